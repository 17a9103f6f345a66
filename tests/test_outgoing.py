"""What the manager writes to workers: whole, in order, and never at the cost of a wait."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import threading
from multiprocessing import reduction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator

import pytest

import scripts
from ears import Ear, handle_of, wait_until
from gates import Gate
from minipool import Pool, PoolStartError, current_session
from minipool._sync import Latch
from minipool.engine import channel, portable, wire
from minipool.engine.channel import FastEnd, PeerGone
from minipool.engine.workerend import FastWorkerEnd
from strikes import Blow, Strike
from workers import Counter, identity

PORTABLE = os.environ.get("MINIPOOL_PORTABLE") == "1"
LIMIT = 1 << 20
LAST = 20.0  # seconds after which a test has failed


class Ends:
    """Both ends of one pipe."""

    def __init__(self) -> None:
        ours, theirs = channel.pair(None, portable=False)
        self.alive, self._dying = os.pipe()
        self.end = FastEnd(ours, self.alive, LIMIT)
        self.theirs = theirs
        self.worker = FastWorkerEnd(theirs, LIMIT)

    def flush_all(self) -> int:
        """Send what is left as the pipe takes it; return in how many goes."""
        goes = 0
        while self.end.unsent:
            assert select.select([], [self.end.out], [], LAST)[1]
            self.end.flush()
            goes += 1
        return goes

    def hang_up(self) -> None:
        self.theirs.close()

    def close(self) -> None:
        self.end.close()
        with contextlib.suppress(OSError):
            self.theirs.close()
        os.close(self.alive)
        os.close(self._dying)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def test_a_post_that_does_not_fit_is_sent_in_pieces_and_arrives_whole(ends: Ends) -> None:
    first, second = os.urandom(3 << 20), os.urandom(1 << 20)
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.append(bytes(ends.worker.receive_assignment())))

    ends.end.post(0, wire.ASSIGN, first, second)  # nobody reads yet
    assert ends.end.unsent
    reader.start()
    assert ends.flush_all() > 1
    reader.join(LAST)

    assert got == [first + second]


def test_posts_follow_each_other_and_no_frame_comes_between(ends: Ends) -> None:
    """A post waits for what is left of the one before."""
    long = os.urandom(800_000)
    ends.end.post(-1, wire.PROBE, long)
    ends.end.post(0, wire.STOP, b"\1")
    expected = b"".join(
        wire.REQUEST.pack(wire.REQUEST.size - 4 + len(body), call_id, kind, 0) + body
        for call_id, kind, body in ((-1, wire.PROBE, long), (0, wire.STOP, b"\1"))
    )
    got = bytearray()

    def read() -> None:
        while len(got) < len(expected):
            got.extend(os.read(ends.theirs.reader.fd, 1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    ends.flush_all()
    reader.join(LAST)

    assert got == expected


def test_a_post_that_was_struck_is_never_sent_twice(ends: Ends) -> None:
    """The second answer would be taken for that to a later call."""

    def post() -> None:
        ends.end.post(-1, wire.PROBE, b"told")

    reader = ends.theirs.reader.fd
    post()
    frame = os.read(reader, LIMIT)
    arrived = []
    for step in itertools.count():
        blow = Blow(step, {channel.__file__})
        with contextlib.suppress(Strike), blow:
            post()
        ends.flush_all()
        came = os.read(reader, LIMIT) if select.select([reader], [], [], 0)[0] else b""
        assert came in (b"", frame)
        arrived.append(came)
        if not blow.fell:
            break

    assert arrived[0] == b""  # nothing had been sent
    assert arrived[-1] == arrived[-2] == frame  # struck at the very end, and not at all


def test_what_follows_a_part_that_is_lost_is_not_sent_without_it(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(fd: int, data: Any) -> int:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(channel.os, "write", no_memory)
        with pytest.raises(MemoryError):
            ends.end.post(0, wire.ASSIGN, b"A" * 20_000, b"B" * 20_000)
    assert not ends.end.unsent


def test_the_length_of_calls_is_limited_after_the_assignment_as_before(ends: Ends) -> None:
    reader = threading.Thread(target=ends.worker.receive_assignment)
    reader.start()
    ends.end.post(0, wire.ASSIGN, bytes(2 * LIMIT))
    ends.flush_all()
    reader.join(LAST)
    ends.end.post(0, wire.PROBE, bytes(LIMIT))

    with pytest.raises(channel.Garbled):
        ends.worker.receive()


def test_the_rest_of_a_post_to_a_dead_worker_is_given_up(ends: Ends) -> None:
    ends.end.post(0, wire.ASSIGN, bytes(1 << 20))
    ends.hang_up()

    with pytest.raises(PeerGone):
        ends.end.flush()

    assert not ends.end.unsent


# -- the start of a worker -----------------------------------------------------------------------

ENOUGH = 4096  # bytes: a pipe of a user who has very many holds one page


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_starting_a_process_writes_nothing_of_the_users(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long arguments, environment, warm-up, names and levels are: a process is a page."""
    sizes: list[int] = []
    dump = reduction.dump

    def measured(what: Any, file: Any, protocol: Any = None) -> None:
        before = file.tell()
        dump(what, file, protocol)
        if not isinstance(what, dict):  # sys.path and sys.argv: read before any module is imported
            sizes.append(file.tell() - before)

    monkeypatch.setattr(reduction, "dump", measured)
    with Pool(
        Counter,
        args=(bytes(1 << 20),),
        size=1,
        name="n" * 10_000,
        start_method=method,
        worker_env={"MINIPOOL_TEST": "e" * 100_000},
        warm_up=[(identity, (bytes(100_000),))],
        forward_logs=True,
    ) as pool:
        assert pool.call(len, bytes(5)) == 5
        assert pool.call(os.getenv, "MINIPOOL_TEST") == "e" * 100_000
    assert len(sizes) == 1
    assert sizes[0] < ENOUGH


