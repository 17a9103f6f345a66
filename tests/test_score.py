"""The health score ranks situations as an operator would."""

from __future__ import annotations

from typing import Any

import pytest

from minipool.observe.score import health_score, health_word

WELL: dict[str, Any] = {
    "utilization": 0.0, "queue_depth": 0, "error_rate": 0.0, "ready": 8, "wanted": 8,
}  # fmt: skip

SITUATIONS = [  # from well to ill; what is said of a pool of eight that is well otherwise
    ("idle, all ready", {}, "green", 100),
    ("well used", {"utilization": 0.8}, "green", 100),
    ("well used, a caller in the line", {"utilization": 0.8, "queue_depth": 1}, "green", 100),
    ("latency at its target", {"latency": 0.5, "target": 0.5}, "green", 100),
    ("slow, and nobody said how slow is too slow", {"latency": 50.0}, "green", 100),
    ("a target, and no calls", {"latency": None, "target": 0.5}, "green", 100),
    ("nobody is wanted", {"ready": 0, "wanted": 0}, "green", 100),
    ("more ready than wanted", {"ready": 10}, "green", 100),
    ("busy, nobody waits", {"utilization": 0.9}, "green", 92.5),
    ("a stray error", {"error_rate": 0.001}, "green", 99.1),
    ("one of eight is missing", {"ready": 7}, "green", 87.5),
    ("all busy, nobody waits", {"utilization": 1.0}, "green", 85),
    ("busy, with a line", {"utilization": 0.9, "queue_depth": 3}, "green", 85),
    ("twice as slow as it may be", {"latency": 1.0, "target": 0.5}, "yellow", 75),
    ("a quarter is missing", {"ready": 6}, "yellow", 75),
    ("every fortieth call fails", {"error_rate": 0.025}, "yellow", 77.5),
    ("saturated, with a line", {"utilization": 1.0, "queue_depth": 9}, "yellow", 70),
    ("every twentieth call fails", {"error_rate": 0.05}, "red", 55),
    ("every call fails", {"error_rate": 1.0}, "red", 55),
    ("half are missing", {"ready": 4}, "red", 50),
    ("saturated and slow", {"utilization": 1.0, "queue_depth": 9, "latency": 2.0, "target": 0.5}, "red", 45),
    ("saturated, a fifth of the calls fail", {"utilization": 1.0, "queue_depth": 9, "error_rate": 0.2}, "red", 25),
    ("everything at once", {"utilization": 1.0, "queue_depth": 9, "error_rate": 1.0, "latency": 9.0, "target": 0.5}, "red", 0),
    ("nobody is there", {"ready": 0}, "red", 0),
]  # fmt: skip


@pytest.mark.parametrize("what, change, word, score", SITUATIONS, ids=[s[0] for s in SITUATIONS])
def test_situation(what: str, change: dict[str, Any], word: str, score: float) -> None:
    found = health_score(**{**WELL, **change})

    assert found == pytest.approx(score)
    assert health_word(found) == word


@pytest.mark.parametrize(
    "field, worse",
    [
        ("utilization", [0.0, 0.5, 0.8, 0.85, 0.95, 1.0]),
        ("queue_depth", [0, 1, 1000]),
        ("error_rate", [0.0, 0.01, 0.04, 0.05, 0.5, 1.0]),
        ("latency", [0.1, 0.5, 0.6, 1.0, 7.0]),
        ("ready", [9, 8, 7, 4, 1, 0]),
    ],
)
def test_worse_is_never_scored_better(field: str, worse: list[Any]) -> None:
    """Whatever else is the matter."""
    for other in ({}, {"utilization": 0.97}, {"error_rate": 0.02}, {"ready": 5}):
        scores = [health_score(**{**WELL, "target": 0.5, **other, field: bad}) for bad in worse]
        assert scores == sorted(scores, reverse=True)
        assert all(0 <= score <= 100 for score in scores)
