"""What worker code leaves behind in its process, and what that does to calls it is not part of."""

from __future__ import annotations

import logging
import os
import signal
import threading
from multiprocessing import Pipe
from typing import Any, Iterator

import pytest

from ears import Ear, handle_of
from gates import Gate
from leftovers import ForksAtStart, fork_and_stop, leave_a_timer
from minipool import Pool
from minipool.engine import channel, wire
from minipool.engine import table as t
from minipool.engine.workerend import FastWorkerEnd, PortableWorkerEnd
from workers import getpid


@pytest.fixture(params=["fast", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "portable":
        monkeypatch.setenv("MINIPOOL_PORTABLE", "1")
    yield request.param


# -- a timer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [(TimeoutError, "late"), (ValueError, "odd"), (OSError, 5, "no file"), (EOFError,)]
)
def test_a_timer_that_strikes_between_calls_costs_no_worker(
    error: tuple[Any, ...], path: str, gate: Gate, caplog: Any
) -> None:
    """It is told, and does not strike again."""
    with caplog.at_level(logging.INFO), Pool(size=1, capture_output=True) as pool:
        ear = Ear(pool, "error", "worker.terminate")
        pid = pool.call(leave_a_timer, gate.path, *error)
        gate.wait_arrived()
        assert [pool.call(getpid) for _ in range(3)] == [pid] * 3
        assert not ear.heard
    told = [record.getMessage() for record in caplog.records if record.name == "minipool.output"]
    assert any("a signal handler raised between two calls" in line for line in told)
    assert any(error[0].__name__ in line for line in told)


class Struck:
    """A worker's end that a signal handler strikes while it receives."""

    def __init__(self, kind: str) -> None:
        if kind == "portable":
            self.ours, conn = Pipe(duplex=True)
            self.end: Any = PortableWorkerEnd(conn, 1 << 20)
            self.write, self._open = self.ours.fileno(), [self.ours, conn]
        else:
            ends, theirs = channel.pair(None, portable=False)
            self.end = FastWorkerEnd(theirs, 1 << 20)
            self.write, self._open = ends.writer, [ends, theirs]

    def receive(self, half_read: bool) -> BaseException:
        """Receive; return what strikes once the end waits, for the first byte or for more."""

        def strike(signum: int, frame: Any) -> None:
            if frame.f_code.co_name == ("_read_on" if half_read else "receive"):
                raise LookupError("struck")

        before = signal.signal(signal.SIGALRM, strike)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        try:
            self.end.receive()
        except LookupError as error:
            return error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        raise AssertionError("it was not struck")

    def close(self) -> None:
        for end in self._open:
            end.close()


@pytest.fixture(params=["fast", "portable"])
def struck(request: pytest.FixtureRequest) -> Iterator[Struck]:
    made = Struck(request.param)
    yield made
    made.close()


def test_waiting_for_a_request_can_be_taken_up_again(struck: Struck) -> None:
    assert struck.end.was_waiting(struck.receive(half_read=False).__traceback__)
    os.write(struck.write, wire.REQUEST.pack(wire.REQUEST.size - 4, 7, wire.PROBE, 0))
    assert struck.end.receive()[:2] == (7, wire.PROBE)


@pytest.mark.parametrize("size", [3, 4, 10])
def test_a_request_that_is_half_read_cannot_be_taken_up_again(struck: Struck, size: int) -> None:
    os.write(struck.write, wire.REQUEST.pack(wire.REQUEST.size - 4, 7, wire.PROBE, 0)[:size])
    assert not struck.end.was_waiting(struck.receive(half_read=True).__traceback__)


# -- a child -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["return", "raise"])
def test_a_child_that_returns_from_a_call_writes_nothing_of_its_workers(
    start_method: str, path: str, how: str, gate: Gate
) -> None:
    """Neither into its row, where the call would be over, nor into its pipe."""
    with Pool(size=1, start_method=start_method) as pool:
        pid = pool.call(getpid)
        row = handle_of(pool).row
        before = [row[word] for word in (t.BUSY_NS, t.BEAT_NS, t.FAILURES, t.CALL_ID)]
        future: list[Any] = []
        caller = threading.Thread(
            target=lambda: future.append(pool.call(fork_and_stop, gate.path, how))
        )
        caller.start()
        gate.wait_arrived()  # the child has ended
        after = [row[word] for word in (t.BUSY_NS, t.BEAT_NS, t.FAILURES)]
        assert after == before[:3]
        if path == "fast":
            assert row[t.CALL_STARTED_NS] > row[t.BEAT_NS], "the call looks as if it was over"
        gate.open()
        caller.join(20)
        assert future == [1]
        assert pool.call(getpid) == pid


def test_a_child_that_returns_from_the_constructor_is_no_worker(
    start_method: str, path: str
) -> None:
    with Pool(ForksAtStart, size=1, start_method=start_method) as pool:
        ear = Ear(pool, "error")
        assert pool.call("how_it_ended") == 1
        assert not handle_of(pool).channel.disturbed()
        assert not ear.heard
