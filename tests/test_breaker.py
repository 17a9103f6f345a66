"""CircuitBreaker: on its own with a clock turned by hand, and over the starts of a pool."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

from ears import Ear, handle_of, wait_until
from gates import Gate
from minipool import (
    CheckoutTimeout,
    CircuitBreaker,
    CircuitOpen,
    Pool,
    PoolConfig,
    WorkerDied,
    WorkerError,
    WorkerStartError,
)
from minipool.breaker import Permit
from minipool.engine import table as t
from minipool.engine.deadend import DeadEnd
from minipool.engine.fleet import Fleet
from minipool.engine.states import WorkerState
from minipool.telemetry import Hooks
from strikes import strike_everywhere
from troublemakers import CannotStart, FailsThenStops, FailsWhileFileExists
from workers import DiesOnCall

LAST = 20.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def breaker_of(**limits: Any) -> tuple[CircuitBreaker, Clock, list[str]]:
    clock, seen = Clock(), []
    breaker = CircuitBreaker(clock=clock, **limits)
    breaker.listeners.append(lambda changed: seen.append(changed.state))
    return breaker, clock, seen


def permit(breaker: CircuitBreaker) -> Permit:
    given = breaker.permit()
    assert given is not None
    return given


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    for attempt in range(times):
        permit(breaker).failed(OSError(attempt))


# -- the object ----------------------------------------------------------------------------------


def test_opens_after_five_failures_in_a_row_and_tells_why() -> None:
    breaker, clock, seen = breaker_of()
    fail(breaker, 4)
    assert (breaker.state, seen) == ("closed", [])
    fail(breaker)
    assert (breaker.state, breaker.failures, breaker.opened, seen) == ("open", 5, 1, ["open"])
    clock.now = 12.0
    with pytest.raises(
        CircuitOpen, match=r"5 failures in a row; the next trial is due in 18\.0 s"
    ) as caught:
        breaker.call(int)
    assert (caught.value.failures, caught.value.retry_in) == (5, 18.0)
    assert isinstance(caught.value.__cause__, OSError)


def test_success_ends_a_row_of_failures() -> None:
    breaker, _, _ = breaker_of()
    for _ in range(3):
        fail(breaker, 4)
        permit(breaker).succeeded()
    assert (breaker.state, breaker.failures, breaker.cause) == ("closed", 0, None)


def test_one_trial_at_a_time_once_it_is_due() -> None:
    breaker, clock, seen = breaker_of()
    fail(breaker, 5)
    clock.now = 29.9
    assert breaker.permit() is None
    clock.now = 30.0
    trial = permit(breaker)
    assert (breaker.state, breaker.permit()) == ("half-open", None), "one is in flight"
    trial.succeeded()
    second = permit(breaker)
    assert breaker.permit() is None
    second.give_up()  # without a verdict
    permit(breaker).succeeded()
    assert breaker.state == "half-open"
    permit(breaker).succeeded()
    assert (breaker.state, seen) == ("closed", ["open", "half-open", "closed"])
    assert breaker.retry_in == 0


def test_as_many_trials_in_flight_as_allowed() -> None:
    breaker, clock, _ = breaker_of(trials=2)
    fail(breaker, 5)
    clock.now = 30.0
    both = [permit(breaker), permit(breaker)]
    assert breaker.permit() is None
    both.pop()  # dropped: it can bring no verdict any more
    assert breaker.permit() is not None


@pytest.mark.parametrize("trials", [1, 2])
def test_trial_that_hangs_holds_up_the_next_one_for_a_while_only(trials: int) -> None:
    """Then another is permitted, and what the first one says, however late, counts for nothing."""
    breaker, clock, _ = breaker_of(trials=trials, successes=1)
    fail(breaker, 5)
    clock.now = 30.0
    hanging = [permit(breaker) for _ in range(trials)]
    clock.now = 59.9
    assert breaker.permit() is None
    clock.now = 60.0
    trial = permit(breaker)
    for late in hanging:
        late.failed()
        late.give_up()
    assert (breaker.state, breaker.failures) == ("half-open", 5)
    assert (breaker.permit() is None) == (trials == 1), "the new one is in flight"
    trial.succeeded()
    assert breaker.state == "closed"


def test_trial_has_a_second_even_where_trying_again_waits_for_nothing() -> None:
    breaker, clock, _ = breaker_of(retry_after=0)
    fail(breaker, 5)
    hanging = permit(breaker)
    clock.now = 0.9
    assert breaker.permit() is None
    clock.now = 1.0
    assert breaker.permit() is not None and hanging.in_flight


def test_trial_worker_that_hangs_lets_another_be_tried(tmp_path: Path, gate: Gate) -> None:
    """Its constructor never ends, and init_timeout is None: others are tried all the same."""
    clock = Clock()
    breaker = CircuitBreaker(failures=1, successes=1, clock=clock)
    pool = Pool(
        FailsThenStops, args=(str(tmp_path / "seen"), gate.path), size=2, breaker=breaker,
        init_timeout=None, health_check_interval=0.2,
    )  # fmt: skip
    ear = Ear(pool, "breaker.changed")
    with pool.open(wait=False):
        ear.wait("breaker.changed")
        clock.now = 30.0
        gate.wait_arrived()
        assert (breaker.state, pool.stats().starting) == ("half-open", 1)
        clock.now = 60.0
        gate.wait_arrived()  # the second trial
        gate.open(2)
        ear.wait("breaker.changed", fits=lambda event: event.metadata["state"] == "closed")
        pool.wait_ready(timeout=LAST)


def test_failed_trial_opens_it_again_for_as_long() -> None:
    breaker, clock, seen = breaker_of()
    fail(breaker, 5)
    clock.now = 40.0
    permit(breaker).succeeded()
    fail(breaker)
    assert (breaker.state, breaker.retry_in, breaker.opened) == ("open", 30.0, 2)
    assert seen == ["open", "half-open", "open"]


def test_late_verdict_of_an_earlier_era_counts_for_nothing() -> None:
    """What began before it opened says nothing of how things are now."""
    breaker, clock, _ = breaker_of(successes=1)
    late = [permit(breaker) for _ in range(3)]
    fail(breaker, 5)
    late[0].failed()
    assert (breaker.failures, breaker.opened) == (5, 1)
    clock.now = 30.0
    trial = permit(breaker)
    late[1].succeeded()
    late[2].failed()
    late[2].give_up()
    assert (breaker.state, breaker.permit()) == ("half-open", None)
    trial.succeeded()
    assert breaker.state == "closed"


def test_reset_closes_it_at_once() -> None:
    breaker, _, seen = breaker_of()
    fail(breaker, 5)
    breaker.reset()
    breaker.reset()
    assert (breaker.state, breaker.failures, breaker.cause) == ("closed", 0, None)
    assert seen == ["open", "closed"]
    assert breaker.call(int, "7") == 7


def test_call_counts_faults_and_not_what_your_code_raises() -> None:
    breaker, _, _ = breaker_of(failures=2)

    def raise_it(error: BaseException) -> None:
        raise error

    fault = WorkerDied("gone", worker_id=0)
    for error in (fault, KeyError("yours"), fault):
        with pytest.raises(type(error)):
            breaker.call(raise_it, error)
    assert (breaker.state, breaker.failures) == ("closed", 1), "your exception came from a worker"
    for error in (CheckoutTimeout("none free"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            breaker.call(raise_it, error)
    assert breaker.failures == 1, "these say nothing"
    with pytest.raises(WorkerError):
        breaker.call(raise_it, fault)
    with pytest.raises(CircuitOpen) as caught:
        breaker.call(raise_it, fault)
    assert caught.value.__cause__ is fault


def test_interrupted_trial_lets_the_next_one_be_made() -> None:
    breaker, clock, _ = breaker_of(successes=1)
    fail(breaker, 5)
    clock.now = 30.0

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaker.call(interrupt)
    assert breaker.call(int) == 0
    assert breaker.state == "closed"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a `__del__`
def test_trial_that_is_interrupted_anywhere_is_not_in_flight_for_ever() -> None:
    breaker, clock, _ = breaker_of(successes=1_000)
    fail(breaker, 5)
    clock.now = 30.0

    def trial() -> None:
        assert breaker.call(int) == 0

    trial()  # half-open from now on
    assert strike_everywhere(trial, sys.modules[CircuitBreaker.__module__]) > 5
    assert breaker.state == "half-open"
    assert breaker._in_flight == 0


def test_threads_at_once_get_one_trial() -> None:
    breaker, clock, _ = breaker_of()
    fail(breaker, 5)
    clock.now = 30.0
    start, got = threading.Barrier(16), []

    def try_it() -> None:
        start.wait(LAST)
        got.append(breaker.permit())

    threads = [threading.Thread(target=try_it) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LAST)
    assert len([given for given in got if given is not None]) == 1


@pytest.mark.logs_errors
def test_listener_that_raises_is_logged_and_removed(caplog: Any) -> None:
    breaker, _, seen = breaker_of()

    def raises(changed: CircuitBreaker) -> None:
        raise RuntimeError("not this one")

    breaker.listeners.insert(0, raises)
    fail(breaker, 5)
    breaker.reset()
    assert seen == ["open", "closed"]
    assert len(caplog.records) == 1 and raises not in breaker.listeners


@pytest.mark.parametrize(
    "limits",
    [{"failures": 0}, {"failures": 1.5}, {"retry_after": -1}, {"successes": 0}, {"trials": 0},
     {"retry_after": float("inf")}],
)  # fmt: skip
def test_wrong_limits_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give a"):
        CircuitBreaker(**limits)


# -- over the starts of a pool -------------------------------------------------------------------


class Obstructed:
    """A pool whose workers cannot be started while there is a certain file."""

    def __init__(self, folder: Path, size: int) -> None:
        self.obstacle = folder / "obstacle"
        self.clock = Clock()
        self.breaker = CircuitBreaker(failures=3, clock=self.clock)
        self.pool = Pool(
            FailsWhileFileExists, args=(str(self.obstacle),), size=size, breaker=self.breaker,
            health_check_interval=0.2,  # a tick of 50 ms
        )  # fmt: skip
        self.ear = Ear(self.pool, "error", "worker.init", "breaker.changed", "queue.depth")

    def prove_all(self) -> None:
        """Have each worker answer a call, so that its death is no failed start."""
        leases = [self.pool.checkout() for _ in range(self.pool.stats().size)]
        for lease in leases:
            lease.call("pid")
            lease.release()

    def starts(self) -> int:
        return self.pool.stats().start_failures

    def states(self) -> list[str]:
        return [event.metadata["state"] for event in self.ear.of("breaker.changed")]

    def open_it(self) -> None:
        """Let one worker die, and its successors fail, until the breaker has opened."""
        self.prove_all()
        self.obstacle.touch()
        handle_of(self.pool, self.pool.stats().size - 1).kill()
        self.ear.wait("breaker.changed")


def test_open_breaker_leaves_the_workers_that_are_well_to_the_callers(tmp_path: Path) -> None:
    """Nothing is started, but who wants a worker gets, or waits for, one of those."""
    story = Obstructed(tmp_path, size=2)
    with story.pool as pool:
        story.open_it()
        stats = pool.stats()
        assert (stats.breaker, stats.breaker_opened, story.starts()) == ("open", 1, 3)
        report = pool.health_check()
        assert report.status == "degraded"
        assert any("circuit breaker is open" in reason for reason in report.reasons), report
        assert pool.call("pid") == handle_of(pool, 0).pid
        with pool.checkout():
            with pytest.raises(CheckoutTimeout):
                pool.checkout(timeout=0.3)  # and not CircuitOpen: it may well come back
        assert story.starts() == 3 and story.states() == ["open"]


def test_without_any_worker_callers_are_told_at_once_and_why(tmp_path: Path) -> None:
    """Those who come later, and those who were waiting for the last one, for ever."""
    story = Obstructed(tmp_path, size=2)
    with story.pool as pool:
        story.open_it()
        lease, told = pool.checkout(), []

        def wait() -> None:
            with pytest.raises(CircuitOpen) as caught:
                pool.checkout(timeout=None)
            told.append(caught.value)

        waiter = threading.Thread(target=wait)
        waiter.start()
        story.ear.wait("queue.depth")
        handle_of(pool, 0).kill()
        waiter.join(LAST)
        with pytest.raises(CircuitOpen, match=r"no worker of pool-[0-9]+ is there") as caught:
            pool.checkout(timeout=None)
        for error in (*told, caught.value):
            assert isinstance(error.__cause__, WorkerStartError) and error.retry_in == 30.0
            assert "is in the way" in str(error.__cause__)
        assert len(told) == 1 and pool.health_check().status == "unhealthy"
        lease.release()


def test_pool_recovers_by_itself_through_one_trial_at_a_time(tmp_path: Path) -> None:
    story = Obstructed(tmp_path, size=3)
    with story.pool as pool:
        story.open_it()
        handle_of(pool, 0).kill()
        handle_of(pool, 1).kill()
        wait_until(pool, lambda: pool.stats().workers == 0)
        story.clock.now += 30.0
        story.ear.wait("breaker.changed", 3)
        assert story.states() == ["open", "half-open", "open"], "the cause was not mended"
        assert story.starts() == 4, "one worker was tried"
        story.obstacle.unlink()
        story.clock.now += 30.0
        story.ear.wait("breaker.changed", 4)
        with pool.checkout(timeout=LAST) as w:
            for _ in range(3):
                w.call("pid")
        story.ear.wait("breaker.changed", 5)
        pool.wait_ready(timeout=LAST)
        assert story.states()[3:] == ["half-open", "closed"]
        assert pool.stats().idle == 3 and pool.stats().breaker == "closed"


def test_living_on_is_success_too(tmp_path: Path) -> None:
    """An idle pool needs no callers to recover: a worker's seconds count."""
    story = Obstructed(tmp_path, size=1)
    with story.pool as pool:
        story.open_it()
        story.obstacle.unlink()
        story.clock.now += 30.0
        story.ear.wait("breaker.changed", 3, fits=lambda _: True)
        assert story.states() == ["open", "half-open", "closed"]
        assert pool.stats().calls == 1, "that with which it had proved well"


