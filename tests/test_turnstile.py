"""The turnstile by itself, without threads where none are needed."""

from __future__ import annotations

import gc
import threading
from typing import Any, Callable, Iterator

import pytest

from minipool.engine import turnstile as module
from minipool.engine.turnstile import Closed, Turnstile, Waiter


class Watched:
    """A turnstile with slots 0..n-1 of generation 1, and what it said to its listeners."""

    def __init__(self, slots: int, strategy: str = "lifo") -> None:
        self.refused: list[tuple[int, Any]] = []
        self.queued = threading.Semaphore(0)
        self.turnstile = Turnstile(
            strategy,
            lambda waiter: self.queued.release(),
            lambda *token: self.refused.append(token),
        )
        for slot in range(slots):
            self.turnstile.admit(slot, 1)
            self.turnstile.publish(slot, 1)


class Taker(threading.Thread):
    """A thread that takes one slot; `outcome` is the token, None or the exception."""

    def __init__(self, watched: Watched, timeout: float | None = 20, wants: int | None = None):
        super().__init__(daemon=True)
        self._take = lambda: watched.turnstile.take(timeout, wants)
        self._outcome: Any = None
        self.start()
        assert watched.queued.acquire(timeout=20), "nobody queued"

    def run(self) -> None:
        try:
            self._outcome = self._take()
        except BaseException as error:
            self._outcome = error

    def outcome(self) -> Any:
        self.join(20)
        assert not self.is_alive(), "still waiting"
        return self._outcome


def test_lifo_gives_the_slot_that_came_last() -> None:
    """The slot used last, whose worker is warm, is used next."""
    turnstile = Watched(3).turnstile

    assert [turnstile.try_take() for _ in range(4)] == [(2, 1), (1, 1), (0, 1), None]


def test_fifo_gives_the_slot_that_came_first() -> None:
    """Slots are used in turn."""
    turnstile = Watched(3, "fifo").turnstile
    assert turnstile.try_take() == (0, 1)
    turnstile.publish(0, 1)

    assert [turnstile.try_take() for _ in range(4)] == [(1, 1), (2, 1), (0, 1), None]


@pytest.mark.parametrize(("strategy", "order"), [("lifo", [3, 2, 1]), ("fifo", [1, 2, 3])])
def test_order_of_the_slots_is_kept_while_somebody_waits_for_another(
    strategy: str, order: list[int]
) -> None:
    turnstile = Watched(4, strategy).turnstile
    assert turnstile.claim(0, 1)
    waiter = turnstile.enqueue(0)

    assert [turnstile.try_take() for _ in range(4)] == [*((slot, 1) for slot in order), None]
    turnstile.publish(0, 1)
    assert waiter.token == (0, 1)


def test_slot_is_on_its_way_to_a_waiter_until_that_has_taken_it() -> None:
    turnstile = Watched(1).turnstile
    assert turnstile.claim(0, 1)
    waiter = turnstile.enqueue()
    assert turnstile.receiver(0) is None
    turnstile.publish(0, 1)
    assert turnstile.receiver(0) is waiter
    waiter.taken = True

    assert turnstile.receiver(0) is None


@pytest.mark.parametrize("strategy", ["lifo", "fifo"])
def test_fenced_token_is_dropped_by_who_finds_it(strategy: str) -> None:
    """A token that slips into `idle` beside a fence is never handed out, not even to a waiter."""
    watched = Watched(2, strategy)
    turnstile = watched.turnstile
    turnstile.fence(0)
    turnstile.fence(1)
    turnstile.idle[0] = turnstile.idle[1] = 1  # by releasers who looked before the fence

    assert turnstile.try_take() is None
    turnstile.idle[0] = 1
    assert turnstile.enqueue().token is None
    assert not turnstile.idle


def test_fence_drops_the_idle_token() -> None:
    """A fenced slot cannot be taken; admitted anew, it can, under the new generation."""
    turnstile = Watched(1).turnstile

    turnstile.fence(0)
    assert turnstile.try_take() is None
    turnstile.admit(0, 2)
    assert turnstile.publish(0, 2)
    assert turnstile.try_take() == (0, 2)


def test_fenced_slot_is_refused_once() -> None:
    """What is given back under an old generation goes to the listener, exactly once."""
    watched = Watched(1)
    token = watched.turnstile.try_take()
    watched.turnstile.fence(0)

    assert token == (0, 1)
    assert watched.turnstile.publish(0, 1) is False
    assert watched.refused == [(0, 1)]
    assert not watched.turnstile.idle


