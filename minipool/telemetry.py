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
import functools
import sys
import threading
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


def logger() -> logging.Logger | _Relayed | _Unlogged:
    """Return minipool's logger; imported when there is something to log, which is seldom.

    A process that has given up its root or its rights by then may be able to import nothing: what
    would be shown by default goes to standard error, and nobody fails for want of a message.

    In a thread that must not wait, it hands on what it is given: see `log_through`.
    """
    put = getattr(_relay, "put", None)
    return _own_logger() if put is None else _Relayed(put, None)


def _own_logger() -> logging.Logger | _Unlogged:
    try:
        import logging
    except (ImportError, OSError):
        return _Unlogged()
    return logging.getLogger("minipool")


_relay = threading.local()  # `put`: what takes the records of this thread


def log_through(put: Callable[[Callable[[], object]], object] | None) -> None:
    """Have what this thread logs from now on written by another: handlers may block.

    `put` is given, for each record, a function that writes it. None: it logs by itself again.
    """
    _relay.put = put


class _Relayed:
    """Takes a logger's place in a thread that must not wait. Takes none of logging's locks.

    Records tell of the time and the thread that they were made in.
    """

    def __init__(self, put: Callable[[Callable[[], object]], object], to: Any) -> None:
        self._put, self._to = put, to  # to: a logger; None is minipool's

    def isEnabledFor(self, level: int) -> bool:
        """As `Logger.isEnabledFor`, which may wait for a lock; in doubt it is True."""
        root = getattr(sys.modules.get("logging"), "root", None)
        if root is None:
            return level >= WARNING
        to = self._to or root.manager.loggerDict.get("minipool", root)
        level_of = getattr(to, "getEffectiveLevel", root.getEffectiveLevel)
        return bool(level >= level_of() and level > root.manager.disable)

    def log(self, level: int, message: str, *args: object, **more: Any) -> None:
        if self.isEnabledFor(level):
            _own_logger()  # imports, here: a process forked meanwhile would have half a module
            made = _circumstances()
            self._put(functools.partial(_write, self._to, made, level, message, args, more))

    def warning(self, message: str, *args: object) -> None:
        self.log(WARNING, message, *args)

    def exception(self, message: str, *args: object) -> None:
        self.log(ERROR, message, *args, exc_info=sys.exc_info())


def _circumstances() -> dict[str, Any]:
    """Return when, where and in which thread a record is being made, as it will tell."""
    now, thread, frame = time.time(), threading.current_thread(), sys._getframe(2)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return {
        "created": now,
        "msecs": now % 1 * 1000 // 1,
        "thread": thread.ident,
        "threadName": thread.name,
        "pathname": frame.f_code.co_filename,
        "lineno": frame.f_lineno,
        "funcName": frame.f_code.co_name,
    }


def _write(
    to: Any,
    made: dict[str, Any],
    level: int,
    message: str,
    args: tuple[object, ...],
    more: dict[str, Any],
) -> None:
    """Write a record that another thread has made."""
    to = to or _own_logger()
    if not hasattr(to, "makeRecord"):  # no logger, but what somebody has in place of one
        to.log(level, message, *args, **more)
    elif to.isEnabledFor(level):
        path, line, function = made["pathname"], made["lineno"], made["funcName"]
        exc_info, extra = more.get("exc_info"), more.get("extra")
        record = to.makeRecord(to.name, level, path, line, message, args, exc_info, function, extra)
        record.relativeCreated -= 1000 * (record.created - made["created"])
        record.__dict__.update(made)
        to.handle(record)


class _Unlogged:
    """Takes a logger's place where there is none."""

    def log(self, level: int, message: str, *args: object, exc_info: Any = None) -> None:
        if level >= WARNING and sys.stderr is not None:
            print(message % args, file=sys.stderr)
        if exc_info is not None:
            sys.excepthook(*exc_info)

    def warning(self, message: str, *args: object) -> None:
        self.log(WARNING, message, *args)

    def exception(self, message: str, *args: object) -> None:
        self.log(ERROR, message, *args, exc_info=sys.exc_info())


def remark(level: int, message: str, *args: object, **more: Any) -> None:
    """Log at a level that may be below what is shown by default.

    Then a program that has not even imported logging is not made to: nobody would hear, and while
    an unhandled Ctrl-C is ending it, that import evaluates a string, upon which CPython forgets
    that it was to end by SIGINT and exits with 1.
    """
    if level >= WARNING or "logging" in sys.modules:
        logger().log(level, message, *args, **more)


def warn(message: str, stacklevel: int = 1) -> None:
    """Issue a ResourceWarning, as if the caller's line had; where this thread must not wait, later.

    Warnings are printed to standard error, which may be a pipe that nobody reads.
    """
    import warnings

    put = getattr(_relay, "put", None)
    if put is not None:
        put(functools.partial(warnings.warn, message, ResourceWarning))
    else:
        warnings.warn(message, ResourceWarning, stacklevel=stacklevel + 1)


class Hooks(Dict[str, List[Listener]]):
    """One plain list of callables for each event of one pool; append to listen."""

    def __init__(self, pool_name: str, names: Iterable[str] = EVENTS) -> None:
        super().__init__((name, []) for name in names)
        self.emitted = 0  # events that somebody heard; not exact
        self._pool_name = pool_name

    def __missing__(self, name: str) -> List[Listener]:
        raise KeyError(f"no event {name!r}; there are: {', '.join(self)}")

    def emit(self, name: str, measurements: dict[str, Any] | None = None, **metadata: Any) -> None:
        """Call each listener of `name` in turn. One that raises is logged and removed.

        Where it matters, the caller tests the list first, so that nothing is built for nobody.
        """
        listeners = self[name]
        if listeners:
            self.emitted += 1
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

    to: Any = log or logging.getLogger("minipool.events")

    def write(event: str, measurements: dict[str, Any], metadata: dict[str, Any]) -> None:
        level = _LEVELS.get(event, INFO)
        put = getattr(_relay, "put", None)
        via = to if put is None else _Relayed(put, to)
        if via.isEnabledFor(level):
            facts = {**metadata, **measurements}
            error = facts.get("error")
            if isinstance(error, BaseException):  # as text: a record may be kept for long
                facts["error"] = f"{type(error).__name__}: {error}"
            words = " ".join(f"{key}={_shown(facts[key])}" for key in facts if key != "pool")
            via.log(
                level, "%s: %s %s", facts["pool"], event, words, extra={"event": event, **facts}
            )

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
