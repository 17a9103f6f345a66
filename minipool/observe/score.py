"""The health score: one number from 0 to 100 that ranks pools as an operator would.

Three parts add up: load, errors, latency. Then each missing worker takes away its share. The
weights are such that one part alone, at its worst, is no longer green, that errors alone at their
worst are red, and that two together are red. A table of situations in the tests says what that
means.
"""

from __future__ import annotations

LOAD, ERRORS, LATENCY = 30.0, 45.0, 25.0
EASY = 0.8  # utilisation up to here costs nothing: workers are there to be used
WORST_ERRORS = 0.05  # of all calls
GREEN, YELLOW = 80.0, 60.0


def health_score(
    *,
    utilization: float,
    queue_depth: int,
    error_rate: float,
    ready: int,
    wanted: int,
    latency: float | None = None,
    target: float | None = None,
) -> float:
    """Return how well a pool is, from 0 (of no use) to 100 (nothing to wish for).

    Args:
        utilization: leased time over workers' time, 0 to 1.
        error_rate: calls that failed by the pool's fault, over all.
        ready, wanted: workers in service, and how many there should be.
        latency, target: seconds; at `target` it begins to cost, at twice that all is lost.
    """
    load = min(1.0, max(0.0, (utilization - EASY) / (1 - EASY)))
    load *= 1.0 if queue_depth else 0.5  # all busy, and nobody waits: that is well sized
    errors = min(1.0, error_rate / WORST_ERRORS)
    slow = 0.0
    if target and latency is not None:
        slow = min(1.0, max(0.0, latency / target - 1))
    missing = max(0.0, 1 - ready / wanted) if wanted else 0.0
    score = LOAD * (1 - load) + ERRORS * (1 - errors) + LATENCY * (1 - slow) - 100 * missing
    return max(0.0, score)


def health_word(score: float) -> str:
    """Return the colour of a score: "green", "yellow" or "red"."""
    return "green" if score >= GREEN else "yellow" if score >= YELLOW else "red"