SLOW_TO_IMPORT = """
    import os, sys, threading, time
    from gates import pass_gate
    if __name__ == "__mp_main__":
        pass_gate(sys.argv[1])
    from minipool import Pool

    class Model:
        def __init__(self, data): self.size = len(data)
        def hit(self): return self.size

    if __name__ == "__main__":
        pool = Pool(Model, args=(bytes(4 << 20),), size=2, start_method="spawn")
        pool.open(wait=False)
        print("opened", flush=True)
        if sys.argv[2] == "go on":
            print(pool.call("hit"), flush=True)
        else:
            sys.stdin.readline()
            pool.close(1)
            print([thread.name for thread in threading.enumerate()], flush=True)
        pool.close()
"""


def test_large_arguments_do_not_make_starts_wait_for_each_other(tmp_path: Path, gate: Gate) -> None:
    """Each worker gets to its main module, though the others still stand in theirs."""
    program = scripts.start(tmp_path, SLOW_TO_IMPORT, gate.path, "go on")
    gate.wait_arrived(2)
    gate.open(2)
    assert scripts.finish(program) == (0, f"opened\n{4 << 20}\n", "")


def test_a_main_module_that_hangs_holds_up_no_close(tmp_path: Path, gate: Gate) -> None:
    program = scripts.start(tmp_path, SLOW_TO_IMPORT, gate.path, "close", stdin=-1)
    gate.wait_arrived(2)
    assert program.stdin is not None
    program.stdin.write("\n")
    program.stdin.flush()
    assert scripts.finish(program) == (0, "opened\n['MainThread']\n", "")


def test_close_waits_for_what_sends_aside_and_with_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The send ends with its worker, and the thread that makes it a moment later."""
    monkeypatch.setenv("MINIPOOL_PORTABLE", "1")
    joined = threading.Event()
    waits: list[float | None] = []
    senders: list[threading.Thread] = []

    class Sender(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            waits.append(timeout)
            joined.set()
            super().join(LAST)

    class Sent(Latch):
        def set(self) -> None:
            super().set()
            senders.append(threading.current_thread())
            joined.wait(LAST)  # this is its last step but one

    monkeypatch.setattr(portable, "Latch", Sent)
    monkeypatch.setattr(portable, "threading", SimpleNamespace(Thread=Sender))
    with Pool(size=1) as pool:
        assert pool.call(len, bytes(1 << 20)) == 1 << 20

    alive = [sender.is_alive() for sender in senders]
    joined.set()
    assert alive == [False]
    assert waits[0] is not None and 0 < waits[0] <= 1


def test_a_main_module_that_hangs_is_given_up_in_time(tmp_path: Path, gate: Gate) -> None:
    """`init_timeout` counts, whatever is still to be sent."""
    code = SLOW_TO_IMPORT.replace("size=2,", "size=1, init_timeout=0.5,")
    code = code.replace("pool.open(wait=False)", "pool.open()")
    program = scripts.start(tmp_path, code, gate.path, "close")
    status, _, err = scripts.finish(program)
    assert status == 1
    assert PoolStartError.__name__ in err
    assert "not ready within 0.5 s" in err


@pytest.mark.logs_errors
@pytest.mark.skipif(PORTABLE, reason="there a thread sends")
def test_worker_that_will_never_have_the_rest_is_given_up_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would wait for what was lost when the pool had no memory to send it."""
    flush, lost = channel.FastEnd.flush, threading.Event()

    def lose_a_part(end: Any) -> None:
        if end.unsent and sum(map(len, end.unsent)) < 4 << 20 and not lost.is_set():
            lost.set()
            end.unsent.clear()
            raise MemoryError
        flush(end)

    monkeypatch.setattr(channel.FastEnd, "flush", lose_a_part)
    pool = Pool(Counter, args=(bytes(4 << 20),), size=1, init_timeout=1000)
    with pytest.raises(PoolStartError, match="a part of what it was sent was lost"):
        pool.open()
    assert lost.is_set()
    pool.close()


