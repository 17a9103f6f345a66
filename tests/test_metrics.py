"""Metrics: what two readings of a pool tell, and for how long it is remembered."""

from __future__ import annotations

import copy
import gc
import random
import threading
import time
import tracemalloc
import types
from typing import Any, Callable, Iterator

import pytest

import rogues
from ears import Ear, handle_of, wait_until
from gates import Gate
from minipool import CallTimeout, CheckoutTimeout, Metrics, Pool, Snapshot, WorkerDied
from minipool.engine import table as t
from minipool.observe.reading import _EMPTY, Reading, WorkerSnapshot, read
from minipool.telemetry import Hooks
from rogues import Stateful
from scripts import run

LAST = 20.0


@pytest.fixture
def pool() -> Iterator[Pool[Any]]:
    with Pool(Stateful, size=2, checkout_timeout=LAST) as made:
        yield made


class Told:
    """Stands in for a pool: what is read of it is what the test says, at the time it says."""

    closed, _desk = False, None

    def __init__(self, **facts: Any) -> None:
        self.hooks = Hooks("told")
        facts.setdefault("workers", tuple(worker(slot) for slot in range(4)))
        self.reading = _EMPTY._replace(status="open", pool_size=4, name="told", **facts)

    def tick(self, metrics: Metrics, seconds: float = 1.0, **change: Any) -> Snapshot:
        """Let time pass, during which the totals change by so much, and sample."""
        old = self.reading
        new = {
            name: getattr(old, name) + more if isinstance(more, (int, float)) else more
            for name, more in change.items()
        }
        if "calls" in change:
            new["call_times"] = added(old.call_times, change["calls"], 0.001)
        self.reading = old._replace(at=old.at + seconds, wall=old.wall + seconds, **new)
        return metrics.sample()


def added(counts: tuple[int, ...], count: int, seconds: float) -> tuple[int, ...]:
    bucket = t.bucket(int(seconds * 1e9))
    return (*counts[:bucket], counts[bucket] + count, *counts[bucket + 1 :])


def watched(**facts: Any) -> tuple[Told, Metrics]:
    told = Told(**facts)
    metrics = Metrics(told, interval=None, read=lambda pool: pool.reading)
    metrics.sample()
    return told, metrics


def worker(slot: int, generation: int = 1, **facts: Any) -> WorkerSnapshot:
    common = {"state": "idle", "uptime": 1.0, "rss_bytes": 1000, "cpu_seconds": 0.0}
    empty = dict.fromkeys(WorkerSnapshot._fields)
    return WorkerSnapshot(
        **{**empty, **common, "worker_id": slot, "generation": generation, **facts}
    )  # type: ignore[arg-type]


# -- one snapshot --------------------------------------------------------------------------------


def test_snapshot_tells_what_was_done(pool: Pool[Any]) -> None:
    """Rates and quantiles are of what happened since, gauges of now."""
    with Metrics(pool, interval=None) as metrics:
        metrics.sample()
        with pool.checkout(session="ada") as w:
            for _ in range(50):
                w.call("add", 1)
            now = metrics.sample()

    assert (now.active, now.idle, now.starting, now.pool_size) == (1, 1, 0, 2)
    assert (now.calls, now.call_count, now.wait_count, now.queue_depth) == (50, 50, 1, 0)
    assert 0 < (now.call_p50 or 0) <= (now.call_p95 or 0) <= (now.call_p99 or 0) < LAST
    assert now.throughput > 0 and 0 < now.utilization <= 0.5
    assert (now.health, now.health_score, now.status) == ("green", 100.0, "open")
    assert sorted(worker.calls for worker in now.workers) == [0, 50]
    assert [w.session for w in now.workers if w.state == "leased"] == ["ada"]
    assert now.rss_bytes == sum(w.rss_bytes for w in now.workers) > 1_000_000
    assert (now.workers_started, now.crashes, now.active_sessions) == (2, 0, 1)


def test_spare_is_shown_and_is_not_in_service() -> None:
    with Pool(Stateful, size=1, spares=1) as pool:
        wait_until(pool, lambda: pool.stats().spare == 1)
        now = Metrics(pool, interval=None).sample()

    assert sorted(worker.state for worker in now.workers) == ["idle", "spare"]
    assert (now.pool_size, now.idle, now.health_score) == (1, 1, 100.0)


