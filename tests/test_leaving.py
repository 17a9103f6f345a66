"""How a block of a pool is left: by an interrupt, by an error, in peace; and what is said of it."""

from __future__ import annotations

import asyncio
import builtins
import logging
import queue
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import pytest

import scripts
from ears import handle_of, wait_until
from gates import Gate, pass_gate
from minipool import LeaseRevoked, Pool, lifecycle
from minipool.engine.holdups import SILENCE, Holdups
from minipool.engine.states import WorkerState as S
from minipool.engine.table import LEASED_SINCE_NS
from scripts import wait_gone
from troublemakers import HangsInClose
from workers import Counter, getpid

LAST = 20.0
SOON = 15.0  # seconds, by a busy machine; close_timeout is twice that


class Cancelled(BaseException):
    """As trio's: no `Exception`, so that nobody takes it for an error."""


GROUP = getattr(builtins, "BaseExceptionGroup", Cancelled)  # since 3.11


class Heard(logging.Handler):
    """Hands on what is logged to whoever waits for it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: queue.SimpleQueue[str] = queue.SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.put(record.getMessage())


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What minipool logs at WARNING and above."""
    handler = Heard()
    logging.getLogger("minipool").addHandler(handler)
    yield handler
    logging.getLogger("minipool").removeHandler(handler)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as made:
        yield made


def busy(pool: Pool[Any], threads: ThreadPoolExecutor, gate: Gate) -> Future[Any]:
    """Have a call of another thread under way, which does not end before the gate opens."""
    call = threads.submit(pool.call, pass_gate, gate.path)
    gate.wait_arrived()
    return call


def when_closing(pool: Pool[Any], act: Callable[[], object]) -> None:
    """Do something once the pool is being closed."""
    assert pool._desk is not None
    manager = pool._desk.manager
    wait_until(pool, lambda: manager.closing)
    act()


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


# -- by an interrupt -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [asyncio.CancelledError, GeneratorExit, Cancelled, GROUP])
def test_interrupt_of_any_kind_waits_for_no_lease(
    kind: Any, threads: ThreadPoolExecutor, gate: Gate
) -> None:
    start = time.monotonic()
    with pytest.raises(kind):
        with Pool(size=1, close_timeout=2 * SOON) as pool:
            call = busy(pool, threads, gate)
            raise kind("of tasks", [KeyboardInterrupt()])
    assert time.monotonic() - start < SOON
    assert isinstance(call.exception(LAST), LeaseRevoked)


def test_generator_that_is_dropped_closes_its_pool_without_waiting(
    threads: ThreadPoolExecutor, gate: Gate
) -> None:
    def pools() -> Iterator[Pool[None]]:
        with Pool(size=1, close_timeout=2 * SOON) as pool:
            yield pool

    start, generator = time.monotonic(), pools()
    call = busy(next(generator), threads, gate)
    del generator
    assert isinstance(call.exception(LAST), LeaseRevoked)
    assert time.monotonic() - start < SOON


IN_A_LOOP = """
    import asyncio, sys
    from gates import pass_gate
    from minipool import Pool

    async def main():
        with Pool(size=1, close_timeout=60, call_timeout=60) as pool:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, pool.call, pass_gate, sys.argv[1])

    if __name__ == "__main__":
        asyncio.run(main())
"""

WITH_THREADS = """
    import sys
    from concurrent.futures import ThreadPoolExecutor
    from gates import pass_gate
    from minipool import Pool

    if __name__ == "__main__":
        with ThreadPoolExecutor(8) as threads, Pool(size=2, close_timeout=60) as pool:
            calls = [threads.submit(pool.call, pass_gate, sys.argv[1]) for _ in range(8)]
            for call in calls:
                call.result()
"""


@pytest.mark.parametrize(("program", "calls"), [(IN_A_LOOP, 1), (WITH_THREADS, 2)])
def test_program_whose_threads_are_in_calls_ends_by_one_ctrl_c(
    program: str, calls: int, gate: Gate, tmp_path: Path
) -> None:
    """In an event loop the block is left by a cancellation; else the pool is the inner block."""
    process = scripts.start(tmp_path, program, gate.path)
    gate.wait_arrived(calls)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, out, err = scripts.finish(process, 2 * SOON)
    assert (code, out) == (-signal.SIGINT, ""), err
    assert err.rstrip().endswith("KeyboardInterrupt"), err
    assert time.monotonic() - start < SOON


