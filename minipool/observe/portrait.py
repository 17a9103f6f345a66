"""A portrait: what is told of one pool, as plain values that JSON can carry.

Made of snapshots alone, so it is the same for a pool of this process and for one that is looked
at from outside. Names are those of `Snapshot`.
"""

from __future__ import annotations

import collections
from typing import Any, Dict, List, Optional, Sequence

from .metrics import Snapshot
from .reading import WorkerSnapshot
from .score import EASY

WORDS = {"green": "healthy", "yellow": "degraded", "red": "unhealthy"}
POINTS = 240  # of a line, at most
LINES = ("utilization", "throughput", "call_p50", "call_p99", "error_rate", "queue_depth")


def word(snapshot: Snapshot) -> str:
    """Return how a pool is: healthy, degraded or unhealthy; else its status."""
    return WORDS[snapshot.health] if snapshot.status == "open" else snapshot.status


def score(snapshot: Snapshot) -> float | None:
    """Return the health score; None of a pool that is not meant to be in service."""
    idle = snapshot.status in ("new", "closing", "closed")
    return None if idle else round(snapshot.health_score, 1)


def figures(snapshot: Snapshot) -> dict[str, Any]:
    """Return the numbers of a pool; None where there is nothing to tell a number of."""
    told = snapshot._asdict()
    del told["workers"]
    told["states"] = dict(
        sorted(collections.Counter(worker.state for worker in snapshot.workers).items())
    )
    told["error_rate"] = _error_rate(snapshot)
    return told


def strains(snapshot: Snapshot) -> list[str]:
    """Return what keeps a pool in service from being well, in words."""
    found = []
    if snapshot.queue_depth:
        found.append(f"{_callers(snapshot.queue_depth)} waiting for a worker")
    if snapshot.utilization > EASY:
        found.append(f"the workers are busy {snapshot.utilization:.0%} of the time")
    if snapshot.error_rate:
        found.append(
            f"{snapshot.error_rate:.1%} of the last minute's calls failed, and not by your code"
        )
    return found


def serves(worker: WorkerSnapshot) -> bool:
    """Tell whether a worker is in service."""
    return worker.state in ("idle", "leased", "probing")


def missing(snapshot: Snapshot) -> list[str]:
    """Return, in words, that workers are missing, if they are."""
    there = sum(map(serves, snapshot.workers))
    if there >= snapshot.pool_size:
        return []
    return [f"{there} of {snapshot.pool_size} workers are in service"]


def series(snapshots: Sequence[Snapshot], window: float) -> dict[str, List[Optional[float]]]:
    """Return the lines of a window, oldest first, and the age in seconds of each point.

    Where there are more snapshots than points, a point is the highest of those it stands for.
    """
    if not snapshots:
        return {name: [] for name in ("age", *LINES)}
    now, step = snapshots[-1].at, window / POINTS
    points: Dict[int, List[Snapshot]] = {}
    for snapshot in snapshots:
        points.setdefault(int((now - snapshot.at) / step), []).append(snapshot)
    lines: dict[str, List[Optional[float]]] = {
        name: [_highest(point, name) for point in points.values()] for name in LINES
    }
    lines["age"] = [round(now - point[-1].at, 1) for point in points.values()]
    return lines


def _highest(snapshots: Sequence[Snapshot], name: str) -> float | None:
    if name == "error_rate":
        values = [_error_rate(snapshot) for snapshot in snapshots]
    else:
        values = [getattr(snapshot, name) for snapshot in snapshots]
    known = [value for value in values if value is not None]
    return float(f"{max(known):.4g}") if known else None


def _error_rate(snapshot: Snapshot) -> float | None:
    """Return the share of calls that failed; None if there were none to fail."""
    return snapshot.error_rate if snapshot.call_count or snapshot.error_rate else None


def _callers(count: int) -> str:
    return "1 caller is" if count == 1 else f"{count} callers are"
