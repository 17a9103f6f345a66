"""Nobody serves yet, or all are leased: how long a caller waits then, and what it is told."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from ears import Ear, wait_until
from gates import Gate, pass_gate
from minipool import CheckoutTimeout, Pool, PoolStartError, WorkerStartError
from minipool.engine.refusal import refusal
from rogues import Stateful
from troublemakers import FailsWhileFileExists, StopsAtGateInInit

LAST = 20.0
SHORT = 0.3


class StopsAtGateWhileFileExists:
    """Becomes ready when the test opens the gate, if there is that file, else at once."""

    def __init__(self, path: str, gate: str) -> None:
        if os.path.exists(path):
            pass_gate(gate)

    def pid(self) -> int:
        return os.getpid()


class Caller(threading.Thread):
    """Does one thing in a thread of its own, and keeps what comes of it."""

    def __init__(self, work: Callable[[], Any], name: str = "caller") -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.result: Any = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:
            self.error = error


def refused(pool: Pool[Any], timeout: float = 0.05, **options: Any) -> str:
    with pytest.raises(CheckoutTimeout) as caught:
        pool.checkout(timeout=timeout, **options)
    return str(caught.value)


# -- how long ------------------------------------------------------------------------------------


@pytest.mark.parametrize("session", [None, "one"])
def test_clock_of_checkout_timeout_stands_still_while_a_lazy_pool_starts_its_first_worker(
    gate: Gate, session: str | None
) -> None:
    with Pool(
        StopsAtGateInInit, args=(gate.path,), size=1, lazy=True, checkout_timeout=SHORT
    ) as pool:
        caller = Caller(lambda: pool.options(session=session).call("pid"))
        gate.wait_arrived()
        caller.join(3 * SHORT)
        assert caller.is_alive(), f"it gave up, with {caller.error!r}"
        gate.open()
        caller.join(LAST)

        assert caller.result == pool.workers()[0].pid, caller.error
        assert pool.stats().checkout_timeouts == 0


def test_clock_of_checkout_timeout_stands_still_while_the_only_worker_is_replaced(
    gate: Gate, tmp_path: Path
) -> None:
    flag = tmp_path / "slow"
    args = (str(flag), gate.path)
    with Pool(StopsAtGateWhileFileExists, args=args, size=1, checkout_timeout=SHORT) as pool:
        flag.touch()
        os.kill(pool.workers()[0].pid or 0, signal.SIGKILL)
        gate.wait_arrived()
        assert pool._desk is not None
        standstills = pool._desk.manager.standstills
        wait_until(pool, lambda: standstills.starting)
        caller = Caller(lambda: pool.call("pid"))
        caller.join(3 * SHORT)
        assert caller.is_alive(), f"it gave up, with {caller.error!r}"
        gate.open()
        caller.join(LAST)

        assert caller.result == pool.workers()[0].pid, caller.error


def test_clock_goes_on_while_somebody_serves(gate: Gate, tmp_path: Path) -> None:
    """Another worker may be starting, but this one is leased for too long."""
    flag = tmp_path / "slow"
    args = (str(flag), gate.path)
    with Pool(StopsAtGateWhileFileExists, args=args, size=2, checkout_timeout=SHORT) as pool:
        flag.touch()
        os.kill(pool.workers()[0].pid or 0, signal.SIGKILL)
        gate.wait_arrived()
        with pool.checkout(), pytest.raises(CheckoutTimeout, match="starting 1"):
            pool.checkout()
        gate.open()


FIRST_USES: dict[str, Callable[[Pool[Any], float], Any]] = {
    "checkout": lambda pool, timeout: pool.checkout(timeout=timeout),
    "of a session": lambda pool, timeout: pool.checkout(timeout=timeout, session="one"),
    "by a hint": lambda pool, timeout: pool.checkout(timeout=timeout, hint="one"),
    "call": lambda pool, timeout: pool.options(timeout=timeout).call("pid"),
    "call in a session": lambda pool, timeout: pool.options(timeout=timeout, session="one").call(
        "pid"
    ),
}


@pytest.mark.parametrize("use", FIRST_USES)
def test_first_use_keeps_the_timeout_that_was_given(use: str, gate: Gate) -> None:
    """It waits for no start beyond that, and the worker that is starting is left alone."""
    pool: Pool[Any] = Pool(StopsAtGateInInit, args=(gate.path,), size=1)
    try:
        caller = Caller(lambda: FIRST_USES[use](pool, 0.1))
        gate.wait_arrived()
        caller.join(LAST)
        assert isinstance(caller.error, CheckoutTimeout), caller.error
        assert caller.error.timeout == 0.1 <= caller.error.waited < LAST
        assert "within 0.1 s" in str(caller.error)
        gate.open()

        assert pool.call("pid") == pool.workers()[0].pid
        assert (pool.stats().workers_started, pool.deaths()) == (1, [])
    finally:
        pool.terminate()


def test_first_use_that_must_not_wait_does_not(gate: Gate) -> None:
    pool: Pool[Any] = Pool(StopsAtGateInInit, args=(gate.path,), size=1)
    try:
        refused(pool, 0)
        gate.wait_arrived()
        gate.open()
        assert pool.call("pid") == pool.workers()[0].pid
    finally:
        pool.terminate()


def test_first_use_hears_at_once_that_the_class_raises(tmp_path: Path) -> None:
    flag = tmp_path / "in the way"
    flag.touch()
    pool = Pool(FailsWhileFileExists, args=(str(flag),), size=1)
    try:
        with pytest.raises(PoolStartError, match="is in the way"):
            pool.checkout(timeout=LAST)
        flag.unlink()

        assert pool.options(timeout=LAST).call("pid") == pool.workers()[0].pid
    finally:
        pool.close()


# -- what it is told -----------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[Pool[Stateful]]:
    with Pool(Stateful, size=2) as made:
        yield made


def test_refusal_tells_which_threads_have_the_workers_and_since_when(
    pool: Pool[Stateful], gate: Gate
) -> None:
    done = threading.Event()

    def keep() -> None:
        with pool.checkout():
            held.set()
            done.wait(LAST)

    held = threading.Event()
    keeper = Caller(keep, name="keeper")
    assert held.wait(LAST)
    busy = Caller(lambda: pool.call(pass_gate, gate.path), name="busy")
    gate.wait_arrived()
    told = refused(pool)
    done.set()
    gate.open()
    keeper.join(LAST)
    busy.join(LAST)

    assert "all 2 workers are leased (the longest held: worker " in told
    assert "by thread 'keeper';" in told
    assert "by thread 'busy', in '" in told and "pass_gate'" in told
    assert told.endswith("(`leak_warn_after`)")
    assert "raise `size`" in told and "never given back" in told


def test_refusal_of_a_session_tells_who_has_it(pool: Pool[Stateful]) -> None:
    with pool.checkout(session="one"):
        told = refused(pool, session="one")

    assert re.search(r"in use for all of 0.05 s \(worker \d for \d+\.\d s, by thread 'MainT", told)


def test_refusal_suspects_no_lease_that_is_younger_than_the_wait(pool: Pool[Stateful]) -> None:
    """The workers went from hand to hand: more of them help, and nobody has to look for one."""
    leases = [pool.checkout() for _ in range(2)]
    assert pool._desk is not None
    why, remedy = refusal(pool._desk.manager, mine=0, waited=LAST)
    for lease in leases:
        lease.release()

    assert why.count("by thread 'MainThread'") == 2
    assert remedy == "raise `size` or `checkout_timeout`"


def test_refusal_tells_of_a_start_under_way(gate: Gate) -> None:
    with Pool(StopsAtGateInInit, args=(gate.path,), size=1, lazy=True) as pool:
        told = refused(pool)
        gate.wait_arrived()
        gate.open()

    assert re.search(r"no worker serves yet: 1 is starting, for \d+\.\d s;", told), told
    assert told.endswith("raise the timeout, or wait for the start with `open()` or `wait_ready()`")
    assert "raise `size`" not in told


def test_refusal_tells_of_starts_that_fail(tmp_path: Path) -> None:
    flag = tmp_path / "in the way"
    with Pool(FailsWhileFileExists, args=(str(flag),), size=1) as pool:
        ear = Ear(pool, "error")
        flag.touch()
        os.kill(pool.workers()[0].pid or 0, signal.SIGKILL)
        ear.wait("error", fits=lambda e: isinstance(e.metadata["error"], WorkerStartError) and
                 e.metadata["error"].__cause__ is not None)  # fmt: skip
        told = refused(pool)
        flag.unlink()

    assert "no worker serves" in told
    assert "the last start failed: worker 0 did not start: OSError:" in told
    assert "is in the way" in told
    assert told.endswith("correct what made the last start fail")


def test_refusal_of_a_nested_checkout_blames_nobody_else(pool: Pool[Stateful]) -> None:
    with pool.checkout(), pool.checkout():
        told = refused(pool)

    assert "this thread already holds 2 leases, and would wait for itself; give" in told
    assert "never given back" not in told
