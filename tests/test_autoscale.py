"""Autoscale: what the optimizer decides is carried out, gently, while the pool is open."""

from __future__ import annotations

import gc
import threading
from typing import Any, Iterator

import pytest

from ears import Ear, handle_of, wait_until
from minipool import ConfigError, Pool
from minipool.observe.autoscale import Autoscaler
from minipool.observe.reading import read
from rogues import Stateful

LAST = 20.0


@pytest.fixture
def pool() -> Iterator[Pool[Any]]:
    with Pool(Stateful, size=3, min_size=1, max_size=6, checkout_timeout=LAST) as made:
        yield made


def scalers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "minipool-autoscale"]


# -- gently smaller ------------------------------------------------------------------------------


def test_gentle_resize_lets_idle_workers_go(pool: Pool[Any]) -> None:
    ear = Ear(pool, "worker.terminate", "pool.resized")
    pool.resize(1, gentle=True)

    ear.wait("worker.terminate", 2)
    assert {event.metadata["reason"] for event in ear.of("worker.terminate")} == {
        "the pool has more workers than its load needs"
    }
    assert ear.of("pool.resized")[0].measurements == {"size": 1, "previous": 3}
    assert (pool.stats().size, pool.stats().workers) == (1, 1)


def test_gentle_resize_leaves_who_is_busy_or_has_a_session_warm(pool: Pool[Any]) -> None:
    """The size sinks no further than that, so nobody is started for those who stay."""
    ear = Ear(pool, "worker.terminate", "pool.resized", "worker.init")
    with pool.checkout(session="ada") as w:
        w.call("add", 1)
        warm = w.worker_id
    with pool.checkout() as busy:
        assert busy.worker_id != warm
        pool.resize(1, gentle=True)
        ear.wait("worker.terminate")
        assert busy.call("add", 1) == 1
    wait_until(pool, lambda: pool.stats().workers == 2)

    assert ear.of("pool.resized")[0].measurements == {"size": 2, "previous": 3}
    assert (len(ear.of("worker.terminate")), ear.of("worker.init")) == (1, [])
    assert {info.worker_id for info in pool.workers()} == {warm, busy_id(ear, warm)}
    with pool.checkout(session="ada") as w:
        assert w.affinity == "hit"


def busy_id(ear: Ear, warm: int) -> int:
    gone = ear.of("worker.terminate")[0].metadata["worker_id"]
    return next(slot for slot in range(3) if slot not in (warm, gone))


def test_gentle_resize_makes_larger_as_well(pool: Pool[Any]) -> None:
    pool.resize(5, gentle=True)

    wait_until(pool, lambda: pool.stats().idle == 5)
    assert pool.stats().size == 5


# -- by itself -----------------------------------------------------------------------------------


def test_idle_pool_shrinks_by_itself() -> None:
    """To its smallest size, one by one; and its thread ends with the pool."""
    pool = Pool(Stateful, size=3, min_size=1, max_size=3, autoscale=True, optimization_interval=0.1)
    assert not scalers(), "not before it is opened"
    ear = Ear(pool, "pool.resized")
    with pool:
        assert len(scalers()) == 1
        ear.wait("pool.resized", 2)
        wait_until(pool, lambda: pool.stats().workers == 1)
    assert [event.measurements["size"] for event in ear.heard] == [2, 1]
    assert not scalers()


def test_forgotten_pool_is_not_kept() -> None:
    pool = Pool(Stateful, size=2, min_size=1, autoscale=True, optimization_interval=3600.0).open()
    ear = Ear(pool, "pool.terminate")
    ticker = pool.hooks["pool.init"][0].__self__  # type: ignore[attr-defined]
    wait_until(pool, lambda: bool(ticker._tick.__self__._history))
    threads = scalers()
    del pool
    gc.collect()

    ear.wait("pool.terminate")
    for thread in threads:
        thread.join(LAST)
        assert not thread.is_alive()


def told(autoscaler: Autoscaler, pool: Pool[Any], minutes: float, **facts: Any) -> list[str]:
    """Let minutes pass in which a pool looks so; return what was decided."""
    decisions = []
    for _ in range(int(60 * minutes)):
        old = autoscaler.seen  # type: ignore[attr-defined]
        now = read(pool)._replace(
            at=old.at + 1, served=old.served + 1, leased=old.leased + facts.get("used", 0.0),
            queue_depth=facts.get("line", 0), demand=facts.get("general", facts.get("line", 0)),
        )  # fmt: skip
        if "wait" in facts:
            counts = list(old.wait_times)
            counts[facts["wait"]] += 1
            now = now._replace(wait_times=tuple(counts))
        autoscaler.seen = now  # type: ignore[attr-defined]
        decision = autoscaler.tick()
        decisions += [decision] if decision is not None else []
    return [decision.reason for decision in decisions]


