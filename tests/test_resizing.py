"""The last word on the size counts: orders, queues and leases against each other, on real pools."""

from __future__ import annotations

import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ears import Ear, handle_of, wait_until
from minipool import CheckoutTimeout, MinipoolError, Pool
from minipool.engine.turnstile import Turnstile
from workers import Counter

LAST = 20.0


def turns(pool: Pool[Any], count: int = 2) -> None:
    """Wait until the manager has looked round again, having seen what is now."""
    assert pool._desk is not None
    for _ in range(count):
        looks: list[int] = []
        pool._desk.manager.order(lambda looks=looks: looks.append(1))
        wait_until(pool, lambda looks=looks: bool(looks))


def resized(pool: Pool[Any], size: int) -> None:
    pool.resize(size)
    wait_until(pool, lambda: pool.stats().workers == pool.stats().idle == size)


# -- an order is not undone ----------------------------------------------------------------------


def test_smaller_pool_stays_so_whoever_queues() -> None:
    with Pool(size=3, checkout_timeout=LAST) as pool, ThreadPoolExecutor(3) as threads:
        resized(pool, 1)
        ear = Ear(pool, "queue.depth", "worker.init")
        with pool.checkout():
            waiters = [threads.submit(pool.call, os.getpid) for _ in range(3)]
            ear.wait("queue.depth", 3)
            turns(pool)
            assert (pool.stats().size, pool.stats().workers) == (1, 1)
        assert len({waiter.result(LAST) for waiter in waiters}) == 1
        turns(pool)
        assert (pool.stats().size, ear.of("worker.init")) == (1, [])


def test_smaller_pool_stays_so_whoever_asks_without_waiting() -> None:
    with Pool(size=3) as pool:
        resized(pool, 1)
        with pool.checkout():
            for _ in range(3):
                with pytest.raises(CheckoutTimeout, match="size 1, leased 1"):
                    pool.checkout(timeout=0)
                turns(pool)
        assert (pool.stats().size, pool.stats().workers) == (1, 1)


def test_smaller_lazy_pool_grows_no_further_than_that() -> None:
    with Pool(size=4, lazy=True) as pool:
        pool.resize(2)
        leases = [pool.checkout(timeout=LAST) for _ in range(2)]
        with pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0.1)
        assert pool.stats().size == 2
        for lease in leases:
            lease.release()


def test_gentle_order_is_not_undone_either() -> None:
    with Pool(size=3) as pool:
        pool.resize(1, gentle=True)
        wait_until(pool, lambda: pool.stats().workers == 1)
        with pool.checkout(), pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0.1)
        turns(pool)
        assert (pool.stats().size, pool.stats().workers) == (1, 1)


# -- those that stay, stay -----------------------------------------------------------------------


def test_those_that_stay_are_no_overflow_of_those_that_leave() -> None:
    """Two long leases go on, on workers that go afterwards; the two that stay serve meanwhile."""
    with Pool(size=4, overflow_idle=0.02, checkout_timeout=LAST) as pool:
        ear, leases = Ear(pool, "utilization"), [pool.checkout() for _ in range(4)]
        pool.resize(2)
        leaving = [lease for lease in leases if handle_of(pool, lease.worker_id).condemned]
        staying = {lease.pid for lease in leases if lease not in leaving}
        for lease in leases:
            if lease not in leaving:
                lease.release()
        ear.wait("utilization", 20)  # twenty looks, each later than overflow_idle
        assert {pool.call(os.getpid) for _ in range(4)} <= staying
        assert {info.pid for info in pool.workers() if info.state == "idle"} == staying
        assert pool.health_check().status == "healthy"
        for lease in leaving:
            lease.release()
        wait_until(pool, lambda: pool.stats().workers == 2)
        assert {info.pid for info in pool.workers()} == staying


def test_larger_again_does_not_count_on_those_that_leave() -> None:
    with Pool(size=3, checkout_timeout=LAST) as pool:
        leases = [pool.checkout() for _ in range(3)]
        pool.resize(1)
        turns(pool)
        assert pool.health_check().reasons == ()
        pool.resize(3)
        pool.wait_ready(timeout=LAST)
        assert (pool.stats().idle, pool.stats().leased) == (2, 3)
        for lease in leases:
            lease.release()
        wait_until(pool, lambda: (pool.stats().workers, pool.stats().idle) == (3, 3))


def test_worker_that_leaves_is_not_counted_as_ready() -> None:
    """health_check, wait_ready and warm_up look at those that are there to stay."""
    with Pool(Counter, size=2, checkout_timeout=LAST) as pool:
        first, second = pool.checkout(), pool.checkout()
        pool.resize(1)
        turns(pool)
        leaving, staying = (
            (first, second) if handle_of(pool, first.worker_id).condemned else (second, first)
        )
        handle_of(pool, staying.worker_id).kill()
        wait_until(pool, lambda: pool.stats().workers_lost == 1)
        pool.wait_ready(timeout=LAST)
        assert pool.stats().idle == 1, "not before another was there"
        assert pool.warm_up([("add", (1,))]).workers == 1
        leaving.release()


