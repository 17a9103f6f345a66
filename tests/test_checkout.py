"""Checkout: how long it waits, in which order callers are served, and what a refusal tells."""

from __future__ import annotations

import math
import os
import random
import select
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from ears import Ear, handle_of, wait_until
from gates import Gate
from minipool import (
    CheckoutTimeout,
    Pool,
    PoolClosed,
    TooManyWaiters,
    WorkerStartError,
)
from minipool.engine import desk as desk_module
from rogues import Stateful
from troublemakers import FailsWhileFileExists, StopsAtGateInInit

LAST = 20.0


@pytest.fixture
def pool() -> Iterator[Pool[Stateful]]:
    with Pool(Stateful, size=1, checkout_timeout=LAST, overflow_idle=0.1) as made:
        yield made


def run(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_queued(pool: Pool[Any], count: int) -> None:
    """Wait until so many callers stand in the line."""
    wait_until(pool, lambda: pool.stats().waiting == count)


# -- timeouts ------------------------------------------------------------------------------------


def test_idle_worker_is_given_without_queueing(pool: Pool[Stateful]) -> None:
    for _ in range(10):
        pool.checkout().release()

    assert (pool.stats().leases, pool.stats().queued) == (10, 0)


def test_timeout_of_the_call_overrides_a_short_default() -> None:
    """The default would give up; who asked for longer gets his worker."""
    with Pool(Stateful, size=1, checkout_timeout=0.01, overflow_idle=0.1) as pool:
        lease = pool.checkout()
        got: list[Any] = []
        waiter = run(lambda: got.append(pool.checkout(timeout=LAST)))
        wait_queued(pool, 1)
        with pytest.raises(CheckoutTimeout) as caught:
            pool.checkout()
        assert caught.value.timeout == 0.01
        lease.release()
        waiter.join(LAST)
        got[0].release()


def test_timeout_of_the_call_overrides_a_long_default(pool: Pool[Stateful]) -> None:
    with pool.checkout():
        start = time.monotonic()
        with pytest.raises(CheckoutTimeout) as caught:
            pool.checkout(timeout=0.05)
        assert 0.05 <= time.monotonic() - start < LAST / 2
    assert caught.value.timeout == 0.05
    assert isinstance(caught.value, TimeoutError)


def test_timeout_zero_takes_what_is_idle_or_raises_at_once(pool: Pool[Stateful]) -> None:
    """It never joins the line."""
    with pool.checkout(timeout=0):
        start = time.monotonic()
        with pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0)
        assert time.monotonic() - start < LAST / 4
        assert pool.stats().waiting == 0
    assert pool.stats().queued == 0, "it does not wait, so it never queued"


@pytest.mark.parametrize("timeout", [None, math.inf, 1e300])
def test_timeout_none_waits_for_ever(timeout: float | None) -> None:
    """As do numbers beyond every clock."""
    with Pool(Stateful, size=1, checkout_timeout=0.01, overflow_idle=0.1) as pool:
        lease = pool.checkout()
        got: list[Any] = []
        waiter = run(lambda: got.append(pool.checkout(timeout=timeout)))
        wait_queued(pool, 1)
        lease.release()
        waiter.join(LAST)
        assert got[0].call("add", 1) == 1
        got[0].release()


@pytest.mark.parametrize(
    ("timeout", "error"),
    [(-1, ValueError), (-0.001, ValueError), (math.nan, ValueError), (-math.inf, ValueError),
     ("5", TypeError), ("", TypeError), (True, TypeError), ([1], TypeError)],
)  # fmt: skip
def test_wrong_timeout_is_refused_everywhere(
    pool: Pool[Stateful], timeout: Any, error: type[Exception]
) -> None:
    """At checkout, for calls, at wait_ready and close: with the value, and nothing taken."""
    with pool.checkout() as w:
        attempts = [
            lambda: pool.checkout(timeout=timeout), lambda: w.options(timeout=timeout),
            lambda: pool.options(timeout=timeout), lambda: pool.wait_ready(timeout=timeout),
            lambda: pool.close(timeout=timeout),
        ]  # fmt: skip
        for attempt in attempts:
            with pytest.raises(error) as caught:
                attempt()
            assert f"timeout={timeout!r}" in str(caught.value)
            assert "give seconds" in str(caught.value)
    assert not pool.closed
    assert pool.stats().leases == 1


