"""Seen from outside: pools of other processes, as a dashboard shows them. Linux only.

All there is to go by is the status table, which is read through `/proc`; see `onlooker`. So what
a pool keeps to itself (sessions, errors, events, why a worker died) is told as unknown.
"""

from __future__ import annotations

import os
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

from .._sync import Latch
from ..engine import table as t
from . import onlooker, portrait
from .board import Board, Post
from .metrics import Metrics, Snapshot
from .onlooker import PoolSight, Unreadable, WorkerSight
from .reading import Reading, WorkerSnapshot

Look = Callable[[Optional[int]], Tuple[List[PoolSight], List[Unreadable]]]
_UNKNOWN = ("error_rate", "user_error_rate", "errors", "user_errors", "timeouts",
            "checkout_timeouts", "active_sessions", "affinity_hits", "affinity_hit_rate",
            "descriptors", "overflow")  # fmt: skip


class Outside(Board):
    """Watches the pools of one process, or all pools of this user (`pid=None`)."""

    def __init__(self, pid: int | None = None, look: Look = onlooker.look) -> None:
        super().__init__()
        self.unreadable: list[Unreadable] = []
        self.source = "Seen from outside"
        self.over = Latch()  # the process has ended
        self._pid, self._look = pid, look
        if pid is not None:
            self.source += f": process {pid}"

    def find(self) -> None:
        """Look at every pool, and take up those that are new."""
        sights, self.unreadable = self._look(self._pid)
        seen = {f"{sight.pid}-{sight.opened:.6f}": sight for sight in sights}
        for post_id, sight in seen.items():
            if post_id not in self.posts:
                self.posts[post_id] = Outsider(post_id, sight)
        for post_id, post in self.posts.items():
            assert isinstance(post, Outsider)
            post.sight = seen.get(post_id)
        if self._pid is not None and not os.path.exists(f"/proc/{self._pid}"):
            self.over.set()


class Outsider(Post):
    """A pool of another process."""

    def __init__(self, post_id: str, sight: PoolSight) -> None:
        super().__init__(post_id, f"{sight.name} ({sight.pid})")
        self.sight: PoolSight | None = sight  # the latest; None: it is gone
        self.hooks: Dict[str, Any] = {}  # there is nothing to hear from outside
        subject: Any = self  # metrics know only what `read` makes of it
        self.metrics = Metrics(subject, interval=None, read=_Counted())
        self._before: PoolSight = sight

    def look(self) -> bool:
        """Take a snapshot of what was seen; return False if the pool is gone."""
        if self.sight is None:
            return False
        self._before = self.sight
        self.snapshot = self.metrics.sample()
        return True

    def health(self) -> tuple[str, list[str]]:
        """Return whether it can serve, as far as that can be seen."""
        assert self.snapshot is not None
        reasons = [*self.reasons(), *portrait.strains(self.snapshot)]
        serving = sum(map(portrait.serves, self.snapshot.workers))
        if self.snapshot.status != "open" or (self.snapshot.pool_size and not serving):
            return "unhealthy", reasons
        return "degraded" if reasons else "healthy", reasons

    def reasons(self) -> list[str]:
        """Return what can be seen to be wrong."""
        assert self.snapshot is not None
        status, told_for = self.snapshot.status, self._before.told_for or 0.0
        found = portrait.missing(self.snapshot)
        if status == "stopped":
            found.insert(0, "its process is stopped by a signal")
        elif status == "silent":
            found.insert(0, f"its manager has said nothing for {told_for:.0f} s")
        stopped = [w.worker_id for w in self.snapshot.workers if w.state == "stopped"]
        return found + [f"worker {worker_id} is stopped by a signal" for worker_id in stopped]

    def uptime(self) -> float:
        """Return for how long the pool had been open."""
        return self._before.at - self._before.opened

    def figures(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return the numbers that can be seen."""
        return {**portrait.figures(snapshot), **dict.fromkeys(_UNKNOWN)}

    def series(self, window: float) -> dict[str, list[float | None]]:
        """Return the lines that can be seen."""
        lines = super().series(window)
        return {**lines, "error_rate": [None] * len(lines["age"])}


class _Counted:
    """Makes readings of one pool's sights; adds up how long its workers served."""

    def __init__(self) -> None:
        self._served = 0.0
        self._at: float | None = None

    def __call__(self, post: Any) -> Reading:
        sight: PoolSight = post.sight
        workers = tuple([_worker(worker, sight.at) for worker in sight.workers])
        if self._at is not None:
            self._served += (sight.at - self._at) * sum(map(portrait.serves, workers))
        self._at = sight.at
        waits = list(sight.wait_times)
        waits[0] += max(0, sight.leases - sum(waits))  # who did not wait is not in the histogram
        return Reading(
            at=sight.at,
            wall=time.time(),
            name=sight.name,
            status=sight.status,
            pool_size=sight.size,
            min_size=sight.size,
            max_size=sight.size,
            overflow=0,
            workers=workers,
            queue_depth=sight.waiting,
            demand=sight.waiting,  # from here it is not seen what for
            active_sessions=0,
            leases=sight.leases,
            used=sight.leased,
            leased=sight.leased,
            served=self._served,
            calls=sum(sight.call_times),
            user_errors=0,
            call_times=tuple(sight.call_times),
            wait_times=tuple(waits),
            create_times=(0,) * t.BUCKETS,
            errors={},
            faults=0,
            workers_started=sight.started,
            workers_lost=sight.lost,
            workers_recycled=sight.retired,
            affinity=dict.fromkeys(("hit", "new", "moved", "lost"), 0),
            descriptors=None,
        )


def _worker(sight: WorkerSight, at: float) -> WorkerSnapshot:
    state = sight.state
    if sight.process == "stopped":
        state = "stopped"
    elif sight.process in ("gone", "zombie"):
        state = "lost"
    return WorkerSnapshot(
        worker_id=sight.worker_id,
        pid=sight.pid,
        generation=sight.generation,
        state=state,
        session=None,
        sessions_warm=0,
        calls=sight.calls,
        in_call_for=sight.in_call_for,
        last_call=sight.quiet_for if sight.calls else None,
        uptime=0.0,
        rss_bytes=sight.rss_bytes,
        cpu_seconds=sight.cpu_seconds,
    )
