"""Sizing: tables and random walks, without any process: who is started, called up and let go."""

from __future__ import annotations

import random
from typing import Any

import pytest

from minipool.engine.sizing import (
    SMALLER,
    LetGo,
    Member,
    Plan,
    Situation,
    Wish,
    nearly_used_up,
    plan,
)
from minipool.engine.states import WorkerState as S

SECOND = 1_000_000_000
FIXED = Wish(target=2, full=2, floor=2, ceiling=2)
ELASTIC = Wish(target=2, full=2, floor=1, ceiling=6)


def idle(slot: int = 0, seconds: float = 0.0, **words: Any) -> Member:
    return Member(slot, S.IDLE, True, int(seconds * SECOND), **words)


def leased(slot: int = 0, **words: Any) -> Member:
    return Member(slot, S.IDLE, **words)


def booting(slot: int = 0, **words: Any) -> Member:
    return Member(slot, S.STARTING, **words)


def spare(slot: int = 0, **words: Any) -> Member:
    return Member(slot, S.SPARE, reserve=True, **words)


def planned(wish: Wish, *members: Member, **words: Any) -> Plan:
    return plan(Situation(members, wish, **words))


def gone(decided: Plan) -> list[int]:
    return [letting.slot for letting in decided.let_go]


NOTHING = Plan(FIXED, (), (), (), (), 0, True)


# -- what is missing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "words", "start"),
    [
        ([], {}, 2),
        ([booting(0)], {}, 1),
        ([idle(0), leased(1)], {}, 0),
        ([idle(0), Member(1, S.PROBING)], {}, 0),
        ([idle(0), Member(1, S.STOPPING)], {}, 1),
        ([idle(0), Member(1, S.LOST)], {"dying": 1}, 0),
        ([idle(0), leased(1, leaving=True)], {}, 1),
        ([idle(0), leased(1, unfit=True)], {}, 0),
        ([idle(0), spare(1, leaving=True)], {}, 1),
        ([], {"may_start": False}, 0),
        ([], {"startup_batch": 1}, 1),
        ([], {"room": 1}, 1),
        ([], {"room": 0}, 0),
        ([], {"waiting": 50}, 2),
    ],
)
def test_what_is_missing_is_started(members: list[Member], words: Any, start: int) -> None:
    """Counting those that boot, and not counting those that are on their way out."""
    decided = planned(FIXED, *members, **words)
    assert (decided.start, gone(decided), decided.wish) == (start, [], FIXED)


def test_service_is_filled_from_the_reserve_first() -> None:
    """Ready ones before worn, worn before those that still boot, used-up ones in need only."""
    ready, worn = spare(4), spare(1, worn=True)
    used_up, raised = spare(2, worn=True, used_up=True), booting(3, reserve=True)
    wish = FIXED.resized(4)
    reserve = [raised, used_up, worn, ready]
    assert planned(wish, *reserve, spares=9).call_up == (4, 1, 3)
    assert planned(wish, *reserve, spares=9, failing=True).call_up == (4, 1, 2, 3)
    assert planned(FIXED.resized(1), *reserve, spares=9).call_up == (4,)


def test_reserve_is_raised_when_service_is_complete() -> None:
    complete = [idle(0), idle(1)]
    assert planned(FIXED, *complete, spares=1)[-2:] == (1, True)
    assert planned(FIXED, *complete, spares=1, may_raise=False).start == 0
    assert planned(FIXED, idle(0), booting(1), spares=1).start == 0
    assert planned(FIXED, idle(0), spares=1)[-2:] == (1, False)
    assert planned(FIXED, *complete, spare(2), spares=1) == NOTHING
    assert planned(FIXED, *complete, Member(2, S.PROBING, reserve=True), spares=1) == NOTHING