def test_timeout_is_measured_over_the_whole_checkout(
    pool: Pool[Stateful], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead workers that are found on the way do not start the clock again."""
    handle = handle_of(pool)
    monkeypatch.setattr(type(handle), "start", _refuse_to_start)
    monkeypatch.setattr(desk_module, "_TRUSTED_NS", 0)  # look at it, although it was ready just now
    os.kill(handle.pid, signal.SIGKILL)
    assert select.select([handle.process.death_fd], [], [], LAST)[0]
    start = time.monotonic()

    with pytest.raises(CheckoutTimeout) as caught:
        pool.checkout(timeout=0.3)

    assert 0.3 <= time.monotonic() - start < LAST / 2
    assert caught.value.waited == pytest.approx(0.3, abs=LAST / 2)
    assert caught.value.waited >= 0.3


def _refuse_to_start(*args: Any) -> None:
    raise OSError("no more processes")


def test_timeout_covers_checkout_and_call_of_a_one_shot(pool: Pool[Stateful], gate: Gate) -> None:
    """pool.options(timeout=...) is one time for both."""
    with pool.checkout():
        with pytest.raises(CheckoutTimeout) as caught:
            pool.options(timeout=0.1).call("get")
        assert caught.value.timeout == 0.1
    start = time.monotonic()
    with pytest.raises(TimeoutError) as late:
        pool.options(timeout=0.2).call("wait_at", gate.path)
    assert 0 < late.value.timeout <= 0.2  # type: ignore[attr-defined]
    assert time.monotonic() - start < LAST / 2


def test_one_shot_without_a_timeout_keeps_the_defaults(gate: Gate) -> None:
    """options(idempotent=True) alone changes neither of the two."""
    with Pool(Stateful, size=1, call_timeout=0.1, checkout_timeout=LAST) as pool:
        with pytest.raises(TimeoutError) as caught:
            pool.options(idempotent=True).call("wait_at", gate.path)
    assert caught.value.timeout == 0.1  # type: ignore[attr-defined]


# -- refusals ------------------------------------------------------------------------------------


def test_refusal_tells_counts_and_what_to_do(pool: Pool[Stateful]) -> None:
    lease = pool.checkout()
    waiter = run(lambda: pool.checkout(timeout=LAST).release())
    wait_queued(pool, 1)
    errors: list[CheckoutTimeout] = []

    def refused() -> None:
        with pytest.raises(CheckoutTimeout) as caught:
            pool.checkout(timeout=0.05)
        errors.append(caught.value)

    run(refused).join(LAST)
    lease.release()
    waiter.join(LAST)

    error = errors[0]
    assert (error.size, error.leased, error.waiting, error.held_by_this_thread) == (1, 1, 1, 0)
    assert error.timeout == 0.05 <= error.waited < LAST
    for words in ("within 0.05 s", "size 1", "leased 1", "waiting 1", "raise `size`"):
        assert words in str(error)
    assert error.__cause__ is None
    assert pool.stats().checkout_timeouts == 1


def test_refusal_carries_the_last_start_failure(tmp_path: Path) -> None:
    """No worker comes because none starts: the cause says why."""
    flag = tmp_path / "in the way"
    with Pool(FailsWhileFileExists, args=(str(flag),), size=1) as pool:
        ear = Ear(pool, "error")
        flag.touch()
        os.kill(pool.workers()[0].pid or 0, signal.SIGKILL)
        ear.wait("error", fits=lambda e: isinstance(e.metadata["error"], WorkerStartError) and
                 e.metadata["error"].__cause__ is not None)  # fmt: skip

        with pytest.raises(CheckoutTimeout) as caught:
            pool.checkout(timeout=0.05)

        cause = caught.value.__cause__
        assert isinstance(cause, WorkerStartError)
        assert isinstance(cause.__cause__, OSError)
        assert "is in the way" in str(cause)
        flag.unlink()
        pool.checkout(timeout=LAST).release()


def test_too_many_waiters_are_turned_away_and_the_line_drains() -> None:
    """At max_waiting the next one is refused at once; when the line is shorter it takes again."""
    with Pool(Stateful, size=1, max_waiting=2, overflow_idle=0.1) as pool:
        served: list[int] = []

        def wait(number: int) -> None:
            with pool.checkout(timeout=LAST):
                served.append(number)

        for turn in range(2):
            lease = pool.checkout()
            waiters = []
            for number in range(2):
                waiters.append(run(lambda number=number: wait(number)))  # type: ignore[misc]
                wait_queued(pool, number + 1)
            with pytest.raises(TooManyWaiters, match="2 callers are waiting") as caught:
                pool.checkout(timeout=LAST)
            assert (caught.value.waiting, caught.value.max_waiting) == (2, 2)
            assert "raise `size`" in str(caught.value)
            lease.release()
            for waiter in waiters:
                waiter.join(LAST)
            assert pool.stats().turned_away == turn + 1
        assert served == [0, 1, 0, 1]
        assert pool.stats().waiting == 0


def test_of_callers_who_come_at_once_no_more_than_max_waiting_may_stay() -> None:
    """Another one joins the line after this one has found room in it: the other one was first."""
    with Pool(Stateful, size=1, max_waiting=1) as pool:
        others: list[threading.Thread] = []

        def overtake(*event: object) -> None:
            pool.hooks["queue.depth"].remove(overtake)  # the other one just queues
            others.append(run(lambda: pool.checkout(timeout=LAST).release()))
            wait_queued(pool, 1)

        pool.hooks["queue.depth"].append(overtake)
        with pool.checkout():
            with pytest.raises(TooManyWaiters) as caught:
                pool.checkout(timeout=LAST)
            assert caught.value.waiting == pool.stats().waiting == 1
        others[0].join(LAST)
        assert (pool.stats().turned_away, pool.stats().waiting) == (1, 0)
        pool.checkout(timeout=LAST).release()


def test_nobody_may_wait_with_max_waiting_zero() -> None:
    with Pool(Stateful, size=1, max_waiting=0) as pool, pool.checkout():
        with pytest.raises(TooManyWaiters):
            pool.checkout()


def test_closed_pool_wakes_its_waiters(pool: Pool[Stateful]) -> None:
    lease = pool.checkout()
    errors: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(PoolClosed) as caught:
            pool.checkout(timeout=None)
        errors.append(caught.value)

    waiters = [run(wait) for _ in range(3)]
    wait_queued(pool, 3)
    closer = run(pool.close)
    for waiter in waiters:
        waiter.join(LAST)

    assert len(errors) == 3
    lease.release()
    closer.join(LAST)


# -- order ---------------------------------------------------------------------------------------


def test_waiters_are_served_in_the_order_they_came(pool: Pool[Stateful]) -> None:
    lease = pool.checkout()
    served: list[int] = []

    def wait(number: int) -> None:
        with pool.checkout(timeout=LAST):
            served.append(number)

    waiters = []
    for number in range(8):
        waiters.append(run(lambda number=number: wait(number)))  # type: ignore[misc]
        wait_queued(pool, number + 1)
    lease.release()
    for waiter in waiters:
        waiter.join(LAST)

    assert served == list(range(8))
    assert pool.stats().queued == 8


def test_newcomer_never_overtakes_who_waits(pool: Pool[Stateful]) -> None:
    """A worker that was given back is the waiter's, even before he has woken up."""
    for _ in range(20):
        lease = pool.checkout()
        done = threading.Event()

        def wait(done: threading.Event = done) -> None:
            with pool.checkout(timeout=LAST):
                assert done.wait(LAST)

        waiter = run(wait)
        wait_queued(pool, 1)
        lease.release()
        with pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0)
        done.set()
        waiter.join(LAST)


