"""How many workers there are: on demand, within bounds, by order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ears import Ear, handle_of, wait_until
from gates import Gate, pass_gate
from minipool import CheckoutTimeout, ConfigError, Pool
from troublemakers import StopsAtGateInHealthCheck, StopsAtGateInInit
from workers import Counter, getpid


def _pids(pool: Pool[Any]) -> set[int]:
    return {info.pid or 0 for info in pool.workers()}


def _turns(pool: Pool[Any], count: int = 2) -> None:
    """Wait until the manager has looked round again, having seen what is now."""
    desk = pool._desk
    assert desk is not None
    for _ in range(count):
        looks: list[int] = []
        desk.manager.order(lambda looks=looks: looks.append(1))
        wait_until(pool, lambda looks=looks: bool(looks))


def _leased(pool: Pool[Any], count: int) -> list[Any]:
    return [pool.checkout(timeout=20) for _ in range(count)]


# -- lazy --------------------------------------------------------------------------------------


def test_lazy_pool_starts_no_worker_until_one_is_needed() -> None:
    with Pool(Counter, size=3, lazy=True) as pool:
        _turns(pool)
        assert pool.stats().workers_started == 0 and pool.workers() == []
        assert pool.call("add") == 1
        _turns(pool)
        assert pool.stats().workers == pool.stats().workers_started == 1
        assert pool.call("add") == 2, "the next call needs no second worker"


def test_lazy_pool_starts_with_its_minimum() -> None:
    with Pool(Counter, size=4, min_size=2, lazy=True) as pool:
        assert pool.stats().workers_started == pool.stats().workers == 2
        leases = _leased(pool, 3)
        assert pool.stats().workers == 3
        for lease in leases:
            lease.release()


def test_lazy_pool_grows_in_parallel_up_to_its_size(gate: Gate) -> None:
    """Each waiter gets a start of its own, at the same time, and there are no more than size."""
    with Pool(StopsAtGateInInit, args=(gate.path,), size=3, lazy=True) as pool:
        with ThreadPoolExecutor(4) as threads:
            ear = Ear(pool, "queue.depth")
            waiters = [threads.submit(pool.checkout, timeout=20) for _ in range(4)]
            gate.wait_arrived(3)  # three are in their constructors at once
            ear.wait("queue.depth", 4)
            _turns(pool)
            assert (pool.stats().starting, pool.stats().workers) == (3, 3)
            gate.open(3)
            for waiter in waiters:
                waiter.result(20).release()
        pool.wait_ready(timeout=20)
        assert pool.stats().workers_started == pool.stats().workers == 3


def test_lazy_pool_starts_a_worker_for_who_does_not_wait() -> None:
    """A checkout without waiting finds nothing, but is a wish: the next one finds a worker."""
    with Pool(Counter, size=2, lazy=True) as pool:
        with pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0)
        wait_until(pool, lambda: pool.stats().idle == 1)
        with pool.checkout(timeout=0) as w:
            assert w.add() == 1
        assert pool.stats().workers == 1


def test_caller_is_served_by_a_returned_worker_while_another_starts(gate: Gate) -> None:
    """Growth is in the background: who waits takes what comes first."""
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=2, min_size=1, lazy=True)
    gate.open(1)
    with pool, ThreadPoolExecutor(1) as threads:
        gate.wait_arrived()
        lease = pool.checkout()
        waiter = threads.submit(pool.checkout, timeout=20)
        gate.wait_arrived()
        pid = lease.pid
        lease.release()
        assert waiter.result(20).pid == pid
        assert (pool.stats().leased, pool.stats().starting) == (1, 1)
        waiter.result(20).release()


# -- elastic -----------------------------------------------------------------------------------


def test_burst_of_short_calls_does_not_grow_to_the_maximum() -> None:
    """By the time a new worker would be there, the burst is over."""
    with Pool(size=1, max_size=16) as pool:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: pool.call(abs, -1), range(64)))
        _turns(pool)
        assert pool.stats().workers_started <= 8


def test_sustained_load_grows_to_the_maximum_and_not_beyond(gate: Gate) -> None:
    with Pool(size=1, max_size=3) as pool:
        ear = Ear(pool, "worker.init")
        with ThreadPoolExecutor(5) as threads:
            calls = [threads.submit(pool.call, pass_gate, gate.path) for _ in range(5)]
            gate.wait_arrived(3)
            _turns(pool)
            assert (pool.stats().leased, pool.stats().waiting) == (3, 2)
            assert len(ear.of("worker.init")) == 2
            gate.open(5)
            assert len({call.result(20) for call in calls}) == 3
        assert pool.stats().workers == pool.stats().size == 3


def test_no_worker_is_started_after_the_demand_has_ended() -> None:
    """Waiters who gave up, or were served, leave no wish behind."""
    with Pool(size=1, max_size=4) as pool:
        ear = Ear(pool, "worker.init")
        with pool.checkout():
            second = pool.checkout(timeout=20)
            second.release()
        ear.wait("worker.init")
        for _ in range(20):
            pool.call(abs, -1)
        _turns(pool, 5)
        assert pool.stats().workers_started == pool.stats().workers == 2


def test_overflow_workers_are_extra_and_retire_when_idle() -> None:
    """They come while callers queue at full size, and go after overflow_idle seconds."""
    with Pool(size=1, max_overflow=2, overflow_idle=0.1) as pool:
        ear = Ear(pool, "worker.terminate")
        first = pool.checkout()
        leases = _leased(pool, 2)
        assert len({lease.pid for lease in [first, *leases]}) == 3
        assert (pool.stats().workers, pool.stats().size) == (3, 1)
        with pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0.1)
        assert pool.stats().workers == 3, "size and max_overflow are all there may be"
        for lease in [*leases, first]:
            lease.release()
        gone = ear.wait("worker.terminate", 2)
        assert gone.metadata["exitcode"] == 0
        assert pool.stats().workers == 1
        assert pool.call(abs, -1) == 1
        assert (pool.stats().workers_retired, pool.stats().workers_lost) == (2, 0)


def test_idle_workers_above_the_minimum_are_retired_one_at_a_time() -> None:
    """One per max_idle seconds, never one that is leased, never below min_size."""
    with Pool(size=4, min_size=2, max_size=4, max_idle=0.5) as pool:
        ear, sizes = Ear(pool, "worker.terminate"), []
        pool.hooks["worker.terminate"].insert(0, lambda *_: sizes.append(pool.stats().size))
        with pool.checkout() as held:
            first = ear.wait("worker.terminate", 1)
            second = ear.wait("worker.terminate", 2)
            assert sizes == [3, 2], "the second was not told to go together with the first"
            _turns(pool)
            assert (pool.stats().size, pool.stats().workers) == (2, 2)
            assert held.pid not in (first.metadata["pid"], second.metadata["pid"])
            assert first.measurements["lifetime"] >= 0.5
        wait_until(pool, lambda: pool.stats().idle == 2)
        assert len(ear.heard) == 2


def test_shrunken_pool_grows_again_under_load() -> None:
    pool = Pool(size=2, min_size=1, max_size=2, max_idle=0.1)
    ear = Ear(pool, "worker.terminate")
    with pool:
        ear.wait("worker.terminate")
        assert pool.stats().size == 1
        leases = _leased(pool, 2)
        assert len({lease.pid for lease in leases}) == 2
        for lease in leases:
            lease.release()


# -- resize ------------------------------------------------------------------------------------


def test_resize_up_starts_more_in_the_background() -> None:
    with Pool(Counter, size=1) as pool:
        before = _pids(pool)
        pool.resize(3)
        pool.wait_ready(timeout=20)
        assert pool.stats().size == pool.stats().idle == 3
        assert before < _pids(pool)


def test_resize_down_retires_idle_workers() -> None:
    with Pool(Counter, size=3) as pool:
        ear, before = Ear(pool, "worker.terminate"), _pids(pool)
        pool.resize(1)
        ear.wait("worker.terminate", 2)
        assert pool.stats().size == pool.stats().workers == 1
        assert _pids(pool) < before
        assert {event.metadata["exitcode"] for event in ear.heard} == {0}


def test_resize_below_the_busy_count_lets_leases_end() -> None:
    """Nobody's call is cut short; who is too much goes when it is given back."""
    with Pool(Counter, size=3) as pool:
        ear, leases = Ear(pool, "worker.terminate"), _leased(pool, 3)
        pool.resize(1)
        _turns(pool)
        assert [lease.add() for lease in leases] == [1, 1, 1]
        for lease in leases:
            lease.release()
        ear.wait("worker.terminate", 2)
        wait_until(pool, lambda: pool.stats().idle == 1)
        assert pool.call("add") == 2
        assert (pool.stats().workers, pool.stats().workers_lost) == (1, 0)


