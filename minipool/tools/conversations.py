"""Sessions: what a session adds to a lease, and what many of them cost.

Everything runs on one core, where there are cores to choose from. All times are in seconds, sizes
in bytes.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import tracemalloc
from typing import Any, Callable

from ..engine.child import current_session
from ..pool import Pool
from . import procfs
from .figures import Group, Result, Series, above, over
from .floors import identity
from .rounds import Plan, Rounds, Subjects, alternate

_MANY = 100_000
_ABOUT = {
    "plain": "checkout + call, without a session",
    "warm": "the same in a session with 1 MB of untouched state, warm",
    "plain_of_two": "checkout + call on two workers by turns, without a session",
    "moving": "the same in a session with 1 kB, which moves every time",
    "of_few": "checkout + checkin of one of 10 sessions",
    "of_many": "the same ten, when there are {count}",
    "anywhere": "any one of {count}, at random: what its memory's caches miss",
    "memory": "checkout + call that commits one small key",
    "sqlite": "the same, with a store in SQLite (temporary directory)",
}


def commit_key(value: int) -> None:
    """Change one small key of the session; run in a worker."""
    current_session()["key"] = value


def sessions(plan: Plan) -> list[Group]:
    """Time leases of sessions beside leases without."""
    count = _MANY if plan.repeats > 2 else 1000
    found: Rounds = {}
    with procfs.pinned():
        for measure in (_warm, _moving, _stored):
            found.update(measure(plan))
        scaling, session_bytes = _many(plan, count)
        found.update(scaling)
    series = {
        key: Series(key, _ABOUT[key].format(count=f"{count:,}"), "s", tuple(found[key]))
        for key in _ABOUT
    }
    size = Series("session_memory", "one idle, empty session", "B", (session_bytes,))
    results = (
        over("session_warm", "warm session / none", series["warm"], series["plain"], 1.3),
        over("session_moving", "moving session / none", series["moving"],
             series["plain_of_two"], 2.5),
        over("session_of_many", "one of many / one of 10", series["of_many"],
             series["of_few"], 1.2),
        over("session_anywhere", "at random of many / one of 10", series["anywhere"],
             series["of_few"]),
        Result(size, 1500.0),
        above("session_commit", "commit to SQLite - in memory", series["sqlite"],
              series["memory"], 60e-6),
    )  # fmt: skip
    about = "one call at a time, every process and thread on one core"
    return [Group("sessions", about, (*series.values(), size), results)]


def _talk(pool: Pool[None], session: str | None) -> Callable[[], Any]:
    def talk() -> None:
        with pool.checkout(session=session) as w:
            w.call(identity, 1)

    talk()
    return talk


def _warm(plan: Plan) -> Rounds:
    with plan.pool(1) as pool:
        pool.create_session("large", {"blob": b"x" * 1_000_000})
        subjects: Subjects = {"plain": _talk(pool, None), "warm": _talk(pool, "large")}
        return alternate(subjects, plan.rounds, plan.batch)


def _moving(plan: Plan) -> Rounds:
    """Two workers take turns, so "any" affinity finds the other one each time."""
    pool: Pool[None] = Pool(size=2, strategy="fifo", affinity="any", start_method=plan.method)
    with pool:
        pool.create_session("small", {"blob": b"x" * 1000})
        subjects: Subjects = {"plain_of_two": _talk(pool, None), "moving": _talk(pool, "small")}
        return alternate(subjects, plan.rounds, plan.batch)


def _many(plan: Plan, count: int) -> tuple[Rounds, float]:
    """Time sessions among few and among many; return also the memory that each of many takes."""
    options: Any = {"size": 1, "max_sessions": count, "start_method": plan.method}
    few: Pool[None] = Pool(**options)
    many: Pool[None] = Pool(**options)
    with few, many:
        for index in range(10):
            few.create_session(f"s{index}")
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for index in range(count):
            many.create_session(f"s{index}")
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        subjects: Subjects = {
            "of_few": _visits(few, range(10)),
            "of_many": _visits(many, range(0, count, count // 10)),
            "anywhere": _visits(many, [7919 * index % count for index in range(count)]),
        }
        return alternate(subjects, plan.rounds, plan.batch), used / count


def _visits(pool: Pool[None], numbers: Any) -> Callable[[], Any]:
    names = itertools.cycle([f"s{number}" for number in numbers])

    def visit() -> None:
        with pool.checkout(session=next(names)):
            pass

    return visit


def _stored(plan: Plan) -> Rounds:
    numbers = itertools.count()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        path = os.path.join(directory, "sessions.sqlite")
        stored: Pool[None] = Pool(size=1, session_store=path, start_method=plan.method)
        with plan.pool(1) as pool, stored:
            subjects: Subjects = {}
            for name, one in (("memory", pool), ("sqlite", stored)):

                def commit(one: Pool[None] = one) -> None:
                    with one.checkout(session="only") as w:
                        w.call(commit_key, next(numbers))

                commit()
                subjects[name] = commit
            return alternate(subjects, plan.rounds, plan.batch)