def test_worn_worker_is_exchanged_for_a_stand_in_and_no_spare_is_used_for_that() -> None:
    worn = [idle(0, worn=True), idle(1)]
    assert planned(FIXED, *worn)[-2:] == (1, True)
    assert planned(FIXED, *worn, spare(2)).exchange == ((0, 2),)
    assert planned(FIXED, *worn, spare(2), spares=1).exchange == ()
    assert planned(FIXED, *worn, spare(2)).dismiss[0].slot == 0, "it goes in the same turn"
    promised = leased(0, worn=True, unfit=True)
    assert planned(FIXED, promised, idle(1, worn=True), spare(2)).exchange == ()


def test_stand_in_for_one_that_is_nearly_used_up_waits_until_it_is() -> None:
    members = [leased(0, nearly_used_up=True), idle(1)]
    assert planned(FIXED, *members)[-2:] == (1, True)
    assert planned(FIXED, *members, spare(2)) == NOTHING
    assert (nearly_used_up(1), nearly_used_up(10), nearly_used_up(100)) == (1, 9, 90)


def test_reserve_that_nobody_needs_goes() -> None:
    complete = [idle(0), idle(1)]
    assert [letting.slot for letting in planned(FIXED, *complete, spare(2)).dismiss] == [2]
    assert planned(FIXED, *complete, spare(2, worn=True), spares=1).dismiss == ()
    assert planned(FIXED, idle(0), booting(1), spare(2, worn=True)).dismiss == ()


# -- growth --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "members", "waiting", "target", "start"),
    [
        (ELASTIC, [leased(0), leased(1)], 1, 3, 1),
        (ELASTIC, [leased(0), leased(1)], 9, 3, 1),
        (ELASTIC, [leased(0), leased(1), booting(2)], 9, 2, 0),
        (ELASTIC, [leased(0), idle(1)], 1, 2, 0),
        (ELASTIC, [leased(0)], 1, 2, 1),
        (ELASTIC._replace(full=5), [leased(0), leased(1)], 9, 5, 3),
        (ELASTIC._replace(full=5), [leased(0), leased(1)], 2, 4, 2),
        (ELASTIC._replace(full=5, target=3), [leased(0), leased(1), booting(2)], 2, 4, 1),
        (FIXED, [leased(0), leased(1)], 9, 2, 0),
        (FIXED._replace(overflow=1), [leased(0), leased(1)], 9, 2, 1),
        (FIXED._replace(overflow=1), [leased(0), leased(1), leased(2)], 9, 2, 0),
        (FIXED, [leased(0), leased(1), leased(2, leaving=True)], 9, 2, 0),
        (ELASTIC.resized(6), [leased(slot) for slot in range(6)], 9, 6, 0),
        (Wish(0, 3, 3, 3), [], 1, 1, 1),
        (Wish(1, 3, 3, 3), [], 1, 1, 1),
    ],
)  # fmt: skip
def test_the_queue_makes_it_grow(
    wish: Wish, members: list[Member], waiting: int, target: int, start: int
) -> None:
    """At once up to what was asked for last, beyond it one by one, within the bounds."""
    decided = planned(wish, *members, waiting=waiting)
    assert (decided.wish.target, decided.start) == (target, start)


def test_who_is_about_to_be_replaced_makes_it_no_larger() -> None:
    """The line is for the successor of the one that is dying."""
    dying = Member(2, S.LOST)
    decided = planned(ELASTIC, leased(0), leased(1), dying, waiting=9, dying=1)
    assert (decided.wish.target, decided.start) == (2, 0)


def test_one_that_asked_without_waiting_counts_up_to_the_full_size_only() -> None:
    assert planned(Wish(0, 3, 3, 3), asked=True).wish.target == 1
    assert planned(Wish(1, 3, 3, 3), idle(0), asked=True).wish.target == 1
    assert planned(FIXED, leased(0), leased(1), asked=True) == NOTHING
    decided = planned(ELASTIC, leased(0), leased(1), asked=True)
    assert (decided.wish.target, decided.start) == (2, 0)


# -- orders --------------------------------------------------------------------------------------