def test_closed_turnstile_refuses_once() -> None:
    """What is given back after close goes to the listener, exactly once."""
    watched = Watched(2)
    watched.turnstile.try_take()
    assert watched.turnstile.close() == [(0, 1)]

    assert watched.turnstile.publish(1, 1) is False
    assert watched.refused == [(1, 1)]
    assert not watched.turnstile.idle


def test_straggler_does_not_displace_the_next_worker() -> None:
    """A releaser who slept through fence, death and replacement is refused; the new token stays."""
    watched = Watched(1)
    turnstile = watched.turnstile
    turnstile.try_take()

    class Slow(dict):  # type: ignore[type-arg]
        def get(self, slot: int, default: Any = None) -> Any:
            found = super().get(slot, default)
            turnstile.current = dict(self)  # the straggler has looked; he sleeps, and meanwhile:
            turnstile.fence(0)
            turnstile.admit(0, 2)
            turnstile.publish(0, 2)
            return found

    turnstile.current = Slow(turnstile.current)

    assert turnstile.publish(0, 1) is False
    assert watched.refused == [(0, 1)]
    assert turnstile.try_take() == (0, 2)


def test_leftover_of_an_old_generation_gives_way() -> None:
    """A stale token in `idle` does not keep the valid one of the same slot out."""
    watched = Watched(1)
    turnstile = watched.turnstile
    turnstile.fence(0)
    turnstile.idle[0] = 1
    turnstile.admit(0, 2)

    assert turnstile.publish(0, 2)
    assert watched.refused == []
    assert turnstile.try_take() == (0, 2)


def test_newcomer_never_overtakes_a_waiter() -> None:
    """While anybody waits, `try_take` gives nothing, even if a slot is idle."""
    watched = Watched(0)
    turnstile = watched.turnstile
    waiter = turnstile.enqueue()
    turnstile.admit(0, 1)
    turnstile.idle[0] = 1  # the releaser has not yet looked at the line

    assert turnstile.try_take() is None
    turnstile.pump()
    assert waiter.token == (0, 1)


def test_waiters_are_served_in_the_order_they_came() -> None:
    """Three waiters, three slots: the first slot goes to the first waiter."""
    turnstile = Watched(0).turnstile
    line = [turnstile.enqueue() for _ in range(3)]
    for slot in (2, 0, 1):
        turnstile.admit(slot, 1)
        turnstile.publish(slot, 1)

    assert [waiter.token for waiter in line] == [(2, 1), (0, 1), (1, 1)]


def test_take_without_waiting() -> None:
    """With timeout 0 an idle slot is taken, and nobody queues if there is none."""
    watched = Watched(1)

    assert watched.turnstile.take(0) == (0, 1)
    assert watched.turnstile.take(0) is None
    assert watched.turnstile.take(-1.0) is None
    assert not watched.queued.acquire(blocking=False)


def test_take_without_waiting_passes_one_who_wants_another_slot() -> None:
    """Who waits for slot 0 alone does not keep slot 1 from one who cannot wait."""
    watched = Watched(2)
    assert watched.turnstile.take(0, wants=0) == (0, 1)
    waiter = watched.turnstile.enqueue(wants=0)

    assert watched.turnstile.take(0) == (1, 1)
    assert watched.turnstile.take(0) is None
    assert list(watched.turnstile.waiters.values()) == [waiter]


def test_wanted_slot_is_waited_for() -> None:
    """Who wants a slot gets that one and no other, after those who wanted it before."""
    watched = Watched(2)
    turnstile = watched.turnstile
    assert turnstile.take(0, wants=0) == (0, 1)
    assert turnstile.take(0, wants=0) is None
    line = [turnstile.enqueue(wants=0), turnstile.enqueue(wants=0)]

    assert [waiter.token for waiter in line] == [None, None]
    turnstile.publish(0, 1)
    assert [waiter.token for waiter in line] == [(0, 1), None]
    assert turnstile.take(0) == (1, 1)


def test_wanting_thread_waits_for_its_slot() -> None:
    """A thread that wants slot 0 sleeps through the return of slot 1."""
    watched = Watched(2)
    watched.turnstile.take(0)
    watched.turnstile.take(0)
    taker = Taker(watched, wants=0)
    watched.turnstile.publish(1, 1)
    assert list(watched.turnstile.waiters)
    watched.turnstile.publish(0, 1)

    assert taker.outcome() == (0, 1)
    assert watched.turnstile.idle == {1: 1}


