"""Hearing: what it costs a call that somebody listens to every event of the pool.

Two pools, one of them with a listener that does nothing on every event, called by turns. All
times are in seconds.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable

from ..lease import Lease
from ..telemetry import attach_reporter
from . import procfs
from .figures import Group, Series, above
from .floors import identity
from .rounds import Plan, Rounds, Subjects, alternate

_ABOUT = {"lease_call": "w.call(identity, 1), lease held", "pool_call": "pool.call(identity, 1)"}
_RESULTS = (  # name, what is compared, target: two events in a lease, four in pool.call
    ("lease_call", "call in a lease", 1.5e-6),
    ("pool_call", "pool.call", None),
)


def hooks(plan: Plan) -> list[Group]:
    """Time a call with a listener on every event, above one that nobody hears of."""
    found: Rounds = {}
    with contextlib.ExitStack() as stack:
        unheard, heard = stack.enter_context(plan.pool(1)), stack.enter_context(plan.pool(1))
        attach_reporter(heard, _nothing)
        cores = procfs.cores()
        if cores:
            stack.enter_context(procfs.pinned(cores[-1]))
        for _ in range(plan.rounds):
            with unheard.checkout() as w, heard.checkout() as v:
                subjects = {"unheard_lease_call": _call(w), "heard_lease_call": _call(v)}
                _measure(subjects, plan, found)
            _measure(
                {
                    "unheard_pool_call": lambda: unheard.call(identity, 1),
                    "heard_pool_call": lambda: heard.call(identity, 1),
                },
                plan,
                found,
            )
    series = {
        name: Series(name, f"{_ABOUT[kind]}, {who}", "s", tuple(times))
        for name, times in found.items()
        for who, _, kind in [name.partition("_")]
    }
    results = tuple(
        above(f"hooks_{kind}", f"{about}: a listener on every event - none",
              series[f"heard_{kind}"], series[f"unheard_{kind}"], target)
        for kind, about, target in _RESULTS
    )  # fmt: skip
    about = "a listener that does nothing, on every event; everything on one core"
    return [Group("hooks", about, tuple(series.values()), results)]


def _measure(subjects: Subjects, plan: Plan, found: Rounds) -> None:
    for name, times in alternate(subjects, 1, plan.batch).items():
        found.setdefault(name, []).extend(times)


def _call(w: Lease[None]) -> Callable[[], Any]:
    return lambda: w.call(identity, 1)


def _nothing(event: str, measurements: dict[str, Any], metadata: dict[str, Any]) -> None:
    pass