def test_reset_tries_again_at_once(tmp_path: Path) -> None:
    story = Obstructed(tmp_path, size=1)
    with story.pool as pool:
        story.open_it()
        story.obstacle.unlink()
        assert pool.breaker is story.breaker and pool._desk is not None
        pool._desk.manager.fleet.not_before += 1000.0  # the back-off ends with it
        pool.breaker.reset()
        assert pool.options(timeout=LAST).call("pid") == handle_of(pool, 0).pid
        assert story.states() == ["open", "closed"]


class Proving:
    """Stands in for a handle: a worker that became ready after all failures so far."""

    state, condemned, tainted = WorkerState.IDLE, True, "let go"
    slot, generation, pid, spawned_ns = 7, 1, 1, 0
    channel = DeadEnd(None)

    def __init__(self, fleet: Fleet, calls: int) -> None:
        assert fleet.breaker is not None
        self.permit = fleet.breaker.permit()
        self.ready_ns = time.monotonic_ns()
        self.row = memoryview(bytearray(t.ROW_BYTES)).cast("q")
        self.row[t.CALL_ID] = calls
        fleet.handles[self.slot] = self  # type: ignore[assignment]

    def reap(self) -> None: ...

    def __getattr__(self, name: str) -> None:
        return None  # whatever else a worker may have, this one has not