@pytest.fixture
def scaler(pool: Pool[Any]) -> Iterator[Autoscaler]:
    """One whose clock and readings are the test's; its own thread ticks by the real ones, once."""
    scaler = Autoscaler.__new__(Autoscaler)
    scaler.seen = read(pool)  # type: ignore[attr-defined]
    scaler.__init__(pool, read=lambda pool: scaler.seen)  # type: ignore[misc,attr-defined]
    scaler._ticker.close()
    yield scaler


def test_busy_pool_grows_and_a_quiet_one_shrinks_later(scaler: Autoscaler, pool: Pool[Any]) -> None:
    assert told(scaler, pool, 1.1, used=0.95, line=6)[-1] == "95% in use and 6 waiting"
    assert pool.stats().size == 5
    wait_until(pool, lambda: pool.stats().idle == 5)

    told(scaler, pool, 4, used=0.1)
    assert pool.stats().size == 5, "too early"
    told(scaler, pool, 2, used=0.1)
    wait_until(pool, lambda: pool.stats().workers == 4)
    assert pool.stats().size == 4


def test_line_for_one_certain_worker_makes_no_pool_grow(
    scaler: Autoscaler, pool: Pool[Any]
) -> None:
    told(scaler, pool, 3, used=0.95, line=6, general=0)
    assert pool.stats().size == 3


def test_reading_tells_how_many_of_the_line_any_worker_could_serve(pool: Pool[Any]) -> None:
    ear = Ear(pool, "queue.depth")
    pool.options(session="ada").call("add", 1)
    leases = [pool.checkout(timeout=LAST) for _ in range(6)]
    one_of = pool.options(session="ada", affinity="strict", timeout=LAST)
    waiters = [threading.Thread(target=one_of.call, args=("add", 1))]
    waiters += [threading.Thread(target=pool.options(timeout=LAST).call, args=("add", 1))]
    heard = len(ear.heard)
    for waiter in waiters:
        waiter.start()
    ear.wait("queue.depth", heard + 2)
    wait_until(pool, lambda: read(pool).queue_depth == 2)
    assert read(pool).demand == 1
    for lease in leases:
        lease.release()
    for waiter in waiters:
        waiter.join(LAST)


def test_overflow_is_given_where_callers_wait_too_long(scaler: Autoscaler, pool: Pool[Any]) -> None:
    """It is what a reading tells, and what the staff may add to the size."""
    assert read(pool).overflow == 0
    told(scaler, pool, 1.1, used=0.8, line=2, wait=180)  # a bucket of about a second

    assert read(pool).overflow == 1
    assert pool.stats().size == 3


def test_closed_pool_is_left_alone(scaler: Autoscaler, pool: Pool[Any]) -> None:
    pool.close()

    assert told(scaler, pool, 7) == []


def test_gentle_resize_that_finds_nobody_tells_nothing() -> None:
    with Pool(Stateful, size=2, min_size=1, checkout_timeout=LAST) as pool:
        ear = Ear(pool, "pool.resized")
        with pool.checkout(), pool.checkout():
            pool.resize(1, gentle=True)
        assert not ear.heard
        assert pool.stats().size == 2


def test_worker_given_back_meanwhile_is_not_taken_for_idle(pool: Pool[Any]) -> None:
    """It is claimed or left: nobody loses the worker he has just taken."""
    with pool.checkout() as w:
        handle = handle_of(pool, w.worker_id)
        pool.resize(1, gentle=True)
        assert handle.tainted is None
        assert not handle.condemned


@pytest.mark.parametrize("options", [{}, {"size": 4}, {"size": 2, "min_size": 2, "max_size": 2}])
def test_autoscale_needs_room(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"autoscale=True: min_size and max_size are both \d+"):
        Pool(Stateful, autoscale=True, **options)


@pytest.mark.parametrize("value", [0, -1.0, None, "60"])
def test_interval_is_checked(value: Any) -> None:
    with pytest.raises(ConfigError, match="optimization_interval="):
        Pool(Stateful, optimization_interval=value)
