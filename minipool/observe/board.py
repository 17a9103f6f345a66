"""A board: the pools that a dashboard shows, wherever they are looked at from.

Each pool has a post: its metrics, the latest snapshot of them, and what else is known there. A
board takes up pools that are new with each tick, and gives up those that ended.
"""

from __future__ import annotations

import time
from typing import Any, Dict, List, Optional

from . import portrait
from .metrics import Metrics, Snapshot


class Post:
    """One pool under watch. What cannot be known from where it is watched is None."""

    def __init__(self, post_id: str, name: str) -> None:
        self.id, self.name = post_id, name
        self.metrics: Metrics
        self.snapshot: Snapshot | None = None  # until the first look

    def look(self) -> bool:
        """Take a snapshot; return False if there is no pool to look at any more."""
        raise NotImplementedError

    def health(self) -> tuple[str, list[str]]:
        """Return "healthy", "degraded" or "unhealthy", as the pool is at this moment, and why."""
        raise NotImplementedError

    def reasons(self) -> list[str]:
        """Return what was wrong at the last look."""
        raise NotImplementedError

    def uptime(self) -> float | None:
        """Return how old the pool was at the last look, in seconds."""
        raise NotImplementedError

    def last_death(self, worker_id: int) -> str | None:
        """Return why the worker before ended."""
        return None

    def events(self) -> Optional[List[Dict[str, Any]]]:
        """Return what happened lately, newest first."""
        return None

    def figures(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return the numbers of the pool."""
        return portrait.figures(snapshot)

    def series(self, window: float) -> dict[str, list[float | None]]:
        """Return its lines over the last `window` seconds."""
        return portrait.series(self.metrics.history(window), window)

    def close(self) -> None:
        """Stop watching."""

    # -- told --------------------------------------------------------------------------------

    def title(self) -> dict[str, Any]:
        """Return what names the pool."""
        assert self.snapshot is not None
        return {"id": self.id, "name": self.name, "word": portrait.word(self.snapshot)}

    def told(self) -> dict[str, Any]:
        """Return what is known of the pool now."""
        snapshot = self.snapshot
        assert snapshot is not None
        return {
            **self.title(),
            "score": portrait.score(snapshot),
            "reasons": list(dict.fromkeys([*self.reasons(), *portrait.strains(snapshot)])),
            "now": {**self.figures(snapshot), "uptime": self.uptime()},
            "workers": [
                {**worker._asdict(), "last_death": self.last_death(worker.worker_id)}
                for worker in snapshot.workers
            ],
        }

    def full(self, window: float) -> dict[str, Any]:
        """Return that, its lines and its events."""
        return {**self.told(), "series": self.series(window), "events": self.events()}


class Board:
    """All pools that are seen from one place. One thread calls `tick`, any the others."""

    source = ""  #: where they are

    def __init__(self) -> None:
        self.posts: Dict[str, Post] = {}

    def find(self) -> None:
        """Take up the pools that are new."""
        raise NotImplementedError

    def tick(self) -> None:
        """Take a reading of every pool; take up those that are new, give up those that ended."""
        self.find()
        for post in tuple(self.posts.values()):
            if not post.look():
                del self.posts[post.id]
                post.close()

    def reading(self, pool_id: str, window: float) -> dict[str, Any]:
        """Return what the page draws: the first pool if none is named, none if it is not there."""
        posts = self._seen()
        chosen = [post for post in posts if post.id == pool_id or not pool_id][:1]
        return {
            "time": time.time(),
            "source": self.source,
            "pools": [post.title() for post in posts],
            "pool": chosen[0].full(window) if chosen else None,
        }

    def pools(self) -> list[dict[str, Any]]:
        """Return what is known of each pool now."""
        return [post.told() for post in self._seen()]

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Return whether there are pools and all can serve, and what ails those that do not."""
        reports = [(post, *post.health()) for post in self._seen()]
        serves = bool(reports) and all(status != "unhealthy" for _, status, _ in reports)
        return serves, {
            "status": "serving" if serves else "not serving",
            "pools": [
                {"id": post.id, "name": post.name, "status": status, "reasons": reasons}
                for post, status, reasons in reports
            ],
        }

    def exposition(self) -> str | None:
        """Return the metrics of all pools as OpenMetrics text, if all that it tells is known."""
        return None

    def close(self) -> None:
        """Stop watching."""
        while self.posts:
            self.posts.popitem()[1].close()

    def _seen(self) -> list[Post]:
        return [post for post in tuple(self.posts.values()) if post.snapshot is not None]
