"""SIGTERM to workers and to the fork server, as a service manager sends it to all of a service."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Iterator

import pytest

import scripts
from ears import Ear, wait_until
from gates import Gate, pass_gate
from minipool import LeaseRevoked, Pool
from minipool.engine import child, desk, process, wire
from minipool.engine import table as t
from minipool.engine.channel import pair
from minipool.engine.workerend import FastWorkerEnd
from scripts import wait_gone
from workers import Counter, getpid

ASKED = "it was sent SIGTERM"
LEFT = 143


@pytest.fixture(params=["", "1"], ids=["fast", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MINIPOOL_PORTABLE", str(request.param))
    yield str(request.param)


def _pids(pool: Pool[Any]) -> list[int]:
    return [info.pid for info in pool.workers() if info.pid]


def _terminate(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGTERM)


# -- a worker --------------------------------------------------------------------------------------


def test_busy_worker_answers_and_is_recycled(start_method: str, path: str, gate: Gate) -> None:
    with Pool(size=1, start_method=start_method) as pool:
        ear = Ear(pool, "worker.terminate", "error")
        answers: list[int] = []
        caller = threading.Thread(target=lambda: answers.append(pool.call(pass_gate, gate.path)))
        (pid,) = _pids(pool)
        caller.start()
        gate.wait_arrived()
        _terminate(pid)
        gate.open()
        caller.join(20)
        assert answers == [pid]
        assert ear.wait("worker.terminate").metadata["reason"] == ASKED
        assert pool.call(getpid) != pid
        assert (pool.stats().workers_lost, pool.deaths(), ear.of("error")) == (0, [], [])


def test_idle_worker_leaves_at_once_and_is_replaced(start_method: str, path: str) -> None:
    with Pool(Counter, size=1, start_method=start_method) as pool:
        ear = Ear(pool, "worker.terminate", "error")
        (pid,) = _pids(pool)
        _terminate(pid)
        facts = ear.wait("worker.terminate").metadata
        assert (facts["pid"], facts["exitcode"], facts["reason"]) == (pid, LEFT, ASKED)
        assert pool.call("pid") != pid
        assert (pool.stats().workers_lost, pool.deaths(), ear.of("error")) == (0, [], [])


def _term_myself() -> None:
    _terminate(os.getpid())


@pytest.mark.parametrize("session", [None, "s"])
def test_lease_keeps_its_worker_until_it_is_over(session: str | None) -> None:
    """What calls have left in the worker is there for the next ones, whenever the signal comes."""
    with Pool(Counter, size=1) as pool:
        ear = Ear(pool, "worker.terminate")
        with pool.checkout(session=session) as w:
            pid = w.call(Counter.pid)
            w.call(_term_myself)
            assert [w.call(Counter.add) for _ in range(3)] == [1, 2, 3]
            _terminate(pid)
            assert w.call(Counter.add) == 4
            assert w.pid == pid
        assert ear.wait("worker.terminate").metadata["pid"] == pid
        assert pool.call("pid") != pid


needs_a_shared_row = pytest.mark.skipif(
    os.environ.get("MINIPOOL_PORTABLE") == "1",
    reason="the parent sees what a worker says between two calls in the shared table only",
)


@needs_a_shared_row
def test_worker_that_heard_it_between_two_calls_leaves_after_the_lease() -> None:
    """No call tells the parent, so the manager's next look does."""
    with Pool(Counter, size=1) as pool:
        ear = Ear(pool, "worker.terminate")
        with pool.checkout() as w:
            pid = w.call(Counter.pid)
            _terminate(pid)
            handle = pool._desk.manager.fleet.handles[0]  # type: ignore[union-attr]
            wait_until(pool, lambda: handle.row[t.PHASE] == t.PHASE_LEAVING)
        assert ear.wait("worker.terminate").metadata["reason"] == ASKED
        assert pool.call("pid") != pid
        assert pool.stats().workers_lost == 0


def test_no_call_is_lost_when_workers_are_sent_it_at_any_moment(path: str) -> None:
    chance = random.Random(8)
    with Pool(Counter, size=2) as pool:
        for number in range(60):
            if chance.random() < 0.5:
                _terminate(*(info.pid for info in pool.workers() if info.pid and info.calls))
            assert pool.call(abs, -number) == number
        assert pool.stats().workers_lost == 0


class ClosesAtGate:
    def __init__(self, gate: str) -> None:
        self.gate = gate

    def close(self) -> None:
        pass_gate(self.gate)