def test_waiter_for_one_slot_does_not_stand_in_the_way_of_others() -> None:
    """A newcomer passes it without queueing, unless it wants, or would get, that very slot."""
    watched = Watched(3)
    turnstile = watched.turnstile
    assert turnstile.take(0, wants=1) == (1, 1)
    waiter = turnstile.enqueue(wants=1)
    turnstile.idle[1] = 1  # the releaser has not yet looked at the line

    assert turnstile.try_take_this(1) is None
    assert turnstile.try_take_this(0) == (0, 1)
    assert turnstile.try_take() == (2, 1)
    assert turnstile.try_take() is None
    assert turnstile.sweep(None) is None
    assert waiter.token == (1, 1)


def test_waiter_that_takes_any_slot_after_a_while_keeps_its_place() -> None:
    """It waited for one slot first, before another joined the line; then any will do for both."""
    watched = Watched(2)
    turnstile = watched.turnstile
    tokens = [turnstile.try_take(), turnstile.try_take()]
    outcome: list[Any] = []
    widened = threading.Event()

    def pump(*slot: Any) -> None:
        Turnstile.pump(turnstile, *slot)
        widened.set()

    turnstile.pump = pump  # type: ignore[method-assign]
    first = threading.Thread(target=lambda: outcome.append(turnstile.take(20, 0, 0.05)))
    first.start()
    assert watched.queued.acquire(timeout=20)
    second = turnstile.enqueue()
    assert widened.wait(20)
    assert turnstile.general_waiters() == 2
    turnstile.publish(1, 1)
    first.join(20)

    assert sorted(tokens) == [(0, 1), (1, 1)]
    assert (outcome, second.token) == ([(1, 1)], None)


def test_waiter_that_takes_any_slot_after_a_while_is_told_of_again() -> None:
    """One more slot did not help it as long as it wanted a certain one; now it does."""
    watched = Watched(1)
    turnstile = watched.turnstile
    turnstile.try_take()
    general: list[int] = []
    told = turnstile._on_queue
    turnstile._on_queue = lambda waiter: (general.append(turnstile.general_waiters()), told(waiter))
    outcome: list[Any] = []
    taker = threading.Thread(target=lambda: outcome.append(turnstile.take(20, 0, 0.01)))
    taker.start()

    assert watched.queued.acquire(timeout=20)
    assert watched.queued.acquire(timeout=20)
    assert general == [0, 1]
    turnstile.admit(1, 1)
    turnstile.publish(1, 1)
    taker.join(20)
    assert outcome == [(1, 1)]


def test_only_those_that_any_slot_would_serve_are_counted() -> None:
    """One slot more is of no use to a waiter that wants a certain one."""
    turnstile = Watched(1).turnstile
    turnstile.try_take()
    line = [turnstile.enqueue(), turnstile.enqueue(wants=0), turnstile.enqueue()]

    assert (turnstile.general_waiters(), len(turnstile.waiters)) == (2, 3)
    turnstile.leave(line[0])
    assert (turnstile.general_waiters(), len(turnstile.waiters)) == (1, 2)
    turnstile.leave(line[1])
    turnstile.leave(line[2])
    assert (turnstile.general_waiters(), len(turnstile.waiters)) == (0, 0)


def test_timed_out_waiter_leaves_no_ghost() -> None:
    """After a timeout nobody is in the line, and the next slot goes to the next one."""
    watched = Watched(1)
    watched.turnstile.try_take()

    assert Taker(watched, timeout=0.01).outcome() is None
    assert not watched.turnstile.waiters
    watched.turnstile.publish(0, 1)
    assert watched.turnstile.try_take() == (0, 1)


def test_hand_over_that_beats_the_timeout_is_a_late_success() -> None:
    """A waiter whose time is up, but to which a slot was handed meanwhile, takes it."""
    turnstile = Watched(0).turnstile
    waiter = turnstile.enqueue()
    assert waiter.settle((0, 1))  # by a matcher, which is about to wake it

    assert turnstile._outcome(waiter) == (0, 1)


def test_waiter_is_settled_once_and_for_all() -> None:
    """The first outcome stays, whoever comes next; equal outcomes are told apart."""
    waiter = Waiter(0)

    assert waiter.settle((0, 1)) is True
    assert waiter.settle((0, 1)) is False
    assert waiter.settle("closed") is False
    assert (waiter.token, waiter.closed) == ((0, 1), False)


def test_forgotten_waiter_is_woken_by_the_sweep() -> None:
    """A thread that an exception struck had settled it, and not woken it."""
    watched = Watched(1)
    token = watched.turnstile.try_take()
    taker = Taker(watched, timeout=None)
    (waiter,) = watched.turnstile.waiters.values()
    assert waiter.settle(token)
    watched.turnstile.sweep(None)

    assert taker.outcome() == (0, 1)
    assert not watched.turnstile.waiters


