"""Metrics: what a pool does now, over the last minute, and did in the last hour.

A sampler, one thread or driven by hand, takes a reading of the pool every second; a `Snapshot` is
the difference of two readings. The last five minutes are kept second by second, and the hour
before in rolls of ten seconds, so memory does not grow. Order and durations are by the monotonic
clock; wall time is for display.

The thread starts when the pool is opened and ends with it; the pool is held weakly.
"""

from __future__ import annotations

import collections
import weakref
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, NamedTuple, Optional, Sequence, Tuple

from .._sync import Guard, guarded
from ..engine import table as t
from .reading import Reading, WorkerSnapshot, read
from .score import health_score, health_word
from .ticker import Ticker

if TYPE_CHECKING:
    from ..pool import Pool

WINDOW = 60.0  # seconds that quantiles and rates of errors are about
FINE_STEP, FINE_SPAN = 1.0, 300.0
ROLL_STEP, ROLL_SPAN = 10.0, 3600.0
_EARLY = 0.05  # a sampler's second may be so much shorter


class Snapshot(NamedTuple):
    """A pool at one moment. Durations are seconds, rates are per second, shares are 0 to 1.

    What is "lately" is over the last 60 seconds; totals are since the pool was opened.
    """

    at: float  #: monotonic
    wall: float  #: the same moment in `time.time()`
    name: str
    status: str  #: "new" (not opened yet), "open", "closing" or "closed"
    pool_size: int  #: workers wanted
    active: int  #: leased
    idle: int
    starting: int
    overflow: int  #: workers that may be added while callers queue
    queue_depth: int  #: callers in the line
    demand: int  #: of them, those that any worker could serve
    utilization: float  #: leased time over workers' time, since the sample before
    throughput: float  #: calls, since the sample before
    call_count: int  #: calls answered lately; the next four are about these
    call_mean: Optional[float]
    call_p50: Optional[float]
    call_p95: Optional[float]
    call_p99: Optional[float]
    wait_count: int  #: checkouts that got a worker lately; the next four are about these
    wait_mean: Optional[float]
    wait_p50: Optional[float]
    wait_p95: Optional[float]
    wait_p99: Optional[float]
    error_rate: float  #: calls that failed by the pool's fault, over all, lately
    user_error_rate: float  #: calls that raised an exception of the user's code, likewise
    calls: int  #: total of those answered
    user_errors: int  #: total
    errors: Dict[str, int]  #: totals of what was the pool's fault, by type of error
    timeouts: int  #: total of calls that took too long
    checkout_timeouts: int  #: total
    crashes: int  #: total of workers that ended without being told to
    workers_started: int  #: total
    workers_recycled: int  #: total of workers that were told to end
    active_sessions: int
    affinity_hits: int  #: total of session checkouts that got the worker that has it warm
    affinity_hit_rate: Optional[float]  #: of session checkouts but the first of each, lately
    rss_bytes: int  #: all workers
    cpu: float  #: CPUs that the workers used, over the last ten seconds
    descriptors: Optional[int]  #: open in this process
    health_score: float  #: 0 to 100
    health: str  #: "green", "yellow" or "red"
    workers: Tuple[WorkerSnapshot, ...]  #: of the latest snapshot only


