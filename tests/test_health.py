"""The health policy, with a clock turned by hand: every action, and the moment it begins."""

from __future__ import annotations

import random
from typing import Any

import pytest

from minipool.engine import sizing
from minipool.engine.health import (
    DYING_NS,
    QUIET_NS,
    SECOND_NS,
    SENT_SIGTERM,
    CountFailure,
    Limits,
    Lost,
    Probe,
    Recycle,
    Replace,
    Retire,
    Revoke,
    Row,
    WarnLeak,
    due_in,
    plan,
    quiet_until,
)
from minipool.engine.sizing import Member, Situation, Wish
from minipool.engine.states import WorkerState as S

NOW = 1_000 * SECOND_NS


def ago(seconds: float) -> int:
    return NOW - int(seconds * SECOND_NS)


def idle(slot: int = 0, since: float = 0.0, **words: Any) -> Row:
    given = {"probed_ns": NOW, "idle": True, **words}
    return Row(slot, 1, S.IDLE, ago(since), **given)


def leased(slot: int = 0, since: float = 0.0, **words: Any) -> Row:
    return Row(slot, 1, S.IDLE, ago(since), leased_since_ns=ago(since), probed_ns=0, **words)


def row(state: S, since: float, slot: int = 0, **words: Any) -> Row:
    return Row(slot, 1, state, ago(since), **words)


def probing(slot: int = 0, **words: Any) -> Row:
    return row(S.PROBING, 0, slot, **words)


def starting(slot: int = 0, **words: Any) -> Row:
    return row(S.STARTING, 0, slot, **words)


def spare(slot: int = 0, since: float = 0.0, **words: Any) -> Row:
    return row(S.SPARE, since, slot, **{"probed_ns": NOW, **words})


def planned(rows: list[Row], limits: Limits) -> list[Any]:
    return plan(rows, NOW, limits)


def to_shrink(rows: list[Row], now: int, limits: Limits, wish: Wish, changed: int) -> list[Any]:
    """Return what the other plan of the manager, that of the sizes, lets go with time."""
    members = [
        Member(row.slot, row.state, row.idle, now - row.since_ns, reserve=row.state is S.SPARE)
        for row in rows
    ]
    situation = Situation(
        members, wish, overflow_idle_ns=limits.overflow_idle_ns, spares=len(rows),
        max_idle_ns=limits.max_idle_ns, since_change_ns=now - changed, may_start=False,
    )  # fmt: skip
    return list(sizing.plan(situation).let_go)


ALL = Limits(
    init_ns=30 * SECOND_NS, probe_every_ns=30 * SECOND_NS, lease_ns=60 * SECOND_NS,
    leak_ns=10 * SECOND_NS, max_idle_ns=60 * SECOND_NS,
)  # fmt: skip


def test_nothing_is_done_when_all_is_well() -> None:
    """Every limit set, workers in every state, none past any border: no action."""
    rows = [
        idle(0, since=5), idle(1, since=29), leased(2, since=9), row(S.STARTING, 29, slot=3),
        row(S.PROBING, 4.9, slot=4), row(S.STOPPING, 29, slot=5), row(S.LOST, 0.01, slot=6),
        row(S.VACANT, 500, slot=7),
    ]  # fmt: skip

    assert planned(rows, ALL) == []


def test_without_limits_nothing_is_ever_overdue() -> None:
    """None means for ever: an ancient lease, start and idle worker are left alone."""
    rows = [idle(0, since=900, probed_ns=0), leased(1, since=900), row(S.STARTING, 900, slot=2)]

    assert planned(rows, Limits()) == []


@pytest.mark.parametrize(
    ("late", "border", "limits", "expected"),
    [
        (lambda s: row(S.STARTING, s), 30, Limits(init_ns=30 * SECOND_NS), Replace),
        (lambda s: row(S.PROBING, s), 5, Limits(), CountFailure),
        (lambda s: row(S.PROBING, s, probe_failures=2), 5, Limits(), Replace),
        (lambda s: row(S.STOPPING, s), 30, Limits(), Replace),
        (lambda s: row(S.LOST, s), DYING_NS / SECOND_NS, Limits(), Replace),
        (lambda s: leased(since=s), 60, Limits(lease_ns=60 * SECOND_NS), Revoke),
        (lambda s: leased(since=s), 10, Limits(leak_ns=10 * SECOND_NS), WarnLeak),
        (lambda s: idle(probed_ns=ago(s)), 30, Limits(probe_every_ns=30 * SECOND_NS), Probe),
        (lambda s: idle(probed_ns=ago(s), probe_failures=1), 5,
         Limits(probe_every_ns=30 * SECOND_NS), Probe),
        (lambda s: idle(probed_ns=ago(s), probe_failures=1), 2,
         Limits(probe_every_ns=2 * SECOND_NS), Probe),
    ],
)  # fmt: skip
def test_action_begins_just_past_its_border(
    late: Any, border: float, limits: Limits, expected: type
) -> None:
    """At the limit nothing happens yet; a nanosecond later the one action is planned."""
    assert planned([late(border)], limits) == []

    (action,) = planned([late(border + 2e-9)], limits)

    assert type(action) is expected
    assert action.slot == 0