def test_session_block_hides_no_interrupt(threads: ThreadPoolExecutor, gate: Gate) -> None:
    """The session cannot be ended, as another thread is using it: it goes on."""
    with Pool(size=1) as pool:
        with pytest.raises(Cancelled):
            with pool.session("ada", {"a": 1}) as scope:
                call = threads.submit(scope.call, pass_gate, gate.path)
                gate.wait_arrived()
                raise Cancelled
        assert pool.session_state("ada") == {"a": 1}
        gate.open()
        assert call.result(LAST)


# -- by an interrupt of the close itself ---------------------------------------------------------


def test_interrupt_of_a_close_revokes_the_leases_at_once(
    threads: ThreadPoolExecutor, gate: Gate
) -> None:
    """It is raised when the pool has ended: nothing is left."""
    pool = Pool(size=1).open()
    (pid,) = [info.pid or 0 for info in pool.workers()]
    call, start = busy(pool, threads, gate), time.monotonic()
    sent = threads.submit(when_closing, pool, interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.close(2 * SOON)
    assert pool.workers() == []
    wait_gone(pid, timeout=0)
    assert isinstance(call.exception(LAST), LeaseRevoked)
    assert time.monotonic() - start < SOON
    sent.result(LAST)


def test_interrupt_while_an_error_waits_for_the_close(
    threads: ThreadPoolExecutor, gate: Gate
) -> None:
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as caught:
        with Pool(size=1, close_timeout=2 * SOON) as pool:
            call = busy(pool, threads, gate)
            sent = threads.submit(when_closing, pool, interrupt)
            raise LookupError("of the block")
    assert isinstance(caught.value.__context__, LookupError)
    assert isinstance(call.exception(LAST), LeaseRevoked)
    assert time.monotonic() - start < SOON
    sent.result(LAST)


def test_interrupt_before_a_close_has_begun_ends_the_pool_all_the_same(
    threads: ThreadPoolExecutor, gate: Gate
) -> None:
    def struck(*args: Any) -> None:
        del its_manager.close
        raise KeyboardInterrupt

    pool, start = Pool(size=1).open(), time.monotonic()
    call = busy(pool, threads, gate)
    its_manager: Any = pool._desk.manager  # type: ignore[union-attr]
    its_manager.close = struck
    with pytest.raises(KeyboardInterrupt):
        pool.close(2 * SOON)
    assert pool.closed and pool.workers() == []
    assert isinstance(call.exception(LAST), LeaseRevoked)
    assert time.monotonic() - start < SOON


def test_second_interrupt_of_a_close_waits_for_nobody(
    threads: ThreadPoolExecutor, gate: Gate
) -> None:
    """The worker hangs in its own close(), and is killed."""
    pool = Pool(HangsInClose, size=2).open()
    pids = [info.pid or 0 for info in pool.workers()]
    call = busy(pool, threads, gate)

    def twice() -> None:
        when_closing(pool, interrupt)
        assert isinstance(call.exception(LAST), LeaseRevoked)
        interrupt()

    sent = threads.submit(twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        pool.close(2 * SOON)
    assert isinstance(caught.value.__context__, KeyboardInterrupt), "the first one"
    wait_gone(*pids)
    sent.result(LAST)
    pool.close()


# -- by an error ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [LookupError, SystemExit])
def test_lease_that_a_traceback_keeps_is_not_waited_for(error: type[BaseException]) -> None:
    start = time.monotonic()
    with pytest.raises(error):
        with Pool(size=1, close_timeout=2 * SOON) as pool:
            lease = pool.checkout()
            raise error("of the block")
    assert time.monotonic() - start < SOON
    with pytest.raises(LeaseRevoked):
        lease.call(getpid)
    lease.release()


def alarm(signum: int, frame: Any) -> None:
    raise LookupError("of the handler")


def interrupt_at(gate: Gate) -> None:
    """Interrupt this process when a call has come to the gate."""
    gate.wait_arrived()
    interrupt()


def test_call_that_an_error_has_broken_off_is_not_waited_for(
    threads: ThreadPoolExecutor, gate: Gate
) -> None:
    """It came from a signal handler, as an alarm's does, and its traceback keeps the lease."""

    start, former = time.monotonic(), signal.signal(signal.SIGINT, alarm)
    try:
        with pytest.raises(LookupError):
            with Pool(size=1, close_timeout=2 * SOON) as pool:
                lease, sent = pool.checkout(), threads.submit(interrupt_at, gate)
                lease.call(pass_gate, gate.path)
    finally:
        signal.signal(signal.SIGINT, former)
    assert time.monotonic() - start < SOON
    sent.result(LAST)
    lease.release()


def test_error_waits_for_the_calls_of_other_threads(
    threads: ThreadPoolExecutor, gate: Gate
) -> None:
    """Also for one that was made with a lease which this thread has taken, and handed over."""
    with pytest.raises(LookupError):
        with Pool(size=2) as pool:
            other, lease = busy(pool, threads, gate), pool.checkout()
            handed_over = threads.submit(lease.call, pass_gate, gate.path)
            gate.wait_arrived()
            opened = threads.submit(when_closing, pool, lambda: gate.open(2))
            raise LookupError
    assert other.result(LAST) != handed_over.result(LAST)
    opened.result(LAST)


def test_error_waits_for_no_call_of_another_pool(threads: ThreadPoolExecutor, gate: Gate) -> None:
    """What keeps a lease that an error has broken off is a call of that worker."""

    start, former = time.monotonic(), signal.signal(signal.SIGINT, alarm)
    with Pool(size=1, call_timeout=None) as unrelated:
        other = Gate(gate.path + "-other")
        call = busy(unrelated, threads, other)
        try:
            with pytest.raises(LookupError):
                with Pool(size=1, close_timeout=2 * SOON) as pool:
                    lease, sent = pool.checkout(), threads.submit(interrupt_at, gate)
                    lease.call(pass_gate, gate.path)
        finally:
            signal.signal(signal.SIGINT, former)
        assert time.monotonic() - start < SOON
        other.open()
        call.result(LAST)
        other.close()
    sent.result(LAST)
    lease.release()


@pytest.mark.parametrize("whose", ["its own", "a former thread's"])
def test_lease_of_a_thread_that_has_ended_is_not_that_of_the_next(
    whose: str, threads: ThreadPoolExecutor
) -> None:
    """Whatever number the next thread has: who holds the lease now may be between two calls."""
    with Pool(size=1).open() as pool:
        leases: list[Any] = []

        def take_and_leave() -> None:
            with pytest.raises(LookupError):
                with pool:
                    if whose == "its own":
                        leases.append(pool.checkout())
                    else:
                        handle_of(pool).thread = threading.get_ident()
                    raise LookupError

        if whose != "its own":
            leases.append(threads.submit(pool.checkout).result(LAST))
        leaving = threading.Thread(target=take_and_leave)
        leaving.start()
        assert pool._desk is not None
        manager = pool._desk.manager
        if whose == "its own":
            leaving.join(LAST)
            assert manager.done
        else:
            wait_until(pool, lambda: manager.holdups.departures != [])
            for _ in range(2):
                manager.command(bool)  # it has looked, once that was done
            assert leases[0].call(getpid)
        leases[0].release()
        leaving.join(LAST)


def test_all_who_leave_by_an_error_are_known(threads: ThreadPoolExecutor) -> None:
    """The leases of the first are not waited for, though the others came after it."""
    barrier, start, leases = threading.Barrier(2), time.monotonic(), []  # type: Any, float, list[Any]

    def leave() -> None:
        with pytest.raises(LookupError):
            with pool:
                leases.append(pool.checkout())
                barrier.wait(LAST)
                raise LookupError

    pool = Pool(size=2, close_timeout=2 * SOON).open()
    for left in [threads.submit(leave) for _ in range(2)]:
        left.result(LAST)
    assert time.monotonic() - start < SOON
    for lease in leases:
        lease.release()

    lease.release()


# -- what is said ----------------------------------------------------------------------------------


def test_close_that_takes_long_names_the_leases_that_it_waits_for(
    heard: Heard, threads: ThreadPoolExecutor, gate: Gate
) -> None:
    pool = Pool(size=2, name="p").open()
    call, lease = busy(pool, threads, gate), pool.checkout()
    pids = {info.worker_id: info.pid for info in pool.workers()}
    mine = lease.worker_id
    closer = threads.submit(pool.close, LAST)
    text = heard.texts.get(timeout=LAST)
    assert text.startswith("p has been closing for ") and "waits for 2 leases: worker " in text
    assert f"worker {1 - mine} (pid {pids[1 - mine]}), leased for " in text
    assert "in a call of 'gates:pass_gate'" in text and "by thread 'ThreadPoolExecutor-" in text
    assert f"worker {mine} (pid {pids[mine]}), leased for " in text
    assert "by thread 'MainThread', between calls" in text
    assert "They are revoked in 1" in text and "`close_timeout`" in text
    gate.open()
    lease.release()
    assert call.result(LAST)
    closer.result(LAST)
    assert heard.texts.empty(), "it is said once"


def test_close_that_waits_for_its_own_thread_says_so(
    heard: Heard, threads: ThreadPoolExecutor
) -> None:
    def close() -> None:
        leases.append(pool.checkout())
        pool.close(LAST)

    pool, leases = Pool(Counter, size=1).open(), []  # type: Pool[Counter], list[Any]
    closing = threads.submit(close)
    text = heard.texts.get(timeout=LAST)
    assert "waits for a lease: worker 0" in text
    assert "by thread 'ThreadPoolExecutor-" in text
    assert "' (the one that closes), between calls" in text
    leases.pop().release()
    closing.result(LAST)


def test_error_that_waits_for_the_close_is_named(
    heard: Heard, threads: ThreadPoolExecutor, gate: Gate
) -> None:
    def release() -> None:
        said.append(heard.texts.get(timeout=LAST))
        gate.open()

    said: list[str] = []
    with pytest.raises(LookupError):
        with Pool(size=1) as pool:
            call = busy(pool, threads, gate)
            opened = threads.submit(release)
            raise LookupError("of the block")
    opened.result(LAST)
    assert call.result(LAST)
    assert "the block was left by LookupError: of the block, which is raised after that" in said[0]


def holdups_of_an_old_close() -> Holdups:
    holdups = Holdups("p")
    assert holdups.tell_in(time.monotonic()) <= 0, "it does not close yet"
    holdups.begin()
    assert 0 < holdups.tell_in(time.monotonic()) <= SILENCE
    holdups._since -= SILENCE
    return holdups


def handle(slot: int, **more: Any) -> Any:
    row = {LEASED_SINCE_NS: time.monotonic_ns() - slot * 10**9}
    known = {"state": S.IDLE, "live_lease": object(), "pid": 1, "thread": 0, "in_call": False}
    return SimpleNamespace(slot=slot, row=row, **{**known, **more})


@pytest.mark.parametrize(
    ("handles", "left"),
    [
        ([], 9.0),
        ([handle(1, live_lease=None)], 9.0),  # idle
        ([handle(1, state=S.STOPPING)], 9.0),  # its lease was taken away from it
        ([handle(1)], -1.0),  # as it is about to be
    ],
)
def test_close_that_waits_for_no_lease_says_nothing(
    handles: list[Any], left: float, heard: Heard
) -> None:
    holdups = holdups_of_an_old_close()
    holdups.tell(handles, time.monotonic() + left)
    assert heard.texts.empty()
    assert holdups.tell_in(time.monotonic()) <= 0


def test_oldest_of_many_leases_are_named(heard: Heard) -> None:
    holdups_of_an_old_close().tell([handle(i) for i in range(20)], time.monotonic() + 9)
    text = heard.texts.get(timeout=LAST)
    assert "waits for 20 leases: worker 19 (pid 1), leased for 19.0 s by a thread that has" in text
    assert "worker 12 " in text and "worker 11 " not in text and "; and 12 more. They" in text


def test_close_that_returns_before_the_end_says_so(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a listener of the program's keeps the manager."""
    monkeypatch.setattr(lifecycle, "_CLOSE_MARGIN", 0.1)
    go_on = threading.Event()
    pool = Pool(size=1, name="kept").open()
    pool.hooks["worker.terminate"].append(lambda *event: go_on.wait(LAST))
    assert pool._desk is not None
    try:
        pool.close(0.1)
        assert not pool._desk.manager.done
        assert "kept has not ended within" in heard.texts.get(timeout=LAST)
    finally:
        go_on.set()
    pool.close()
    assert pool._desk.manager.done
