"""Recycling: who has served for long enough goes, but not before another can take its place."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ears import Ear, handle_of, wait_until
from gates import Gate
from minipool import Pool, WorkerDied
from minipool.engine import manager as manager_module
from troublemakers import (
    FailsWhileFileExists,
    Hoards,
    NotesItsEnd,
    StopsAtGateInInit,
    hoard_at_gate,
)
from workers import Counter, getpid

MB = 1_000_000


def _capacity(pool: Pool[Any]) -> list[int]:
    """Note how many workers are in service whenever one begins or ends."""
    found: list[int] = []

    def look(*_: Any) -> None:
        stats = pool.stats()
        found.append(stats.idle + stats.leased)

    for event in ("worker.init", "worker.terminate"):
        pool.hooks[event].append(look)
    return found


# -- max_calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 7])
def test_worker_is_recycled_after_exactly_max_calls(start_method: str, most: int) -> None:
    with Pool(Counter, size=1, max_calls=most, start_method=start_method) as pool:
        counts = [pool.options(timeout=20).call("add") for _ in range(3 * most)]
        assert counts == [*range(1, most + 1)] * 3
        assert (pool.stats().workers_lost, pool.stats().discarded) == (0, 0)


def test_max_calls_is_exact_under_many_threads() -> None:
    """Nobody is given a worker that has made its calls, however many wait for one."""
    with Pool(Counter, size=2, max_calls=5) as pool, ThreadPoolExecutor(8) as threads:
        call = pool.options(timeout=30).call
        counts = list(threads.map(lambda _: call("add"), range(200)))
        assert max(counts) == 5
        assert counts.count(1) - counts.count(5) <= 2, "and nobody goes before that"


def test_lease_is_not_cut_short_by_max_calls() -> None:
    with Pool(Counter, size=1, max_calls=3) as pool:
        with pool.checkout() as w:
            assert [w.add() for _ in range(10)] == list(range(1, 11))
        assert pool.options(timeout=20).call("add") == 1


def test_successor_is_ready_when_max_calls_are_made() -> None:
    """It is started when nine tenths are made, and stands by for the rest."""
    with Pool(Counter, size=1, max_calls=20) as pool:
        capacity = _capacity(pool)
        for _ in range(17):
            pool.call("add")
        assert pool.stats().workers_started == 1
        pool.call("add")
        wait_until(pool, lambda: pool.stats().spare == 1)
        assert [pool.call("add") for _ in range(3)] == [19, 20, 1]
        wait_until(pool, lambda: pool.stats().workers == 1)
        assert set(capacity) == {1}


def test_used_up_worker_serves_on_while_no_other_can_be_started(tmp_path: Path) -> None:
    """Too many calls are better than no worker; once starting works again it goes."""
    blocker = tmp_path / "blocker"
    with Pool(FailsWhileFileExists, args=(str(blocker),), size=1, max_calls=1) as pool:
        ear = Ear(pool, "error", "worker.terminate")
        blocker.touch()
        call = pool.options(timeout=20).call
        old = call("pid")
        assert [call("pid") for _ in range(3)] == [old] * 3
        ear.wait("error", fits=lambda event: event.metadata["kind"] == "start")
        assert pool.health_check().status == "degraded"
        assert any("past their limits" in reason for reason in pool.health_check().reasons)
        blocker.unlink()
        ear.wait("worker.terminate", fits=lambda event: event.metadata["pid"] == old)
        assert call("pid") != old
        assert pool.stats().workers_lost == pool.stats().start_failures


def test_call_to_a_worker_that_serves_on_is_made_again_like_any(tmp_path: Path) -> None:
    """It was used up and called up again; its next lease has made no calls, whatever it made."""
    blocker = tmp_path / "blocker"
    with Pool(FailsWhileFileExists, args=(str(blocker),), size=1, max_calls=1) as pool:
        blocker.touch()
        old = pool.call("pid")
        with pool.checkout(timeout=20) as w:
            assert w.pid == old
            blocker.unlink()
            os.kill(old, signal.SIGKILL)
            assert w.options(timeout=20).call("pid") != old, "it had not begun"


# -- age and memory ------------------------------------------------------------------------------


def test_worker_is_recycled_when_it_reaches_max_lifetime() -> None:
    with Pool(Counter, size=2, max_lifetime=0.2) as pool:
        ear, capacity = Ear(pool, "worker.terminate"), _capacity(pool)
        for event in (ear.wait("worker.terminate", 1), ear.wait("worker.terminate", 2)):
            assert event.metadata["reason"] == "it has reached its max_lifetime"
            assert event.metadata["exitcode"] == 0
            assert event.measurements["lifetime"] >= 0.18
        assert min(capacity) >= 2, "the next one was there before"
        assert pool.stats().workers_lost == 0


def test_lifetimes_differ_so_that_not_all_end_at_once() -> None:
    with Pool(size=8, max_lifetime=1000.0) as pool:
        handles = [handle_of(pool, slot) for slot in range(8)]
        spans = [(handle.expires_ns - handle.ready_ns) / 1e9 for handle in handles]
        assert all(900 <= span <= 1100 for span in spans)
        assert len(set(spans)) == 8


def test_leased_worker_past_its_lifetime_goes_when_it_is_given_back() -> None:
    with Pool(Counter, size=1, max_lifetime=0.1) as pool:
        ear = Ear(pool, "worker.init", "worker.terminate")
        with pool.checkout() as held:
            ear.wait("worker.init")
            wait_until(pool, lambda: handle_of(pool, held.worker_id).tainted is not None)
            assert (held.add(), held.add()) == (1, 2), "the lease goes on undisturbed"
            assert pool.stats().leased == pool.stats().spare == 1
            assert not ear.of("worker.terminate")
            pid = held.pid
        assert pool.call("add") == 1
        ear.wait("worker.terminate", fits=lambda event: event.metadata["pid"] == pid)


def test_worker_that_has_grown_over_max_rss_is_recycled() -> None:
    """By its own word of how large it is, after the call that made it so."""
    with Pool(Hoards, size=1, max_rss=120 * MB) as pool:
        ear = Ear(pool, "worker.terminate")
        old = pool.call("pid")
        handle_of(pool)  # it is there
        pool.call("hoard", 150 * MB)
        assert pool.health_check(probe=True), "a probe makes it say how large it is"
        gone = ear.wait("worker.terminate")
        assert gone.metadata["pid"] == old and gone.metadata["exitcode"] == 0
        assert "over max_rss=120000000" in gone.metadata["reason"]
        assert pool.stats().workers_lost == 0


def test_busy_worker_that_grows_over_kill_rss_is_killed(start_method: str, gate: Gate) -> None:
    """In the midst of its call; its caller is told why."""
    pool = Pool(size=1, kill_rss=200 * MB, start_method=start_method)
    with pool, pytest.raises(WorkerDied, match=r"killed it: it uses .* over kill_rss=200000000"):
        pool.call(hoard_at_gate, gate.path, 250 * MB)


def test_worker_that_proc_hides_is_weighed_by_its_own_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with `hidepid=2` one that has made itself unreadable, or is another user by now."""
    monkeypatch.setattr(manager_module, "resident_bytes", lambda pid: 0)
    with Pool(Hoards, size=1, kill_rss=120 * MB) as pool:
        ear = Ear(pool, "worker.terminate")
        pool.call("hoard", 150 * MB)
        pool.health_check(probe=True)  # which makes it say how large it is
        assert "over kill_rss=120000000" in ear.wait("worker.terminate").metadata["reason"]


