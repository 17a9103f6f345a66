"""One worker process by itself: how it ended, who may still hear of it, and what a start costs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import scripts
from minipool._sync import Guard
from minipool.engine import process as process_room
from minipool.engine.blackbox import LAST_WORDS
from minipool.engine.process import WorkerProcess

LAST = 20.0  # seconds after which a test has failed


def started(start_method: str) -> WorkerProcess:
    """Return a worker that does nothing until it is killed."""
    context = multiprocessing.get_context(start_method)
    worker = WorkerProcess(context, "worker", signal.pause, ())
    worker.start()
    return worker


def ended(start_method: str) -> WorkerProcess:
    """Return a worker that has ended, of which nothing was asked yet."""
    worker = started(start_method)
    os.kill(worker.pid or 0, signal.SIGKILL)
    assert connection.wait([worker.death_fd], LAST)
    return worker


# -- how it ended ----------------------------------------------------------------------------


@pytest.mark.skipif(not LAST_WORDS, reason="there are no real-time signals")
def test_worker_that_was_asked_for_its_last_words_was_killed_by_us(start_method: str) -> None:
    """They end it by a signal of ours, which means nothing to those that are told of it."""
    worker = started(start_method)
    assert worker.kill(LAST_WORDS)
    assert worker.exitcode(LAST) == -signal.SIGKILL
    assert worker.killed
    assert not worker.starved
    worker.close()


@pytest.mark.skipif(not LAST_WORDS, reason="there are no real-time signals")
def test_worker_that_had_ended_when_it_was_asked_was_not_killed_by_us(start_method: str) -> None:
    worker = ended(start_method)
    worker.kill(LAST_WORDS)
    assert worker.exitcode(LAST) == -signal.SIGKILL
    assert not worker.killed
    worker.close()


def test_worker_that_something_else_has_reaped_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pid is all there is, the kernel knows nothing of it any more."""
    monkeypatch.setattr(process_room, "_pidfd", lambda pid: None)
    worker = ended("fork")
    os.waitpid(worker.pid or 0, 0)
    assert worker.has_ended()
    assert worker.exitcode() is None
    assert worker.unknown is not None and "something else" in worker.unknown
    worker.close()


@pytest.mark.parametrize(("method", "which"), [("fork", 1), ("forkserver", 1), ("forkserver", 2)])
def test_wait_for_an_exit_code_begins_anew_after_a_stop(
    method: str, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All were stopped, so the worker has not ended, or the fork server has not told, in time."""
    worker, waits, stopped = started(method), [], [0.0]  # type: WorkerProcess, list[Any], list[float]
    worker.kill()
    assert connection.wait([worker.death_fd], LAST)
    real_wait = connection.wait

    def wait(sources: Any, timeout: float | None = None) -> Any:
        if not timeout:
            return real_wait(sources, timeout)
        waits.append(sources)
        if len(waits) != which:
            return real_wait(sources, LAST)
        stopped[0] += 3600.0
        return []

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + stopped[0])
    monkeypatch.setattr(process_room, "time", clock)
    monkeypatch.setattr(process_room.connection, "wait", wait)
    worker._wait_ended(0.25)
    assert len(waits) > which
    assert waits[which] == waits[which - 1]
    monkeypatch.undo()
    assert worker.exitcode(LAST) == -signal.SIGKILL
    worker.close()


# -- who may still hear of it ----------------------------------------------------------------


class Wanted:
    """A guard that tells when somebody comes to it who will not wait for ever."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self.wanted = threading.Event()
        self.run = guard.run

    def run_within(self, timeout: float, work: Any, *args: Any) -> Any:
        self.wanted.set()
        return self._guard.run_within(timeout, work, *args)


def test_descriptors_are_closed_when_nobody_waits_at_them_any_more(
    start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their numbers go to whatever is opened next, at which a thread would wait in vain."""
    monkeypatch.setattr(process_room, "REAP_TIMEOUT", LAST)
    worker = ended(start_method)
    guard: Any = Wanted(worker._waiting)
    worker._waiting = guard
    closed, waits, real_wait = threading.Event(), threading.Event(), connection.wait
    too_soon: list[bool] = []
    thread = threading.Thread(target=lambda: worker.has_ended(LAST))
    close_pidfd = worker._close_pidfd

    def wait(sources: Any, timeout: float | None = None) -> Any:
        if threading.current_thread() is thread and not too_soon:
            waits.set()
            assert guard.wanted.wait(LAST), "nobody closes it"
            too_soon.append(closed.wait(0.1))
        return real_wait(sources, timeout)

    def close() -> None:
        closed.set()
        close_pidfd()

    monkeypatch.setattr(connection, "wait", wait)
    monkeypatch.setattr(worker, "_close_pidfd", close)
    thread.start()
    assert waits.wait(LAST)
    closer = threading.Thread(target=worker.close)
    closer.start()
    closer.join(LAST)
    thread.join(LAST)
    assert closed.is_set()
    assert too_soon == [False]
    assert guard.run_within(LAST, lambda: True), "whoever comes next waits for ever"


def test_thread_that_never_hears_of_the_end_keeps_no_descriptor_open(
    start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was struck, or sleeps: after a while its worker is closed all the same."""
    monkeypatch.setattr(process_room, "REAP_TIMEOUT", 0.05)
    worker = ended(start_method)
    held, go_on = threading.Event(), threading.Event()

    def sleep() -> None:
        held.set()
        go_on.wait(LAST)

    thread = threading.Thread(target=worker._waiting.run, args=(sleep,))
    thread.start()
    assert held.wait(LAST)
    worker.close()
    assert worker.has_ended()
    assert worker._pidfd is None
    go_on.set()
    thread.join(LAST)


# -- what a start costs ----------------------------------------------------------------------

NARROW = """
    import gc, multiprocessing, os, resource, signal, sys
    from multiprocessing import forkserver
    from minipool.engine.process import WorkerProcess

    def descriptors():
        gc.collect()
        return sorted(map(int, os.listdir("/proc/self/fd")))[:-1]  # the last one read the others

    def start():
        worker = WorkerProcess(context, "worker", signal.pause, ())
        try:
            worker.start()
        except OSError:
            return False
        worker.kill()
        assert worker.exitcode(20) == -9
        worker.close()
        return True

    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[1])
        assert start()  # and with it, what serves all of them
        while os.dup(0) < 100:  # the lowest numbers are taken, those that are free are at the end
            pass
        before, hard = descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        server = forkserver._forkserver._forkserver_pid
        results = []
        for free in range(40):
            resource.setrlimit(resource.RLIMIT_NOFILE, (before[-1] + 1 + free, hard))
            results.append(start())
            resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
            assert descriptors() == before, (free, before, descriptors())
            if results[-1]:
                break
        print(results[0], results[-1], forkserver._forkserver._forkserver_pid == server)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors cannot be counted")
def test_start_without_room_for_descriptors_loses_none(tmp_path: Path, start_method: str) -> None:
    """However many are free: multiprocessing would make some of them and then forget them.

    Nor does it cost the fork server, which ends when it is connected to and sent nothing.
    """
    code, out, err = scripts.run(tmp_path, NARROW, start_method)
    assert (code, out) == (0, "False True True\n"), err
