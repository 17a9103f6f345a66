"""Spares: workers that are ready and out of service, until somebody is missing."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

from ears import Ear, handle_of, wait_until
from gates import Gate, pass_gate
from minipool import CheckoutTimeout, MinipoolError, Pool, WorkerDied
from troublemakers import (
    FailsWhileFileExists,
    LeavesOnceReady,
    NotesItsEnd,
    SickWhileFileExists,
    StopsAtGateInInit,
)
from workers import Counter, kill_self


def _spares(pool: Pool[Any], count: int) -> Callable[[], bool]:
    return lambda: pool.stats().spare == count


def _pids(pool: Pool[Any], state: str) -> set[int]:
    return {info.pid or 0 for info in pool.workers() if info.state == state}


def test_spares_are_ready_and_given_to_nobody(start_method: str) -> None:
    with Pool(Counter, size=1, spares=2, start_method=start_method) as pool:
        wait_until(pool, _spares(pool, 2))
        with pool.checkout() as held:
            with pytest.raises(CheckoutTimeout):
                pool.checkout(timeout=0)
            assert held.pid not in _pids(pool, "spare")
            stats = pool.stats()
            assert (stats.size, stats.workers, stats.leased, stats.spare) == (1, 3, 1, 2)
        assert (pool.stats().idle, pool.stats().spare) == (1, 2)


def test_opening_does_not_wait_for_spares(gate: Gate) -> None:
    """They are raised when everybody else is in service."""
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=1, spares=1)
    gate.open()
    with pool:
        gate.wait_arrived(2)
        assert (pool.stats().idle, pool.stats().starting, pool.stats().spare) == (1, 1, 0)
        assert pool.call("pid")
        gate.open()
        wait_until(pool, _spares(pool, 1))


def test_spare_takes_the_place_of_a_dead_worker_before_another_is_started(
    start_method: str, gate: Gate
) -> None:
    """The next call is made by the spare, while its own successor is still in its constructor."""
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=1, spares=1, start_method=start_method)
    gate.open(2)
    with pool:
        wait_until(pool, _spares(pool, 1))
        gate.wait_arrived(2)
        (spare,) = _pids(pool, "spare")
        with pytest.raises(WorkerDied):
            pool.call(kill_self)
        assert pool.call("pid") == spare
        gate.wait_arrived()
        assert (pool.stats().idle, pool.stats().starting) == (1, 1)
        gate.open()
        wait_until(pool, _spares(pool, 1))
        assert (pool.stats().workers, pool.stats().workers_lost) == (2, 1)


def test_recovery_is_told_of_who_was_in_service_only() -> None:
    with Pool(Counter, size=1, spares=1) as pool:
        wait_until(pool, _spares(pool, 1))
        ear = Ear(pool, "recovery", "worker.init")
        (spare,) = _pids(pool, "spare")
        os.kill(spare, signal.SIGKILL)
        ear.wait("worker.init")
        wait_until(pool, _spares(pool, 1))
        assert not ear.of("recovery"), "nobody missed it"
        (next_spare,) = _pids(pool, "spare")
        with pytest.raises(WorkerDied):
            pool.call(kill_self)
        told = ear.wait("recovery")
        assert told.metadata["pid"] == next_spare and 0 <= told.measurements["seconds"] < 5


def test_spare_that_died_with_the_worker_is_not_called_up() -> None:
    """Both are killed at once: the caller gets neither, but one that is started now."""
    with Pool(Counter, size=1, spares=1) as pool:
        wait_until(pool, _spares(pool, 1))
        pids = {info.pid or 0 for info in pool.workers()}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert pool.options(timeout=20).call("pid") not in pids
        wait_until(pool, _spares(pool, 1))


def test_spare_that_is_still_booting_serves_who_waits(gate: Gate) -> None:
    """It is not started twice: the one under way becomes the worker."""
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=1, spares=1)
    gate.open()
    with pool:
        gate.wait_arrived(2)
        with pytest.raises(WorkerDied):
            pool.call(kill_self)
        wait_until(pool, lambda: pool.stats().lost == 0)
        gate.open()
        assert pool.options(timeout=20).call("pid")
        gate.wait_arrived()
        assert pool.stats().workers_started == 2
        gate.open()
        wait_until(pool, _spares(pool, 1))


def test_sick_spare_is_found_by_probes_and_replaced(tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    pool = Pool(
        SickWhileFileExists, args=(str(sick),), size=1, spares=1,
        health_check_interval=0.05, max_health_failures=1,
    )  # fmt: skip
    with pool:
        wait_until(pool, _spares(pool, 1))
        ear = Ear(pool, "worker.terminate")
        (spare,) = _pids(pool, "spare")
        with pool.checkout():  # the worker itself is not probed
            sick.touch()
            ear.wait("worker.terminate", fits=lambda event: event.metadata["pid"] == spare)
            sick.unlink()
            wait_until(pool, _spares(pool, 1))


def test_well_spare_stays_one_when_it_is_probed() -> None:
    with Pool(Counter, size=1, spares=1, health_check_interval=0.05) as pool:
        wait_until(pool, _spares(pool, 1))
        ear = Ear(pool, "worker.health_check")
        (spare,) = _pids(pool, "spare")
        ear.wait("worker.health_check", 3, fits=lambda event: event.metadata["pid"] == spare)
        wait_until(pool, lambda: _pids(pool, "spare") == {spare})
        assert pool.call("pid") != spare


def test_spare_serves_growth_and_another_is_raised() -> None:
    with Pool(Counter, size=1, max_size=2, spares=1) as pool:
        wait_until(pool, _spares(pool, 1))
        (spare,) = _pids(pool, "spare")
        with pool.checkout(), pool.checkout(timeout=20) as second:
            assert second.pid == spare
        wait_until(pool, _spares(pool, 1))
        assert (pool.stats().size, pool.stats().workers) == (2, 3)


def test_lazy_pool_has_its_spares_from_the_start() -> None:
    """That is what they are for: the first caller does not wait for a start."""
    with Pool(Counter, size=2, lazy=True, spares=1) as pool:
        wait_until(pool, _spares(pool, 1))
        (spare,) = _pids(pool, "spare")
        assert pool.stats().workers == 1
        assert pool.call("pid") == spare


def test_resize_leaves_the_spares_alone() -> None:
    with Pool(Counter, size=2, spares=1) as pool:
        wait_until(pool, _spares(pool, 1))
        (spare,) = _pids(pool, "spare")
        for size in (1, 3):
            pool.resize(size)
            wait_until(pool, lambda size=size: pool.stats().idle == size)  # type: ignore[misc]
            wait_until(pool, _spares(pool, 1))
        assert pool.stats().workers == 4
        assert spare in {info.pid for info in pool.workers()}, "it served growth, or stayed"


def test_spares_are_not_overflow() -> None:
    """What is idle in service is not retired because a spare is there, or being started."""
    with Pool(Counter, size=1, spares=2, max_overflow=1, overflow_idle=0.05) as pool:
        wait_until(pool, _spares(pool, 2))
        (worker,) = _pids(pool, "idle")
        ear = Ear(pool, "utilization")
        ear.wait("utilization", 20)
        assert _pids(pool, "idle") == {worker}
        assert (pool.stats().spare, pool.stats().workers_retired) == (2, 0)


def test_drain_renews_the_spares_as_well() -> None:
    with Pool(Counter, size=2, spares=1) as pool:
        wait_until(pool, _spares(pool, 1))
        old = {info.pid for info in pool.workers()}
        pool.drain()
        wait_until(pool, lambda: not old & {info.pid for info in pool.workers()})
        wait_until(pool, lambda: (pool.stats().idle, pool.stats().workers) == (2, 3))
        assert pool.stats().spare == 1


def test_spare_goes_with_max_lifetime_too() -> None:
    with Pool(Counter, size=1, spares=1, max_lifetime=0.2) as pool:
        wait_until(pool, _spares(pool, 1))
        (spare,) = _pids(pool, "spare")
        wait_until(pool, lambda: spare not in {info.pid for info in pool.workers()})
        wait_until(pool, lambda: pool.stats().idle == 1)


def test_close_ends_spares_in_good_order(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    pool = Pool(NotesItsEnd, args=(str(notes),), size=1, spares=2).open()
    wait_until(pool, _spares(pool, 2))
    pool.close()
    assert len(notes.read_text().split()) == 3
    assert pool.stats().workers_lost == 0


def test_session_goes_on_with_a_spare() -> None:
    """What was committed is there; the binding was to the dead one."""
    with Pool(Counter, size=1, spares=1) as pool:
        wait_until(pool, _spares(pool, 1))
        with pool.checkout(session="ada") as w:
            w.call(_remember, "ada")
            first = w.pid
        assert first is not None
        with pool.checkout(session="ada") as w, pytest.raises(WorkerDied):
            w.call(kill_self)
        with pool.checkout(session="ada") as w:
            assert (w.call(_remembered), w.affinity) == ("ada", "lost")
            assert w.pid != first


def test_spares_that_fail_at_once_are_put_off(tmp_path: Path) -> None:
    """A class that ends as soon as it is ready does not spin, only because it is a spare."""
    with Pool(LeavesOnceReady, size=1, spares=1, lazy=True) as pool:
        ear = Ear(pool, "error")
        for failures in range(1, 4):
            ear.wait("error", failures, fits=lambda event: event.metadata["kind"] == "start")
        desk = pool._desk
        assert desk is not None and desk.manager.fleet.failures_in_a_row >= 3


def test_pool_serves_without_spares_while_they_cannot_be_started(tmp_path: Path) -> None:
    blocker = tmp_path / "blocker"
    with Pool(FailsWhileFileExists, args=(str(blocker),), size=1, spares=1) as pool:
        wait_until(pool, _spares(pool, 1))
        blocker.touch()
        ear = Ear(pool, "error")
        with pytest.raises(WorkerDied):
            pool.call(kill_self)
        ear.wait("error", fits=lambda event: event.metadata["kind"] == "start")
        assert pool.call("pid"), "the spare does the work"
        report = pool.health_check()
        assert report.status == "degraded" and "in the way" in report.reasons[0]
        blocker.unlink()
        wait_until(pool, _spares(pool, 1))


def test_utilization_counts_the_time_in_service_only(gate: Gate) -> None:
    """Spares that nobody can use do not make a busy pool look idle."""
    with Pool(size=1, spares=3) as pool, ThreadPoolExecutor(1) as threads:
        call = threads.submit(pool.call, pass_gate, gate.path)
        gate.wait_arrived()
        wait_until(pool, _spares(pool, 3))
        desk = pool._desk
        assert desk is not None
        now = handle_of(pool).serving_ns + 1_000_000_000
        assert desk.manager.fleet.served_ns(now) == 1_000_000_000
        gate.open()
        assert call.result(20)


def test_crash_storm_ends_at_full_strength() -> None:
    """Every worker killed ten times a second under 16 threads; then all are there again."""
    with Pool(size=4, spares=2) as pool, ThreadPoolExecutor(16) as threads:
        ended, tick = threading.Event(), threading.Event()

        def work() -> tuple[int, int]:
            good = bad = 0
            while not ended.is_set():
                try:
                    assert pool.options(timeout=20).call(abs, -1) == 1
                    good += 1
                except MinipoolError:
                    bad += 1
            return good, bad

        jobs = [threads.submit(work) for _ in range(16)]
        try:
            for _ in range(20):
                for info in pool.workers():
                    if info.pid and info.state not in ("lost", "stopping"):
                        os.kill(info.pid, signal.SIGKILL)
                tick.wait(0.1)
            wait_until(pool, lambda: pool.stats().idle + pool.stats().leased == 4, timeout=20)
        finally:
            ended.set()
        counts = [job.result(20) for job in jobs]
        assert all(good > 0 for good, _ in counts)
        wait_until(pool, _spares(pool, 2))
        assert pool.stats().workers == 6


def _remember(what: str) -> None:
    import minipool

    minipool.current_session()["what"] = what


def _remembered() -> Any:
    import minipool

    return minipool.current_session()["what"]