def test_reasons_tell_the_limit_that_was_broken() -> None:
    """Whoever reads the log finds the option and its value."""
    (start,) = planned([row(S.STARTING, 31)], Limits(init_ns=30 * SECOND_NS))
    (probe,) = planned([row(S.PROBING, 6, probe_failures=2)], Limits())
    (stop,) = planned([row(S.STOPPING, 32)], Limits())
    (lease,) = planned([leased(since=2)], Limits(lease_ns=SECOND_NS))

    assert "30 s" in start.reason
    assert "3 health checks in a row" in probe.reason
    assert "within 30 s" in stop.reason
    assert "lease_timeout=1 s" in lease.reason


def test_worker_that_was_sent_sigterm_is_recycled() -> None:
    """One that ends by itself is seen off; the manager's looks do not rest till then."""
    asked, ending = {"leaving": True}, {"left": True}
    for one in (idle(**asked), leased(**asked), spare(**asked)):
        assert planned([one], Limits()) == [Recycle(0, SENT_SIGTERM)]
    for one in (idle(**ending), spare(**ending)):
        assert planned([one], Limits()) == [Retire(0, SENT_SIGTERM)]
    assert planned([leased(**ending), idle(**asked, worn=True)], Limits()) == []
    assert quiet_until([idle(**asked)], NOW, Limits()) == NOW
    assert quiet_until([idle(**ending)], NOW, Limits()) == NOW


def test_leak_is_warned_of_once() -> None:
    """A lease that was reported is not reported at each look."""
    limits = Limits(leak_ns=SECOND_NS)

    assert planned([leased(since=50, leak_warned=True)], limits) == []


def test_revocation_goes_before_the_warning() -> None:
    """A lease past both limits is revoked; to warn of it as well would be late."""
    limits = Limits(leak_ns=SECOND_NS, lease_ns=2 * SECOND_NS)

    (action,) = planned([leased(since=3)], limits)

    assert type(action) is Revoke


def test_slot_neither_idle_nor_leased_is_lost_only_at_the_second_look() -> None:
    """The first look may fall between two steps of a healthy thread; the second may not."""
    between = Row(0, 1, S.IDLE, ago(0))

    (first,) = planned([between], Limits())
    (second,) = planned([between._replace(lost=True)], Limits())

    assert type(first) is Lost
    assert type(second) is Revoke
    assert "lost" in second.reason


def test_what_was_seen_again_is_not_lost() -> None:
    """A slot that is idle or leased at this look is well, however it looked before."""
    assert planned([idle(0, lost=True), leased(1, lost=True)], Limits()) == []


@pytest.mark.parametrize(("workers", "at_once"), [(1, 1), (2, 1), (3, 1), (4, 2), (9, 4)])
def test_probes_never_take_all_workers_at_once(workers: int, at_once: int) -> None:
    """When all are due, half of them at most are probed; a pool of one is probed too."""
    rows = [idle(slot, probed_ns=ago(100 + slot)) for slot in range(workers)]

    actions = planned(rows, Limits(probe_every_ns=SECOND_NS))

    assert all(type(action) is Probe for action in actions)
    assert len(actions) == at_once
    longest_first = list(range(workers))[::-1][:at_once]
    assert [action.slot for action in actions] == longest_first


def test_probes_under_way_count() -> None:
    """No more are started while as many as may be are out already."""
    rows = [idle(slot, probed_ns=0) for slot in range(3)] + [row(S.PROBING, 1, slot=3)]
    limits = Limits(probe_every_ns=SECOND_NS)

    assert len(planned(rows, limits)) == 1
    assert planned(rows[1:], limits) == []


def test_busy_worker_is_never_probed() -> None:
    """A leased worker is its lessee's, however long ago it was probed."""
    assert planned([leased(0, since=500)], Limits(probe_every_ns=SECOND_NS)) == []


def test_due_in_names_the_first_moment_that_matters() -> None:
    """The manager sleeps until the earliest border of what is under way, and no longer."""
    limits = Limits(init_ns=30 * SECOND_NS)
    starting, probing = row(S.STARTING, 28), row(S.PROBING, 4, slot=1)
    stopping = row(S.STOPPING, 29.5, slot=2)

    assert due_in([starting], NOW, limits) == 2 * SECOND_NS
    assert due_in([starting, probing], NOW, limits) == SECOND_NS
    assert due_in([starting, probing, stopping], NOW, limits) == SECOND_NS // 2
    assert due_in([row(S.PROBING, 50)], NOW, limits) == 0
    assert due_in([row(S.LOST, 0)], NOW, limits) == DYING_NS
    assert due_in([idle(0), leased(1), row(S.LOST, 3, slot=2)], NOW, limits) is None
    assert due_in([starting], NOW, Limits()) is None


# -- wear ----------------------------------------------------------------------------------------