@pytest.fixture
def failing_fleet() -> Iterator[Fleet]:
    """A fleet, without a manager to look round, whose starts have failed four times."""
    fleet = Fleet(CannotStart(), PoolConfig(size=1), Hooks(""))  # type: ignore[arg-type]
    for _ in range(4):
        assert fleet.spawn(1) == []
    yield fleet
    for give_back in fleet.givings_back():
        give_back()


def test_success_between_two_looks_ends_the_row(failing_fleet: Fleet) -> None:
    """A fifth failure is the first if a worker has answered a call meanwhile."""
    Proving(failing_fleet, calls=1)
    assert failing_fleet.spawn(1) == []
    breaker = failing_fleet.breaker
    assert breaker is not None
    assert (breaker.failures, failing_fleet.failures_in_a_row) == (1, 1)


def test_worker_that_proved_well_and_ended_between_two_looks_ends_the_row(
    failing_fleet: Fleet,
) -> None:
    failing_fleet.bury(Proving(failing_fleet, calls=1), 0, None)  # type: ignore[arg-type]
    assert failing_fleet.failures_in_a_row == 0
    assert failing_fleet.spawn(1) == [] and failing_fleet.failures_in_a_row == 1


def test_each_call_is_one_success_however_often_it_is_seen(failing_fleet: Fleet) -> None:
    breaker = failing_fleet.breaker
    assert breaker is not None and failing_fleet.spawn(1) == [] and breaker.state == "open"
    breaker._retry_at = 0.0
    worker = Proving(failing_fleet, calls=2)
    for _ in range(4):
        failing_fleet.forgive(worker.ready_ns + 1)
    assert breaker.state == "half-open"
    worker.row[t.CALL_ID] = 3
    failing_fleet.forgive(worker.ready_ns + 1)
    assert breaker.state == "closed"


