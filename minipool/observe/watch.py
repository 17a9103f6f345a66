"""The watch: what pools did between two looks at them, from outside.

Nothing in a pool is asked or told; see `onlooker`. Rates and percentiles are the difference of
two readings of its table. That a process is stopped the kernel tells, but not since when: it is
counted from the first look that finds it so.
"""

from __future__ import annotations

import collections
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..engine import table as t
from . import onlooker
from .onlooker import PoolSight, Unreadable, WorkerSight

SPAN = 10.0  # seconds that rates and percentiles are about
_STEP = 0.95  # seconds between two looks that are kept, however often it looks
STUCK = 10.0  # seconds after which a call is called stuck


class Rates(NamedTuple):
    """What happened between two sights. Durations are seconds; None: nothing was counted."""

    seconds: float  #: between the two
    calls: float  #: replies, a second
    leases: float  #: checkouts that got a worker, a second
    utilization: float  #: leased time over the time of the workers there are now
    cpu: float  #: processors that the workers used
    call_p50: Optional[float]
    call_p95: Optional[float]
    call_p99: Optional[float]
    wait_p50: Optional[float]
    wait_p99: Optional[float]


class Worker(NamedTuple):
    """A worker, and what it did lately."""

    sight: WorkerSight
    rates: Optional[Rates]  #: None at the first sight
    stopped_for: Optional[float]  #: at least: it may have been so before we looked
    stuck: bool  #: in a call, for longer than the watch was told


class PoolView(NamedTuple):
    """A pool, and what it did lately."""

    sight: PoolSight
    rates: Optional[Rates]  #: None at the first sight
    stopped_for: Optional[float]  #: its own process, as for a worker
    workers: Tuple[Worker, ...]


class Watch:
    """Looks at pools again and again; each view is compared with one about SPAN seconds older."""

    def __init__(
        self,
        pid: int | None = None,
        stuck: float = STUCK,
        look: Callable[[Optional[int]], Tuple[List[PoolSight], List[Unreadable]]] = onlooker.look,
    ) -> None:
        self._pid, self._stuck, self._look = pid, stuck, look
        self._past: Dict[Tuple[int, float], Deque[PoolSight]] = {}
        self._stopped: Dict[Tuple[int, float], float] = {}  # process and pool: first seen so

    def look(self) -> tuple[list[PoolView], list[Unreadable]]:
        """Return what there is now, and what could not be read."""
        sights, unreadable = self._look(self._pid)
        past, stopped, self._past, self._stopped = self._past, self._stopped, {}, {}
        shown = []
        for now in sights:
            key = now.pid, now.opened
            older = self._past[key] = past.get(key, collections.deque())
            while len(older) > 1 and older[1].at <= now.at - SPAN:
                older.popleft()
            shown.append(self._compared(now, older[0] if older else None, stopped))
            if not older or now.at - older[-1].at >= _STEP:
                older.append(now)
        return shown, unreadable

    def _compared(
        self, now: PoolSight, then: PoolSight | None, stopped: dict[tuple[int, float], float]
    ) -> PoolView:
        def stopped_for(pid: int, is_stopped: bool) -> float | None:
            if not is_stopped:
                return None
            since = self._stopped[pid, now.opened] = stopped.get((pid, now.opened), now.at)
            return now.at - since

        before = {worker.worker_id: worker for worker in then.workers} if then else {}
        elapsed = now.at - then.at if then else 0.0
        workers = []
        for worker in now.workers:
            rates = None
            if elapsed > 0:
                rates = _worker_rates(worker, before.get(worker.worker_id), elapsed)
            paused = stopped_for(worker.pid, worker.process == "stopped")
            stuck = worker.in_call_for is not None and worker.in_call_for >= self._stuck
            workers.append(Worker(worker, rates, paused, stuck))
        rates = None
        if then is not None and elapsed > 0:
            cpu = sum(worker.rates.cpu for worker in workers if worker.rates)
            rates = _rates(now, then, elapsed, max(1, len(workers)), cpu)
        paused = stopped_for(now.pid, now.status == "stopped")
        return PoolView(now, rates, paused, tuple(workers))


def _worker_rates(now: WorkerSight, then: WorkerSight | None, elapsed: float) -> Rates | None:
    if then is None:
        return None
    used = now.cpu_seconds
    if then.generation == now.generation:
        used = max(0.0, used - then.cpu_seconds)
    return _rates(now, then, elapsed, 1, used / elapsed)


def _rates(now: Any, then: Any, elapsed: float, workers: int, cpu: float) -> Rates:
    calls = [max(0, a - b) for a, b in zip(now.call_times, then.call_times)]
    waits = [max(0, a - b) for a, b in zip(now.wait_times, then.wait_times)]
    leases = now.leases - then.leases
    waits[0] += max(0, leases - sum(waits))  # who did not wait is not in the histogram
    return Rates(
        seconds=elapsed,
        calls=sum(calls) / elapsed,
        leases=leases / elapsed,
        utilization=min(1.0, max(0.0, now.leased - then.leased) / elapsed / workers),
        cpu=cpu,
        call_p50=t.quantile(calls, 0.5),
        call_p95=t.quantile(calls, 0.95),
        call_p99=t.quantile(calls, 0.99),
        wait_p50=t.quantile(waits, 0.5),
        wait_p99=t.quantile(waits, 0.99),
    )


_BULK = {"wait_times", "call_times", "workers", "at", "opened"}


def as_object(pools: Sequence[PoolView], unreadable: Sequence[Unreadable]) -> dict[str, Any]:
    """Return everything as one object for JSON. Durations in seconds, sizes in bytes."""
    return {
        "pools": [
            {
                **_facts(pool),
                "uptime": pool.sight.at - pool.sight.opened,
                "workers": [_facts(worker) for worker in pool.workers],
            }
            for pool in pools
        ],
        "unreadable": [one._asdict() for one in unreadable],
    }


def _facts(seen: Any) -> dict[str, Any]:
    facts = {key: value for key, value in seen.sight._asdict().items() if key not in _BULK}
    rest = {key: value for key, value in seen._asdict().items() if key not in ("sight", "workers")}
    return {**facts, **rest, "rates": seen.rates._asdict() if seen.rates else None}
