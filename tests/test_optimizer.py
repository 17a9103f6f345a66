"""The optimizer: what a pool's size should be, rule by rule, and over a whole simulated day."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

from minipool import PoolConfig, Snapshot, recommended_size
from minipool.observe import optimizer
from minipool.observe.optimizer import Decision, decide

CONFIG = PoolConfig(size=4, min_size=2, max_size=8, autoscale=True)
EMPTY = Snapshot(**dict.fromkeys(Snapshot._fields, 0))  # type: ignore[arg-type]


def seen(seconds: int, size: int = 4, **facts: Any) -> list[Snapshot]:
    """What is seen in so many seconds after a change, one sample a second, all alike."""
    alike = EMPTY._replace(pool_size=size, **facts)
    return [alike._replace(at=100.0 + second) for second in range(seconds + 1)]


# -- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, to", [(1, 5), (2, 5), (3, 6), (5, 6), (8, 7), (10, 7), (15, 8), (500, 8)]
)
def test_busy_pool_grows_by_what_waits(line: int, to: int) -> None:
    """One and a fifth of the line, four at once at most."""
    assert decide(seen(60, utilization=0.95, demand=line), CONFIG)[:2] == (to, None)


def test_who_waits_for_one_certain_worker_asks_for_no_other() -> None:
    assert decide(seen(60, utilization=0.95, queue_depth=9), CONFIG)[:2] == (None, None)


def test_growth_ends_at_max_size() -> None:
    history = seen(60, size=7, utilization=1.0, demand=50)

    assert decide(history, CONFIG).resize_to == 8
    full = [snapshot._replace(pool_size=8) for snapshot in history]
    assert decide(full, CONFIG) == (
        None,
        None,
        "100% in use and 50 waiting; it has all it may have",
    )


@pytest.mark.parametrize(
    "facts",
    [
        {"utilization": 0.95},
        {"utilization": 0.9, "demand": 5},
        {"utilization": 0.3},
        {"utilization": 0.6, "demand": 1, "wait_mean": 0.1},
        {"utilization": 0.2, "demand": 2, "wait_mean": 0.01},
    ],
    ids=str,
)
def test_what_is_well_is_left(facts: dict[str, Any]) -> None:
    assert decide(seen(400, **facts), CONFIG)[:2] == (None, None)


def test_quiet_pool_shrinks_by_one() -> None:
    assert decide(seen(300, utilization=0.29), CONFIG)[:2] == (3, None)
    assert decide(seen(300, size=2, utilization=0.0), CONFIG)[:2] == (None, None), "min_size"


def test_short_silence_in_a_busy_time_does_not_shrink() -> None:
    """It is five intervals that must have been quiet, all together."""
    busy, quiet = seen(300, utilization=0.8)[:200], seen(300, utilization=0.0)[200:]

    assert decide(busy + quiet, CONFIG)[:2] == (None, None)


def test_slow_checkouts_get_overflow() -> None:
    """Up to twice the size; and what was given is taken back, one at a time, when it is quiet."""
    history = seen(60, utilization=0.8, demand=2, wait_mean=0.2)

    assert decide(history, CONFIG)[:2] == (None, 1)
    assert decide([s._replace(overflow=4) for s in history], CONFIG)[:2] == (None, None)
    quiet = seen(300, size=2, utilization=0.1, overflow=3)
    assert decide(quiet, CONFIG)[:2] == (None, 2)
    assert decide(seen(300, utilization=0.1, overflow=3), CONFIG)[:2] == (3, 2)


def test_ten_samples_are_needed() -> None:
    config = PoolConfig(size=4, max_size=8, min_size=2, autoscale=True, optimization_interval=5.0)
    history = seen(10, utilization=1.0, demand=9)

    assert decide(history, config).resize_to == 7
    assert decide(history[1:], config) == (None, None, "9 samples are too few to judge by")
    assert decide([], config).reason == "0 samples are too few to judge by"


def test_after_a_change_it_waits() -> None:
    """A minute before it grows again, five before it shrinks."""
    assert decide(seen(57, utilization=1.0, demand=9), CONFIG).resize_to is None
    assert decide(seen(60, utilization=1.0, demand=9), CONFIG).resize_to == 7
    assert decide(seen(290, utilization=0.1), CONFIG).resize_to is None
    assert decide(seen(300, utilization=0.1), CONFIG).resize_to == 3


def test_failing_calls_freeze_it() -> None:
    """What is wrong then is not the size: dead workers look idle, repeated calls look busy."""
    for facts in ({"utilization": 1.0, "demand": 9}, {"utilization": 0.0}):
        history = seen(400, **facts)
        history[-1] = history[-1]._replace(error_rate=0.06)
        assert decide(history, CONFIG) == (
            None,
            None,
            "6% of the calls fail, which no size will mend",
        )
        history[-1] = history[-1]._replace(error_rate=0.05)
        assert decide(history, CONFIG).resize_to is not None


def test_what_was_seen_before_the_change_does_not_count() -> None:
    history = seen(60, utilization=0.5)
    history[0] = history[0]._replace(utilization=50.0, demand=1000)

    assert decide(history, CONFIG)[:2] == (None, None)


# -- a day ---------------------------------------------------------------------------------------


class Day(NamedTuple):
    workers: float  # on average
    wait: float  # of a caller, on average
    changes: list[tuple[int, int]]  # when, and from which size up or down

    @property
    def turns(self) -> list[int]:
        """When it went down after having gone up, or up after down."""
        pairs = zip(self.changes, self.changes[1:])
        return [second for (_, before), (second, after) in pairs if before * after < 0]


def simulate(
    load: Callable[[int], float], config: PoolConfig, adapt: bool = True,
    seconds: int = 24 * 3600, seed: int = 5,
) -> Day:  # fmt: skip
    """Let work arrive by the second, as a load says and chance has it, and be done by workers.

    What is not done waits; nothing is lost. Workers come and go at once: a start takes
    milliseconds, and the clock here goes by seconds.
    """
    source, size, line = random.Random(seed), config.size or 0, 0.0
    history: list[Snapshot] = []
    workers = waited = arrived = 0.0
    changes = []
    for second in range(seconds):
        expected = load(second)
        arriving = max(0.0, source.gauss(expected, math.sqrt(expected)))
        done = min(size, line + arriving)
        line += arriving - done
        workers, arrived, waited = (
            workers + size,
            arrived + arriving,
            waited + arriving * line / size,
        )
        if not adapt:
            continue
        now = EMPTY._replace(
            at=float(second), pool_size=size, utilization=done / size, demand=int(line),
            wait_mean=line / size,
        )  # fmt: skip
        history.append(now)
        if second % 60 == 0:
            wanted = decide(history[-301:], config).resize_to
            if wanted is not None:
                changes.append((second, wanted - size))
                size, history = wanted, [now]
    return Day(workers / seconds, waited / max(1.0, arrived), changes)


def weekday(second: int) -> float:
    """Work for 2 workers at night, for 16 at noon, and for 8 more in the half hour after it."""
    hour = second / 3600
    return 2 + max(0.0, 14 * math.sin((hour - 6) / 12 * math.pi)) + 8 * (12 <= hour < 12.5)


WIDE = PoolConfig(size=2, min_size=2, max_size=40, autoscale=True)


@pytest.fixture(scope="module")
def day() -> Day:
    return simulate(weekday, WIDE)


def test_day_gets_what_it_needs(day: Day) -> None:
    """Enough by day, few by night, up in the morning and down in the evening and no more turns."""
    assert day.wait < 0.2
    assert len(day.turns) <= 1
    assert day.workers < 14
    largest = size = 2
    for _, change in day.changes:
        size += change
        largest = max(largest, size)
    assert 24 <= largest <= 34
    assert size <= 6


def test_gain_over_a_fixed_size_is_the_one_that_readme_tells(day: Day) -> None:
    """The smallest fixed pool in which nobody waits longer is so much larger."""
    readme = " ".join((Path(__file__).parent.parent / "README.md").read_text().split())
    told = re.search(r"keeps ([\d.]+) workers on average and lets a caller wait ([\d.]+) s; "
                     r"a fixed pool needs (\d+)", readme)  # fmt: skip
    assert told, "README does not tell"
    assert float(told[1]) == pytest.approx(day.workers, rel=0.02)
    assert float(told[2]) == pytest.approx(day.wait, abs=0.006)
    fixed, smaller = (
        simulate(weekday, PoolConfig(size=size), adapt=False)
        for size in (int(told[3]), int(told[3]) - 1)
    )
    assert fixed.wait <= day.wait < smaller.wait


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("load", [0.0, 0.4, 1.9, 3.5, 7.6, 19.0])
def test_steady_load_comes_to_rest(load: float, seed: int) -> None:
    """It may overshoot once; after that it stays."""
    found = simulate(lambda second: load, WIDE, seconds=6 * 3600, seed=seed)

    assert len(found.turns) <= 1
    assert all(second < 2 * 3600 for second, _ in found.changes)


def test_swings_within_minutes_are_met_with_workers_for_their_peaks() -> None:
    """And not by following them."""
    found = simulate(lambda s: 10.0 if s // 120 % 2 else 2.0, WIDE, seconds=6 * 3600)

    assert not found.turns
    assert found.wait < 1.0, "the climb from 2 workers included"


# -- to begin with -------------------------------------------------------------------------------


@pytest.mark.parametrize("cpus, sizes", [(1, (2, 3, 2)), (2, (3, 6, 4)), (12, (18, 36, 24))])
def test_recommended_size_is_by_usable_cpus(
    monkeypatch: Any, cpus: int, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(optimizer, "usable_cpus", lambda: cpus)

    assert tuple(map(recommended_size, ("cpu", "io", "mixed"))) == sizes


def test_unknown_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"work='gpu': give \"cpu\", \"io\" or \"mixed\""):
        recommended_size("gpu")


def test_decision_says_why() -> None:
    assert decide(seen(60, utilization=0.95, demand=3), CONFIG) == Decision(
        6, None, "95% in use and 3 waiting"
    )