def test_deaths_in_calls_do_not_open_it() -> None:
    """One poisonous input, sent often, shuts nobody out: its workers are replaced at once."""
    with Pool(DiesOnCall, size=1) as pool:
        for _ in range(8):
            with pytest.raises(WorkerDied):
                pool.options(timeout=LAST).call("die")
        assert pool.options(timeout=LAST).call("well") == "well"
        assert (pool.stats().breaker, pool.stats().breaker_opened) == ("closed", 0)


def test_without_a_breaker_starting_goes_on(tmp_path: Path) -> None:
    obstacle = tmp_path / "obstacle"
    with Pool(FailsWhileFileExists, args=(str(obstacle),), size=1, breaker=False) as pool:
        ear = Ear(pool, "error", "breaker.changed")
        pool.call("pid")
        obstacle.touch()
        handle_of(pool, 0).kill()
        ear.wait("error", 6, fits=lambda event: event.metadata["kind"] == "start")
        with pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0.05)
        assert pool.breaker is None and pool.stats().breaker is None
        assert ear.of("breaker.changed") == []


def test_breaker_of_a_closed_pool_forgets_it() -> None:
    breaker = CircuitBreaker()
    for _ in range(2):
        with Pool(size=1, breaker=breaker) as pool:
            assert pool.breaker is breaker and len(breaker.listeners) == 1
        assert breaker.listeners == []
