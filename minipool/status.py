"""What a pool tells of itself: frozen snapshots, made from the table and the fleet.

Nothing here changes anything or waits for anybody; any thread may call it. Numbers that belong
together are read one after the other, so a snapshot of a busy pool may be off by what happened
in between.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Optional, Tuple

from .breaker import CLOSED
from .config import PoolConfig
from .engine import table as t
from .engine.desk import Desk
from .engine.handle import Handle
from .engine.states import WorkerState as S
from .records import Record
from .sessions import Sessions


class WorkerInfo(NamedTuple):
    """One worker at one moment. Durations are seconds."""

    worker_id: int  #: its slot
    generation: int
    pid: Optional[int]
    state: str  #: "starting", "idle", "leased", "probing", "spare", "stopping" or "lost"
    calls: int  #: done by this process
    busy: float  #: spent in calls
    in_call_for: Optional[float]  #: the call that runs now has taken so long
    uptime: float  #: since it was ready
    rss_bytes: int  #: as it said last
    probe_failures: int  #: in a row


class SessionInfo(NamedTuple):
    """One session at one moment. Durations are seconds."""

    session_id: str
    age: float
    idle: float  #: since its last lease ended; 0 while it is leased
    size_bytes: int  #: of its pickled state
    worker_id: Optional[int]  #: the worker that has it warm, if there is one
    leased: bool


class PoolStats(NamedTuple):
    """A pool at one moment, and what it did since it was opened. Durations are seconds."""

    name: str
    size: int  #: how many workers are wanted now
    workers: int  #: how many there are: the sum of the next seven
    idle: int
    leased: int
    starting: int
    probing: int
    spare: int  #: ready, and out of service until one is missing
    stopping: int
    lost: int  #: dying
    waiting: int  #: callers in the queue
    leases: int  #: checkouts that got a worker
    queued: int  #: checkouts that had to queue
    checkout_timeouts: int
    turned_away: int  #: by max_waiting
    calls: int  #: replies received
    raised: int  #: of them, those with an exception of the user's code
    faults: int  #: calls that got no reply: the worker died, was too late, or garbled it
    discarded: int  #: workers given back unfit
    workers_started: int
    workers_lost: int  #: ended without being told to
    workers_retired: int  #: ended because they were told to
    start_failures: int
    breaker: Optional[str]  #: "closed", "open" or "half-open"; None: there is none
    breaker_opened: int  #: how often it opened
    uptime: float
    sessions: int  #: that are alive in this process
    session_hits: int  #: checkouts of a session that got the worker that has it warm
    sessions_new: int  #: that got the session's first worker
    sessions_moved: int  #: that got another worker than before
    sessions_lost: int  #: that found the worker before dead
    session_hit_rate: Optional[float]  #: hits over all but the new; None without any
    utilization: float  #: leased time over workers' time, since the pool was opened
    call_p50: Optional[float]  #: of the calls that were answered; None without any
    call_p99: Optional[float]
    wait_p50: Optional[float]  #: of checkouts that got a worker
    wait_p99: Optional[float]


class HealthReport(NamedTuple):
    """What `Pool.health_check()` found."""

    status: str  #: "healthy", "degraded" (it serves, but not as it should) or "unhealthy"
    reasons: Tuple[str, ...]
    workers: Tuple[WorkerInfo, ...]


def session_infos(sessions: Sessions) -> list[SessionInfo]:
    """Return what is known of each session, the longest unused first."""
    now = time.monotonic()
    infos = [_session_info(sessions, record, now) for record in sessions.records()]
    return sorted(infos, key=lambda info: info.idle, reverse=True)


def _session_info(sessions: Sessions, record: Record, now: float) -> SessionInfo:
    holder = record.holder
    leased = holder is not None and holder.session is record
    worker = sessions.nearness.worker_of(record)
    return SessionInfo(
        session_id=record.key,
        age=now - record.born,
        idle=0.0 if leased else max(0.0, now - record.used),
        size_bytes=record.size_bytes,
        worker_id=None if worker is None else worker.slot,
        leased=leased,
    )


def worker_info(handle: Handle) -> WorkerInfo:
    """Return the snapshot of one worker."""
    row, now = handle.row, time.monotonic_ns()
    state = handle.state
    running = state is S.IDLE and t.running(row)
    return WorkerInfo(
        worker_id=handle.slot,
        generation=handle.generation,
        pid=handle.pid,
        state=handle.doing,
        calls=t.calls_done(row),
        busy=row[t.BUSY_NS] / 1e9,
        in_call_for=(now - row[t.CALL_STARTED_NS]) / 1e9 if running else None,
        uptime=(now - handle.ready_ns) / 1e9 if handle.ready_ns else 0.0,
        rss_bytes=row[t.RSS_BYTES],
        probe_failures=handle.probe_failures,
    )


def pool_stats(config: PoolConfig, desk: Desk | None, sessions: int = 0) -> PoolStats:
    """Return the snapshot of a pool; of one that was never opened, all zeros."""
    if desk is None:
        zeros = dict.fromkeys(PoolStats._fields, 0)
        empty = dict.fromkeys(
            ("call_p50", "call_p99", "wait_p50", "wait_p99", "session_hit_rate", "breaker")
        )
        return PoolStats(**{**zeros, **empty, "name": config.name, "utilization": 0.0})  # type: ignore[arg-type]
    desk.check_process()
    manager, fleet = desk.manager, desk.manager.fleet
    infos = [worker_info(handle) for handle in tuple(fleet.handles.values())]
    states = [info.state for info in infos]
    rows = fleet.counted_rows()
    totals = {word: sum(row[word] for row in rows) for word in _TOTALS}
    now = manager.closed_ns or time.monotonic_ns()
    waits, calls = t.histograms(rows)
    waits[0] += max(0, totals[t.LEASES] - sum(waits))  # who did not wait is not in the histogram
    hits = totals[t.SESSION_HITS]
    returning = hits + desk.sessions_moved + desk.sessions_lost
    return PoolStats(
        name=config.name or "",
        size=manager.staff.target,
        workers=len(infos),
        **{name: states.count(name) for name in _GAUGES},
        waiting=len(manager.turnstile.waiters),
        leases=totals[t.LEASES],
        queued=desk.queued,
        checkout_timeouts=desk.timeouts,
        turned_away=desk.turned_away,
        calls=sum(calls),
        raised=totals[t.RAISED],
        faults=desk.faults,
        discarded=desk.discarded,
        workers_started=fleet.started,
        workers_lost=fleet.lost,
        workers_retired=fleet.retired,
        start_failures=fleet.start_failures,
        breaker=None if fleet.breaker is None else fleet.breaker.state,
        breaker_opened=0 if fleet.breaker is None else fleet.breaker.opened,
        uptime=(now - manager.opened_ns) / 1e9,
        sessions=sessions,
        session_hits=hits,
        sessions_new=desk.sessions_new,
        sessions_moved=desk.sessions_moved,
        sessions_lost=desk.sessions_lost,
        session_hit_rate=hits / returning if returning else None,
        utilization=_utilization(desk, rows, now),
        call_p50=t.quantile(calls, 0.5),
        call_p99=t.quantile(calls, 0.99),
        wait_p50=t.quantile(waits, 0.5),
        wait_p99=t.quantile(waits, 0.99),
    )


_TOTALS = (t.LEASES, t.RAISED, t.SESSION_HITS)
_GAUGES = ("idle", "leased", "starting", "probing", "spare", "stopping", "lost")


def _utilization(desk: Desk, rows: list[memoryview], now: int) -> float:
    """Return leased time, that of the leases not yet ended included, over workers' time."""
    leased = sum(row[t.LEASED_NS] for row in rows)
    for handle in tuple(desk.manager.fleet.handles.values()):
        since = handle.row[t.LEASED_SINCE_NS]
        leased += now - since if since else 0
    served = desk.manager.fleet.served_ns(now)
    return min(1.0, leased / served) if served else 0.0


