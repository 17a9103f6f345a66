"""OpenMetrics: what pools have counted, as text that Prometheus and its kin read.

Made from a reading when it is asked for; nothing runs in between. Names and their meaning follow
OpenTelemetry's conventions for connection pools (`minipool.worker.wait_time` and so on). Labels
are few and stay few: the pool's name, a worker's state, a type of error; never a process, a
session or a generation.
"""

from __future__ import annotations

import weakref
from typing import Any, Callable, Iterable, List, NamedTuple, Sequence, Tuple

from ..engine import table as t
from ..pool import Pool
from .reading import STATES, Reading, read

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_FAULTS = dict.fromkeys(("WorkerDied", "CallTimeout", "ProtocolError"), 0)  # told before any is
_OCTAVES = range(5, t.OCTAVES)  # bounds of the shown buckets, from 8 µs to 137 s, twofold each

Sample = Tuple[str, "dict[str, str]", float]  # suffix of the name, labels, value


class _Family(NamedTuple):
    name: str
    kind: str
    about: str
    samples: Callable[[Reading], List[Sample]]

    @property
    def unit(self) -> str:
        last = self.name.rpartition("_")[2]
        return last if last in ("seconds", "bytes") else ""


def exposition(pools: Iterable[Pool[Any]]) -> str:
    """Return the metrics of some pools in the OpenMetrics text format; see `CONTENT_TYPE`.

    Of pools that have one name, the second is called "name#2" and so on: each series is one
    pool's. A pool that was never opened has zeros.

    Raises:
        PoolForked: a pool belongs to another process.
    """
    told = _named(pools)
    lines: list[str] = []
    for family in FAMILIES:
        lines.append(f"# TYPE {family.name} {family.kind}")
        if family.unit:
            lines.append(f"# UNIT {family.name} {family.unit}")
        lines.append(f"# HELP {family.name} {_escaped(family.about)}")
        for name, reading, highest in told:
            for suffix, labels, value in family.samples(reading):
                pairs = [("pool", name), *labels.items()]
                text = ",".join(f'{key}="{_escaped(word)}"' for key, word in pairs)
                series = f"{family.name}{suffix}{{{text}}}"
                if family.kind != "gauge":
                    value = highest[series] = max(value, highest.get(series, 0))
                lines.append(f"{series} {value!r}")
    return "\n".join([*lines, "# EOF", ""])


# What was told of each pool. Words that belong together are read one after the other, so a count
# may seem to fall by one; a reader would take that for a restart, and all of it for new.
_highest: weakref.WeakKeyDictionary[Pool[Any], dict[str, float]] = weakref.WeakKeyDictionary()


def _named(pools: Iterable[Pool[Any]]) -> list[tuple[str, Reading, dict[str, float]]]:
    seen: dict[str, int] = {}
    found = []
    for pool in pools:
        reading = read(pool)
        number = seen[reading.name] = seen.get(reading.name, 0) + 1
        name = reading.name if number == 1 else f"{reading.name}#{number}"
        found.append((name, reading, _highest.setdefault(pool, {})))
    return found


def _escaped(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # half a character cannot be sent
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


# -- what is told --------------------------------------------------------------------------------


def _one(value: Callable[[Reading], float], suffix: str = "") -> Callable[[Reading], list[Sample]]:
    return lambda reading: [(suffix, {}, value(reading))]


def _total(value: Callable[[Reading], float]) -> Callable[[Reading], list[Sample]]:
    return _one(value, "_total")


def _histogram(counts: Callable[[Reading], Sequence[int]]) -> Callable[[Reading], list[Sample]]:
    def samples(reading: Reading) -> list[Sample]:
        found = counts(reading)
        total, mean = sum(found), t.mean(found) or 0.0
        buckets: list[Sample] = []
        for octave in _OCTAVES:
            bound = t.bucket_start_ns(octave * t.STEPS) / 1e9
            buckets.append(("_bucket", {"le": repr(bound)}, sum(found[: octave * t.STEPS])))
        ends: list[Sample] = [("_bucket", {"le": "+Inf"}, total), ("_count", {}, total)]
        return [*buckets, *ends, ("_sum", {}, mean * total)]

    return samples


def _use_time(reading: Reading) -> list[Sample]:
    ended = reading.leases - reading.count("leased")
    return [("_count", {}, max(0, ended)), ("_sum", {}, reading.used)]


def _states(reading: Reading) -> list[Sample]:
    return [("", {"state": state}, reading.count(state)) for state in STATES]


def _labelled(label: str, counts: dict[str, int]) -> list[Sample]:
    return [("_total", {label: name}, count) for name, count in sorted(counts.items())]


FAMILIES = (
    _Family("minipool_worker_count", "gauge", "Workers by state.", _states),
    _Family("minipool_worker_wanted", "gauge", "Workers that there should be.",
            _one(lambda r: r.pool_size)),
    _Family("minipool_worker_max", "gauge", "Workers that there may be, overflow included.",
            _one(lambda r: r.max_size + r.overflow)),
    _Family("minipool_worker_idle_min", "gauge", "Workers that are kept without any load.",
            _one(lambda r: r.min_size)),
    _Family("minipool_worker_pending_requests", "gauge", "Callers waiting for a worker.",
            _one(lambda r: r.queue_depth)),
    _Family("minipool_worker_timeouts", "counter", "Callers who got no worker in time.",
            _total(lambda r: r.errors.get("CheckoutTimeout", 0))),
    _Family("minipool_worker_create_time_seconds", "histogram",
            "From the start of a worker until it was ready. The sum is within 6 %.",
            _histogram(lambda r: r.create_times)),
    _Family("minipool_worker_wait_time_seconds", "histogram",
            "What callers waited who got a worker. The sum is within 6 %.",
            _histogram(lambda r: r.wait_times)),
    _Family("minipool_worker_use_time_seconds", "summary", "What leases took that have ended.",
            _use_time),
    _Family("minipool_worker_leased_seconds", "counter",
            "Time that workers were leased; over the time that they served it is the utilization.",
            _total(lambda r: r.leased)),
    _Family("minipool_worker_served_seconds", "counter", "Time that workers were in service.",
            _total(lambda r: r.served)),
    _Family("minipool_worker_starts", "counter", "Workers that became ready.",
            _total(lambda r: r.workers_started)),
    _Family("minipool_worker_ends", "counter", "Workers that ended: lost, or recycled as told.",
            lambda r: _labelled("how", {"lost": r.workers_lost, "recycled": r.workers_recycled})),
    _Family("minipool_worker_memory_bytes", "gauge", "Resident memory of all workers together.",
            _one(lambda r: sum(worker.rss_bytes for worker in r.workers))),
    _Family("minipool_call_time_seconds", "histogram",
            "What calls took that were answered. The sum is within 6 %.",
            _histogram(lambda r: r.call_times)),
    _Family("minipool_call_exceptions", "counter", "Calls that raised an exception of their own.",
            _total(lambda r: r.user_errors)),
    _Family("minipool_errors", "counter", "What was the pool's fault, by type of error.",
            lambda r: _labelled("type", {**_FAULTS, **r.errors})),
    _Family("minipool_sessions", "gauge", "Sessions that are alive in this process.",
            _one(lambda r: r.active_sessions)),
    _Family("minipool_session_checkouts", "counter", "Checkouts of a session, by affinity.",
            lambda r: _labelled("affinity", r.affinity)),
)  # fmt: skip