def test_waiters_sweep_where_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turnstile without a manager repairs itself while anybody waits."""
    monkeypatch.setattr(module, "_LOOK", 0.01)
    watched = Watched(1)
    watched.turnstile._seat["taken"] = "a thread that was struck"
    watched.turnstile.try_take()
    takers = [Taker(watched, timeout=None), Taker(watched, timeout=20)]
    watched.turnstile.publish(0, 1)
    assert takers[0].outcome() == (0, 1)
    watched.turnstile.publish(0, 1)

    assert takers[1].outcome() == (0, 1)


def test_second_settlement_is_impossible() -> None:
    """Of all who would settle a waiter, one pops its ticket; the others find nothing to do."""
    watched = Watched(0)
    turnstile = watched.turnstile
    woken: list[Any] = []
    waiter = turnstile.enqueue()
    waiter.wake = lambda: woken.append((waiter.token, waiter.closed))
    for slot in (0, 1):
        turnstile.admit(slot, 1)
        turnstile.publish(slot, 1)
    turnstile.close()

    assert woken == [((0, 1), False)]
    assert (waiter.token, waiter.closed) == ((0, 1), False)


def test_waiter_who_leaves_gives_back_what_he_was_given() -> None:
    """A slot handed over to one who does not want it any more is idle again."""
    turnstile = Watched(0).turnstile
    waiter = turnstile.enqueue()
    turnstile.admit(0, 1)
    turnstile.publish(0, 1)
    assert waiter.token == (0, 1) and not turnstile.idle

    turnstile.leave(waiter)
    assert turnstile.idle == {0: 1}
    turnstile.leave(waiter)  # has no second effect
    assert turnstile.try_take() == (0, 1)


def test_waiter_that_leaves_twice_takes_nothing_from_the_next_owner() -> None:
    """What it gave back the first time may have a new owner by the second."""
    turnstile = Watched(0).turnstile
    waiter = turnstile.enqueue()
    turnstile.admit(0, 1)
    turnstile.publish(0, 1)
    turnstile.leave(waiter)
    assert turnstile.try_take() == (0, 1)

    turnstile.leave(waiter)
    assert turnstile.try_take() is None


def test_waiter_that_runs_with_its_slot_does_not_give_it_back_by_leaving() -> None:
    """An exception that comes when its thread has got the slot already finds it there."""
    turnstile = Watched(0).turnstile
    waiter = turnstile.enqueue()
    turnstile.admit(0, 1)
    turnstile.publish(0, 1)
    waiter.taken = True

    turnstile.leave(waiter)
    assert turnstile.try_take() is None


def test_waiter_who_leaves_in_time_is_not_served() -> None:
    """Who left the line gets nothing; the next one does."""
    turnstile = Watched(0).turnstile
    first, second = turnstile.enqueue(), turnstile.enqueue()
    turnstile.leave(first)
    turnstile.admit(0, 1)
    turnstile.publish(0, 1)

    assert (first.token, second.token) == (None, (0, 1))


@pytest.mark.parametrize("where", ["_on_queue", "wait"])
def test_interrupted_waiter_loses_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the wait leaves nobody in the line, and a slot handed over is idle again."""
    watched = Watched(1)
    turnstile = watched.turnstile
    turnstile.try_take()

    def interrupted(*args: Any) -> None:
        turnstile.publish(0, 1)  # it is handed over at the last moment
        raise KeyboardInterrupt

    target: Any = turnstile if where == "_on_queue" else Waiter
    monkeypatch.setattr(target, where, interrupted)

    with pytest.raises(KeyboardInterrupt):
        turnstile.take(None)
    assert not turnstile.waiters
    assert turnstile.idle == {0: 1}


def test_close_settles_every_waiter_and_returns_what_was_idle() -> None:
    """Sleepers wake with Closed, idle tokens go to the closer, newcomers are told at once."""
    watched = Watched(3)
    turnstile = watched.turnstile
    assert turnstile.take(0, wants=1) == (1, 1)
    takers = [Taker(watched, timeout=None, wants=1) for _ in range(3)]

    assert sorted(turnstile.close()) == [(0, 1), (2, 1)]
    assert [type(taker.outcome()) for taker in takers] == [Closed] * 3
    assert not turnstile.waiters
    with pytest.raises(Closed):
        turnstile.take(None)
    assert turnstile.try_take() is None
    assert turnstile.enqueue().closed
    assert turnstile.close() == []


