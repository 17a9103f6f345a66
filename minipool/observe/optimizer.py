"""The optimizer: what the last minutes say about the size of a pool. Pure; decides, does nothing.

It grows by what the line asks for and shrinks by one, sooner up than down, and waits after each
change until that one shows: what it judges is the history since the last change. So it cannot
chase its own effects, and a load that swings faster than five minutes is met with workers for
its peaks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Optional, Sequence

from ..config import MAX_WORKERS, usable_cpus, usable_memory
from .metrics import Snapshot

if TYPE_CHECKING:
    from ..config import PoolConfig

ENOUGH = 10  # samples, below which nothing is decided
BUSY, QUIET = 0.9, 0.3  # utilization that asks for more workers, or for fewer
SLOW = 0.1  # seconds that callers may wait for a worker, on average
TOO_MANY_ERRORS = 0.05  # of all calls: what is wrong then is not the size
UP, DOWN = 1, 5  # optimization intervals between a change and the next one up, or down

_MEMORY_FOR_WORKERS = 0.8  # of what there is
_WORKERS_PER_CPU = {"cpu": 1.5, "mixed": 2.0, "io": 3.0}


class Decision(NamedTuple):
    """What to do about the size of a pool, and why. None: leave it."""

    resize_to: Optional[int]
    overflow: Optional[int]
    reason: str


def decide(history: Sequence[Snapshot], config: PoolConfig) -> Decision:
    """Return what to do about the size of a pool.

    `history` is what was seen since the last change, oldest first; the first snapshot is the one
    that the change was decided on (or the first of all), and only tells when that was.
    """
    if len(history) <= ENOUGH:
        return _leave(f"{max(0, len(history) - 1)} samples are too few to judge by")
    last, interval = history[-1], config.optimization_interval
    if last.error_rate > TOO_MANY_ERRORS:
        return _leave(f"{last.error_rate:.0%} of the calls fail, which no size will mend")
    since = last.at - history[0].at
    recent = [snapshot for snapshot in history[1:] if snapshot.at > last.at - UP * interval]
    used = _mean([snapshot.utilization for snapshot in recent])
    line = _mean([snapshot.demand for snapshot in recent])  # a new one could serve these
    if line >= 1:
        return _grow(last, config, used, line, since)
    longer = [snapshot for snapshot in history[1:] if snapshot.at > last.at - DOWN * interval]
    return _shrink(last, config, _mean([snapshot.utilization for snapshot in longer]), since)


def _grow(last: Snapshot, config: PoolConfig, used: float, line: float, since: float) -> Decision:
    size, most = last.pool_size, config.max_size or 0
    why = f"{used:.0%} in use and {line:.0f} waiting"
    if not _over(since, UP * config.optimization_interval):
        return _leave(f"{why}; the last change was {since:.0f} s ago")
    if used > BUSY and size < most:
        return Decision(min(most, size + round(1 + min(line / 5, 3))), None, why)
    room = min(size, MAX_WORKERS - most)
    if (last.wait_mean or 0.0) > SLOW and last.overflow < room:
        return Decision(None, last.overflow + 1, f"{why} for {last.wait_mean:.2g} s on average")
    return _leave(f"{why}; it has all it may have" if used > BUSY else why)


def _shrink(last: Snapshot, config: PoolConfig, used: float, since: float) -> Decision:
    why = f"{used:.0%} in use"
    if used >= QUIET:
        return _leave(why)
    if not _over(since, DOWN * config.optimization_interval):
        return _leave(f"{why}; the last change was {since:.0f} s ago")
    size = last.pool_size - 1 if last.pool_size > (config.min_size or 0) else None
    overflow = last.overflow - 1 if last.overflow > config.max_overflow else None
    if size is None and overflow is None:
        return _leave(f"{why}; it has as few as it may have")
    return Decision(size, overflow, why)


def _leave(reason: str) -> Decision:
    return Decision(None, None, reason)


def _over(since: float, cooldown: float) -> bool:
    return since >= 0.98 * cooldown  # ticks are not exact


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def recommended_size(work: str, worker_bytes: int | None = None) -> int:
    """Return how many workers to begin with on this machine.

    `work` is "cpu" (it computes), "io" (it waits), or "mixed": 1.5, 3 or 2 workers for each CPU
    that this process may use. With `worker_bytes`, the memory that one worker takes, no more than
    four fifths of the memory that this process may use have room for; one at least.

    Raises:
        ValueError: it is none of these, or no number of bytes.
    """
    if work not in _WORKERS_PER_CPU:
        raise ValueError(f'work={work!r}: give "cpu", "io" or "mixed"')
    size = round(usable_cpus() * _WORKERS_PER_CPU[work])
    if worker_bytes is not None:
        if isinstance(worker_bytes, bool) or not worker_bytes > 0:
            raise ValueError(f"worker_bytes={worker_bytes!r}: give a number of bytes above 0")
        memory = usable_memory()
        if memory is not None:
            size = min(size, int(memory * _MEMORY_FOR_WORKERS / worker_bytes))
    return max(1, size)