def health_report(
    config: PoolConfig, desk: Desk | None, closed: bool, failure: BaseException | None
) -> HealthReport:
    """Judge a pool: unhealthy if it cannot serve, degraded if it serves but not as it should.

    `failure` is why its last opening failed.
    """
    why = () if failure is None else (f"it could not start: {failure}",)
    if desk is None:
        state = "closed" if closed else "not open"
        return HealthReport("unhealthy", (f"{config.name} is {state}", *why), ())
    manager, fleet = desk.manager, desk.manager.fleet
    handles = sorted(fleet.handles.values(), key=lambda handle: handle.slot)
    infos = tuple(worker_info(handle) for handle in handles)
    if manager.closing:
        return HealthReport("unhealthy", (f"{config.name} is closed", *why), infos)
    serving, target = len(fleet.usable()), manager.staff.target
    reasons = [
        f"worker {info.worker_id} failed {info.probe_failures} health checks in a row"
        for info in infos
        if info.probe_failures
    ]
    if serving < target:
        reasons.append(f"{serving} of {target} workers are in service")
    if fleet.last_failure is not None:
        reasons.append(f"the last start failed: {fleet.last_failure}")
        worn = sum(handle.worn is not None for handle in fleet.staying())
        if worn:
            reasons.append(f"{worn} workers past their limits serve on, as no other can be started")
    if fleet.breaker is not None and fleet.breaker.state != CLOSED:
        reasons.append(
            f"the circuit breaker is {fleet.breaker.state}; the next start is tried in "
            f"{fleet.breaker.retry_in:.1f} s"
        )
    stuck = _stuck(desk, fleet.usable(), target)
    if stuck is not None:
        reasons.append(stuck)
    waiting = len(manager.turnstile.waiters)
    if waiting:
        reasons.append(f"{waiting} callers are waiting for a worker")
    unhealthy = target > 0 and not serving
    status = "unhealthy" if unhealthy else "degraded" if reasons else "healthy"
    return HealthReport(status, tuple(reasons), infos)


def _stuck(desk: Desk, serving: list[Handle], target: int) -> str | None:
    """Tell that none of those that serve has come free since before a caller was refused."""
    began, calling = [], 0
    for handle in serving:
        row = handle.row
        leased, called = row[t.LEASED_SINCE_NS], row[t.CALL_STARTED_NS]
        if not leased or handle.live_lease is None:
            return None
        in_call = called >= leased and t.running(row)
        calling += in_call
        began.append(called if in_call else leased)
    if not began or max(began) >= desk.timed_out_ns:
        return None
    seconds = (time.monotonic_ns() - max(began)) / 1e9
    what = "in one call" if calling == len(serving) else "leased to the same callers"
    return (
        f"{len(serving)} of {target} workers have been {what} for {seconds:.0f} s, callers time out"
    )