def test_claim_takes_that_very_slot() -> None:
    """The manager takes an idle slot by name: once, and only under its valid generation."""
    turnstile = Watched(2).turnstile

    assert turnstile.claim(0, 1) is True
    assert turnstile.claim(0, 1) is False
    assert turnstile.idle == {1: 1}
    assert turnstile.claim(1, 2) is False
    assert turnstile.publish(0, 1)
    assert turnstile.try_take() == (0, 1)


def test_pump_may_be_entered_again_in_mid_match() -> None:
    """A handler that gives back a slot in mid-match neither deadlocks nor is forgotten."""
    turnstile = Watched(0).turnstile
    for slot in (0, 1):
        turnstile.admit(slot, 1)
    first, second = turnstile.enqueue(), turnstile.enqueue()

    def handler() -> None:
        turnstile.publish(1, 1)
        assert second.token is None, "two matches at once, in one thread"

    first.wake = handler
    turnstile.publish(0, 1)

    assert (first.token, second.token) == ((0, 1), (1, 1))
    assert not turnstile._seat


class InACycle:
    """Garbage that only the collector finds; `last_words` are said in whatever thread it runs."""

    def __init__(self, last_words: Callable[[], object]) -> None:
        self.itself = self
        self.last_words = last_words

    def __del__(self) -> None:
        self.last_words()


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """Collect garbage as often as it can be collected."""
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*before)


def test_finaliser_may_queue_while_the_line_is_read(eager_collector: None) -> None:
    """The line is read whole: a finaliser that joins it in mid-read breaks nothing."""
    turnstile = Watched(1).turnstile
    for _ in range(200):
        turnstile.enqueue(wants=7)
    joined: list[Waiter] = []
    for _ in range(20):
        InACycle(lambda: joined.append(turnstile.enqueue(wants=7)))
        turnstile.pump()

    assert joined


@pytest.mark.parametrize("strategy", ["lifo", "fifo"])
def test_exception_in_mid_match_leaves_the_seat(strategy: str) -> None:
    """An exception in the match goes to its thread; the next match is made all the same."""
    turnstile = Watched(0, strategy).turnstile
    for slot in (0, 1):
        turnstile.admit(slot, 1)
    first, second = turnstile.enqueue(), turnstile.enqueue()

    wake = first.wake

    def struck() -> None:
        first.wake = wake
        raise KeyboardInterrupt

    first.wake = struck
    with pytest.raises(KeyboardInterrupt):
        turnstile.publish(0, 1)
    turnstile.publish(1, 1)

    assert (first.token, second.token) == ((0, 1), (1, 1))


def test_sweep_frees_a_forgotten_seat_at_the_second_look() -> None:
    """A seat left taken holds up the line until the manager has seen it twice."""
    turnstile = Watched(0).turnstile
    turnstile._seat["taken"] = "a thread that is struck"
    turnstile.admit(0, 1)
    waiter = turnstile.enqueue()
    turnstile.publish(0, 1)
    assert waiter.token is None

    seen = turnstile.sweep(None)
    assert (seen, waiter.token) == ("a thread that is struck", None)
    assert turnstile.sweep(seen) is None
    assert waiter.token == (0, 1)


def test_sweep_finishes_a_match_that_was_cut_short() -> None:
    """If a slot is idle and somebody waits, the manager's next look brings them together."""
    turnstile = Watched(0).turnstile
    waiter = turnstile.enqueue()
    turnstile.admit(0, 1)
    turnstile.idle[0] = 1  # by a releaser who was struck before he looked at the line

    assert turnstile.sweep(None) is None
    assert waiter.token == (0, 1)


def test_sweep_looks_at_no_line_whose_slot_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be thousands of them; where one slot is idle, one line is matched."""
    turnstile = Watched(3).turnstile
    for slot in (0, 1, 2):
        assert turnstile.claim(slot, 1)
        turnstile.enqueue(wants=slot)
    turnstile.idle[1] = 1  # by a releaser that was struck before it looked at the line
    matched: list[Any] = []
    next_for = Turnstile._next_for

    def noted(turnstile: Turnstile, slot: Any) -> Any:
        matched.append(slot)
        return next_for(turnstile, slot)

    monkeypatch.setattr(Turnstile, "_next_for", noted)

    turnstile.sweep(None)
    assert set(matched) == {1, None}
    assert not turnstile.idle


def test_waiter_sleeps_no_longer_than_asked() -> None:
    """A wait ends by itself, and at once if the waiter is settled already."""
    waiter = Waiter(0)

    assert waiter.wait(0.001) is False
    waiter.wake()
    assert waiter.wait(None) is True
