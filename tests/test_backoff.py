"""Backoff: growing pauses, each with its share of chance."""

from __future__ import annotations

import random
from typing import Any

import pytest

from minipool import Backoff


def test_pauses_double_from_base_to_cap() -> None:
    backoff = Backoff(jitter=0)
    assert [backoff.next() for _ in range(11)] == [
        0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0,
    ]  # fmt: skip
    assert backoff.failures == 11


def test_success_begins_anew() -> None:
    backoff = Backoff(jitter=0)
    for _ in range(5):
        backoff.next()
    backoff.reset()
    assert (backoff.failures, backoff.next(), backoff.failures) == (0, 0.1, 1)


@pytest.mark.parametrize("luck, factor", [(0.0, 0.75), (0.5, 1.0), (1.0, 1.25)])
def test_jitter_is_a_share_up_or_down_and_does_not_add_up(luck: float, factor: float) -> None:
    backoff = Backoff(random=lambda: luck)
    for steady in (0.1, 0.2, 0.4, 0.8):
        assert backoff.next() == pytest.approx(steady * factor)


def test_decorrelated_pauses_start_from_the_last_one_as_it_was() -> None:
    luck = iter([1.0, 0.0, 0.5])
    backoff = Backoff(decorrelated=True, random=lambda: next(luck))
    assert backoff.next() == pytest.approx(0.125)
    assert backoff.next() == pytest.approx(0.25 * 0.75)
    assert backoff.next() == pytest.approx(0.375)


def test_decorrelated_pauses_do_not_drift_below_the_base() -> None:
    backoff = Backoff(base=1.0, multiplier=1.0, decorrelated=True, random=lambda: 0.0)
    assert [backoff.next() for _ in range(50)] == [pytest.approx(0.75)] * 50


def test_decorrelated_crowd_spreads_wider() -> None:
    """After ten failures in step, those who come back are further apart than with plain jitter."""
    spread = {}
    for decorrelated in (False, True):
        chance = random.Random(4).random
        crowd = [Backoff(cap=1e9, decorrelated=decorrelated, random=chance) for _ in range(200)]
        last = sorted([each.next() for _ in range(10)][-1] for each in crowd)
        spread[decorrelated] = last[180] / last[20]
    assert spread[True] > 1.5 * spread[False], spread


def test_thousands_of_failures_do_not_overflow() -> None:
    backoff = Backoff(jitter=0, multiplier=1e9)
    assert [backoff.next() for _ in range(5000)][-1] == 30.0


@pytest.mark.parametrize(
    "arguments",
    [{"base": -1}, {"base": "1"}, {"base": 2.0, "cap": 1.0}, {"multiplier": 0.5}, {"jitter": 1.5},
     {"jitter": -0.1}, {"cap": float("nan")}, {"base": True}],
)  # fmt: skip
def test_wrong_numbers_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give a (share|number)"):
        Backoff(**arguments)