def test_errors_are_told_by_type(pool: Pool[Any], gate: Gate) -> None:
    """What is the pool's fault is no user's error, and the other way round."""
    with Metrics(pool, interval=None) as metrics:
        metrics.sample()
        pool.call("add", 1)
        with pytest.raises(KeyError):
            pool.call(rogues.raise_it, "KeyError", "k")
        with pytest.raises(WorkerDied):
            pool.call(rogues.kill_self)
        with pytest.raises(CallTimeout), pool.checkout() as w:
            w.options(timeout=0.05).call("wait_at", gate.path)
        wait_until(pool, lambda: pool.stats().idle == 2)
        with pool.checkout(), pool.checkout(), pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0)
        now = metrics.sample()

    told = {name: now.errors[name] for name in ("WorkerDied", "CallTimeout", "CheckoutTimeout")}
    assert told == {"WorkerDied": 1, "CallTimeout": 1, "CheckoutTimeout": 1}
    assert (now.timeouts, now.checkout_timeouts, now.crashes) == (1, 1, 2)
    assert (now.calls, now.user_errors) == (2, 1)
    assert (now.error_rate, now.user_error_rate) == (0.5, 0.25)
    assert now.health == "red"


def test_utilization_is_an_integral() -> None:
    """Leased time over workers' time between two samples, whatever is leased at the moment."""
    told, metrics = watched()

    assert told.tick(metrics, served=4.0, leased=1.0).utilization == 0.25
    assert told.tick(metrics, served=4.0, leased=4.0).utilization == 1.0
    assert told.tick(metrics, served=4.0).utilization == 0.0
    assert told.tick(metrics).utilization == 0.0, "nobody served"
    assert told.tick(metrics, served=4.0, leased=4.1).utilization == 1.0, "a lease in between"


def test_throughput_is_over_the_time_that_really_passed() -> None:
    told, metrics = watched()

    assert told.tick(metrics, 1.0, calls=100).throughput == 100
    assert told.tick(metrics, 4.0, calls=100).throughput == 25, "a tick that came late"
    assert told.tick(metrics, 1.0).throughput == 0


def test_quantiles_and_rates_of_errors_are_of_the_last_minute() -> None:
    """What is older leaves them, but stays in the totals."""
    told, metrics = watched()
    told.tick(metrics, call_times=added(told.reading.call_times, 10, 2.0), faults=10)
    before = told.tick(metrics, calls=10)

    assert before.call_count == 20
    assert before.call_p50 == pytest.approx(0.001, rel=0.06)
    assert before.call_p99 == pytest.approx(2.0, rel=0.06)
    assert before.call_mean == pytest.approx(1.0005, rel=0.06)
    assert before.error_rate == pytest.approx(10 / 30)
    for _ in range(60):
        last = told.tick(metrics, errors={"WorkerDied": 10})
    assert (last.call_count, last.error_rate, last.errors) == (0, 0.0, {"WorkerDied": 10})
    assert last.call_p50 is last.call_p99 is last.call_mean is None


def test_samples_far_apart_tell_what_was_in_between() -> None:
    told, metrics = watched()
    for _ in range(3):
        last = told.tick(metrics, 120.0, calls=240)

    assert (last.call_count, last.throughput) == (240, 2)


def test_cpu_of_a_worker_is_a_share_of_the_last_ten_seconds() -> None:
    """And that of another worker in its slot is its own."""
    told, metrics = watched(workers=(worker(0), worker(1)))
    assert metrics.latest().workers[0].cpu is None
    for second in range(1, 15):
        said = second - second % 2  # it is not said at each tick
        last = told.tick(metrics, workers=(worker(0, cpu_seconds=said / 2), worker(1)))
    assert [w.cpu for w in last.workers] == [0.5, 0.0]
    assert last.cpu == 0.5
    last = told.tick(metrics, workers=(worker(0, generation=2, cpu_seconds=9.0), worker(1)))
    assert [w.cpu for w in last.workers] == [None, 0.0]


def test_reading_that_is_not_later_changes_nothing() -> None:
    """Of two threads that sample at once, the slower one gets what the faster one took."""
    told, metrics = watched()
    latest = told.tick(metrics, calls=5)

    assert told.tick(metrics, 0.0) is latest
    assert told.tick(metrics, -0.5) is latest
    assert metrics.latest() is latest
    assert len(metrics.history()) == 2


