"""What a pool tells of itself: statistics, workers, health, its repr."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import rogues
from ears import Ear, handle_of, wait_until
from gates import Gate
from minipool import CallTimeout, CheckoutTimeout, Pool, PoolStats, WorkerDied, WorkerInfo
from rogues import SaysItIsIll, Stateful
from troublemakers import FailsWhileFileExists, StopsAtGateInInit

LAST = 20.0

KEYS = {
    "name", "size", "workers", "idle", "leased", "starting", "probing", "spare", "stopping", "lost",
    "waiting", "leases", "queued", "checkout_timeouts", "turned_away", "calls", "raised",
    "faults", "discarded", "workers_started", "workers_lost", "workers_retired",
    "start_failures", "uptime", "utilization", "call_p50", "call_p99", "wait_p50", "wait_p99",
    "sessions", "session_hits", "sessions_new", "sessions_moved", "sessions_lost",
    "session_hit_rate", "breaker", "breaker_opened",
}  # fmt: skip
GAUGES = ("idle", "leased", "starting", "probing", "spare", "stopping", "lost")


@pytest.fixture
def pool() -> Iterator[Pool[Stateful]]:
    with Pool(Stateful, size=2, checkout_timeout=LAST, overflow_idle=0.1) as made:
        yield made


def run(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def gauges(stats: PoolStats) -> dict[str, int]:
    return {name: getattr(stats, name) for name in GAUGES if getattr(stats, name)}


# -- stats ---------------------------------------------------------------------------------------


def test_every_key_is_there_from_the_beginning() -> None:
    """Before it is opened a pool has done nothing, and says so under every key."""
    stats = Pool(Stateful, size=2, name="p").stats()

    assert set(stats._fields) == KEYS
    assert stats.name == "p"
    quantiles = ("call_p50", "call_p99", "wait_p50", "wait_p99", "session_hit_rate", "breaker")
    assert all(getattr(stats, key) is None for key in quantiles)
    assert not any(getattr(stats, key) for key in KEYS - {"name", *quantiles, "size"})


def test_a_story_is_counted_exactly(pool: Pool[Stateful], gate: Gate) -> None:
    """Calls, exceptions, faults, timeouts, discards: each in its own counter, once."""
    for _ in range(3):
        pool.call("add", 1)
    with pytest.raises(KeyError):
        pool.call(rogues.raise_it, "KeyError", "k")
    with pytest.raises(WorkerDied):
        pool.call(rogues.kill_self)
    with pytest.raises(CallTimeout):
        with pool.checkout() as w:
            w.options(timeout=0.05).call("wait_at", gate.path)
    with pool.checkout() as w:
        w.discard("enough")
    a, b = pool.checkout(), pool.checkout()
    with pytest.raises(CheckoutTimeout):
        pool.checkout(timeout=0.01)
    a.release(), b.release()
    wait_until(pool, lambda: pool.stats().idle == 2)

    stats = pool.stats()
    assert (stats.calls, stats.raised, stats.faults) == (4, 1, 2)
    assert (stats.leases, stats.checkout_timeouts) == (9, 1)
    assert (stats.discarded, stats.workers_retired, stats.workers_lost) == (3, 1, 2)
    assert stats.workers_started == 5
    assert stats.start_failures <= 2, "a death within a second of the start may count as one"


def test_totals_are_exact_under_many_threads() -> None:
    """Nothing is lost between 32 threads that lease, call and raise at once."""
    threads, each = 32, 25
    with Pool(Stateful, size=4, checkout_timeout=60) as pool:

        def work() -> None:
            for number in range(each):
                with pool.checkout() as w:
                    w.call("add", 1)
                    if number % 5 == 0:
                        with pytest.raises(KeyError):
                            w.call(rogues.raise_it, "KeyError", "k")

        for thread in [run(work) for _ in range(threads)]:
            thread.join(60)

        stats = pool.stats()
        assert stats.leases == threads * each
        assert stats.calls == threads * each + threads * 5
        assert stats.raised == threads * 5
        assert sum(info.calls for info in pool.workers()) == stats.calls
        assert (stats.faults, stats.discarded, stats.workers_lost) == (0, 0, 0)
        assert gauges(stats) == {"idle": 4}
    closed = pool.stats()
    assert (closed.leases, closed.calls) == (stats.leases, stats.calls), "also after close()"


def test_gauges_sum_to_the_workers(gate: Gate) -> None:
    """Whatever the workers do, each is in one gauge."""
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=3)
    pool.open(wait=False)
    try:
        gate.wait_arrived(3)
        assert gauges(pool.stats()) == {"starting": 3}
        gate.open(2)
        pool.wait_ready(2, timeout=LAST)
        assert gauges(pool.stats()) == {"starting": 1, "idle": 2}
        with pool.checkout():
            stats = pool.stats()
            assert gauges(stats) == {"starting": 1, "idle": 1, "leased": 1}
            assert sum(gauges(stats).values()) == stats.workers == stats.size == 3
        gate.open()
        pool.wait_ready(3, timeout=LAST)
        assert gauges(pool.stats()) == {"idle": 3}
    finally:
        pool.terminate()
    assert (gauges(pool.stats()), pool.stats().workers) == ({}, 0)


def test_waiting_callers_are_counted() -> None:
    with Pool(Stateful, size=1, overflow_idle=0.1) as pool:
        lease = pool.checkout()
        waiters = [run(lambda: pool.checkout(timeout=LAST).release()) for _ in range(3)]
        wait_until(pool, lambda: pool.stats().waiting == 3)
        assert pool.stats().queued == 3
        lease.release()
        for waiter in waiters:
            waiter.join(LAST)
        assert (pool.stats().waiting, pool.stats().queued) == (0, 3)


def test_times_are_those_of_calls_and_waits(pool: Pool[Stateful], gate: Gate) -> None:
    """Quantiles have something to say once there was a call; the held worker was utilised."""
    assert pool.stats().call_p50 is None
    with pool.checkout() as w:
        for _ in range(20):
            w.call("add", 1)
        stats = pool.stats()
        assert stats.call_p50 is not None
        assert stats.call_p99 is not None
        assert 0 < stats.call_p50 <= stats.call_p99 < LAST
        assert stats.wait_p50 is not None
        assert stats.wait_p50 < 1e-3
        assert 0 < stats.utilization <= 1
    assert 0 < stats.uptime <= pool.stats().uptime


def test_utilization_of_a_held_worker_grows(gate: Gate) -> None:
    """A lease that is not yet over counts as well."""
    with Pool(Stateful, size=1) as pool, pool.checkout() as w:
        opener = run(lambda: (gate.wait_arrived(), gate.open()))
        w.call("wait_at", gate.path)
        opener.join(LAST)
        first = pool.stats().utilization
        for _ in range(2_000):
            w.call("add", 1)
        assert 0 < first < pool.stats().utilization <= 1


def test_uptime_stops_with_the_pool(pool: Pool[Stateful]) -> None:
    pool.close()

    assert pool.stats().uptime == pool.stats().uptime > 0


# -- workers -------------------------------------------------------------------------------------


def test_workers_tell_what_each_does(pool: Pool[Stateful], gate: Gate) -> None:
    """Id, generation, process, state, calls; and how long the call of this moment has run."""
    with pool.checkout() as w:
        caller = run(lambda: w.call("wait_at", gate.path))
        gate.wait_arrived()
        infos = {info.worker_id: info for info in pool.workers()}

        assert sorted(infos) == [0, 1]
        busy, idle = infos.pop(w.worker_id), infos.popitem()[1]
        assert isinstance(busy, WorkerInfo)
        assert (busy.state, idle.state) == ("leased", "idle")
        assert (busy.pid, busy.generation) == (w.pid, w.generation)
        assert busy.in_call_for is None or busy.in_call_for > 0
        assert idle.in_call_for is None
        assert (idle.calls, idle.busy, idle.probe_failures) == (0, 0.0, 0)
        assert idle.uptime > 0
        assert idle.rss_bytes > 1_000_000
        gate.open()
        caller.join(LAST)
        after = pool.worker(w.worker_id)
        assert (after.calls, after.in_call_for) == (1, None)
        assert after.busy > 0


def test_running_call_is_seen_where_memory_is_shared(gate: Gate) -> None:
    """The table tells without a message that a call has begun, and since when."""
    with Pool(Stateful, size=1) as pool:
        assert pool._desk is not None
        if os.environ.get("MINIPOOL_PORTABLE") == "1":
            pytest.skip("the worker's words come with its replies here")
        with pool.checkout() as w:
            caller = run(lambda: w.call("wait_at", gate.path))
            gate.wait_arrived()
            first = pool.worker(0).in_call_for
            second = pool.worker(0).in_call_for
            assert first is not None
            assert second is not None
            assert 0 < first < second < LAST
            gate.open()
            caller.join(LAST)


@pytest.mark.parametrize("worker_id", [2, -1, "0", None])
def test_worker_that_is_not_there_is_a_key_error(pool: Pool[Stateful], worker_id: Any) -> None:
    with pytest.raises(KeyError, match=f"no worker {worker_id!r}"):
        pool.worker(worker_id)


def test_pool_without_processes_has_no_workers() -> None:
    pool = Pool(Stateful, size=2)
    assert pool.workers() == []
    pool.close()
    assert pool.workers() == []


# -- repr ----------------------------------------------------------------------------------------


def test_repr_is_a_status_report() -> None:
    pool = Pool(Stateful, size=2, name="models")
    assert repr(pool) == "<Pool models: not open yet>"
    with pool:
        with pool.checkout():
            assert repr(pool) == (
                "<Pool models: 2 of 2 workers: 1 idle, 1 leased, 0 starting; 0 waiting>"
            )
    assert repr(pool) == "<Pool models: closed>"
    never = Pool(Stateful, size=1, name="never")
    never.close()
    assert repr(never) == "<Pool never: closed>"


def test_repr_says_that_it_is_closing() -> None:
    with Pool(Stateful, size=1, name="p", close_timeout=LAST) as pool:
        lease = pool.checkout()
        closer = run(pool.close)
        wait_until(pool, lambda: pool._desk is not None and pool._desk.manager.closing)
        assert repr(pool).startswith("<Pool p: closing, 1 of 1 workers")
        lease.release()
        closer.join(LAST)


# -- health --------------------------------------------------------------------------------------


def test_well_pool_is_healthy(pool: Pool[Stateful]) -> None:
    """No reasons, and a row per worker; also while all are leased."""
    with pool.checkout(), pool.checkout():
        report = pool.health_check()

    assert (report.status, report.reasons) == ("healthy", ())
    assert [info.worker_id for info in report.workers] == [0, 1]


def test_unopened_and_closed_pools_are_unhealthy() -> None:
    pool = Pool(Stateful, size=1, name="p")
    assert pool.health_check() == ("unhealthy", ("p is not open",), ())
    pool.open()
    pool.close()
    assert pool.health_check()[:2] == ("unhealthy", ("p is closed",))
    assert pool.health_check(probe=True).status == "unhealthy"


def test_probe_asks_every_idle_worker(pool: Pool[Stateful]) -> None:
    """And leaves the leased ones to their lessees."""
    ear = Ear(pool, "worker.health_check")

    pool.health_check()
    assert not ear.heard
    assert pool.health_check(probe=True).status == "healthy"
    assert sorted(event.metadata["worker_id"] for event in ear.heard) == [0, 1]
    with pool.checkout() as w:
        pool.health_check(probe=True)
        asked = [event.metadata["worker_id"] for event in ear.heard[2:]]
        assert asked == [1 - w.worker_id]


@pytest.mark.parametrize("how", ["raises", "returns False"])
def test_failed_probes_degrade_and_then_replace(how: str) -> None:
    """The object's own health_check() is believed; the third failure costs the worker."""
    with Pool(SaysItIsIll, args=(how,), size=1, max_health_failures=3) as pool:
        ear = Ear(pool, "worker.health_check", "worker.terminate")
        pid = pool.workers()[0].pid
        for failures in (1, 2):
            report = pool.health_check(probe=True)
            assert report.status == "degraded"
            assert f"worker 0 failed {failures} health checks in a row" in report.reasons
            assert report.workers[0].probe_failures == failures
        pool.health_check(probe=True)

        dead = ear.wait("worker.terminate")
        assert dead.metadata["pid"] == pid
        assert "failed 3 health checks in a row" in dead.metadata["reason"]
        assert [event.measurements["failures"] for event in ear.of("worker.health_check")] == [1, 2, 3]  # fmt: skip
        assert not any(event.metadata["healthy"] for event in ear.of("worker.health_check"))
        with pool.checkout(timeout=LAST) as w:
            assert w.pid != pid