class Metrics:
    """Watches one pool; `latest()` and `history(seconds)` tell. Use it in a `with`, or `close()`.

    `interval` is the seconds between two samples; None: `sample()` is called by hand. `target` is
    how long a call may take (p99, seconds) before it costs points of health. Any thread may call
    any method; one that reads never waits. Ends with the pool; what was seen stays readable.
    `read` takes the readings: tests have their own.
    """

    def __init__(
        self,
        pool: Pool[Any],
        interval: float | None = 1.0,
        *,
        target: float | None = None,
        read: Callable[[Pool[Any]], Reading] = read,
    ) -> None:
        if interval is not None and not interval > 0:
            raise ValueError(f"interval={interval!r}: give seconds, more than 0, or None")
        self._pool = weakref.ref(pool)
        self._target, self._read = target, read
        self._sampling = Guard()
        self._before: Reading | None = None
        self._lately: Deque[Reading] = collections.deque()  # of the last WINDOW, a step apart
        self._recent: Deque[Reading] = collections.deque()  # of the last ROLL_STEP, with workers
        self._rolled: Reading | None = None  # the one that the present roll began with
        self._fine: Deque[Snapshot] = collections.deque()
        self._rolls: Deque[Snapshot] = collections.deque()
        self._latest: Snapshot | None = None
        self._ticker: Ticker | None = None
        if interval is not None:
            self._ticker = Ticker(pool, interval, self.sample, "minipool-metrics")

    # -- reading -----------------------------------------------------------------------------

    def latest(self) -> Snapshot:
        """Return the last snapshot; the first one is taken now, if there is none yet.

        Raises:
            ReferenceError: the pool was collected before there was any.
        """
        return self._latest or self.sample()

    def history(self, seconds: float = FINE_SPAN) -> list[Snapshot]:
        """Return the snapshots of the last `seconds` before the latest, oldest first.

        They are 1 s apart up to five minutes, 10 s beyond, and reach back one hour.
        """
        fine, rolls, latest = self._fine.copy(), self._rolls.copy(), self._latest
        if latest is None:
            return []
        since = latest.at - seconds
        begin = fine[0].at if fine else latest.at
        kept = [roll for roll in rolls if since <= roll.at < begin]
        kept += [snapshot for snapshot in fine if since <= snapshot.at < latest.at]
        return [*kept, latest]

    # -- sampling ----------------------------------------------------------------------------

    def sample(self) -> Snapshot:
        """Take a snapshot now, whatever the interval.

        Raises:
            PoolForked: this process is a fork of the pool's owner.
            ReferenceError: the pool was collected.
        """
        return self._take(self._read(self._alive()))  # and hold the pool no longer than that

    def _alive(self) -> Pool[Any]:
        pool = self._pool()
        if pool is None:
            raise ReferenceError("the pool that these metrics were about was collected")
        return pool

    @guarded("_sampling")
    def _take(self, reading: Reading) -> Snapshot:
        latest = self._latest
        if latest is not None and reading.at <= latest.at:
            return latest  # another thread was faster
        before = self._before or reading
        lately = _first_since(self._lately, reading.at - WINDOW) or before
        recent = _first_since(self._recent, reading.at - ROLL_STEP) or before
        snapshot = _snapshot(reading, before, lately, recent, self._target)
        self._keep(reading, snapshot)
        self._before, self._latest = reading, snapshot
        return snapshot

    def _keep(self, reading: Reading, snapshot: Snapshot) -> None:
        """Keep what the later ones are compared with, and what history will tell."""
        if not self._recent or _due(reading.at, self._recent[-1].at, FINE_STEP):
            self._recent.append(reading)
            self._lately.append(reading._replace(workers=()))
            self._fine.append(snapshot._replace(workers=()))
        _first_since(self._fine, snapshot.at - FINE_SPAN)
        start = self._rolled = self._rolled or reading
        if _due(reading.at, start.at, ROLL_STEP):
            self._rolls.append(self._roll(reading, start))
            self._rolled = reading
        _first_since(self._rolls, snapshot.at - ROLL_SPAN)

    def _roll(self, reading: Reading, start: Reading) -> Snapshot:
        """Return one snapshot for ten seconds: their longest line and their worst health."""
        rolled = _snapshot(reading, start, self._lately[0], self._recent[0], self._target)
        within = [snapshot for snapshot in self._fine if snapshot.at > start.at] or [rolled]
        worst = min(within, key=lambda snapshot: snapshot.health_score)
        return rolled._replace(
            queue_depth=max(snapshot.queue_depth for snapshot in within),
            demand=max(snapshot.demand for snapshot in within),
            health_score=worst.health_score,
            health=worst.health,
            workers=(),
        )

    # -- the end -----------------------------------------------------------------------------

    def close(self) -> None:
        """Stop sampling. What was seen stays readable."""
        if self._ticker is not None:
            self._ticker.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _due(now: float, last: float, step: float) -> bool:
    return now - last >= step - _EARLY