# -- waiting for one certain worker --------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_who_waits_for_one_certain_worker_makes_no_pool_grow(lazy: bool) -> None:
    pool = Pool(Counter, size=1 + lazy, min_size=1, max_size=4, max_overflow=2, lazy=lazy)
    with pool, ThreadPoolExecutor(1) as threads:
        pool.options(session="ada").call("add", 0)
        ear = Ear(pool, "queue.depth", "worker.init")
        with pool.checkout():
            options = pool.options(session="ada", affinity="strict", timeout=LAST)
            call = threads.submit(options.call, "add", 1)
            ear.wait("queue.depth")
            turns(pool, 5)
            assert (pool.stats().size, pool.stats().workers) == (1, 1)
        assert call.result(LAST) == 1
        with pool.checkout(), pytest.raises(CheckoutTimeout):
            pool.checkout(session="ada", affinity="strict", timeout=0)
        turns(pool)
        assert (pool.stats().size, ear.of("worker.init")) == (1, [])


def test_warm_up_that_waits_for_a_lease_makes_no_pool_grow() -> None:
    pool = Pool(Counter, size=2, max_size=4)
    with pool, ThreadPoolExecutor(1) as threads:
        ear = Ear(pool, "queue.depth", "worker.init", "pool.warmup")
        with pool.checkout():
            warm_up = threads.submit(pool.warm_up, [("add", (1,))])
            ear.wait("queue.depth")
            turns(pool, 5)
            assert pool.stats().size == 2
        assert warm_up.result(LAST).succeeded == 2
        assert ear.of("worker.init") == []


def test_waiter_that_takes_any_worker_after_a_while_makes_it_grow() -> None:
    """As soon as it does: not at the manager's next look."""
    pool = Pool(Counter, size=1, max_size=2, affinity_wait=0.1)
    with pool:
        pool.options(session="ada").call("add", 0)
        held = pool.checkout()
        with pool.checkout(session="ada", timeout=LAST) as w:
            assert (w.affinity, pool.stats().size) == ("moved", 2)
        held.release()


def test_waiter_is_told_of_again_when_any_slot_will_do() -> None:
    """So that whoever listens may bring one: nothing else would tell."""
    told: list[Any] = []
    turnstile = Turnstile(on_queue=lambda waiter: told.append(waiter.wants))
    turnstile.admit(7, "first")
    assert turnstile.take(0.02, wants=7, widen_after=0.01) is None
    assert told == [7, None]


# -- a random walk -------------------------------------------------------------------------------


class Model:
    """How many workers there are to be, and which leases end with their worker."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.leases: dict[Any, bool] = {}  # lease -> its worker will go, or is dead

    def resize(self, size: int) -> int:
        """Return how many leases the workers of which must go with them."""
        staying = [lease for lease, leaves in self.leases.items() if not leaves]
        self.size = size
        return max(0, len(staying) - size)

    @property
    def usable(self) -> int:
        """How many more leases there can be."""
        return self.size - sum(not leaves for leaves in self.leases.values())


def walk(seed: int, steps: int) -> None:
    chance, model = random.Random(seed), Model(3)
    pool = Pool(size=3, checkout_timeout=LAST, overflow_idle=0.01)
    with pool, ThreadPoolExecutor(4) as threads:
        for _ in range(steps):
            what = chance.choice(["resize", "lease", "release", "kill", "queue", "ask"])
            leases = list(model.leases)
            if what == "resize":
                size = chance.randint(1, 5)
                must_go = model.resize(size)
                pool.resize(size)
                for lease in leases:
                    if not model.leases[lease]:
                        model.leases[lease] = handle_of(pool, lease.worker_id).condemned
                        must_go -= model.leases[lease]
                assert must_go == 0, "as many leased workers go as must, and no more"
            elif what == "lease" and model.usable:
                model.leases[pool.checkout()] = False
            elif what == "release" and leases:
                lease = chance.choice(leases)
                del model.leases[lease]
                lease.release()
            elif what == "kill" and leases:
                lease = chance.choice(leases)
                model.leases[lease] = True
                with pytest.raises(MinipoolError):
                    lease.call(os.kill, lease.pid, signal.SIGKILL)
            elif what == "queue" and model.usable:
                calls = [threads.submit(pool.call, os.getpid) for _ in range(4)]
                assert all(call.result(LAST) for call in calls)
            elif what == "ask" and not model.usable:
                with pytest.raises(CheckoutTimeout):
                    pool.checkout(timeout=0)
            wait_until(pool, lambda: pool.stats().idle == model.usable)
            assert pool.stats().size == model.size
        for lease in list(model.leases):
            lease.release()
        wait_until(pool, lambda: pool.stats().workers == pool.stats().idle == model.size)


@pytest.mark.parametrize("seed", range(3))
def test_random_walk_agrees_with_the_model(seed: int) -> None:
    """Resize, lease, give back, kill, queue, ask: always as many are free as the model says."""
    walk(seed, 40)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 112))
def test_long_random_walk_agrees_with_the_model(seed: int) -> None:
    walk(seed, 200)