def test_probe_of_a_stopped_worker_ends_in_time() -> None:
    """It gets no answer, which is a failure, and the caller is not kept for longer."""
    with Pool(Stateful, size=2, health_check_timeout=0.2, max_health_failures=50) as pool:
        pid = pool.workers()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        report = pool.health_check(probe=True)
        os.kill(pid, signal.SIGCONT)

        assert report.status == "degraded"
        wait_until(pool, lambda: gauges(pool.stats()) == {"idle": 2})
        assert pool.health_check(probe=True).status == "healthy"


def test_waiting_callers_degrade(pool: Pool[Stateful]) -> None:
    leases = [pool.checkout(), pool.checkout()]
    waiter = run(lambda: pool.checkout().release())
    wait_until(pool, lambda: pool.stats().waiting == 1)

    report = pool.health_check()

    assert report.status == "degraded"
    assert "1 callers are waiting for a worker" in report.reasons
    for lease in leases:
        lease.release()
    waiter.join(LAST)


def test_missing_workers_degrade_and_their_lack_is_unhealthy(tmp_path: Path) -> None:
    """With the reason why the last start failed; and it is well again by itself."""
    flag = tmp_path / "in the way"
    with Pool(FailsWhileFileExists, args=(str(flag),), size=2) as pool:
        ear = Ear(pool, "error")
        flag.touch()
        first, second = pool.workers()
        os.kill(first.pid or 0, signal.SIGKILL)
        ear.wait("error", fits=lambda e: "is in the way" in str(e.metadata["error"]))
        report = pool.health_check()
        assert report.status == "degraded"
        assert "1 of 2 workers are in service" in report.reasons
        assert any("the last start failed" in reason for reason in report.reasons)

        os.kill(second.pid or 0, signal.SIGKILL)
        wait_until(pool, lambda: pool.health_check().status == "unhealthy")
        flag.unlink()
        pool.wait_ready(timeout=LAST)
        for _ in range(2):
            pool.call("pid")
        wait_until(pool, lambda: pool.health_check().status == "healthy")


def test_booting_worker_does_not_show_what_its_predecessor_did(gate: Gate) -> None:
    """The row of a slot starts again with each worker, before that one says anything."""
    gate.open(1)
    with Pool(StopsAtGateInInit, args=(gate.path,), size=1) as pool:
        gate.wait_arrived()
        for _ in range(3):
            pid = pool.call("pid")
        os.kill(pid, signal.SIGKILL)
        gate.wait_arrived()
        (info,) = pool.workers()
        assert (info.state, info.calls, info.busy, info.rss_bytes) == ("starting", 0, 0.0, 0)
        gate.open(1)
        pool.wait_ready(timeout=20)


def test_worker_that_was_given_back_unfit_is_not_called_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody will get it, though the manager has not heard of it yet."""
    with Pool(size=1) as pool:
        monkeypatch.setattr(handle_of(pool), "in_call", b"left")
        assert pool.worker(0).state == "stopping"
        assert (pool.stats().idle, pool.stats().stopping) == (0, 1)
        monkeypatch.undo()
        assert pool.worker(0).state == "idle"
