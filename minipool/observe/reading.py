"""A reading: everything a pool has counted, and how it stands, at one moment.

Metrics are the difference of two readings, so the way of a call carries nothing for them: a
reading takes what the table and the pool's counters have anyhow. It may be taken in any thread.
Counts that belong together are read one after the other; a busy pool's may be off by what
happened in between, and the next reading makes up for it.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, Dict, NamedTuple, Optional, Tuple

from ..engine import table as t
from ..engine.desk import Desk
from ..engine.handle import Handle
from ..engine.states import WorkerState as S

if TYPE_CHECKING:
    from ..pool import Pool

STATES = tuple(state.name.lower() for state in S if state is not S.VACANT)


class WorkerSnapshot(NamedTuple):
    """One worker at one moment. Durations are seconds."""

    worker_id: int  #: its slot
    pid: Optional[int]
    generation: int
    state: str  #: "starting", "idle", "leased", "probing", "stopping" or "lost"
    session: Optional[str]  #: that it is leased for
    sessions_warm: int
    calls: int  #: done by this process
    in_call_for: Optional[float]  #: the call that runs now has taken so long
    last_call: Optional[float]  #: since its last call began; None: it had none
    uptime: float  #: since it was ready
    rss_bytes: int  #: as it said last
    cpu_seconds: float  #: as it said last
    cpu: Optional[float] = None  #: of one CPU, over the last ten seconds; None: not known yet


class Reading(NamedTuple):
    """A pool at one moment, and all it has done since it was opened. Durations are seconds."""

    at: float  #: monotonic
    wall: float  #: the same moment in `time.time()`
    name: str
    status: str  #: "new" (not opened yet), "open", "closing" or "closed"
    pool_size: int  #: workers wanted now
    min_size: int
    max_size: int
    overflow: int  #: workers that may be added while callers queue
    workers: Tuple[WorkerSnapshot, ...]
    queue_depth: int
    demand: int  #: of those in the line, how many any worker could serve
    active_sessions: int
    leases: int
    used: float  #: all leases together that have ended
    leased: float  #: the same, with those that have not
    served: float  #: all workers together, past ones included
    calls: int  #: that were answered
    user_errors: int  #: of them, those with an exception of the user's code
    call_times: Tuple[int, ...]  #: how many calls fell into each bucket of the table
    wait_times: Tuple[int, ...]  #: the same of checkouts that got a worker
    create_times: Tuple[int, ...]  #: the same of workers, from their start until they were ready
    errors: Dict[str, int]  #: what was the pool's fault, by type of error
    faults: int  #: of them, calls that got no reply
    workers_started: int
    workers_lost: int
    workers_recycled: int
    affinity: Dict[str, int]  #: checkouts of a session: "hit", "new", "moved", "lost"
    descriptors: Optional[int]  #: open in this process; None: not known here

    def count(self, state: str) -> int:
        """Return how many workers are in a state."""
        return sum(worker.state == state for worker in self.workers)


def read(pool: Pool[Any]) -> Reading:
    """Take a reading of a pool; of one that was never opened, all zeros.

    Raises:
        PoolForked: this process is a fork of the pool's owner.
    """
    desk, config = pool._desk, pool.config
    now = time.monotonic_ns()
    common: dict[str, Any] = {
        "at": now / 1e9, "wall": time.time(), "name": config.name or "",
        "descriptors": _descriptors(),
    }  # fmt: skip
    if desk is None:
        return _EMPTY._replace(status="closed" if pool.closed else "new", **common)
    desk.check_process()
    manager, fleet = desk.manager, desk.manager.fleet
    now, wish = manager.closed_ns or now, manager.staff.wish
    handles = [handle for _, handle in sorted(fleet.handles.copy().items())]
    rows = fleet.counted_rows()
    waits, calls = t.histograms(rows)
    leases = sum(row[t.LEASES] for row in rows)
    waits[0] += max(0, leases - sum(waits))  # who did not wait is not in the histogram
    errors, used = dict(desk.errors), sum(row[t.LEASED_NS] for row in rows)
    return Reading(
        **common,
        status="closed" if manager.done else "closing" if manager.closing else "open",
        pool_size=wish.target,
        min_size=wish.floor,
        max_size=wish.ceiling,
        overflow=wish.overflow,
        workers=tuple([_worker(handle, now) for handle in handles]),
        queue_depth=len(manager.turnstile.waiters),
        demand=manager.turnstile.general_waiters(),
        active_sessions=len(pool._sessions),
        leases=leases,
        used=used / 1e9,
        leased=(used + _held_ns(handles, now)) / 1e9,
        served=fleet.served_ns(now) / 1e9,
        calls=sum(calls),
        user_errors=sum(row[t.RAISED] for row in rows),
        call_times=tuple(calls),
        wait_times=tuple(waits),
        create_times=tuple(fleet.create_times),
        errors={**errors, **_refusals(desk)},
        faults=sum(errors.values()),
        workers_started=fleet.started,
        workers_lost=fleet.lost,
        workers_recycled=fleet.retired,
        affinity={
            "hit": sum(row[t.SESSION_HITS] for row in rows),
            "new": desk.sessions_new,
            "moved": desk.sessions_moved,
            "lost": desk.sessions_lost,
        },
    )


_EMPTY = Reading(
    at=0.0, wall=0.0, name="", status="new", pool_size=0, min_size=0, max_size=0, overflow=0,
    workers=(), queue_depth=0, demand=0, active_sessions=0, leases=0, used=0.0, leased=0.0,
    served=0.0, calls=0, user_errors=0, call_times=(0,) * t.BUCKETS, wait_times=(0,) * t.BUCKETS,
    create_times=(0,) * t.BUCKETS, errors={}, faults=0,
    workers_started=0, workers_lost=0, workers_recycled=0,
    affinity=dict.fromkeys(("hit", "new", "moved", "lost"), 0), descriptors=None,
)  # fmt: skip


def _worker(handle: Handle, now: int) -> WorkerSnapshot:
    row, state, session = handle.row, handle.state, handle.session
    begun = row[t.CALL_STARTED_NS] if row[t.CALL_ID] else 0
    running = state is S.IDLE and t.running(row)
    return WorkerSnapshot(
        worker_id=handle.slot,
        pid=handle.pid,
        generation=handle.generation,
        state=handle.doing,
        session=None if session is None else session.key,
        sessions_warm=len(handle.sessions),
        calls=t.calls_done(row),
        in_call_for=max(0, now - begun) / 1e9 if running else None,
        last_call=max(0, now - begun) / 1e9 if begun else None,
        uptime=(now - handle.ready_ns) / 1e9 if handle.ready_ns else 0.0,
        rss_bytes=row[t.RSS_BYTES],
        cpu_seconds=row[t.CPU_NS] / 1e9,
    )


def _held_ns(handles: list[Handle], now: int) -> int:
    begun = [handle.row[t.LEASED_SINCE_NS] for handle in handles]
    return sum(max(0, now - since) for since in begun if since)


def _refusals(desk: Desk) -> dict[str, int]:
    """Return what the pool could not do for its callers, but for calls it did not finish."""
    counts = {
        "CheckoutTimeout": desk.timeouts,
        "TooManyWaiters": desk.turned_away,
        "WorkerStartError": desk.manager.fleet.start_failures,
    }
    return {name: count for name, count in counts.items() if count}


def _descriptors() -> int | None:
    for path in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(path)) - 1  # one is the listing's own
    return None
