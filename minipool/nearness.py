"""Nearness: which worker a session gets, and which it had; a hint gets the worker it had last.

Called by who owns the session. What is noted here is a matter of speed, never of truth: a worker
that turns out not to have a session is sent its state.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from .engine.conversation import MAX_WARM
from .engine.desk import Desk
from .engine.handle import Handle
from .engine.passage import passage
from .engine.states import WorkerState
from .errors import SessionLost
from .records import Record


class Nearness:
    """Which worker has what warm, for the sessions and the hints of one pool."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._config = desk.config
        self._hints: dict[str, tuple[int, int]] = {}  # hint -> slot, generation used last

    @passage
    def worker_for(self, record: Record, affinity: str, timeout: float | None) -> Handle:
        """Take the worker that suits the affinity, and note how that went."""
        known = record.at_slot >= 0
        warm = self.worker_of(record)
        handle: Handle | None = None
        start = time.monotonic()
        if warm is not None and affinity != "any":
            wait = None if affinity == "strict" else self._config.affinity_wait
            handle = self._desk.acquire_this(warm, timeout, wait)
            if handle is None and affinity == "strict":
                self.tell_lost(record, start=None)
        if handle is None:
            left = None if timeout is None else max(0.0, timeout - (time.monotonic() - start))
            handle = self._desk.acquire(left)
        if warm is handle:
            record.affinity = "hit"
        elif not known:
            record.affinity = "new"
        else:
            record.affinity = "lost" if self.worker_of(record) is None else "moved"
        return handle

    def worker_of(self, record: Record) -> Handle | None:
        """Return the worker that has a session warm, if it is alive."""
        handle = self._desk.manager.fleet.handles.get(record.at_slot)
        if handle is None or handle.generation != record.at_generation or handle.ended_ns:
            return None
        return None if handle.state in (WorkerState.STOPPING, WorkerState.LOST) else handle

    def workers_knowing(self, record: Record) -> list[Handle]:
        """Return the living workers that have the session, or what it left there before a move."""
        known = dict(record.known or {})
        if record.at_slot >= 0:
            known[record.at_slot] = record.at_generation
        handles = self._desk.manager.fleet.handles
        found = []
        for slot, generation in known.items():
            handle = handles.get(slot)
            if handle is not None and handle.generation == generation and not handle.ended_ns:
                found.append(handle)
        return found

    def tell_over(self, record: Record) -> list[Handle]:
        """Have each worker that knows a session hear of its end; return them."""
        handles = self.workers_knowing(record)
        for handle in handles:
            handle.sessions.pop(record.key, None)
            handle.sessions_over.append((record.key, record.serial))
            if len(handle.sessions_over) == 1:  # else it is on its way to hear of others
                self._ask(handle)
        return handles

    def _ask(self, handle: Handle) -> None:
        manager = self._desk.manager
        manager.order(lambda: manager.care.probe(handle))

    def bind(self, record: Record, handle: Handle) -> None:
        """Note that a worker has the session from now on."""
        event = "session.bound" if record.affinity == "new" else "session.moved"
        old = self.worker_of(record)
        if old is not None:
            old.sessions.pop(record.key, None)
            record.known = {**(record.known or {}), old.slot: old.generation}
        record.at_slot, record.at_generation = handle.slot, handle.generation
        self.tell(event, record, worker_id=handle.slot)

    def warmed(self, record: Record, handle: Handle) -> None:
        """Note that a worker is sent a session's state, and which one it forgets for that."""
        warm = handle.sessions
        warm.pop(record.key, None)
        warm[record.key] = None
        while len(warm) > MAX_WARM:
            oldest = next(iter(warm))
            del warm[oldest]
            forgotten = record.sessions.record_of(oldest)
            if forgotten is not None and forgotten.at_slot == handle.slot:
                forgotten.missing()  # or it would answer that it has not got it

    @passage
    def acquire(self, hint: str, timeout: float | None) -> Handle:
        """Take the worker that served this hint last, if it is idle; else any."""
        slot, generation = self._hints.get(checked_key(hint, "hint"), (-1, -1))
        handle = self._desk.try_acquire_this(slot, generation)
        if handle is None:
            handle = self._desk.acquire(timeout)
        self._hints.pop(hint, None)  # to its end: what was used last is forgotten last
        self._hints[hint] = (handle.slot, handle.generation)
        while len(self._hints) > self._config.max_sessions:
            with contextlib.suppress(StopIteration, RuntimeError):  # others change it as well
                self._hints.pop(next(iter(self._hints)), None)
        return handle

    def tell_lost(self, record: Record, start: float | None) -> None:
        """With strict affinity, tell everyone who waited for a worker that is dead, once.

        `start` is when the caller came; None: it has just found out.
        """
        if start is None or (record.at_slot >= 0 and self.worker_of(record) is None):
            record.unbind()
            record.lost_at = time.monotonic()
            self.tell("session.lost", record, reason="its worker died")
            self._desk.count("sessions_lost")
        elif start > record.lost_at:
            return
        raise SessionLost(
            f"the worker that had session {record.key!r} is gone, and with it what could not "
            f"travel; its committed state is kept; check out again for a fresh start",
            session_id=record.key,
        )

    def tell(self, event: str, record: Record, **facts: Any) -> None:
        """Tell listeners of something that happened to a session."""
        if self._desk.hooks[event]:
            self._desk.hooks.emit(event, {"version": record.version}, session=record.key, **facts)


def checked_key(key: Any, name: str = "session") -> str:
    """Return an id, if it is one, as a plain `str`.

    Raises:
        TypeError: it is no text. ValueError: it is empty, or cannot be written down.
    """
    if not isinstance(key, str):
        raise TypeError(f"{name}={key!r}: give a text")
    if not key or "\0" in key or key.encode("utf-8", "replace").decode() != key:
        raise ValueError(f"{name}={key!r}: give a text that is not empty, without NUL and half "
                         f"characters")  # fmt: skip
    return str.__str__(key)  # of a subclass, which a worker or a store may not know