def test_resize_twice_while_busy_dismisses_no_more_than_needed() -> None:
    """Those dismissed by the first order count for the second: the others stay."""
    with Pool(Counter, size=4) as pool:
        leases = _leased(pool, 4)
        pool.resize(2)
        _turns(pool)
        dismissed = [lease for lease in leases if handle_of(pool, lease.worker_id).condemned]
        kept = {lease.pid for lease in leases if lease not in dismissed}
        assert len(dismissed) == 2
        for lease in leases:
            if lease not in dismissed:
                lease.release()
        pool.resize(2)
        _turns(pool)
        assert {info.pid for info in pool.workers() if info.state == "idle"} == kept
        for lease in dismissed:
            lease.release()
        wait_until(pool, lambda: pool.stats().workers == 2)
        assert _pids(pool) == kept


def test_resize_dismisses_booting_workers_first(gate: Gate) -> None:
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=2).open(wait=False)
    gate.wait_arrived(2)
    gate.open(1)
    pool.wait_ready(1, timeout=20)
    booting, idle = sorted(pool.workers(), key=lambda info: info.state == "idle")
    ear = Ear(pool, "worker.terminate")
    pool.resize(1)
    assert ear.wait("worker.terminate").metadata["pid"] == booting.pid
    assert _pids(pool) == {idle.pid}
    assert pool.stats().start_failures == 0, "it was told to go"
    pool.close()


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, 5000])
def test_resize_refuses_what_is_no_size(size: Any) -> None:
    with Pool(Counter, size=1) as pool:
        with pytest.raises(ConfigError, match="size"):
            pool.resize(size)
        _turns(pool)
        assert pool.stats().size == pool.stats().workers == 1


