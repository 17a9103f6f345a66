"""Exit codes: read once, by the pool alone, and told the same to everybody."""

from __future__ import annotations

import collections
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing import process as children
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import scripts
from ears import Ear, handle_of, wait_until
from minipool import CallTimeout, Pool, WorkerDied
from minipool.engine.handle import Handle
from minipool.engine.process import WorkerProcess
from strikes import strike_everywhere, unstruck
from workers import DiesOnCall, identity, kill_self

LAST = 20.0


@pytest.fixture
def polling() -> Iterator[None]:
    """Another thread that asks multiprocessing for its children all the time."""
    done = threading.Event()

    def poll() -> None:
        while not done.is_set():
            multiprocessing.active_children()

    thread = threading.Thread(target=poll)
    thread.start()
    yield
    done.set()
    thread.join()


# -- one reader ----------------------------------------------------------------------------------


def test_multiprocessing_polls_no_worker(start_method: str) -> None:
    """Neither `active_children` nor the start of any process, of ours or of the program's."""
    with Pool(size=1, start_method=start_method) as pool:
        polled: list[object] = []
        handle_of(pool).process._process._popen.poll = lambda *args: polled.append(args)
        assert multiprocessing.active_children() == []
        pool.resize(2)
        pool.wait_ready(2)
        other = multiprocessing.get_context(start_method).Process(target=identity, args=(1,))
        other.start()
        other.join(LAST)
        assert other.exitcode == 0
        assert not polled
        assert not children._children  # type: ignore[attr-defined]
        del handle_of(pool).process._process._popen.poll


def test_exit_codes_are_right_while_the_program_polls_its_children(
    start_method: str, polling: None
) -> None:
    """With a spare, the next worker is in service while the last one is still being buried."""
    with Pool(DiesOnCall, size=1, spares=1, start_method=start_method, breaker=False) as pool:
        ear = Ear(pool, "worker.terminate")
        deaths = 40 if start_method == "forkserver" else 10
        for _ in range(deaths):
            with pytest.raises(WorkerDied) as caught:
                pool.call("leave", 3)
            assert (caught.value.exitcode, caught.value.signal) == (3, None)
        ear.wait("worker.terminate", deaths)
        assert {event.metadata["exitcode"] for event in ear.heard} == {3}
        assert {death.exitcode for death in pool.deaths()} == {3}