@needs_a_shared_row
@pytest.mark.parametrize("start_method", ["forkserver"])
def test_leaving_worker_has_its_time_to_close_its_object(start_method: str, gate: Gate) -> None:
    """It counts as stopping: callers are served by others, and nobody kills it meanwhile."""
    with Pool(ClosesAtGate, args=(gate.path,), size=2, start_method=start_method) as pool:
        ear = Ear(pool, "worker.terminate")
        pid = _pids(pool)[0]
        _terminate(pid)
        gate.wait_arrived()
        for _ in range(4):
            assert pool.call(getpid) != pid
        gate.open(3)  # this one, and those that the end of the pool stops
        facts = ear.wait("worker.terminate").metadata
        assert (facts["pid"], facts["exitcode"]) == (pid, LEFT)


def test_request_of_any_length_does_not_wait_for_a_worker_that_leaves(
    start_method: str, path: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker takes it at once; the one that leaves is not killed for that."""
    monkeypatch.setattr(desk, "_TRUSTED_NS", 1 << 60)  # it is given out without a look
    with Pool(
        ClosesAtGate, args=(gate.path,), size=2, start_method=start_method, strategy="lifo"
    ) as pool:
        ear = Ear(pool, "worker.terminate")
        with pool.checkout() as w:
            pid = w.pid
        _terminate(pid)
        gate.wait_arrived()  # it closes its object
        with pool.checkout() as w:
            assert w.options(timeout=5).call(len, b"x" * 1_000_000) == 1_000_000
            assert w.pid != pid
        gate.open(4)  # this one, and those that the end of the pool stops
        facts = ear.wait("worker.terminate").metadata
        assert facts["pid"] == pid
        if not path:  # else the parent does not see that it leaves, and kills it
            assert (facts["exitcode"], facts["reason"]) == (LEFT, ASKED)


def test_leaving_worker_says_so_before_its_pipe_ends() -> None:
    """Whoever sends a call to it in that moment hears that it has not begun."""

    class Pipe:
        def let_go(self) -> None:
            phases.append(words[t.PHASE])

    phases: list[int] = []
    words = memoryview(bytearray(t.ROW_BYTES)).cast("q")
    worker = child._Worker(Pipe(), words, shared=True, forked=False)
    with pytest.raises(SystemExit) as caught:
        worker._leave()
    assert (phases, caught.value.code) == ([t.PHASE_STOPPING], LEFT)


def test_second_signal_changes_nothing(gate: Gate) -> None:
    with Pool(size=1) as pool:
        (pid,) = _pids(pool)
        call = threading.Thread(target=pool.call, args=(pass_gate, gate.path))
        call.start()
        gate.wait_arrived()
        ear = Ear(pool, "worker.terminate", "operation.exception")
        _terminate(pid, pid, pid)
        gate.open()
        call.join(20)
        assert ear.wait("worker.terminate").metadata["reason"] == ASKED
        assert not ear.of("operation.exception")


class HandlesSigterm:
    def __init__(self) -> None:
        self.came = 0
        signal.signal(signal.SIGTERM, self.count)

    def count(self, *_: object) -> None:
        self.came += 1

    def counted(self) -> int:
        _term_myself()
        return self.came


def test_handler_of_the_users_own_stays() -> None:
    with Pool(HandlesSigterm, size=1) as pool:
        assert [pool.call("counted") for _ in range(2)] == [1, 2]


def test_request_that_has_begun_to_come_is_taken_whole() -> None:
    """The signal ends a wait for a request, and never tears one apart."""
    ours, theirs = pair(multiprocessing.get_context("spawn"), portable=False)
    end = FastWorkerEnd(theirs, 1 << 20)
    body = bytes(100_000)
    frame = wire.REQUEST.pack(11 + 1 + len(body), 7, wire.METHOD, 1) + b"f" + body
    try:
        end.stop_waiting()
        with pytest.raises(BlockingIOError) as caught:
            end.receive()
        assert end.found_nothing(caught.value.__traceback__)
        os.set_blocking(ours.writer, True)
        os.write(ours.writer, frame[:1000])
        rest = threading.Thread(target=os.write, args=(ours.writer, frame[1000:]))
        rest.start()
        got = end.receive()
        rest.join(20)
        assert (got[0], got[1], bytes(got[2]), bytes(got[3])) == (7, wire.METHOD, b"f", body)
    finally:
        ours.close()
        end.let_go()


def test_end_of_a_pool_sends_no_other_signal_than_sigkill(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to a worker that is busy, or in its start: it has no time to tell what it does with it."""
    sent: list[int] = []
    send = process.signal.pidfd_send_signal

    def note(fd: int, signum: int, *more: Any) -> None:
        sent.append(signum)
        send(fd, signum, *more)

    monkeypatch.setattr(process.signal, "pidfd_send_signal", note)
    pool = Pool(size=2, close_timeout=0.1, call_timeout=None).open()
    caller = threading.Thread(target=_call_until_it_is_closed, args=(pool, gate.path))
    caller.start()
    booting = Pool(StandsAtGate, args=(gate.path,), size=1).open(wait=False)
    gate.wait_arrived(2)
    pool.close()
    booting.close()
    caller.join(20)
    assert set(sent) == {signal.SIGKILL}


class StandsAtGate:
    def __init__(self, gate: str) -> None:
        pass_gate(gate)


def _call_until_it_is_closed(pool: Pool[Any], gate: str) -> None:
    with pytest.raises(LeaseRevoked):
        pool.call(pass_gate, gate)


# -- what a worker starts --------------------------------------------------------------------------


def _end_of_program(signum: int) -> int:
    """Return how a program ends that is sent a signal."""
    program = subprocess.Popen(["sleep", "600"])
    program.send_signal(signum)
    return program.wait(20)


def _end_of_fork(signum: int) -> int:
    """Return how a forked process ends that is sent a signal; 99 if it would raise an interrupt."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        if signum == signal.SIGINT:
            os._exit(99 if signal.getsignal(signum) is signal.default_int_handler else 1)
        os.write(writer, b"!")
        while True:
            signal.pause()
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    if signum != signal.SIGINT:
        os.kill(pid, signum)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def test_what_a_worker_starts_has_the_defaults_again(start_method: str) -> None:
    with Pool(size=1, start_method=start_method) as pool:
        assert pool.call(_end_of_program, signal.SIGTERM) == -signal.SIGTERM
        assert pool.call(_end_of_program, signal.SIGINT) == -signal.SIGINT
        assert pool.call(_end_of_fork, signal.SIGTERM) == -signal.SIGTERM
        assert pool.call(_end_of_fork, signal.SIGINT) == 99, "a KeyboardInterrupt, as anywhere"
        assert pool.stats().workers_lost == 0


# -- the fork server and the whole service ---------------------------------------------------------

SERVED = """
    import multiprocessing, os, signal, sys, threading
    from multiprocessing import forkserver
    from ears import Ear
    from minipool import Pool
    from workers import getpid

    def wait_for_ever():
        print("begun", *signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)
        threading.Event().wait()

    def main():
        with Pool(size=1, start_method="forkserver") as pool:
            ear = Ear(pool, "worker.terminate")
            server = forkserver._forkserver._forkserver_pid
            for name in ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGINT"):
                os.kill(server, getattr(signal, name))
            os.kill(pool.call(getpid), signal.SIGKILL)
            print(ear.wait("worker.terminate").metadata["exitcode"], pool.call(getpid) > 0)
            assert forkserver._forkserver._forkserver_pid == server
            other = multiprocessing.get_context("forkserver").Process(target=wait_for_ever)
            other.start()
            sys.stdin.readline()  # it has begun
            other.terminate()
            other.join(20)
            print(other.exitcode, flush=True)

    if __name__ == "__main__":
        main()
"""


def test_fork_server_ends_only_with_its_parent(tmp_path: Path) -> None:
    """A process of the program's own that it forks blocks no signal, and SIGTERM ends it, as ever."""
    process = scripts.start(tmp_path, SERVED, stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "-9 True\n", process.communicate()
    assert process.stdout.readline() == "begun\n"
    process.stdin.write("\n")
    process.stdin.flush()
    code, out, err = scripts.finish(process)
    assert (code, out) == (0, "-15\n")
    assert err.count("\n") == 1, err  # the worker that was killed


SERVICE = """
    import os, sys, threading
    from gates import pass_gate
    from minipool import Pool

    if __name__ == "__main__":
        method, gate = sys.argv[1:]
        with Pool(size=2, start_method=method, call_timeout=None) as pool:
            pool.install_signal_handlers()
            print(*(info.pid for info in pool.workers()), flush=True)
            with pool.checkout() as w:  # the program lives until it is given back
                print(w.call(pass_gate, gate) > 0, flush=True)
        threading.Event().wait()
"""


def test_service_that_is_ended_as_a_whole_loses_no_call(
    start_method: str, gate: Gate, tmp_path: Path
) -> None:
    """As systemd does by default, and supervisord with stopasgroup."""
    process = scripts.start(tmp_path, SERVICE, start_method, gate.path)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    gate.wait_arrived()
    for pid in sorted({process.pid, *pids, *_descendants(process.pid)}):
        with contextlib.suppress(ProcessLookupError):  # the pool may have ended it by now
            os.kill(pid, signal.SIGTERM)
    gate.open()
    code, out, err = scripts.finish(process)
    assert (code, out, err) == (-signal.SIGTERM, "True\n", "")
    wait_gone(*pids)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for one in map(int, children.read_text().split()):
            found += [one, *_descendants(one)]
    return found


def test_interpreter_of_these_tests_has_the_default() -> None:
    """Nothing that importing minipool does touches the signals of the program."""
    code = (
        "import signal, minipool.pool, minipool.engine.child;"
        "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=scripts.environment(), capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr
