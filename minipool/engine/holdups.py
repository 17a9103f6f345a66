"""Holdups: the leases that hold up the end of a pool, told to whoever wonders why it takes long.

A pool that closes waits for its leases, and the thread that closes it may not know who has them.
Any thread may add to what is known of the close; the rest is for the manager's thread.
"""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType
from typing import Iterable, NamedTuple

from ..telemetry import logger
from . import table as t
from .handle import Handle
from .states import WorkerState as S

SILENCE = 1.0  # seconds that a pool closes before it says what for
_MOST_NAMED = 8  # leases, those that are oldest


class Departure(NamedTuple):
    """How a thread left the pool's `with` block by an exception, which waits for the pool's end."""

    thread: int
    since_ns: int  # monotonic; the number of the thread has been this one's since then, at least
    error: str


class Holdups:
    """What one pool that closes waits for."""

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self._since: float | None = None  # monotonic; None: it does not close yet
        self._told = False
        self.closers: list[int] = []  # the threads that wait for the end
        self.departures: list[Departure] = []

    def begin(self) -> None:
        """Note that the pool closes from now on."""
        if self._since is None:
            self._since = time.monotonic()

    def tell_in(self, now: float) -> float:
        """Return in how many seconds there may be something to tell; not above 0: never."""
        if self._since is None or self._told:
            return 0.0
        return max(self._since + SILENCE - now, 1e-6)

    def in_vain(self, handle: Handle) -> bool:
        """Tell whether a lease is waited for in vain.

        The thread that took it has left the block by an exception, and waits for the end of the
        pool itself. Its frames, which the traceback keeps, may be all that has the lease. A call
        was broken off by the exception, if it is not that of a thread to which the lease was given.
        """
        return handle.live_lease is not None and any(
            handle.thread == departure.thread
            and handle.row[t.LEASED_SINCE_NS] >= departure.since_ns
            and not (handle.in_call and _others_call(handle, departure.thread))
            for departure in self.departures
        )

    def tell(self, handles: Iterable[Handle], close_by: float) -> None:
        """Log once, when the pool has closed for a second, which leases it waits for."""
        now = time.monotonic()
        if self._told or self._since is None or now < self._since + SILENCE:
            return
        self._told = True
        waited_for = [
            handle for handle in handles if handle.state is S.IDLE and handle.live_lease is not None
        ]
        if waited_for and now < close_by:
            logger().warning("%s", self._text(waited_for, now - self._since, close_by - now))

    def _text(self, handles: list[Handle], closing_for: float, left: float) -> str:
        handles.sort(key=lambda handle: handle.row[t.LEASED_SINCE_NS])
        named = [self._lease(handle) for handle in handles[:_MOST_NAMED]]
        if len(handles) > _MOST_NAMED:
            named.append(f"and {len(handles) - _MOST_NAMED} more")
        one = len(handles) == 1
        after = "" if not self.departures else (
            f"; the block was left by {self.departures[0].error}, which is raised after that"
        )  # fmt: skip
        return (
            f"{self._pool} has been closing for {closing_for:.1f} s and waits for "
            f"{'a lease' if one else f'{len(handles)} leases'}: {'; '.join(named)}. "
            f"{'It is' if one else 'They are'} revoked in {left:.1f} s{after}. Release leases by "
            f"`with pool.checkout()`, or give them less time: `close_timeout`, `close(timeout)`, "
            f"`terminate()`"
        )

    def _lease(self, handle: Handle) -> str:
        since = handle.row[t.LEASED_SINCE_NS]
        seconds = (time.monotonic_ns() - since) / 1e9 if since else 0.0
        call = handle.in_call
        doing = "between calls" if not call else "in a call"
        if isinstance(call, bytes):
            doing = f"in a call of {call.decode(errors='replace')!r}"
        return (
            f"worker {handle.slot} (pid {handle.pid}), leased for {seconds:.1f} s by "
            f"{self._thread(handle.thread)}, {doing}"
        )

    def _thread(self, ident: int) -> str:
        """Name a thread. The dict is read as it is: its lock may be held for who knows how long."""
        thread = getattr(threading, "_active", {}).get(ident)
        name = "a thread that has ended" if thread is None else f"thread {thread.name!r}"
        return f"{name} (the one that closes)" if ident in self.closers else name


def _others_call(handle: Handle, thread: int) -> bool:
    """Tell whether any thread but that one is in a call of that worker, by its stack."""
    frames: dict[int, FrameType] = getattr(sys, "_current_frames", dict)()
    for ident, frame in frames.items():
        outer: FrameType | None = None if ident == thread else frame
        while outer is not None:
            if outer.f_code is Handle.request.__code__ and outer.f_locals.get("self") is handle:
                return True
            outer = outer.f_back
    return False
