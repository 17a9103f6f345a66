"""Rounds: how the bench measures, so that what disturbs the machine disturbs both sides.

A `Plan` says how much. `alternate` times its subjects by turns, in small batches.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

from ..pool import Pool
from .floors import Bare, started
from .peers import Peer, open_peers

Subjects = Dict[str, Callable[[], Any]]
Rounds = Dict[str, List[float]]

_clock_ns = time.perf_counter_ns


class Plan(NamedTuple):
    """How much is measured, and how processes are started."""

    context: Any  # of multiprocessing
    peers: bool = False  # also those that are not of the standard library
    rounds: int = 40  # of a latency
    batch: int = 200  # calls of each kind in a round
    stretch: float = 0.2  # seconds of throughput for each kind in a round
    repeats: int = 9  # of what takes longer: start-up, recovery, throughput, import
    idle_seconds: float = 30.0

    @property
    def method(self) -> str:
        return str(self.context.get_start_method())

    def pool(self, size: int, **options: Any) -> Pool[None]:
        return Pool(size=size, start_method=self.method, **options)


@contextlib.contextmanager
def bare_processes(plan: Plan, count: int) -> Iterator[list[Bare]]:
    bare = started(plan.context, count)
    try:
        yield bare
    finally:
        for one in bare:
            one.close()


@contextlib.contextmanager
def opened_peers(plan: Plan, size: int) -> Iterator[tuple[list[Peer], tuple[str, ...]]]:
    peers, missing = open_peers(plan.context, size, plan.peers)
    try:
        for peer in peers:
            peer.warm_up(size)
        yield peers, tuple(f"{name}: not installed" for name in missing)
    finally:
        for peer in peers:
            peer.close()


def alternate(subjects: Subjects, rounds: int, batch: int) -> Rounds:
    """Time each subject in small batches by turns; return the median of each round's batch."""
    found: Rounds = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            found[name].append(median_time(subject, batch))
    return found


def median_time(subject: Callable[[], Any], batch: int) -> float:
    clock, times = _clock_ns, []
    for _ in range(batch):
        start = clock()
        subject()
        times.append(clock() - start)
    return statistics.median(times) / 1e9
