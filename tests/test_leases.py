"""Leases: given back once, never lost, revoked when they must be, whatever interrupts them."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import pickle
import signal
import threading
import time
from typing import Any, Callable, Iterator

import pytest

import rogues
from ears import Ear, wait_until
from gates import Gate
from minipool import (
    CheckoutTimeout,
    Lease,
    LeaseError,
    LeaseReleased,
    LeaseRevoked,
    Pool,
)
from rogues import Stateful

LAST = 20.0


@pytest.fixture
def pool() -> Iterator[Pool[Stateful]]:
    with Pool(Stateful, size=1, close_timeout=5.0, overflow_idle=0.1) as made:
        yield made


def run(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def nothing_free(pool: Pool[Any]) -> bool:
    try:
        pool.checkout(timeout=0).release()
    except CheckoutTimeout:
        return True
    return False


# -- release -------------------------------------------------------------------------------------


def test_second_release_is_a_no_op(pool: Pool[Stateful]) -> None:
    w = pool.checkout()
    w.release()
    w.release()

    with pool.checkout():
        assert nothing_free(pool), "the worker was offered once"
    assert pool.stats().leases == 2


def test_second_release_does_not_touch_the_next_lease(pool: Pool[Stateful]) -> None:
    """The slot was leased again meanwhile: the old lease cannot give it away."""
    old = pool.checkout()
    old.release()
    with pool.checkout() as new:
        old.release()
        old.discard("not mine any more")

        assert nothing_free(pool)
        assert new.call("add", 1) == 1
    assert pool.stats().discarded == 0


def test_release_in_the_body_is_fine(pool: Pool[Stateful]) -> None:
    with pool.checkout() as w:
        w.release()
        assert not nothing_free(pool)


def test_two_threads_release_a_lease_once(pool: Pool[Stateful]) -> None:
    """However they meet, the worker comes back once."""
    meet = threading.Barrier(2, timeout=LAST)
    for _ in range(50):
        w = pool.checkout()

        def release(w: Lease[Any] = w) -> None:
            meet.wait()
            w.release()

        other = run(release)
        release()
        other.join(LAST)
        with pool.checkout(timeout=0):
            assert nothing_free(pool)


def test_released_lease_gives_no_access(pool: Pool[Stateful]) -> None:
    """Calls and attributes of a worker that is no more ours raise, and say so."""
    w = pool.checkout()
    w.release()

    with pytest.raises(LeaseReleased, match=r"cannot call 'add'.*take a new one"):
        w.call("add", 1)
    with pytest.raises(LeaseReleased):
        w.add(1)
    with pytest.raises(LeaseReleased):
        w.options(timeout=1).call("add", 1)
    for attribute in ("worker_id", "pid", "generation"):
        with pytest.raises(LeaseReleased):
            getattr(w, attribute)
    assert "released" in repr(w)
    assert pool.call("get") == 0


def test_any_thread_may_release(pool: Pool[Stateful]) -> None:
    w = pool.checkout()
    run(w.release).join(LAST)

    assert not nothing_free(pool)


def test_lease_belongs_to_its_pool() -> None:
    """No method of a pool takes a lease, and a lease gives its worker to its own pool alone."""
    for name, method in inspect.getmembers(Pool, inspect.isfunction):
        if not name.startswith("_"):
            hints = [str(p.annotation) for p in inspect.signature(method).parameters.values()]
            assert not any("Lease" in hint or "Handle" in hint for hint in hints), name

    with Pool(Stateful, args=(1,), size=1) as a, Pool(Stateful, args=(2,), size=1) as b:
        theirs = b.checkout()
        a.checkout().release()
        assert nothing_free(b)
        theirs.release()
        assert (a.call("get"), b.call("get")) == (1, 2)


def test_views_with_options_are_the_same_lease(pool: Pool[Stateful]) -> None:
    """Released through one, it is released for all; while a view is there it is not dropped."""
    view = pool.checkout().options(timeout=LAST, idempotent=True)
    gc.collect()

    assert view.call("add", 1) == 1
    assert view.options(timeout=None).call("add", 1) == 2
    again = view.options(timeout=1)
    view.release()
    with pytest.raises(LeaseReleased):
        again.call("add", 1)
    assert not nothing_free(pool)


def test_methods_of_the_object_are_the_leases_own(pool: Pool[Stateful]) -> None:
    """But for private ones; and where there is no object, there are none."""
    with pool.checkout() as w:
        assert w.pid == w.call("pid") == w.options(timeout=LAST).call("pid")
        assert w.add(2) == 2 and w.options(timeout=LAST).add(3) == 5
        with pytest.raises(AttributeError, match="_private"):
            w._private()
    with Pool(size=1) as functions, functions.checkout() as w:
        assert isinstance(w, Lease)
        with pytest.raises(AttributeError, match="add"):
            w.add(2)


def test_lease_tells_who_it_has(pool: Pool[Stateful]) -> None:
    with pool.checkout() as w:
        assert (w.worker_id, w.generation) == (0, 1)
        assert w.pid == w.call("pid") == pool.worker(0).pid
        assert f"worker 0, pid {w.pid}" in repr(w)
        assert pool.config.name in repr(w)


@pytest.mark.parametrize("what", ["lease", "view", "pool"])
def test_lease_and_pool_cannot_be_pickled_or_copied(pool: Pool[Stateful], what: str) -> None:
    with pool.checkout() as w:
        thing: Any = {"lease": w, "view": w.options(timeout=1), "pool": pool}[what]
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled"):
                way(thing)


# -- the body ------------------------------------------------------------------------------------


def test_exception_in_the_body_keeps_the_worker(pool: Pool[Stateful]) -> None:
    """The caller's own troubles are not the worker's."""
    with pytest.raises(ZeroDivisionError):
        with pool.checkout() as w:
            pid = w.pid
            w.call("add", 5)
            raise ZeroDivisionError

    with pool.checkout() as w:
        assert (w.pid, w.call("get")) == (pid, 5)
    assert pool.stats().discarded == 0


def test_discarded_worker_is_replaced_on_return_and_counted(pool: Pool[Stateful]) -> None:
    """It ends in good order: told to stop, its reason told to those who listen."""
    ear = Ear(pool, "worker.terminate")
    with pool.checkout() as w:
        pid = w.pid
        w.discard("smells")

    event = ear.wait("worker.terminate")
    assert event.metadata["pid"] == pid
    assert "smells" in event.metadata["reason"]
    assert event.metadata["exitcode"] == 0
    with pool.checkout(timeout=LAST) as w:
        assert w.pid != pid
    stats = pool.stats()
    assert (stats.discarded, stats.workers_retired, stats.workers_lost) == (1, 1, 0)


def test_call_while_another_is_under_way_is_refused(pool: Pool[Stateful], gate: Gate) -> None:
    """A lease is for one thread at a time; the call that runs is not disturbed."""
    results = []
    with pool.checkout() as w:
        caller = run(lambda: results.append(w.call("wait_at", gate.path)))
        gate.wait_arrived()

        with pytest.raises(LeaseError, match="another call of this lease is under way"):
            w.call("get")

        gate.open()
        caller.join(LAST)
        assert results == [w.pid]
        assert w.call("get") == 1


def test_release_in_mid_call_abandons_the_call(pool: Pool[Stateful], gate: Gate) -> None:
    """Its worker is killed; who made the call is told; the next lease has another worker."""
    outcome: list[BaseException] = []
    w = pool.checkout()
    pid = w.pid

    def call() -> None:
        try:
            w.call("wait_at", gate.path)
        except Exception as error:
            outcome.append(error)

    caller = run(call)
    gate.wait_arrived()
    w.release()
    caller.join(LAST)

    assert [isinstance(error, Exception) for error in outcome] == [True]
    with pool.checkout(timeout=LAST) as w:
        assert w.pid != pid


# -- dropped -------------------------------------------------------------------------------------


def test_dropped_lease_is_warned_of_and_its_worker_recovered(pool: Pool[Stateful]) -> None:
    """The very process with its state is there for the next one."""
    w: Any = pool.checkout()
    pid = w.pid
    w.call("add", 3)

    with pytest.warns(ResourceWarning, match=r"dropped without release\(\); use `with"):
        del w
        gc.collect()

    with pool.checkout(timeout=0) as w:
        assert (w.pid, w.call("get")) == (pid, 3)


def test_lease_dropped_in_a_cycle_is_recovered(pool: Pool[Stateful]) -> None:
    """The collector finds it, in whatever thread it runs."""
    cycle: Any = [pool.checkout()]
    cycle.append(cycle)

    with pytest.warns(ResourceWarning):
        del cycle
        run(gc.collect).join(LAST)

    assert not nothing_free(pool)


def test_closed_generator_gives_its_lease_back(pool: Pool[Stateful]) -> None:
    """With a with-block in it there is nothing to warn of."""

    def counted() -> Iterator[int]:
        with pool.checkout() as w:
            while True:
                yield w.call("add", 1)

    numbers = counted()
    assert [next(numbers), next(numbers)] == [1, 2]
    numbers.close()  # type: ignore[attr-defined]

    assert pool.call("get") == 2


def test_abandoned_generator_without_with_is_recovered(pool: Pool[Stateful]) -> None:
    def counted() -> Iterator[int]:
        w = pool.checkout()
        while True:
            yield w.call("add", 1)

    numbers: Any = counted()
    assert next(numbers) == 1
    with pytest.warns(ResourceWarning):
        del numbers
        gc.collect()

    assert pool.call("get") == 1


# -- interrupts ----------------------------------------------------------------------------------


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_interrupted_call_costs_the_worker_and_nothing_else(
    pool: Pool[Stateful], gate: Gate
) -> None:
    """Ctrl-C in a call: KeyboardInterrupt at once, a new worker, no late reply to anybody."""
    ctrl_c = run(lambda: (gate.wait_arrived(), interrupt()))

    with pytest.raises(KeyboardInterrupt):
        with pool.checkout() as w:
            pid = w.pid
            w.call("wait_at", gate.path)
    ctrl_c.join(LAST)
    gate.open()

    for number in range(5):
        with pool.checkout(timeout=LAST) as w:
            assert w.pid != pid
            assert w.call(rogues.double, number) == 2 * number
    assert pool.stats().discarded == 1


def test_interrupted_lease_refuses_its_next_call(pool: Pool[Stateful], gate: Gate) -> None:
    """Its reply may still come, so the pipe is not used again."""
    ctrl_c = run(lambda: (gate.wait_arrived(), interrupt()))
    with pool.checkout() as w:
        with pytest.raises(KeyboardInterrupt):
            w.call("wait_at", gate.path)
        ctrl_c.join(LAST)

        with pytest.raises(LeaseError, match="broke off"):
            w.call("get")

    assert pool.options(timeout=LAST).call("get") == 0


def test_lease_dropped_after_an_interrupt_costs_the_worker(
    pool: Pool[Stateful], gate: Gate
) -> None:
    """Dropped in mid-call: warned of, and the worker is replaced instead of recovered."""
    w: Any = pool.checkout()
    pid = w.pid
    ctrl_c = run(lambda: (gate.wait_arrived(), interrupt()))
    try:
        w.call("wait_at", gate.path)
    except KeyboardInterrupt:
        pass
    else:
        pytest.fail("the call was not interrupted")
    ctrl_c.join(LAST)
    with pytest.warns(ResourceWarning):
        del w
        gc.collect()

    with pool.checkout(timeout=LAST) as w:
        assert w.pid != pid


def test_interrupted_wait_loses_nothing(pool: Pool[Stateful]) -> None:
    """Ctrl-C while queueing: out of the line, and the worker goes to the next one."""
    lease = pool.checkout()
    desk = pool._desk
    assert desk is not None
    waiters = desk.manager.turnstile.waiters

    def ctrl_c() -> None:
        wait_until(pool, lambda: bool(waiters))
        interrupt()

    other = run(ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        pool.checkout(timeout=None)
    other.join(LAST)

    assert not waiters
    lease.release()
    with pool.checkout(timeout=0) as w:
        assert w.call("add", 1) == 1
    assert pool.stats().leases == 2


@pytest.mark.filterwarnings("ignore:a lease of worker:ResourceWarning")
def test_interrupts_at_any_moment_lose_no_worker(pool: Pool[Stateful]) -> None:
    """A timer strikes again and again, wherever checkout, call and release are just then."""

    def call_for_ever(number: int) -> None:
        while True:
            with pool.checkout(timeout=LAST) as w:
                assert w.call(rogues.double, number) == 2 * number

    struck = 0
    signal.signal(signal.SIGALRM, lambda *args: signal.raise_signal(signal.SIGINT))
    try:
        for number in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + number * 0.00002)
                call_for_ever(number)
            except KeyboardInterrupt:
                struck += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        gc.collect()

    assert struck == 60
    with pool.checkout(timeout=LAST) as w:
        assert w.call(rogues.double, 7) == 14
        assert nothing_free(pool)


# -- leaks and revocation ------------------------------------------------------------------------


def borrow(pool: Pool[Any]) -> Lease[Any]:
    return pool.checkout()


def warnings_of(caplog: Any) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_leak_is_logged_once_with_the_borrowers_stack(caplog: Any) -> None:
    """And again when the lease comes back after all."""
    with Pool(Stateful, size=1, leak_warn_after=0.05) as pool:
        ear = Ear(pool, "lease.leaked", "utilization")
        with caplog.at_level(logging.WARNING, "minipool"):
            w = borrow(pool)
            event = ear.wait("lease.leaked")
            ear.wait("utilization", len(ear.of("utilization")) + 5)  # it looked again

            assert len(ear.of("lease.leaked")) == 1
            (leaked,) = warnings_of(caplog)
            assert "in borrow" in leaked
            assert "return pool.checkout()" in leaked
            assert event.metadata["worker_id"] == 0
            assert event.measurements["seconds"] >= 0.05
            assert w.call("add", 1) == 1, "it is only a warning"

            w.release()
            back = warnings_of(caplog)[1:]
        assert len(back) == 1
        assert "reported as leaked, was given back after" in back[0]
        assert pool.call("get") == 1


def test_short_lease_is_no_leak(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "minipool"):
        with Pool(Stateful, size=1, leak_warn_after=LAST) as pool:
            pool.call("add", 1)

    assert not warnings_of(caplog)


def test_idle_lease_is_revoked_when_its_time_is_up() -> None:
    """The holder is told at his next call; the pool has a new worker meanwhile."""
    with Pool(Stateful, size=1, lease_timeout=0.1) as pool:
        ear = Ear(pool, "worker.init")
        with pool.checkout() as w:
            pid = w.pid
            ear.wait("worker.init")
            with pytest.raises(LeaseRevoked, match=r"lease_timeout=0\.1 s") as caught:
                w.call("get")
            assert "take a new one" in str(caught.value)
            assert "lease_timeout" in caught.value.reason

        with pool.checkout(timeout=LAST) as w:
            assert w.pid != pid
            assert w.call("add", 1) == 1


def test_lease_is_revoked_in_mid_call(gate: Gate) -> None:
    """The call ends at once with LeaseRevoked and not at its own timeout."""
    with Pool(Stateful, size=1, lease_timeout=0.2, call_timeout=None) as pool:
        start = time.monotonic()
        with pool.checkout() as w:
            with pytest.raises(LeaseRevoked):
                w.call("wait_at", gate.path)
        assert time.monotonic() - start < LAST

        assert pool.options(timeout=LAST).call("get") == 0


def test_revoked_idempotent_call_is_not_made_again(gate: Gate) -> None:
    """A lease that was taken away does not help itself to another worker."""
    with Pool(Stateful, size=2, lease_timeout=0.2) as pool:
        with pool.checkout() as w:
            with pytest.raises(LeaseRevoked):
                w.options(idempotent=True).call("wait_at", gate.path)


def test_lease_within_its_time_is_not_revoked() -> None:
    with Pool(Stateful, size=1, lease_timeout=LAST, overflow_idle=0.1) as pool:
        ear = Ear(pool, "utilization")
        with pool.checkout() as w:
            ear.wait("utilization", 5)
            assert w.call("add", 1) == 1


def test_lease_time_starts_anew_with_each_lease() -> None:
    """A worker that was leased for long in all is not taken from its next lessee."""
    with Pool(Stateful, size=1, lease_timeout=1.0) as pool:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            with pool.checkout() as w:
                w.call("add", 1)
        assert pool.stats().workers_lost == 0


# -- nested --------------------------------------------------------------------------------------


def test_nested_checkout_on_a_full_pool_times_out_with_the_hint(pool: Pool[Stateful]) -> None:
    """A thread that would wait for itself is told so."""
    with pool.checkout():
        with pytest.raises(CheckoutTimeout, match="this thread already holds 1 lease,") as caught:
            pool.checkout(timeout=0.05)
        assert caught.value.held_by_this_thread == 1

        errors: list[CheckoutTimeout] = []

        def other() -> None:
            try:
                pool.checkout(timeout=0.05)
            except CheckoutTimeout as error:
                errors.append(error)

        run(other).join(LAST)
        assert errors[0].held_by_this_thread == 0
        assert "holds" not in str(errors[0])
