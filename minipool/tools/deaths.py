"""Deaths: how soon the caller is told of a worker that died or was too late. Times in seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from ..errors import CallTimeout, WorkerDied
from ..pool import Pool
from .figures import Group, Result, Series, above
from .floors import identity, started
from .rounds import Plan, Rounds

_clock = time.perf_counter
_TIMEOUT = 0.1


def deaths(plan: Plan) -> list[Group]:
    """Time how long it takes from a worker's end to its caller's exception, stacks included."""
    found: Rounds = {"floor": [], "told": []}
    with plan.pool(1) as pool:
        for _ in range(2 * plan.repeats):
            found["floor"].append(_end(plan))
            found["told"].append(_die(pool))
        late = [_be_late(pool) for _ in range(4 * plan.repeats)]
    floor = Series("floor", "a bare process is killed: its exit code", "s",
                   tuple(found["floor"]))  # fmt: skip
    by_death = Series("death", "a call that kills its worker: WorkerDied", "s",
                      tuple(found["told"]))  # fmt: skip
    by_timeout = Series("timeout", "CallTimeout with the stack, beyond the 100 ms", "s",
                        tuple(seconds for seconds, _ in late))  # fmt: skip
    longest = by_timeout._replace(
        name="timeout_longest",
        about="CallTimeout with the stack, beyond the 100 ms: the longest",
        rounds=(max(by_timeout.rounds),),
    )
    missing = sum(not stack for _, stack in late)
    notes = (f"{missing} of {len(late)} without a stack",) if missing else ()
    about = "from the end of a worker to its caller's exception"
    results = (
        above("death_told", "from the exit code to WorkerDied", by_death, floor, 0.001),
        Result(longest, 0.05),
    )
    return [Group("deaths", about, (floor, by_death, by_timeout), results, notes)]


def _end(plan: Plan) -> float:
    (bare,) = started(plan.context)
    start = _clock()
    os.kill(bare.pid, signal.SIGKILL)
    bare.wait_ended()
    took = _clock() - start
    bare.close()
    return took


def _die(pool: Pool[None]) -> float:
    with pool.checkout(timeout=30.0) as w:
        w.call(identity, 1)
        start = _clock()
        with contextlib.suppress(WorkerDied):
            w.call(signal.raise_signal, int(signal.SIGKILL))
        return _clock() - start


def _be_late(pool: Pool[None]) -> tuple[float, str]:
    with pool.checkout(timeout=30.0) as w:
        w.call(identity, 1)
        caller, stack, start = w.options(timeout=_TIMEOUT), "", _clock()
        try:
            caller.call(time.sleep, 60.0)
        except CallTimeout as error:
            stack = error.stack
        return _clock() - start - _TIMEOUT, stack
