"""Event names, and the plain lists of callables that hear them.

`pool.hooks["worker.init"].append(f)` is all there is to listening: `f(event, measurements,
metadata)` is called in the thread where the event happens, never under a lock, so it should only
count or enqueue. An event nobody listens to costs one truth test where it would be emitted. The
shape (a name, numbers, context) is that of Erlang's `telemetry`, and so is `span`.

`attach_logger` and `attach_reporter` are listeners ready-made; what they return takes them away
again. Every pool imports this module, so it imports next to nothing itself.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, Iterator, List

if TYPE_CHECKING:
    import logging
    from typing import Protocol

    class Emitter(Protocol):
        """What has hooks: a pool."""

        hooks: Hooks


DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40  # as `logging` numbers them

Listener = Callable[[str, Dict[str, Any], Dict[str, Any]], object]

#: Event -> when it is emitted, its measurements, its metadata (besides `pool`, always there).
EVENTS: dict[str, tuple[str, str, str]] = {
    "pool.init": ("the pool was opened", "size", ""),
    "pool.terminate": ("the last worker is gone", "uptime", ""),
    "pool.resized": ("resize() changed the size", "size, previous", ""),
    "pool.warmup": ("warm_up() has ended", "seconds, workers, succeeded", "strategy"),
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
    "breaker.changed": (
        "starting workers was given up for now, is tried again, or works",
        "failures",
        "state, cause",
    ),
    "session.bound": ("a session got its first worker", "version", "session, worker_id"),
    "session.moved": ("a session went on with another worker", "version", "session, worker_id"),
    "session.lost": (
        "a session expired, was evicted or taken over by another process, or lost its worker "
        "under strict affinity",
        "version",
        "session, reason",
    ),
    "lease.leaked": ("a lease outlived leak_warn_after, or was dropped", "seconds", "worker_id"),
    "span.start": ("a span of the caller's own began", "", "span, facts"),
    "span.stop": ("it ended well", "seconds", "span, facts"),
    "span.exception": ("it ended by an exception", "seconds", "span, facts, error"),
}


def logger() -> logging.Logger | _Unlogged:
    """Return minipool's logger; imported when there is something to log, which is seldom.

    A process that has given up its root or its rights by then may be able to import nothing: what
    would be shown by default goes to standard error, and nobody fails for want of a message.
    """
    try:
        import logging
    except (ImportError, OSError):
        return _Unlogged()
    return logging.getLogger("minipool")


class _Unlogged:
    """Takes a logger's place where there is none."""

    def log(self, level: int, message: str, *args: object, **more: Any) -> None:
        if level >= WARNING and sys.stderr is not None:
            print(message % args, file=sys.stderr)

    def warning(self, message: str, *args: object) -> None:
        self.log(WARNING, message, *args)

    def exception(self, message: str, *args: object) -> None:
        self.log(ERROR, message, *args)
        sys.excepthook(*sys.exc_info())


def remark(level: int, message: str, *args: object, **more: Any) -> None:
    """Log at a level that may be below what is shown by default.

    Then a program that has not even imported logging is not made to: nobody would hear, and while
    an unhandled Ctrl-C is ending it, that import evaluates a string, upon which CPython forgets
    that it was to end by SIGINT and exits with 1.
    """
    if level >= WARNING or "logging" in sys.modules:
        logger().log(level, message, *args, **more)


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
        if listeners:
            metadata["pool"] = self._pool_name
            tell(name, listeners, measurements or {}, metadata)


def tell(
    name: str, listeners: List[Listener], measurements: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """Do as `Hooks.emit`, for who has the list and whole metadata at hand: events of each call."""
    for listener in tuple(listeners):  # a copy: listeners may remove themselves
        try:
            listener(name, measurements, metadata)
        except Exception:
            drop(name, listeners, listener)


def drop(name: str, listeners: List[Listener], listener: Listener) -> None:
    """Log the exception that a listener raised, which is being handled, and remove it."""
    logger().exception("listener %r failed on %s and was removed", listener, name)
    with contextlib.suppress(ValueError):  # another thread removed it first
        listeners.remove(listener)


# -- listeners ready-made ------------------------------------------------------------------------

#: The events of each single call: to hear them costs every call about a microsecond.
OF_CALLS = ("worker.checkout", "worker.checkin", "operation.start", "operation.stop")

_LEVELS = {  # all others are steps in a life, and told at INFO
    "error": ERROR,
    "operation.exception": ERROR,
    "span.exception": ERROR,
    "lease.leaked": WARNING,
    **dict.fromkeys(OF_CALLS, DEBUG),
    **dict.fromkeys(("worker.health_check", "queue.depth", "utilization"), DEBUG),
    **dict.fromkeys(("span.start", "span.stop"), DEBUG),
}


def attach_reporter(
    pool: Emitter, report: Listener, events: Iterable[str] | None = None
) -> Callable[[], None]:
    """Have `report(event, measurements, metadata)` hear every event, or those named.

    It runs in the thread where the event happens, as any listener does. The function returned
    detaches it; what is under way in other threads may still be heard.

    Raises:
        KeyError: there is no such event; nothing is attached.
    """
    lists = [pool.hooks[name] for name in (pool.hooks if events is None else events)]
    for listeners in lists:
        listeners.append(report)

    def detach() -> None:
        for listeners in lists:
            with contextlib.suppress(ValueError):  # it raised and was removed, or left
                listeners.remove(report)

    return detach


def attach_logger(
    pool: Emitter, log: logging.Logger | None = None, calls: bool = False
) -> Callable[[], None]:
    """Log a pool's events: lives at INFO, health at DEBUG, leaks at WARNING, errors at ERROR.

    Each record has the event's name as `event`, and every measurement and metadata as attributes
    of their own names, for formatters that make structured logs. The function returned detaches.

    Args:
        log: where to; None is the logger "minipool.events".
        calls: also what happens at each single checkout and call, at DEBUG.
    """
    import logging

    to = log or logging.getLogger("minipool.events")

    def write(event: str, measurements: dict[str, Any], metadata: dict[str, Any]) -> None:
        level = _LEVELS.get(event, INFO)
        if to.isEnabledFor(level):
            facts = {**metadata, **measurements}
            error = facts.get("error")
            if isinstance(error, BaseException):  # as text: a record may be kept for long
                facts["error"] = f"{type(error).__name__}: {error}"
            words = " ".join(f"{key}={_shown(facts[key])}" for key in facts if key != "pool")
            to.log(level, "%s: %s %s", facts["pool"], event, words, extra={"event": event, **facts})

    wanted = [name for name in pool.hooks if calls or name not in OF_CALLS]
    return attach_reporter(pool, write, wanted)


def _shown(value: Any) -> str:
    """Return a value as one word, which cannot be taken for several, or for another line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if text.isprintable() and not set(text) & set(" =\"'") and text else repr(value)


@contextlib.contextmanager
def span(
    pool: Emitter, name: str, metadata: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Time a piece of the caller's own work among the pool's events.

    `with span(pool, "answer", {"user": 7}) as facts:` emits `span.start`, and at the end
    `span.stop` or `span.exception`, with the seconds it took. What the block puts into `facts`
    is told at the end.
    """
    hooks, facts = pool.hooks, dict(metadata or {})
    hooks.emit("span.start", {}, span=name, facts=dict(facts))
    start = time.monotonic()
    try:
        yield facts
    except BaseException as error:
        took = {"seconds": time.monotonic() - start}
        hooks.emit("span.exception", took, span=name, facts=facts, error=error)
        raise
    hooks.emit("span.stop", {"seconds": time.monotonic() - start}, span=name, facts=facts)