ANSWERS_EARLY = """
    import contextlib, os, struct
    if __name__ == "__mp_main__":
        for fd in range(3, 64):
            with contextlib.suppress(OSError):
                if "pipe:" in os.readlink(f"/proc/self/fd/{fd}"):
                    os.write(fd, struct.pack("!iqB", 9, 0, 5))
    from minipool import Pool
    if __name__ == "__main__":
        pool = Pool(len, args=(bytes(4 << 20),), size=1, start_method="spawn", breaker=False)
        pool.open(wait=False)
        pool.hooks["error"].append(lambda event, numbers, facts: print(facts["error"], flush=True))
        pool.hooks["error"].append(lambda event, numbers, facts: os.write(told, b"!"))
        hears, told = os.pipe()
        os.read(hears, 1)
        pool.close()
"""


@pytest.mark.skipif(PORTABLE, reason="there a thread sends, and what was read is not known")
def test_a_worker_that_answers_what_it_cannot_have_read_is_not_used(tmp_path: Path) -> None:
    status, out, _ = scripts.run(tmp_path, ANSWERS_EARLY)
    assert status == 0
    assert "it answered before it had read what it was sent" in out.splitlines()[0]


# -- ended sessions ------------------------------------------------------------------------------


class Mourner:
    """Counts the sessions whose end it has seen."""

    def __init__(self) -> None:
        self.ended = 0

    def begin(self) -> int:
        current_session()["x"] = 1
        return os.getpid()

    def session_ended(self, session: Any) -> None:
        self.ended += 1

    def how_many(self) -> tuple[int, int]:
        return os.getpid(), self.ended


def test_many_sessions_that_expire_together_cost_their_worker_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """1,000 at once: all are told, in more than one piece, and the worker lives."""
    count, options = 1000, {"session_ttl": 0.5, "max_sessions": 2000}
    with Pool(Mourner, size=1, max_health_failures=1, **options) as pool:
        ear = Ear(pool, "session.lost", "worker.health_check", "worker.terminate")
        handle = handle_of(pool)
        pids = {pool.options(session=f"{i:0200}").call("begin") for i in range(count)}
        ear.wait("session.lost", count)
        wait_until(pool, lambda: not handle.sessions_over)
        with pool.checkout() as w:
            pid, ended = w.call("how_many")
        assert {pid} == pids
        assert ended == count
        assert len(ear.of("worker.health_check")) >= count // 200
        assert not ear.of("worker.terminate")


def test_one_probe_tells_of_so_many_sessions_only() -> None:
    with Pool(size=1) as pool:
        handle = handle_of(pool)
        for ids in (["x"] * 1000, ["y" * 1000] * 100, ["z" * 100_000] * 3):
            handle.sessions_over.extend((key, 1) for key in ids)
            told = handle._next_to_tell()
            assert 1 <= len(told) <= 200
            assert len(told) == 1 or sum(len(key) for key, _ in told) <= 16 * 1024
            handle.sessions_over.clear()


def test_the_end_of_a_session_with_a_very_long_name_is_told(tmp_path: Path) -> None:
    """Longer than a pipe: it is sent as the worker reads it."""
    with Pool(Mourner, size=1) as pool:
        key = "k" * 300_000
        pid = pool.options(session=key).call("begin")
        pool.end_session(key)
        assert pool.call("how_many") == (pid, 1)