def test_order_is_the_last_word_on_the_size() -> None:
    """Neither a queue nor a wish without waiting goes back to what the pool was made with."""
    wish = planned(Wish(6, 6, 6, 6), *map(leased, range(6)), resize=2).wish
    assert wish == Wish(2, 2, 2, 2)
    assert planned(wish, leased(0), leased(1), waiting=4).wish == wish
    assert planned(wish, leased(0), leased(1), asked=True).wish == wish
    assert ELASTIC.resized(5) == Wish(5, 5, 1, 6)


def test_order_to_be_smaller_takes_those_first_that_are_missed_least() -> None:
    members = [
        leased(0), leased(1, worn=True), Member(2, S.PROBING), idle(3, warm=True), idle(4, 1),
        idle(5, 9), idle(6, worn=True), booting(7), leased(8, unfit=True),
    ]  # fmt: skip
    order = [8, 7, 6, 5, 4, 3, 2, 1, 0]
    wish = FIXED.resized(9)
    for size in range(1, 9):
        decided = planned(wish, *members, resize=size)
        assert decided.let_go == tuple(LetGo(slot, SMALLER) for slot in order[: 9 - size])
        assert decided.start == 0 or decided.reserve, "a stand-in for one that is worn"


def test_order_counts_those_that_leave_already() -> None:
    leaving = [leased(slot, leaving=True) for slot in (0, 1)]
    for size, wanted in ((2, 0), (1, 1), (3, 0)):
        decided = planned(FIXED, *leaving, leased(2), idle(3), resize=size)
        assert len(decided.let_go) == wanted
        assert not {0, 1} & set(gone(decided))
        assert decided.start == max(0, size - 2)


def test_gentle_order_takes_cold_idle_workers_and_sinks_no_further() -> None:
    members = [leased(0), idle(1, warm=True), idle(2, 5), idle(3, 9)]
    wish = Wish(4, 4, 1, 6)
    decided = planned(wish, *members, resize=3, gentle=True)
    assert (gone(decided), decided.wish.target) == ([3], 3)
    decided = planned(wish, *members, resize=1, gentle=True)
    assert (gone(decided), decided.wish.target) == ([3, 2], 2)
    assert all(letting.if_idle for letting in decided.let_go)
    decided = planned(wish, *members, resize=6, gentle=True)
    assert (decided.start, decided.wish.target) == (2, 6)


# -- idleness ------------------------------------------------------------------------------------


def test_overflow_is_let_go_when_idle_for_long_enough() -> None:
    """Only what is above the target, the longest idle first; the target stays."""
    members = [idle(0, 40), idle(1, 50), idle(2, 60), leased(3)]
    decided = planned(FIXED, *members, overflow_idle_ns=30 * SECOND)
    assert gone(decided) == [2, 1] and decided.wish == FIXED
    assert all(letting.if_idle and not letting.shrink for letting in decided.let_go)
    assert gone(planned(FIXED, *members, overflow_idle_ns=60 * SECOND)) == []
    assert gone(planned(FIXED, *members, overflow_idle_ns=30 * SECOND, waiting=1)) == []


@pytest.mark.parametrize(
    "members",
    [
        [leased(0), leased(1), leased(2)],
        [idle(0, 90), idle(1, 90), Member(2, S.STOPPING), Member(3, S.LOST)],
        [idle(0, 90), idle(1, 90), leased(2, leaving=True), leased(3, leaving=True)],
        [idle(0, 90), idle(1, 90), spare(2), booting(3, reserve=True)],
    ],
    ids=["busy", "ending", "leaving", "reserve"],
)
def test_nobody_is_let_go_as_overflow_for(members: list[Member]) -> None:
    """What is busy, on its way out or out of service pushes nobody out."""
    assert gone(planned(FIXED, *members, spares=2, overflow_idle_ns=SECOND)) == []


