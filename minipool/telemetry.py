"""Event names, and the plain lists of callables that hear them.

`pool.hooks["worker.init"].append(f)` is all there is to listening: `f(event, measurements,
metadata)` is called in the thread where the event happens, never under a lock, so it should only
count or enqueue. An event nobody listens to costs one truth test where it would be emitted. The
shape (a name, numbers, context) is that of Erlang's `telemetry`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List

if TYPE_CHECKING:
    import logging

Listener = Callable[[str, Dict[str, Any], Dict[str, Any]], object]

#: Event -> when it is emitted, its measurements, its metadata (besides `pool`, always there).
EVENTS: dict[str, tuple[str, str, str]] = {
    "pool.init": ("the pool was opened", "size", ""),
    "pool.terminate": ("the last worker is gone", "uptime", ""),
    "pool.resized": ("resize() changed the size", "size, previous", ""),
    "worker.init": ("a worker became ready", "seconds", "worker_id, pid, generation"),
    "worker.checkout": ("a lease began", "wait", "worker_id, pid, generation"),
    "worker.checkin": ("a lease ended", "seconds", "worker_id, pid, generation"),
    "worker.terminate": (
        "a worker's process ended",
        "calls, lifetime",
        "worker_id, pid, generation, exitcode, reason",
    ),
    "worker.health_check": (
        "an idle worker was probed",
        "seconds, failures",
        "worker_id, pid, generation, healthy",
    ),
    "operation.start": ("a call is about to be sent", "", "worker_id, target"),
    "operation.stop": ("a call returned", "seconds", "worker_id, target"),
    "operation.exception": ("a call raised", "seconds", "worker_id, target, error"),
    "queue.depth": ("a caller had to queue", "depth", ""),
    "utilization": ("the manager looked round", "leased, workers, ratio", ""),
    "error": ("the pool, not the user's code, failed", "", "kind, error, worker_id"),
    "recovery": ("a lost worker was replaced", "seconds", "worker_id, pid, generation"),
    "session.bound": ("a session got its first worker", "version", "session, worker_id"),
    "session.moved": ("a session went on with another worker", "version", "session, worker_id"),
    "session.lost": (
        "a session expired, was evicted, or lost its worker under strict affinity",
        "version",
        "session, reason",
    ),
    "lease.leaked": ("a lease outlived leak_warn_after, or was dropped", "seconds", "worker_id"),
}


def logger() -> logging.Logger:
    """Return minipool's logger; imported when there is something to log, which is seldom."""
    import logging

    return logging.getLogger("minipool")


class Hooks(Dict[str, List[Listener]]):
    """One plain list of callables for each event of one pool; append to listen."""

    def __init__(self, pool_name: str, names: Iterable[str] = EVENTS) -> None:
        super().__init__((name, []) for name in names)
        self._pool_name = pool_name

    def __missing__(self, name: str) -> List[Listener]:
        raise KeyError(f"no event {name!r}; there are: {', '.join(self)}")

    def emit(self, name: str, measurements: dict[str, Any] | None = None, **metadata: Any) -> None:
        """Call each listener of `name` in turn. One that raises is logged and removed.

        Where it matters, the caller tests the list first, so that nothing is built for nobody.
        """
        listeners = self[name]
        if not listeners:
            return
        metadata["pool"] = self._pool_name
        for listener in tuple(listeners):  # a copy: listeners may remove themselves
            try:
                listener(name, measurements or {}, metadata)
            except Exception:
                logger().exception("listener %r failed on %s and was removed", listener, name)
                with contextlib.suppress(ValueError):  # another thread removed it first
                    listeners.remove(listener)