def test_timed_out_waiter_loses_no_worker(pool: Pool[Stateful]) -> None:
    """He leaves no ghost in the line: the worker goes to the next one."""
    lease = pool.checkout()
    given_up = threading.Event()

    def wait() -> None:
        with pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0.05)
        given_up.set()

    run(wait)
    assert given_up.wait(LAST)
    assert pool.stats().waiting == 0
    got: list[Any] = []
    second = run(lambda: got.append(pool.checkout(timeout=LAST)))
    wait_queued(pool, 1)

    lease.release()

    second.join(LAST)
    got[0].release()
    pool.checkout(timeout=LAST).release()


def test_hand_off_and_timeout_at_once_lose_no_worker(pool: Pool[Stateful]) -> None:
    """Late success or clean failure, never a lost worker: released just as a waiter gives up."""
    dice = random.Random(3)
    outcomes = set()
    for _ in range(150):
        lease = pool.checkout(timeout=LAST)
        timeout = dice.uniform(0.0005, 0.002)
        seen: list[bool] = []

        def wait(timeout: float = timeout, seen: list[bool] = seen) -> None:
            try:
                pool.checkout(timeout=timeout).release()
                seen.append(True)
            except CheckoutTimeout:
                seen.append(False)

        waiter = run(wait)
        until = time.perf_counter() + timeout
        while time.perf_counter() < until:
            pass  # meet him at the very moment
        lease.release()
        waiter.join(LAST)
        outcomes.update(seen)
        assert pool.stats().waiting == 0
        pool.checkout(timeout=LAST).release()  # the manager may be matching

    assert outcomes, "each ended in one way or the other"
    assert pool.stats().workers_lost == 0


# -- which worker --------------------------------------------------------------------------------


def test_lifo_uses_the_last_used_worker_again() -> None:
    with Pool(Stateful, size=3, strategy="lifo") as pool:
        pids = [pool.call("pid") for _ in range(9)]

    assert len(set(pids)) == 1


def test_fifo_uses_all_workers_alike() -> None:
    with Pool(Stateful, size=3, strategy="fifo") as pool:
        pids = [pool.call("pid") for _ in range(9)]

    assert sorted(pids.count(pid) for pid in set(pids)) == [3, 3, 3]


def test_checkout_works_before_the_pool_is_full(gate: Gate) -> None:
    """The first ready worker serves the first waiter, while another is still starting."""
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=2, overflow_idle=0.1)
    pool.open(wait=False)
    try:
        got: list[Any] = []
        waiter = run(lambda: got.append(pool.checkout(timeout=LAST)))
        gate.wait_arrived(2)
        wait_queued(pool, 1)
        gate.open(1)
        waiter.join(LAST)

        assert got[0].call("pid") == got[0].pid
        stats = pool.stats()
        assert (stats.leased, stats.starting, stats.workers) == (1, 1, 2)
        got[0].release()
        gate.open(1)
        pool.wait_ready(timeout=LAST)
    finally:
        pool.terminate()


def test_first_use_opens_the_pool() -> None:
    """Neither open() nor with is needed to begin."""
    pool = Pool(Stateful, size=1)
    try:
        assert pool.call("add", 2) == 2
    finally:
        pool.close()