@pytest.mark.exhaustive
def test_exit_codes_are_right_among_many_pools() -> None:
    """Fifty pools, a hundred deaths, and every start of a worker in between."""
    pools = [Pool(size=1, start_method="forkserver", checkout_timeout=60) for _ in range(50)]
    told: collections.Counter[tuple[int | None, str | None]] = collections.Counter()

    def use(pool: Pool[None]) -> None:
        with pool:
            for _ in range(2):
                with pytest.raises(WorkerDied) as caught:
                    pool.call(kill_self)
                told[caught.value.exitcode, caught.value.signal] += 1

    threads = [threading.Thread(target=use, args=(pool,)) for pool in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {(-signal.SIGKILL, "SIGKILL"): 100}


def test_exit_code_survives_an_interrupt_anywhere(start_method: str) -> None:
    """What was read is kept, at whichever instruction the reader is struck."""
    context = multiprocessing.get_context(start_method)
    workers: list[WorkerProcess] = []

    def ask() -> None:
        with unstruck():
            workers.append(WorkerProcess(context, "worker", os._exit, (3,)))
            workers[-1].start()
        assert workers[-1].exitcode(LAST) == 3

    modules = [module for name, module in sys.modules.items() if name in STRUCK]
    assert strike_everywhere(ask, *modules) > 10
    for worker in workers:
        assert worker.exitcode(LAST) == 3
        worker.close()


STRUCK = {
    WorkerProcess.__module__,
    "multiprocessing.connection",
    "multiprocessing.forkserver",
    "multiprocessing.popen_fork",
    "multiprocessing.popen_forkserver",
    "multiprocessing.process",
    "selectors",
}


# -- unknown -------------------------------------------------------------------------------------

SERVER_GONE = """
    import os, signal, sys
    from multiprocessing import forkserver
    from minipool import Pool, WorkerDied

    if __name__ == "__main__":
        with Pool(size=1, start_method="forkserver", breaker=False) as pool:
            pool.call(int)
            os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
            pid = pool.call(os.getpid)
            try:
                pool.call(os._exit, 3)
            except WorkerDied as died:
                print(died.exitcode, died.signal, died.started, "fork server is gone" in str(died))
            print(pool.call(os.getpid) != pid)
            (death,) = pool.deaths()
            print(death.exitcode, death.reason)
"""


def test_exit_code_of_a_worker_without_its_fork_server_is_unknown(tmp_path: Path) -> None:
    """None, and why; not a number that nobody has told. The worker serves until then."""
    code, out, err = scripts.run(tmp_path, SERVER_GONE)
    assert (code, out.splitlines()) == (
        0,
        [
            "None None True True",
            "True",
            "None (its exit code is not known: the fork server is gone)",
        ],
    ), err


# -- the log follows from the death --------------------------------------------------------------


def bury_first(monkeypatch: pytest.MonkeyPatch, pool: Pool[Any]) -> None:
    """Keep the caller from seeing a death before the manager has dealt with it."""
    dead, failed = handle_of(pool), Handle._failed

    def late(handle: Handle, *args: Any) -> Any:
        if handle is dead:
            wait_until(pool, lambda: dead not in tuple(desk.manager.fleet.handles.values()))
        return failed(handle, *args)

    desk: Any = pool._desk
    monkeypatch.setattr(Handle, "_failed", late)


def call_first(monkeypatch: pytest.MonkeyPatch, pool: Pool[Any]) -> None:
    """Keep the manager from seeing a death before the caller has dealt with it."""
    told, failed = threading.Event(), Handle._failed

    def tell(handle: Handle, *args: Any) -> Any:
        try:
            return failed(handle, *args)
        finally:
            told.set()

    monkeypatch.setattr(Handle, "_failed", tell)
    desk: Any = pool._desk
    desk.manager.order(lambda: told.wait(LAST))


@pytest.mark.parametrize("first", [bury_first, call_first])
def test_log_of_a_death_in_a_call_is_the_same_whoever_saw_it_first(
    first: Callable[[pytest.MonkeyPatch, Pool[Any]], None],
    start_method: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Pool(DiesOnCall, size=1, start_method=start_method) as pool:
        ear = Ear(pool, "error", "worker.terminate")
        first(monkeypatch, pool)
        with pytest.raises(WorkerDied):
            pool.call("leave", 3)
        assert ear.wait("worker.terminate").metadata["reason"] == "with exit code 3"
        assert ear.of("error")[0].metadata["error"] == "with exit code 3 during 'leave'"
    record = told_of_death(caplog)
    assert record.levelno == logging.WARNING
    assert "died with exit code 3 during 'leave' and is replaced" in record.getMessage()


def test_log_of_a_worker_that_was_killed_for_a_reason_says_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At INFO: whoever had it killed was told."""
    caplog.set_level(logging.INFO, "minipool")
    with Pool(DiesOnCall, size=1) as pool:
        with pytest.raises(CallTimeout):
            pool.options(timeout=0.05).call(time.sleep, 60)
        wait_until(pool, lambda: pool.stats().workers_lost == 1)
        assert pool.deaths()[0].reason == "too late during 'time:sleep'"
    record = told_of_death(caplog)
    assert record.levelno == logging.INFO
    assert "died by SIGKILL (too late during 'time:sleep')" in record.getMessage()


def test_reason_of_a_kill_is_the_callers_if_its_lease_is_over_before_the_death_is_seen() -> None:
    with Pool(DiesOnCall, size=1) as pool:
        ear, lease, handle = Ear(pool, "worker.terminate"), pool.checkout(), handle_of(pool)
        handle.in_call, handle.failed = b"slow", True
        handle.tainted = "too late during 'slow'"
        lease.release()
        assert ear.wait("worker.terminate").metadata["reason"] == "too late during 'slow'"


def told_of_death(caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    """Return the one record that tells of a death; written by the time that its pool is closed."""
    (record,) = [record for record in caplog.records if " is replaced" in record.getMessage()]
    return record


def test_log_of_an_idle_workers_death_says_that_no_call_was_running(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Pool(DiesOnCall, size=1) as pool:
        assert pool.call("well") == "well"
        os.kill(handle_of(pool).pid, signal.SIGKILL)
        wait_until(pool, lambda: pool.stats().workers_lost == 1)
    record = told_of_death(caplog)
    assert record.levelno == logging.WARNING
    assert "died by SIGKILL between calls and is replaced" in record.getMessage()