def test_elastic_pool_resizes_within_its_bounds_only() -> None:
    with Pool(Counter, size=2, min_size=1, max_size=3) as pool:
        for size in (4, 0):
            with pytest.raises(ConfigError, match=f"size={size}"):
                pool.resize(size)
        for size in (3, 1):
            pool.resize(size)
            wait_until(pool, lambda size=size: pool.stats().workers == size)
        assert pool.stats().size == 1


def test_fixed_pool_keeps_its_new_size() -> None:
    """It stays fixed: no growth under load, and a dead worker is replaced up to that size."""
    with Pool(Counter, size=1) as pool:
        pool.resize(2)
        pool.wait_ready(timeout=20)
        leases = _leased(pool, 2)
        with pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0.1)
        for lease in leases:
            lease.discard("to be replaced")
        pool.wait_ready(timeout=20)
        assert pool.stats().workers == 2


# -- drain -------------------------------------------------------------------------------------


def test_drain_replaces_idle_workers_and_leased_ones_on_return() -> None:
    with Pool(Counter, size=3) as pool:
        ear, before = Ear(pool, "worker.terminate"), _pids(pool)
        with pool.checkout() as held:
            pool.drain()
            ear.wait("worker.terminate", 2)
            wait_until(pool, lambda: pool.stats().idle == 2)
            assert before & _pids(pool) == {held.pid}
            assert held.add(5) == 5, "the lease goes on undisturbed"
        ear.wait("worker.terminate", 3)
        wait_until(pool, lambda: pool.stats().idle == 3)
        assert not before & _pids(pool)
        assert (pool.stats().workers, pool.stats().workers_lost) == (3, 0)
        assert {event.metadata["exitcode"] for event in ear.heard} == {0}


def test_drain_reaches_a_worker_that_is_being_probed(gate: Gate) -> None:
    """It is replaced when it has answered, and not even given to who is waiting for it."""
    pool = Pool(StopsAtGateInHealthCheck, args=(gate.path,), size=1)
    with pool, ThreadPoolExecutor(2) as threads:
        (before,) = _pids(pool)
        ear = Ear(pool, "worker.terminate", "queue.depth")
        threads.submit(pool.health_check, probe=True)
        gate.wait_arrived()
        call = threads.submit(pool.options(timeout=20).call, "pid")
        ear.wait("queue.depth")
        pool.drain()
        wait_until(pool, lambda: pool.stats().spare == 1)
        _turns(pool)
        gate.open()
        assert ear.wait("worker.terminate").metadata["pid"] == before
        assert call.result(20) != before


def test_worker_dismissed_in_the_moment_it_is_given_back_goes_all_the_same() -> None:
    """It was found neither idle nor given back unfit; the next look finds it."""
    with Pool(Counter, size=1) as pool:
        ear, handle = Ear(pool, "worker.terminate"), handle_of(pool)
        desk = pool._desk
        assert desk is not None

        def dismiss_too_early() -> None:
            handle.tainted, handle.condemned = "dismissed", True

        desk.manager.order(dismiss_too_early)
        assert ear.wait("worker.terminate").metadata["pid"] == handle.pid
        assert pool.call(getpid) != handle.pid
