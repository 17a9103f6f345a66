"""An ear for a pool's hooks: tests wait for events instead of sleeping."""

from __future__ import annotations

import threading
from typing import Any, Callable, NamedTuple

from minipool import Pool


class Event(NamedTuple):
    name: str
    measurements: dict[str, Any]
    metadata: dict[str, Any]


class Ear:
    """Remembers what a pool emits; `wait` returns when enough of it has been heard."""

    def __init__(self, pool: Pool[Any], *names: str) -> None:
        self.heard: list[Event] = []
        self._changed = threading.Condition()
        for name in names or tuple(pool.hooks):
            pool.hooks[name].append(self)

    def __call__(self, name: str, measurements: dict[str, Any], metadata: dict[str, Any]) -> None:
        with self._changed:
            self.heard.append(Event(name, measurements, metadata))
            self._changed.notify_all()

    def of(self, name: str) -> list[Event]:
        """Return what was heard under one name."""
        return [event for event in tuple(self.heard) if event.name == name]

    def wait(
        self,
        name: str,
        count: int = 1,
        timeout: float = 20.0,
        fits: Callable[[Event], bool] = lambda event: True,
    ) -> Event:
        """Wait until `count` events of that name (that fit) were heard in all; return that one."""

        def fitting() -> list[Event]:
            return [event for event in self.of(name) if fits(event)]

        with self._changed:
            enough = self._changed.wait_for(lambda: len(fitting()) >= count, timeout)
        assert enough, f"{name} was heard {len(fitting())} times, not {count}: {self.heard[-30:]}"
        return fitting()[count - 1]


def wait_until(pool: Pool[Any], condition: Callable[[], bool], timeout: float = 20.0) -> None:
    """Wait for something that the pool's manager brings about."""
    desk = pool._desk
    assert desk is not None
    assert desk.manager.wait_for(condition, timeout), f"never so: {pool!r}"


def handle_of(pool: Pool[Any], worker_id: int = 0) -> Any:
    """Return the parent's end of one worker, for tests that break it."""
    desk = pool._desk
    assert desk is not None
    return desk.manager.fleet.handles[worker_id]