def _first_since(kept: Deque[Any], since: float) -> Any:
    """Drop what is too old; return the first of the rest, or None."""
    while kept and kept[0].at < since - _EARLY:
        kept.popleft()
    return kept[0] if kept else None


def _snapshot(
    now: Reading, before: Reading, lately: Reading, recent: Reading, target: float | None
) -> Snapshot:
    """Make a snapshot: gauges of `now`, rates since `before`, quantiles since `lately`.

    CPU time is said by the workers once a second, so it is taken since `recent`.
    """
    times = {
        **_times("call", _since(now.call_times, lately.call_times)),
        **_times("wait", _since(now.wait_times, lately.wait_times)),
    }
    utilization, workers = _utilization(now, before), _workers(now, recent)
    answered, faults = times["call_count"], max(0, now.faults - lately.faults)
    made, elapsed = max(1, answered + faults), now.at - before.at
    score = _score(now, utilization, faults / made, times["call_p99"], target)
    return Snapshot(
        at=now.at,
        wall=now.wall,
        name=now.name,
        status=now.status,
        pool_size=now.pool_size,
        active=now.count("leased"),
        idle=now.count("idle"),
        starting=now.count("starting"),
        overflow=now.overflow,
        queue_depth=now.queue_depth,
        demand=now.demand,
        utilization=utilization,
        throughput=max(0, now.calls - before.calls) / elapsed if elapsed > 0 else 0.0,
        **times,
        error_rate=faults / made,
        user_error_rate=max(0, now.user_errors - lately.user_errors) / made,
        calls=now.calls,
        user_errors=now.user_errors,
        errors=now.errors,
        timeouts=now.errors.get("CallTimeout", 0),
        checkout_timeouts=now.errors.get("CheckoutTimeout", 0),
        crashes=now.workers_lost,
        workers_started=now.workers_started,
        workers_recycled=now.workers_recycled,
        active_sessions=now.active_sessions,
        affinity_hits=now.affinity["hit"],
        affinity_hit_rate=_hit_rate(now, lately),
        rss_bytes=sum(worker.rss_bytes for worker in workers),
        cpu=sum(worker.cpu or 0.0 for worker in workers),
        descriptors=now.descriptors,
        health_score=score,
        health=health_word(score),
        workers=workers,
    )


def _score(
    now: Reading, utilization: float, error_rate: float, p99: float | None, target: float | None
) -> float:
    if now.status != "open":
        return 0.0
    return health_score(
        utilization=utilization,
        queue_depth=now.queue_depth,
        error_rate=error_rate,
        ready=now.count("idle") + now.count("leased") + now.count("probing"),
        wanted=now.pool_size,
        latency=p99,
        target=target,
    )


def _utilization(now: Reading, before: Reading) -> float:
    served, leased = now.served - before.served, now.leased - before.leased
    return min(1.0, max(0.0, leased / served)) if served > 0 else 0.0


def _times(what: str, counts: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {f"{what}_count": sum(counts), f"{what}_mean": t.mean(counts)}
    for percent in (50, 95, 99):
        found[f"{what}_p{percent}"] = t.quantile(counts, percent / 100)
    return found


def _since(now: Sequence[int], before: Sequence[int]) -> list[int]:
    return [max(0, a - b) for a, b in zip(now, before)]


def _hit_rate(now: Reading, lately: Reading) -> float | None:
    found = {how: now.affinity[how] - lately.affinity[how] for how in ("hit", "moved", "lost")}
    total = sum(found.values())
    return found["hit"] / total if total > 0 else None


def _workers(now: Reading, then: Reading) -> tuple[WorkerSnapshot, ...]:
    """Add to what is known of each worker how much CPU time it took of late."""
    used = {(old.worker_id, old.generation): old.cpu_seconds for old in then.workers}
    elapsed, workers = now.at - then.at, []
    for worker in now.workers:
        before = used.get((worker.worker_id, worker.generation))
        if before is not None and elapsed > 0:
            worker = worker._replace(cpu=max(0.0, worker.cpu_seconds - before) / elapsed)
        workers.append(worker)
    return tuple(workers)
