"""Seen from inside: every live pool of this process, as a dashboard shows it.

Besides its metrics, a post has an ear for the events that an operator wants to hear of. Pools are
held weakly.
"""

from __future__ import annotations

import collections
import itertools
import os
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any, Deque, Dict, List, Tuple

from ..engine.inquest import Death
from ..errors import PoolForked
from ..opening import live_pools
from . import openmetrics
from .board import Board, Post
from .metrics import Metrics

if TYPE_CHECKING:
    from ..pool import Pool

EVENTS_KEPT = 50
#: Too many, or too little, for an operator; all other events are told.
_UNTOLD = {
    "worker.checkout", "worker.checkin", "worker.health_check", "operation.start",
    "operation.stop", "operation.exception", "queue.depth", "utilization", "session.bound",
    "session.moved", "span.start", "span.stop",
}  # fmt: skip
_BAD = {"error", "session.lost", "lease.leaked"}


class Inside(Board):
    """Watches every live pool of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.source = f"Process {os.getpid()}, {_program()}"
        self._numbers = itertools.count(1)
        self._placed: weakref.WeakSet[Pool[Any]] = weakref.WeakSet()

    def place(self, pool: Pool[Any]) -> None:
        """Begin to watch a pool; the first one is shown to who names none."""
        self._placed.add(pool)
        post = Insider(str(next(self._numbers)), pool)
        self.posts[post.id] = post

    def find(self) -> None:
        """Take up the pools that were opened since."""
        for pool in live_pools():
            if pool not in self._placed:
                self.place(pool)

    def exposition(self) -> str:
        """Return the metrics of all pools as OpenMetrics text."""
        return openmetrics.exposition(live_pools())


class Insider(Post):
    """A pool of this process."""

    def __init__(self, post_id: str, pool: Pool[Any]) -> None:
        super().__init__(post_id, pool.config.name or "")
        self.metrics = Metrics(pool, interval=None)
        self._pool = weakref.ref(pool)
        self._uptime: float | None = None
        self._reasons: list[str] = []
        self._events: Deque[Dict[str, Any]] = collections.deque(maxlen=EVENTS_KEPT)
        self._ends: Dict[int, Tuple[int, str]] = {}  # of each slot the last: generation, and why
        self._hooks = pool.hooks
        for event in self._hooks:
            if event not in _UNTOLD:
                self._hooks[event].append(self._hear)

    def look(self) -> bool:
        """Take a snapshot; return False if there is no pool to look at any more."""
        pool = self._pool()
        if pool is None or pool._desk is None:
            return False
        try:
            snapshot = self.metrics.sample()
            self._reasons = list(pool.health_check().reasons)
            for death in pool.deaths():  # oldest first
                if death.generation >= self._ends.get(death.worker_id, (0, ""))[0]:
                    self._ends[death.worker_id] = death.generation, _obituary(death)
        except PoolForked:
            return False
        self._uptime = snapshot.at - pool._desk.manager.opened_ns / 1e9
        self.snapshot = snapshot
        return snapshot.status != "closed"

    def close(self) -> None:
        """Stop listening."""
        self.metrics.close()
        for listeners in self._hooks.values():
            if self._hear in listeners:
                listeners.remove(self._hear)

    def health(self) -> tuple[str, list[str]]:
        """Return what `Pool.health_check` says."""
        pool = self._pool()
        if pool is None:
            return "unhealthy", [f"{self.name} has ended"]
        report = pool.health_check()
        return report.status, list(report.reasons)

    def reasons(self) -> list[str]:
        """Return what `Pool.health_check` said."""
        return self._reasons

    def uptime(self) -> float | None:
        """Return for how long the pool had been open."""
        return self._uptime

    def last_death(self, worker_id: int) -> str | None:
        """Return why the worker before ended, if it is known."""
        return self._ends.get(worker_id, (0, None))[1]

    def events(self) -> List[Dict[str, Any]]:
        """Return what happened lately, newest first."""
        return list(reversed(self._events.copy()))

    def _hear(self, event: str, numbers: dict[str, Any], facts: dict[str, Any]) -> None:
        if event == "worker.terminate":
            self._ends[facts["worker_id"]] = facts["generation"], facts["reason"]
        self._events.append(
            {"time": time.time(), "name": event, "bad": event in _BAD,
             "text": _sentence({**facts, **numbers})}
        )  # fmt: skip


def _obituary(death: Death) -> str:
    """Return the end of a worker in a few words."""
    words = death.reason
    if death.call is not None:
        words += f", during {death.call!r}"
    if death.call_age is not None:
        words += f", {death.call_age:.3g} s after it began"
    if death.exitcode is not None and death.signal is None:
        words += f" (exit code {death.exitcode})"
    return words


def _sentence(facts: dict[str, Any]) -> str:
    """Return the facts of an event on one line."""
    facts.pop("pool", None)
    words = []
    if "worker_id" in facts:
        words.append(f"worker {facts.pop('worker_id')}")
    for name, value in facts.items():
        if isinstance(value, float):
            value = f"{value:.3g}"
        if value is not None:
            words.append(f"{name} {value}")
    return ", ".join(words)


def _program() -> str:
    return os.path.basename(getattr(sys.modules.get("__main__"), "__file__", None) or "python")
