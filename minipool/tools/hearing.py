"""Hearing: what it costs a call that somebody listens to every event of the pool.

The same worker is called by turns with a listener that does nothing on every event, and without.
All times are in seconds.
"""

from __future__ import annotations

from typing import Any, Callable

from ..pool import Pool
from ..telemetry import attach_reporter
from . import procfs
from .figures import Group, Series, above
from .floors import identity
from .rounds import Plan, Rounds, median_time

_ABOUT = {"lease_call": "w.call(identity, 1), lease held", "pool_call": "pool.call(identity, 1)"}
_RESULTS = (  # name, what is compared, target: two events in a lease, four in pool.call
    ("lease_call", "call in a lease", 1.5e-6),
    ("pool_call", "pool.call", None),
)


def hooks(plan: Plan) -> list[Group]:
    """Time a call with a listener on every event, above one that nobody hears of."""
    found: Rounds = {f"{who}_{kind}": [] for kind in _ABOUT for who in ("unheard", "heard")}
    with plan.pool(1) as pool, procfs.pinned():
        for _ in range(plan.rounds):
            with pool.checkout() as w:
                _measure(pool, "lease_call", lambda: w.call(identity, 1), plan.batch, found)
            _measure(pool, "pool_call", lambda: pool.call(identity, 1), plan.batch, found)
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


def _measure(
    pool: Pool[None], kind: str, call: Callable[[], Any], batch: int, found: Rounds
) -> None:
    found[f"unheard_{kind}"].append(median_time(call, batch))
    detach = attach_reporter(pool, _nothing)
    found[f"heard_{kind}"].append(median_time(call, batch))
    detach()


def _nothing(event: str, measurements: dict[str, Any], metadata: dict[str, Any]) -> None:
    pass