def test_quantiles_are_within_six_percent_of_the_exact_ones() -> None:
    """Of a million latencies, of several shapes, by nearest rank; so is the mean."""
    source = random.Random(5)
    shapes: list[Callable[[], float]] = [
        lambda: source.lognormvariate(-7, 1.5),
        lambda: source.paretovariate(1.2) * 1e-5,
        lambda: source.uniform(1e-6, 2e-2) if source.random() < 0.9 else source.gauss(1, 0.05),
    ]
    for shape in shapes:
        times = sorted(int(shape() * 1e9) for _ in range(333_334))
        counts = [0] * t.BUCKETS
        for ns in times:
            counts[t.bucket(ns)] += 1
        for fraction in (0.01, 0.5, 0.9, 0.95, 0.99, 0.999):
            exact = times[-(-int(fraction * 1000) * len(times) // 1000) - 1]
            assert (t.quantile(counts, fraction) or 0) * 1e9 == pytest.approx(exact, rel=0.06)
        if times[-1] < t.bucket_start_ns(t.BUCKETS - 1):
            assert (t.mean(counts) or 0) * 1e9 == pytest.approx(sum(times) / len(times), rel=0.06)


# -- history -------------------------------------------------------------------------------------


def test_history_is_by_seconds_for_five_minutes_and_by_tens_for_an_hour() -> None:
    told, metrics = watched()
    for _ in range(5_000):
        told.tick(metrics)
    now = told.reading.at

    assert [s.at for s in metrics.history(300)] == [now - 300 + n for n in range(301)]
    hour = metrics.history(3600)
    times = [s.at for s in hour]
    assert times == sorted(set(times))
    assert now - 3600 <= times[0] <= now - 3590
    steps = {b - a for a, b in zip(times[:-302], times[1:-302])}
    assert steps == {10.0}
    assert 301 + 329 <= len(hour) <= 301 + 331
    assert metrics.history(0) == [metrics.latest()]


def test_memory_is_flat_after_an_hour() -> None:
    """The second hour takes nothing more, and keeps no worker but in the latest snapshot."""
    told, metrics = watched()

    def hour() -> int:
        for tick in range(640):  # sparse at first, to be quick; at the end all is as always
            busy = worker(1, cpu_seconds=tick)
            told.tick(metrics, 10.0 if tick < 330 else 1.0, calls=7, workers=(worker(0), busy))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = hour()
        assert hour() - first < 50_000
    finally:
        tracemalloc.stop()
    assert not any(snapshot.workers for snapshot in metrics.history(3600)[:-1])
    assert len(metrics.latest().workers) == 2


def test_short_interval_keeps_no_more_than_a_long_one() -> None:
    told, metrics = watched()
    for _ in range(4_000):
        told.tick(metrics, 0.1)

    assert 290 <= len(metrics.history(300)) <= 302


def test_roll_tells_of_the_worst_of_its_ten_seconds() -> None:
    """Short trouble does not vanish from the hour; rates are those of all ten seconds."""
    told, metrics = watched()
    for second in range(400):
        line = 7 if second == 13 else 0
        leased = 4.0 if second == 13 else 0.0
        line -= told.reading.queue_depth
        told.tick(metrics, served=4.0, leased=leased, calls=50, queue_depth=line)
    roll = metrics.history(3600)[1]

    assert (roll.at, roll.queue_depth, roll.health) == (20.0, 7, "yellow")
    assert (roll.throughput, roll.utilization) == (50, 0.1)


# -- life ----------------------------------------------------------------------------------------


def sampled(metrics: Metrics, fits: Callable[[Snapshot], bool]) -> None:
    """Wait until the sampler has seen something."""
    seen = threading.Event()
    take = metrics._take

    def watch(reading: Reading) -> Snapshot:
        snapshot = take(reading)
        if fits(snapshot):
            seen.set()
        return snapshot

    metrics._take = watch  # type: ignore[method-assign]
    assert seen.wait(LAST)


def samplers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "minipool-metrics"]


def test_sampler_lives_from_opening_to_close() -> None:
    """Made before the pool is opened, it waits without a thread; at close() it sees the end."""
    pool = Pool(Stateful, size=1)
    metrics = Metrics(pool, interval=0.01)
    assert not samplers()
    assert (metrics.latest().status, metrics.latest().health) == ("new", "red")
    with pool:
        pool.call("add", 1)
        sampled(metrics, lambda snapshot: snapshot.calls == 1 and snapshot.health == "green")
        assert len(samplers()) == 1
    assert not samplers()
    assert (metrics.latest().status, metrics.latest().calls) == ("closed", 1)
    assert metrics.history()[-1].status == "closed"
    metrics.close()


def test_closed_metrics_leave_the_pool_alone(pool: Pool[Any]) -> None:
    listeners = {event: list(heard) for event, heard in pool.hooks.items()}
    with Metrics(pool, interval=0.01) as metrics:
        sampled(metrics, lambda snapshot: True)
        latest = metrics.latest()
    metrics.close()

    assert not samplers()
    assert dict(pool.hooks) == listeners
    assert metrics.latest().at >= latest.at


def test_pool_that_is_closed_before_it_was_opened_has_no_sampler() -> None:
    pool = Pool(Stateful, size=1)
    metrics = Metrics(pool, interval=0.01)
    pool.close()

    assert not samplers()
    assert metrics.latest().status == "closed"


def test_metrics_do_not_keep_the_pool() -> None:
    """A forgotten pool ends, and its sampler with it; what was seen can still be read."""
    pool = Pool(Stateful, size=1).open()
    ear = Ear(pool, "pool.terminate")
    metrics = Metrics(pool, interval=60)
    metrics.sample()
    del pool
    gc.collect()

    ear.wait("pool.terminate")
    for thread in samplers():
        thread.join(LAST)
    assert metrics.latest().name
    with pytest.raises(ReferenceError):
        metrics.sample()


@pytest.mark.logs_errors
def test_failed_sample_is_logged_and_the_next_one_taken(pool: Pool[Any], caplog: Any) -> None:
    failures = [ValueError("no reading")]

    def read_sometimes(pool: Any) -> Reading:
        if failures:
            raise failures.pop()
        return read(pool)

    with Metrics(pool, interval=0.01, read=read_sometimes) as metrics:
        sampled(metrics, lambda snapshot: True)
    assert "no reading" in caplog.text


def test_two_pools_do_not_mix(pool: Pool[Any]) -> None:
    with Pool(Stateful, size=1, name="other") as other:
        first, second = Metrics(pool, interval=None), Metrics(other, interval=None)
        first.sample(), second.sample()
        for _ in range(3):
            pool.call("add", 1)
        other.call("add", 1)

        assert (first.sample().calls, second.sample().calls) == (3, 1)
        assert (first.latest().pool_size, second.latest().pool_size) == (2, 1)
        assert second.latest().name == "other"


def test_fork_is_refused_a_sample_and_may_read_the_last_one(tmp_path: Any) -> None:
    status, out, err = run(
        tmp_path,
        """\
        import os

        import minipool

        if __name__ == "__main__":
            with minipool.Pool(size=1) as pool, minipool.Metrics(pool, interval=60) as metrics:
                pool.call(abs, -1)
                metrics.sample()
                child = os.fork()
                if child == 0:
                    assert metrics.latest().calls == 1
                    try:
                        metrics.sample()
                    except minipool.PoolForked:
                        os._exit(7)
                    os._exit(1)
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
    )
    assert (status, out.strip()) == (0, "7"), err


@pytest.mark.parametrize("interval", [0, -1, float("nan")])
def test_interval_must_be_more_than_nothing(interval: float) -> None:
    with pytest.raises(ValueError, match="interval="):
        Metrics(Told(), interval=interval)


def test_tick_of_two_hundred_workers_takes_five_milliseconds(pool: Pool[Any]) -> None:
    """The quickest of several, as others use this machine; stand-ins, with all counters used."""
    desk = copy.copy(pool._desk)
    assert desk is not None
    desk.manager = copy.copy(desk.manager)
    desk.manager.fleet = fleet = copy.copy(desk.manager.fleet)
    first, fleet.handles, fleet.table = handle_of(pool), {}, t.Table("many")
    for slot in range(200):
        handle = fleet.handles[slot] = copy.copy(first)
        handle.slot, handle.row = slot, fleet.table.row(slot)
        handle.row[t.CALL_ID] = handle.row[t.LEASES] = 10**6
        for word in range(t.WAIT_TIMES, t.ROW_WORDS):
            handle.row[word] = random.randrange(10**6)
    told = types.SimpleNamespace(_desk=desk, _sessions=(), config=pool.config, closed=False)
    metrics, times = Metrics(pool, interval=None, read=lambda pool: read(told)), []  # type: ignore[arg-type]
    for _ in range(15):
        start = time.perf_counter()
        assert len(metrics.sample().workers) == 200
        times.append(time.perf_counter() - start)
    assert min(times) <= 0.005
    fleet.table.close()