# -- under load, and when starting fails ---------------------------------------------------------


def test_recycling_under_backlog_loses_no_call_and_no_capacity() -> None:
    """Every worker is always wanted by somebody, and they are renewed all the same."""
    with Pool(Counter, size=2, max_lifetime=0.05) as pool, ThreadPoolExecutor(6) as threads:
        capacity, enough = _capacity(pool), threading.Event()
        ear = Ear(pool, "worker.terminate")

        def work() -> int:
            calls = 0
            while not enough.is_set():
                pool.options(timeout=20).call("add")
                calls += 1
            return calls

        jobs = [threads.submit(work) for _ in range(6)]
        try:
            ear.wait("worker.terminate", 10)
        finally:
            enough.set()
        assert sum(job.result(20) for job in jobs) == pool.stats().calls
        assert min(capacity) >= 2
        assert (pool.stats().workers_lost, pool.stats().faults) == (0, 0)


def test_what_cannot_be_replaced_is_not_retired(tmp_path: Path) -> None:
    """Drained while nothing can be started: the old ones serve on, and the report says so."""
    blocker = tmp_path / "blocker"
    with Pool(FailsWhileFileExists, args=(str(blocker),), size=2) as pool:
        ear = Ear(pool, "error", "worker.terminate")
        old = {info.pid for info in pool.workers()}
        blocker.touch()
        pool.drain()
        ear.wait("error", 2)
        assert pool.call("pid") in old
        assert pool.stats().idle == 2
        report = pool.health_check()
        assert report.status == "degraded"
        assert any("2 workers past their limits" in reason for reason in report.reasons)
        blocker.unlink()
        ear.wait("worker.terminate", 2, fits=lambda event: event.metadata["pid"] in old)
        wait_until(pool, lambda: pool.stats().idle == pool.stats().workers == 2)
        assert not old & {info.pid for info in pool.workers()}


