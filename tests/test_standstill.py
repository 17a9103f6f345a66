"""Time in which nothing could be done counts against no deadline: the account of it."""

from __future__ import annotations

import threading
from typing import Callable

import pytest

from minipool._sync import Notice
from minipool.engine import standstill
from minipool.engine.standstill import DefaultTimeout, Standstills


class Clock:
    """A clock that the test turns by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def account(clock: Clock) -> Standstills:
    """An account whose manager has begun a turn, at 100."""
    made = Standstills(20.0, clock)
    made.turn()
    return made


def rest(account: Standstills, clock: Clock, patience: float, took: float) -> None:
    """Have the manager wait for so long, where it expected to be back after `patience`."""
    account.rest(patience, 1.0)
    clock.now += took
    account.turn()


def test_manager_that_comes_in_time_finds_no_stop(account: Standstills, clock: Clock) -> None:
    """A little late is what a loaded machine is."""
    rest(account, clock, 1.0, 1.9)

    assert account.lost(0.0) == 0.0
    assert not account.stopped


def test_what_a_turn_comes_late_by_is_a_stop(account: Standstills, clock: Clock) -> None:
    rest(account, clock, 1.0, 10.0)

    assert account.lost(0.0) == pytest.approx(9.0)
    assert account.lost(105.0) == pytest.approx(5.0), "who came in the middle lost the rest"
    assert account.lost(clock.now) == 0.0


def test_long_rest_hides_no_more_than_a_tick_of_a_stop(account: Standstills, clock: Clock) -> None:
    """A pool at rest waits for long by choice, and a call may begin right after that."""
    rest(account, clock, 3.0, 10.0)

    assert account.lost(0.0) == pytest.approx(9.0)


def test_stop_in_the_middle_of_a_turn_counts(account: Standstills, clock: Clock) -> None:
    clock.now += 5.0
    account.rest(1.0, 1.0)

    assert account.lost(0.0) == pytest.approx(5.0)


def test_turn_that_something_outside_held_up_does_not_count(
    account: Standstills, clock: Clock
) -> None:
    """Else a slow listener would keep every deadline from coming."""
    clock.now += 5.0
    account.rest(1.0, 1.0, counts=False)

    assert account.lost(0.0) == 0.0


def test_stops_add_up_and_old_ones_are_put_together(account: Standstills, clock: Clock) -> None:
    for _ in range(1000):
        rest(account, clock, 1.0, 4.0)

    assert account.lost(0.0) == pytest.approx(3000.0)
    assert account.lost(clock.now - 8.0) == pytest.approx(6.0)
    assert len(account._stops) <= 256


def test_caller_that_is_first_at_the_thaw_waits_for_the_manager(
    account: Standstills, clock: Clock
) -> None:
    account.rest(1.0, 1.0)
    clock.now += 10.0
    found: list[float] = []
    asked = threading.Event()
    wait_for = account._heard_of.wait_for

    def wait(condition: Callable[[], bool], timeout: float | None = None) -> bool:
        asked.set()
        return wait_for(condition, timeout)

    account._heard_of = Heard(account._heard_of, wait)  # type: ignore[assignment]
    caller = threading.Thread(target=lambda: found.append(account.lost(100.0)))
    caller.start()
    assert asked.wait(20), "it does not wait"
    account.turn()
    caller.join(20)

    assert found == [pytest.approx(9.0)]


class Heard:
    """A notice whose waits are seen."""

    def __init__(self, notice: Notice, wait_for: Callable[..., bool]) -> None:
        self.post, self.wait_for, self._gates = notice.post, wait_for, notice._gates


def test_manager_that_stays_away_is_waited_for_with_a_bound(
    account: Standstills, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standstill, "_PATIENCE", 0.01)
    account.rest(1.0, 1.0)
    clock.now += 10.0
    found: list[float] = []
    caller = threading.Thread(target=lambda: found.append(account.lost(0.0)))
    caller.start()
    caller.join(20)

    assert found == [0.0]


@pytest.mark.parametrize(("rests", "patience"), [(True, 1.0), (False, 0.05)])
def test_manager_that_is_late_with_a_turn_is_given_a_moment_only(
    account: Standstills, clock: Clock, rests: bool, patience: float
) -> None:
    """A listener may hold it up, and what was that long does not count."""
    if rests:
        account.rest(1.0, 1.0)
    waits: list[float | None] = []

    def wait(condition: Callable[[], bool], timeout: float | None = None) -> bool:
        waits.append(timeout)
        return False

    account._heard_of = Heard(account._heard_of, wait)  # type: ignore[assignment]
    clock.now += 10.0
    caller = threading.Thread(target=lambda: account.lost(100.0))
    caller.start()
    caller.join(20)

    assert waits == [patience]


def test_caller_that_waits_is_witness_of_a_stop(account: Standstills, clock: Clock) -> None:
    """A listener ran when it began: the manager cannot tell how long, and counts nothing."""
    limit, longer = account.limit(5.0), account.limit(7.0)
    assert limit.first_wait() == 5.0
    clock.now += 9.0
    account.rest(1.0, 1.0, counts=False)

    assert limit.next_wait() == 0.0
    assert account.lost(100.0) == pytest.approx(4.0), "for all that ask"
    assert account.stopped
    assert longer.left() == pytest.approx(2.0)


def test_stop_that_manager_and_witness_tell_of_counts_once(
    account: Standstills, clock: Clock
) -> None:
    limits = [account.limit(5.0) for _ in range(3)]
    for limit in limits:
        limit.first_wait()
    rest(account, clock, 0.5, 9.0)
    for limit in limits:
        limit.next_wait()

    assert account.lost(100.0) == pytest.approx(8.5)
    assert not account._witnessed


@pytest.mark.parametrize("late", [0.0, 0.9])
def test_wait_that_ends_about_in_time_witnesses_nothing(
    account: Standstills, clock: Clock, late: float
) -> None:
    limit = account.limit(5.0)
    limit.first_wait()
    clock.now += 5.0 + late
    limit.next_wait()

    assert not account.stopped


def test_what_a_caller_does_between_its_waits_is_no_stop(
    account: Standstills, clock: Clock
) -> None:
    limit = account.limit(60.0)
    limit.first_wait()
    clock.now += 10.0
    limit.left()
    clock.now += 10.0
    limit.first_wait()
    clock.now += 1.0
    limit.next_wait()

    assert not account.stopped


def test_manager_waits_for_itself_never(account: Standstills, clock: Clock) -> None:
    """In the middle of a long turn it may ask as well, and so may a listener in its thread."""
    clock.now += 10.0

    assert account.lost(0.0) == 0.0


def test_nobody_waits_for_a_manager_that_has_ended(account: Standstills, clock: Clock) -> None:
    account.end()
    clock.now += 10.0
    found: list[float] = []
    caller = threading.Thread(target=lambda: found.append(account.lost(0.0)))
    caller.start()
    caller.join(20)

    assert found == [0.0]
    assert not account._heard_of._gates


@pytest.mark.parametrize("seconds", [0.0, 5.0, DefaultTimeout(0.0), DefaultTimeout(5.0)])
def test_caller_that_has_time_or_must_not_wait_does_not_wait_for_the_manager(
    account: Standstills, clock: Clock, seconds: float
) -> None:
    """A listener may hold it up: only whoever would give up else has a reason to."""
    clock.now += 10.0
    found: list[float | None] = []
    caller = threading.Thread(target=lambda: found.append(account.limit(seconds).left()))
    caller.start()
    caller.join(20)

    assert found == [seconds]
    assert not account._heard_of._gates


def test_limit_goes_on_by_what_was_lost(account: Standstills, clock: Clock) -> None:
    limit, for_ever = account.limit(5.0), account.limit(None)
    rest(account, clock, 1.0, 10.0)

    assert limit.left() == pytest.approx(4.0)
    assert limit.waited == pytest.approx(10.0)
    assert for_ever.left() is None
    clock.now += 4.5
    assert limit.left() == 0.0


def test_default_timeout_stands_still_while_the_first_worker_starts(
    account: Standstills, clock: Clock
) -> None:
    """One that was given explicitly does not."""
    default, explicit = account.limit(DefaultTimeout(5.0)), account.limit(5.0)
    clock.now += 1.0
    account.note_starting(True)
    clock.now += 10.0
    account.rest(1.0, 1.0, counts=False)

    assert default.left() == pytest.approx(4.0)
    assert explicit.left() == 0.0
    account.note_starting(False)
    clock.now += 3.0
    assert default.left() == pytest.approx(1.0)
    clock.now += 1.5
    assert default.left() == 0.0


def test_default_timeout_stands_still_within_bounds(account: Standstills, clock: Clock) -> None:
    """For no longer than a worker may take to start."""
    account.note_starting(True)
    limit = account.limit(DefaultTimeout(5.0))
    clock.now += 24.0
    account.rest(1.0, 1.0, counts=False)
    assert limit.left() == pytest.approx(1.0)
    clock.now += 1.5
    account.rest(1.0, 1.0, counts=False)

    assert limit.left() == 0.0


def test_wait_for_the_end_of_a_start_is_no_short_one(account: Standstills, clock: Clock) -> None:
    """However little of the timeout was left: who looked more often would learn nothing."""
    limit = account.limit(DefaultTimeout(1.0))
    clock.now += 0.999
    account.note_starting(True)

    assert limit.left() == standstill._BREATH


def test_stop_in_the_middle_of_a_start_counts_once(account: Standstills, clock: Clock) -> None:
    limit = account.limit(DefaultTimeout(5.0))
    account.note_starting(True)
    rest(account, clock, 1.0, 10.0)
    account.note_starting(False)
    clock.now += 1.5
    account.rest(1.0, 1.0, counts=False)

    assert limit.left() == pytest.approx(5.0 - 1.5)
    assert account.counted_or_starting(limit.since) == pytest.approx(10.0)