WEAR = Limits(max_rss=1_000_000, kill_rss=2_000_000, cpu_ns=90 * SECOND_NS)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"expires_ns": NOW - 1}, "it has reached its max_lifetime"),
        ({"rss_bytes": 1_500_000}, "it uses 1.5 MB, over max_rss=1000000"),
        ({"cpu_ns": 91 * SECOND_NS}, "its cpu_limit is nearly used up"),
    ],
)
@pytest.mark.parametrize("make", [idle, leased, probing, spare])
def test_worn_worker_is_recycled_once(make: Any, words: dict[str, Any], reason: str) -> None:
    """Whatever it does; and it is not planned again when that is known."""
    assert planned([make(**words)], WEAR) == [Recycle(0, reason)]
    assert planned([make(worn=True, **words)], WEAR) == []


@pytest.mark.parametrize("make", [idle, leased, probing, spare])
def test_worker_within_its_limits_is_left_alone(make: Any) -> None:
    words = {"expires_ns": NOW, "rss_bytes": 1_000_000, "cpu_ns": 90 * SECOND_NS}
    assert planned([make(**words)], WEAR) == []


@pytest.mark.parametrize("make", [idle, leased, probing, spare, starting])
def test_worker_over_kill_rss_is_killed_whatever_it_does(make: Any) -> None:
    rows = [make(rss_bytes=2_500_000, worn=True)]
    assert planned(rows, WEAR) == [Replace(0, "it uses 2.5 MB, over kill_rss=2000000")]


def test_end_of_a_lifetime_is_looked_for_when_it_comes() -> None:
    """Once: a worker that is known to be worn is not looked for again."""
    rows = [idle(0, expires_ns=NOW + 7), spare(1, expires_ns=NOW + 5), idle(2)]
    assert due_in(rows, NOW, Limits()) == 6
    assert due_in([idle(0, expires_ns=NOW - 9, worn=True)], NOW, Limits()) is None


@pytest.mark.parametrize("state", [S.STOPPING, S.LOST])
def test_worker_that_is_ending_is_not_recycled(state: S) -> None:
    rows = [row(state, 0, expires_ns=NOW - 1, rss_bytes=9_000_000)]
    assert planned(rows, WEAR) == []


# -- the reserve ---------------------------------------------------------------------------------


def test_spares_are_probed_like_idle_workers() -> None:
    limits = Limits(probe_every_ns=30 * SECOND_NS)
    assert planned([spare(probed_ns=ago(31))], limits) == [Probe(0)]
    assert planned([spare(probed_ns=ago(29))], limits) == []


# -- looks that can be skipped -------------------------------------------------------------------


def test_nothing_is_to_be_done_in_quiet_time() -> None:
    """Whatever workers at rest there are: no plan is made before the time is over, and then one."""
    random_ = random.Random(20)
    ended_by_plan = 0

    def some(most: int) -> int:
        return random_.randint(0, most * SECOND_NS)

    for _ in range(4000):
        limits = Limits(
            probe_every_ns=random_.choice([None, some(12)]),
            probe_timeout_ns=1 + some(5),
            overflow_idle_ns=some(12),
            max_idle_ns=random_.choice([None, some(12)]),
        )
        rows = [
            Row(
                slot, 1, random_.choice([S.IDLE, S.IDLE, S.SPARE]), NOW - some(12), idle=True,
                probed_ns=NOW - some(12), probe_failures=random_.choice([0, 0, 1]),
                expires_ns=random_.choice([0, NOW - some(3) + some(12)]),
            )
            for slot in range(random_.randint(1, 4))
        ]  # fmt: skip
        service = sum(row.state is S.IDLE for row in rows)
        target, changed = random_.randint(0, service), NOW - some(12)
        wish = Wish(target, full=target, floor=0, ceiling=service)

        def planned_at(
            now: int,
            rows: Any = rows,
            limits: Any = limits,
            wish: Any = wish,
            changed: Any = changed,
        ) -> list[Any]:
            return [*plan(rows, now, limits), *to_shrink(rows, now, limits, wish, changed)]

        if planned_at(NOW):
            continue
        until = quiet_until(rows, NOW, limits, changed)
        assert NOW <= until <= NOW + QUIET_NS
        for moment in (random_.randint(NOW, until), until):
            assert planned_at(moment) == []
        ended_by_plan += bool(planned_at(until + 1))
    assert ended_by_plan > 500, "the time is never long enough"


@pytest.mark.parametrize(
    "restless",
    [
        leased(), idle(idle=False), idle(worn=True), row(S.STARTING, 1), row(S.STOPPING, 1),
        row(S.PROBING, 1), row(S.LOST, 0.1), spare(worn=True),
    ],
)  # fmt: skip
def test_there_is_no_quiet_time_while_anything_is_under_way(restless: Row) -> None:
    assert quiet_until([idle(1), spare(2)], NOW, ALL) > NOW
    assert quiet_until([idle(1), restless, spare(2)], NOW, ALL) == NOW


def test_there_is_no_quiet_time_for_workers_that_must_be_weighed() -> None:
    assert quiet_until([idle()], NOW, Limits(kill_rss=1 << 30)) == NOW