def test_drain_keeps_capacity_until_successors_are_ready(gate: Gate) -> None:
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=2)
    gate.open(2)
    with pool:
        gate.wait_arrived(2)
        old = {info.pid for info in pool.workers()}
        pool.drain()
        gate.wait_arrived(2)  # two more are in their constructors
        assert pool.call("pid") in old
        assert (pool.stats().idle, pool.stats().starting) == (2, 2)
        gate.open(2)
        wait_until(pool, lambda: not old & {info.pid for info in pool.workers()})
        assert pool.stats().idle == 2


def test_stand_in_takes_the_place_of_who_dies_before_it_is_replaced(gate: Gate) -> None:
    """A worker past its limit dies by itself: its stand-in serves, and is not one too many."""
    with Pool(Counter, size=1) as pool:
        ear = Ear(pool, "recovery")
        with pool.checkout() as held:
            pool.drain()
            wait_until(pool, lambda: pool.stats().spare == 1)
            os.kill(held.pid or 0, 9)
            ear.wait("recovery")
        assert pool.call("add") == 1
        wait_until(pool, lambda: pool.stats().workers == 1)
        assert pool.stats().workers_started == 2


def test_discarded_worker_goes_although_it_was_worn() -> None:
    with Pool(Counter, size=1) as pool:
        ear = Ear(pool, "worker.terminate")
        with pool.checkout() as held:
            pool.drain()
            wait_until(pool, lambda: handle_of(pool, held.worker_id).tainted is not None)
            held.discard("it is wrong")
        assert ear.wait("worker.terminate").metadata["reason"] == "discarded: it is wrong"


def test_close_ends_stand_ins_and_worn_workers_in_good_order(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    pool = Pool(NotesItsEnd, args=(str(notes),), size=1).open()
    lease = pool.checkout()
    pool.drain()
    wait_until(pool, lambda: handle_of(pool, lease.worker_id).tainted is not None)
    pids = {str(info.pid) for info in pool.workers()}
    lease.release()
    pool.close()
    assert set(notes.read_text().split()) == pids and len(pids) == 2


def test_plain_pools_have_a_plain_desk() -> None:
    """Who does not limit calls does not pay for counting them."""
    from minipool.engine.desk import Desk

    with Pool(size=1) as pool:
        assert type(pool._desk) is Desk
        assert pool.call(getpid) == pool.workers()[0].pid