def test_idleness_takes_one_worker_at_a_time() -> None:
    """The longest idle one goes; the next only a whole max_idle later, never below the floor."""
    members = [idle(0, 50), idle(1, 99), idle(2, 20)]
    wish, limit = Wish(3, 3, 1, 4), 10 * SECOND
    late = {"max_idle_ns": limit, "since_change_ns": limit + 1}
    assert planned(wish, *members, **late).let_go == (
        LetGo(1, "idle for max_idle", if_idle=True, shrink=True),
    )
    assert planned(wish, *members, **late).start == 0, "nobody takes its place"
    assert gone(planned(wish, *members, max_idle_ns=limit, since_change_ns=limit)) == []
    assert gone(planned(wish._replace(floor=3), *members, **late)) == []
    assert gone(planned(wish, *members[:2], booting(2), **late)) == [], "that was wanted just now"
    assert gone(planned(wish, leased(0), leased(1), Member(2, S.PROBING), **late)) == []
    assert gone(planned(wish, idle(0, 10), leased(1), leased(2), **late)) == []


# -- a random walk -------------------------------------------------------------------------------


class Walk:
    """A pool of the mind: carries out plans and is struck by random events."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        low = self.random.randint(1, 3)
        high = low + self.random.choice([0, 0, 4])
        size = self.random.randint(low, high)
        start = self.random.choice([0, size])
        self.wish = Wish(start, size, low, high, self.random.choice([0, 0, 2]))
        if low == high:
            self.wish = self.wish._replace(floor=size, ceiling=size)
        self.spares = self.random.choice([0, 0, 2])
        self.members: dict[int, Member] = {}
        self.waiting, self.last_wish = 0, self.wish.target
        self.counted = 0  # settled workers that a plan was made without

    def change(self, slot: int, **words: Any) -> None:
        self.members[slot] = self.members[slot]._replace(**words)

    def strike(self) -> int | None:
        """Have something happen; return a new size if one was ordered."""
        roll, members = self.random.random(), list(self.members.values())
        some = self.random.choice(members) if members else None
        if roll < 0.1:
            elastic = self.wish.floor != self.wish.ceiling
            return self.random.randint(*(self.wish[2:4] if elastic else (1, 8)))
        if roll < 0.3:
            self.waiting = self.random.choice([0, 0, 1, 5])
        elif some is None:
            pass
        elif roll < 0.4:
            del self.members[some.slot]  # killed and buried
        elif some.state is S.STARTING:
            state = S.SPARE if some.reserve else S.IDLE
            self.change(some.slot, state=state, idle=not some.reserve)
        elif some.state is S.STOPPING or (some.leaving and not some.idle):
            del self.members[some.slot]
        elif some.state is S.IDLE:
            self.change(some.slot, idle=not some.idle and not some.unfit, idle_ns=2 * SECOND)
            if roll > 0.95:
                self.change(some.slot, worn=True)
        return None

    def look(self, order: int | None = None) -> Plan:
        situation = Situation(
            tuple(self.members.values()), self.wish, self.waiting, resize=order,
            spares=self.spares, startup_batch=3, overflow_idle_ns=SECOND,
            max_idle_ns=self.random.choice([None, SECOND]), room=40 - len(self.members),
        )  # fmt: skip
        before = {slot: m for slot, m in self.members.items() if not m.reserve and _lives(m)}
        decided = plan(situation)
        self.check(decided, before, order)
        if order is None and not self.waiting and len(before) <= self.wish.target:
            self.check_counting(situation._replace(max_idle_ns=None))
        self.carry_out(decided)
        return decided

    def check_counting(self, situation: Situation) -> None:
        """Counted only, the settled make the same plan."""
        unsettled = [member for member in situation.members if not member.settled]
        others = len(situation.members) - len(unsettled)
        assert plan(situation._replace(members=unsettled, others=others)) == plan(situation)
        self.counted += others

    def check(self, decided: Plan, before: dict[int, Member], order: int | None) -> None:
        going = set(gone(decided))
        assert len(going) == len(decided.let_go) and going <= set(before)
        leased_ones = {slot for slot, m in before.items() if m.state is S.IDLE and not m.idle}
        if order is None:
            assert not going & leased_ones, "only an order takes workers that callers have"
            assert all(letting.if_idle for letting in decided.let_go)
            left = len(before) - len(going) + sum(letting.shrink for letting in decided.let_go)
            assert left >= min(len(before), self.wish.target), "those that should stay"
            assert decided.wish.target >= self.wish.target
            assert decided.wish.target <= max(self.wish.target, self.wish.ceiling)
            assert self.waiting or decided.wish == self.wish, "nobody asked for another size"
        else:
            assert len(before) - len(going) <= max(order, 0) or not decided.start
            assert len(going) >= len(before) - order
            busy = {slot for slot in going & leased_ones if not before[slot].unfit}
            assert not busy or going >= set(before) - leased_ones, "free ones go first"
        there = len(before) - len(going) + len(decided.call_up)
        begun = 0 if decided.reserve else decided.start
        assert there + begun <= max(len(before), decided.wish.most), "no more than there may be"
        assert decided.start <= 40 - len(self.members)

    def carry_out(self, decided: Plan) -> None:
        self.wish = decided.wish
        for letting in decided.let_go:
            member = self.members[letting.slot]
            self.wish = self.wish._replace(target=self.wish.target - letting.shrink)
            if (member.state is S.IDLE and not member.idle) or member.state is S.PROBING:
                self.change(member.slot, leaving=True)
            else:
                self.change(member.slot, state=S.STOPPING, idle=False)
        for slot in decided.call_up:
            self.call_up(slot)
        for old, new in decided.exchange:
            if self.members[old].idle:
                self.call_up(new)
                self.change(old, state=S.SPARE, idle=False, reserve=True)
            else:
                self.change(old, unfit=True)
        for letting in decided.dismiss:
            if self.members[letting.slot].reserve:
                self.change(letting.slot, state=S.STOPPING)
        free = (slot for slot in range(40) if slot not in self.members)
        for slot in [next(free) for _ in range(decided.start)]:
            self.members[slot] = booting(slot, reserve=decided.reserve)

    def call_up(self, slot: int) -> None:
        ready = self.members[slot].state is S.SPARE
        self.change(slot, reserve=False, idle=ready, state=S.IDLE if ready else S.STARTING)

    def settle(self) -> None:
        """Let everything end that is under way, and nobody want anything."""
        self.waiting = 0
        for _ in range(60):
            for slot, member in list(self.members.items()):
                if member.state is S.STOPPING or member.leaving:
                    del self.members[slot]
                elif member.unfit and member.worn:
                    self.change(slot, state=S.SPARE, unfit=False, reserve=True)
                elif member.state is S.STARTING:
                    ready = S.SPARE if member.reserve else S.IDLE
                    self.change(slot, state=ready, idle=not member.reserve)
                elif member.state is S.IDLE:
                    self.change(slot, idle=True, idle_ns=2 * SECOND)
            self.look()


def _lives(member: Member) -> bool:
    return not member.leaving and member.state not in (S.STOPPING, S.LOST)


@pytest.mark.parametrize("seed", range(60))
def test_random_walk_keeps_what_was_wished_for_last(seed: int) -> None:
    """Orders, queues, leases, deaths: bounds hold at each step, and in peace it comes to rest."""
    walk = Walk(seed)
    for _ in range(200):
        order = walk.strike()
        walk.look(order)
        if order is not None:
            assert walk.wish.target == order or walk.waiting
            assert walk.wish.full == order
    assert walk.counted
    walk.settle()
    rested = walk.look()
    assert (rested.let_go, rested.call_up, rested.exchange, rested.start) == ((), (), (), 0)
    service = [member for member in walk.members.values() if not member.reserve]
    reserve = [member for member in walk.members.values() if member.reserve]
    assert (len(service), len(reserve)) == (walk.wish.target, walk.spares)
    assert not any(member.worn for member in service)
