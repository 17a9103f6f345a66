"""Seen from inside: every live pool of this process, as a dashboard shows it.

A pool gets a post when it is first seen: metrics, which are sampled with each tick, and an ear
for the events that an operator wants to hear of. Pools are held weakly, and a post is given up
when its pool has ended.
"""

from __future__ import annotations

import collections
import itertools
import os
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any, Deque, Dict

from ..errors import PoolForked
from ..opening import live_pools
from . import openmetrics, portrait
from .metrics import Metrics, Snapshot

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


class Inside:
    """Watches every live pool of this process. One thread calls `tick`, any the others."""

    def __init__(self) -> None:
        self._posts: Dict[int, Post] = {}
        self._numbers = itertools.count(1)
        self._placed: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def place(self, pool: Pool[Any]) -> None:
        """Begin to watch a pool; the first one is shown to who names none."""
        number = next(self._numbers)
        self._placed[pool] = number
        self._posts[number] = Post(str(number), pool)

    def tick(self) -> None:
        """Take a reading of every pool; take up those that are new, give up those that ended."""
        for pool in live_pools():
            if pool not in self._placed:
                self.place(pool)
        for number, post in tuple(self._posts.items()):
            if not post.look():
                del self._posts[number]
                post.close()

    def reading(self, pool_id: str, window: float) -> dict[str, Any]:
        """Return what the page draws; without a pool of that id, none of them."""
        posts = self._seen()
        chosen = [post for post in posts if post.id == pool_id or not pool_id][:1]
        return {
            "time": time.time(),
            "source": f"Process {os.getpid()}, {_program()}",
            "pools": [post.title() for post in posts],
            "pool": chosen[0].full(window) if chosen else None,
        }

    def pools(self) -> list[dict[str, Any]]:
        """Return what is known of each pool now."""
        return [post.told() for post in self._seen()]

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Return whether there are pools and all can serve, and what ails those that do not."""
        reports = [(post, post.health()) for post in self._seen()]
        serves = bool(reports) and all(status != "unhealthy" for _, (status, _) in reports)
        return serves, {
            "status": "serving" if serves else "not serving",
            "pools": [
                {"id": post.id, "name": post.name, "status": status, "reasons": reasons}
                for post, (status, reasons) in reports
            ],
        }

    def exposition(self) -> str:
        """Return the metrics of all pools as OpenMetrics text."""
        return openmetrics.exposition(live_pools())

    def close(self) -> None:
        """Stop watching."""
        while self._posts:
            self._posts.popitem()[1].close()

    def _seen(self) -> list[Post]:
        return [post for post in tuple(self._posts.values()) if post.snapshot is not None]


class Post:
    """One pool under watch: its latest snapshot, its history, and what happened to it lately."""

    def __init__(self, number: str, pool: Pool[Any]) -> None:
        self.id = number
        self.name = pool.config.name or ""
        self.snapshot: Snapshot | None = None
        self._pool = weakref.ref(pool)
        self._opened = 0.0
        self._metrics = Metrics(pool, interval=None)
        self._events: Deque[Dict[str, Any]] = collections.deque(maxlen=EVENTS_KEPT)
        self._deaths: Dict[int, str] = {}
        self._reasons: list[str] = []
        self._hooks = pool.hooks
        for event in self._hooks:
            if event not in _UNTOLD:
                self._hooks[event].append(self._hear)

    def look(self) -> bool:
        """Take a snapshot; return False if there is no pool to look at any more."""
        pool = self._pool()
        if pool is None:
            return False
        try:
            self.snapshot = self._metrics.sample()
            self._reasons = list(pool.health_check().reasons)
        except (ReferenceError, PoolForked):
            return False
        return self.snapshot.status != "closed"

    def close(self) -> None:
        """Stop listening."""
        self._metrics.close()
        for listeners in self._hooks.values():
            if self._hear in listeners:
                listeners.remove(self._hear)

    def health(self) -> tuple[str, list[str]]:
        """Return how the pool is at this moment, as `Pool.health_check` says it, and why."""
        pool = self._pool()
        if pool is None:
            return "unhealthy", [f"{self.name} has ended"]
        report = pool.health_check()
        return report.status, list(report.reasons)

    # -- told --------------------------------------------------------------------------------

    def title(self) -> dict[str, Any]:
        """Return what names the pool."""
        assert self.snapshot is not None
        return {"id": self.id, "name": self.name, "word": portrait.word(self.snapshot)}

    def told(self) -> dict[str, Any]:
        """Return what is known of the pool now."""
        snapshot = self.snapshot
        assert snapshot is not None
        said = portrait.strains(snapshot)
        return {
            **self.title(),
            "score": portrait.score(snapshot),
            "reasons": [*self._reasons, *(one for one in said if one not in self._reasons)],
            "now": {**portrait.figures(snapshot), "uptime": self._uptime(snapshot)},
            "workers": [
                {**worker._asdict(), "last_death": self._deaths.get(worker.worker_id)}
                for worker in snapshot.workers
            ],
        }

    def full(self, window: float) -> dict[str, Any]:
        """Return that, the lines of a window, and the events, newest first."""
        return {
            **self.told(),
            "series": portrait.series(self._metrics.history(window), window),
            "events": list(reversed(self._events.copy())),
        }

    def _uptime(self, snapshot: Snapshot) -> float | None:
        pool = self._pool()
        if pool is None or pool._desk is None:
            return None
        return snapshot.at - pool._desk.manager.opened_ns / 1e9

    # -- heard -------------------------------------------------------------------------------

    def _hear(self, event: str, numbers: dict[str, Any], facts: dict[str, Any]) -> None:
        if event == "worker.terminate":
            code = facts["exitcode"]
            self._deaths[facts["worker_id"]] = f"{facts['reason']} (exit code {code})"
        self._events.append(
            {"time": time.time(), "name": event, "bad": event in _BAD,
             "text": _sentence({**facts, **numbers})}
        )  # fmt: skip


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
