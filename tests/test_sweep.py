"""The sweep: it finds workers that nobody has and nobody can get, and takes no busy one for such."""

from __future__ import annotations

import threading
from typing import Any, Callable, Iterator

import pytest

from minipool import Pool
from workers import Counter


class Sweeper:
    """Runs everything in the manager's own thread, so that no other look comes in between."""

    def __init__(self, pool: Pool[Any]) -> None:
        assert pool._desk is not None
        self.desk, self.manager = pool._desk, pool._desk.manager

    def run(self, scenario: Callable[[], bool]) -> bool:
        results: list[bool] = []
        done = threading.Event()

        def ordered() -> None:
            try:
                results.append(scenario())
            finally:
                done.set()

        self.manager.order(ordered)
        assert done.wait(20)
        return results[0]

    def look(self, *, sweep: bool) -> None:
        self.manager._last_look = 0.0 if sweep else float("inf")
        self.manager._look()


@pytest.fixture
def pool() -> Iterator[Pool[Counter]]:
    with Pool(Counter, size=1, health_check_interval=None) as pool:
        yield pool


def test_worker_that_is_lost_between_two_steps_is_replaced_by_the_second_sweep(
    pool: Pool[Counter],
) -> None:
    """A worker taken by nobody's lease: an exception came between the claim and the lease."""
    sweeper = Sweeper(pool)

    def lose() -> bool:
        handle = sweeper.desk.acquire(0)
        sweeper.look(sweep=True)
        suspected = handle.tainted is not None
        sweeper.look(sweep=True)
        return not suspected and handle.tainted is not None

    before = pool.workers()[0].pid
    assert sweeper.run(lose)
    with pool.checkout(timeout=20) as w:
        assert w.call("pid") != before


def test_looks_between_two_sweeps_condemn_nobody(pool: Pool[Counter]) -> None:
    """There is a look at every death and every order, a moment after the last: it proves nothing."""
    sweeper = Sweeper(pool)

    def look_often() -> bool:
        handle = sweeper.desk.acquire(0)
        sweeper.look(sweep=True)
        for _ in range(5):
            sweeper.look(sweep=False)
        well = handle.tainted is None
        sweeper.desk.give_back(handle)
        return well

    assert sweeper.run(look_often)
    assert pool.stats().workers_lost == 0


def test_busy_worker_that_every_sweep_finds_between_two_leases_is_not_lost(
    pool: Pool[Counter],
) -> None:
    """It was given back since the sweep before, so somebody had it: it is used, not lost."""
    sweeper = Sweeper(pool)

    def sweep_between_leases() -> bool:
        for _ in range(5):
            handle = sweeper.desk.acquire(0)
            sweeper.look(sweep=True)
            if handle.tainted is not None:
                return False
            sweeper.desk.give_back(handle)
        return True

    assert sweeper.run(sweep_between_leases)
    assert pool.stats().workers_lost == 0


def test_pool_at_rest_is_left_alone_for_longer_unless_somebody_counts_on_each_look() -> None:
    def patience(**options: Any) -> float:
        with Pool(Counter, size=1, health_check_interval=None, **options) as pool:
            sweeper, found = Sweeper(pool), []

            def ask() -> bool:
                sweeper.look(sweep=True)
                found.extend(sweeper.manager._patience() for _ in range(2))
                return sweeper.manager._still()

            assert sweeper.run(ask)
            if not options:
                pool.hooks["utilization"].append(lambda *event: None)
                assert sweeper.run(ask)
                assert found.pop() == pytest.approx(1.0, abs=0.01)
            return found[1]

    assert patience() == pytest.approx(3.0, abs=0.01)
    assert patience(lease_timeout=60.0) == pytest.approx(1.0, abs=0.01)
    assert patience(leak_warn_after=60.0) == pytest.approx(1.0, abs=0.01)


def test_manager_looks_again_after_every_lease_and_every_loss(pool: Pool[Counter]) -> None:
    """Only a pool in which nothing has moved since a look that found nothing is left alone."""
    sweeper = Sweeper(pool)
    manager, desk = sweeper.manager, sweeper.desk

    def settle() -> bool:
        sweeper.look(sweep=True)
        manager._patience()
        return manager._still()

    def move() -> bool:
        if not settle():
            return False
        desk.give_back(desk.acquire(0))
        after_a_lease = manager._still()
        if not settle():
            return False
        token = manager.turnstile.try_take()
        assert token is not None
        after_a_loss = manager._still()
        manager.turnstile.publish(*token)
        return not after_a_lease and not after_a_loss

    assert sweeper.run(move)
