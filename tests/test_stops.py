"""Waits of which none ends early by a time in which the program did not run.

The stop is made up: an hour that begins when somebody waits. `test_stopped_process` makes a real
one, for other waits.
"""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any, Callable

import pytest

import minipool
from ears import handle_of, wait_until
from gates import Gate, pass_gate
from minipool import CheckoutTimeout, Pool, warmup
from minipool.engine import care, health
from minipool.engine.manager import Keeper, Manager
from minipool.engine.process import WorkerProcess
from workers import Counter, getpid

LIMIT = 1.5
HOUR = 3600.0
LAST = 20.0


def manager_of(pool: Pool[Any]) -> Manager:
    assert pool._desk is not None
    return pool._desk.manager


class Run:
    """What a function returns or raises in a thread of its own."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._found: list[Any] = []
        self.at_end: Callable[[], object] = bool
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._function())
        except Exception as problem:
            self._found.append(problem)
        self.at_end()

    def result(self) -> Any:
        self.thread.join(LAST)
        return self._found[0]


def stop_for_an_hour(pool: Pool[Any], waiter: Run) -> threading.Event:
    """Have an hour from now on not count; return what tells that who waits has asked, or ended."""
    account, asked = manager_of(pool).standstills, threading.Event()
    now = time.monotonic()
    account._stops = ((now, now + HOUR),)
    counted = account.counted

    def note(since: float) -> float:
        if threading.current_thread() is waiter.thread:
            asked.set()
        return counted(since)

    account.counted = note  # type: ignore[method-assign]
    waiter.at_end = asked.set
    return asked


@pytest.mark.parametrize("affinity", ["strict", "prefer"])
def test_wait_for_the_worker_that_has_a_session_goes_on(affinity: str) -> None:
    """With `prefer`, that is the wait for any worker which comes after."""
    with Pool(Counter, size=1, affinity_wait=LIMIT / 3) as pool:
        pid = pool.options(session="s").call("pid")
        lease = pool.checkout()

        def wait() -> Any:
            with pool.checkout(session="s", timeout=LIMIT, affinity=affinity) as w:
                return w.call("pid")

        waiter = Run(wait)
        wait_until(pool, lambda: bool(manager_of(pool).turnstile.waiters))
        assert stop_for_an_hour(pool, waiter).wait(LAST)
        lease.release()
        assert waiter.result() == pid


def test_wait_for_the_nearest_worker_goes_on() -> None:
    """Before any other will do, though another comes free at once after the stop."""
    with Pool(Counter, size=2, affinity_wait=LIMIT / 2) as pool:
        pid = pool.options(session="s").call("pid")
        leases = [pool.checkout(), pool.checkout()]
        waiter = Run(lambda: pool.checkout(session="s", timeout=LAST))
        wait_until(pool, lambda: bool(manager_of(pool).turnstile.waiters))
        asked = stop_for_an_hour(pool, waiter).wait(LAST)
        for lease in sorted(leases, key=lambda lease: lease.pid == pid):
            lease.release()
        with waiter.result() as w:
            assert w.call("pid") == pid
        assert asked


def test_warm_up_of_a_worker_that_starts_goes_on(gate: Gate) -> None:
    """It is part of the start, and so of `init_timeout`."""
    pool = Pool(size=1, warm_up=[(pass_gate, (gate.path,))])
    try:
        pool.open(wait=False)
        gate.wait_arrived()
        manager, now = manager_of(pool), time.monotonic()
        manager.standstills._stops = ((now - HOUR, now),)
        handle_of(pool).since_ns = int((now - HOUR) * health.SECOND_NS)
        for _ in range(2):
            manager.command(bool)  # it has looked, once that was done
        gate.open()
        pool.wait_ready()
        assert pool.stats().start_failures == 0
    finally:
        pool.close()


def pass_if_last(path: str) -> None:
    worker = minipool.current_worker()
    if worker is not None and worker.worker_id == 1:
        pass_gate(path)


def test_warm_up_of_a_pool_goes_on(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls, and the wait for those who make them."""
    last_is_waited_for = threading.Event()

    class Helper(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            if self.name == "minipool-warm-up-1":
                last_is_waited_for.set()
            super().join(timeout)

    stand_in = SimpleNamespace(Thread=Helper, TIMEOUT_MAX=threading.TIMEOUT_MAX)
    monkeypatch.setattr(warmup, "threading", stand_in)
    monkeypatch.setattr(warmup, "_MARGIN", 0.0)
    with Pool(size=2) as pool:
        waiter = Run(lambda: pool.warm_up([(pass_if_last, (gate.path,))], timeout=LIMIT))
        gate.wait_arrived()
        assert last_is_waited_for.wait(LAST)
        assert stop_for_an_hour(pool, waiter).wait(LAST)
        gate.open()
        report = waiter.result()
        assert (report.complete, report.succeeded) == (True, 2)


def test_wait_for_an_exit_code_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork server, which passes it on, was stopped as well."""
    with Pool(size=1, start_method="forkserver") as pool:
        handle, manager = handle_of(pool), manager_of(pool)
        told: list[int | None] = [None]
        read = WorkerProcess.exitcode

        def late(process: WorkerProcess, timeout: float = 0.0) -> int | None:
            return told[0] and read(process, timeout)

        monkeypatch.setattr(care, "_EXITCODE_PATIENCE_NS", 1)
        monkeypatch.setattr(WorkerProcess, "exitcode", late)
        now = time.monotonic()
        manager.standstills._stops = ((now, now + HOUR),)
        handle.kill()
        wait_until(pool, lambda: bool(handle.ended_ns))
        manager.command(bool)  # a turn that looks at it again
        assert handle.process.unknown is None
        assert manager.fleet.handles[0] is handle
        told[0] = 1
        manager.look_at_all()
        wait_until(pool, lambda: pool.stats().idle == 1 and manager.fleet.handles[0] is not handle)
        assert [death.signal for death in pool.deaths()] == ["SIGKILL"]


def test_worker_that_was_sent_sigkill_before_a_stop_is_not_given_up_after_it() -> None:
    with Pool(size=1) as pool:
        handle, manager = handle_of(pool), manager_of(pool)
        now = time.monotonic()
        handle.since_ns = int((now - HOUR) * health.SECOND_NS)
        assert manager._outlives(handle)
        manager.standstills._stops = ((now - HOUR, now),)
        assert not manager._outlives(handle)


class NeverEnds(Keeper):
    def end(self) -> None:
        pass


def test_wait_for_a_store_that_is_closing_goes_on() -> None:
    with Pool(size=1) as pool:
        manager = manager_of(pool)
    manager.keepers.append(NeverEnds())
    now = time.monotonic()
    manager._keepers_since = now - HOUR
    assert manager._keepers_ended(), "an hour is enough"
    manager.standstills._stops = ((now - HOUR, now),)
    assert not manager._keepers_ended()


def test_wait_ends_in_its_time_where_nothing_stopped_it() -> None:
    with Pool(Counter, size=1) as pool:
        pool.options(session="s").call("pid")
        with pool.checkout() as w, pytest.raises(CheckoutTimeout):
            w.call(getpid)
            pool.checkout(session="s", timeout=LIMIT / 10, affinity="strict")
