"""Watching: what it costs a pool's callers that somebody looks. Measured by turns.

Nobody looks; then metrics are taken each second; then a dashboard is shown and `top` runs, too.
The same pool, lease and call each time; the stretches are long enough for what comes each second.
Where that can be had, all of it shares one core, so that what the watchers take is seen whole.

Throughput is told in two factors, because a machine that is not quiet changes its speed from one
second to the next by more than is looked for: the p50 of a call, and the excess, which is the time
that calls took over what they would have taken at the p50 of their moment. What a watcher takes at
its tick makes some calls longer: that is excess. The processor time they take is measured, too.
All times are in seconds.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from typing import Any, Callable, ContextManager, Iterator, NamedTuple

from ..observe.metrics import Metrics
from ..pool import Pool
from . import procfs
from .figures import Group, Result, Series, above, over
from .floors import identity
from .rounds import Plan, Rounds

_clock_ns = time.perf_counter_ns
_MOMENT_NS = 50_000_000  # in which the speed of a machine does not change, but by what it runs
_READER = "import sys, urllib.request as u\nfor line in u.urlopen(sys.argv[1], timeout=60): pass"
_ABOUT = {
    "alone": "nobody looks",
    "metrics": "Metrics(pool, interval=1.0)",
    "all": "the same, a dashboard that is shown, and top",
}


_WHAT = {
    "p50": "p50 of a call",
    "excess": "excess over the p50",
    "time": "time of a call",
    "cpu": "processor time a second",
}


def watching(plan: Plan) -> list[Group]:
    """Make calls in a lease, one after the other, while nobody looks, and while all do."""
    found: dict[str, Rounds] = {what: {name: [] for name in _ABOUT} for what in _WHAT}
    notes = () if os.name == "posix" else ("top is not for this system, and not measured",)
    with plan.pool(1) as pool, procfs.pinned():
        watchers: dict[str, Callable[[], ContextManager[Any]]] = {
            "alone": contextlib.nullcontext,
            "metrics": lambda: Metrics(pool, interval=1.0),
            "all": lambda: _everything(pool),
        }
        with pool.checkout() as w:
            known = procfs.descendants() if procfs.available() else set()
            names = list(watchers)
            for _ in range(2 * plan.repeats):
                names.reverse()
                for name in names:
                    with watchers[name]():
                        _stretch(lambda: w.call(identity, 1), 3 * plan.stretch)  # all are there
                        pids = procfs.descendants() - known if procfs.available() else set()
                        before, start = _taken_by_others(pids), _clock_ns()
                        stretch = _stretch(lambda: w.call(identity, 1), 5 * plan.stretch)
                        taken, took = _taken_by_others(pids) - before, _clock_ns() - start
                    found["p50"][name].append(stretch.median)
                    found["time"][name].append(stretch.mean)
                    found["excess"][name].append(stretch.excess)
                    found["cpu"][name].append(taken / took)
    of = {
        what: {
            name: Series(f"watched_{what}_{name}", f"{_WHAT[what]}, {about}",
                         "x" if what == "excess" else "s", tuple(found[what][name]))
            for name, about in _ABOUT.items()
        }
        for what in _WHAT
    }  # fmt: skip
    results: list[Result] = []
    for what, most in (("p50", 1.03), ("excess", 1.03), ("time", None)):
        for name, about in (("metrics", "metrics"), ("all", "metrics, dashboard, top")):
            about = f"{_WHAT[what]}: {about} / nobody looks"
            both = of[what][name], of[what]["alone"]
            results.append(over(f"watched_{what}_{name}", about, *both, most))
    about = "processor time a second of metrics, dashboard, top"
    results.append(above("watched_cpu_all", about, of["cpu"]["all"], of["cpu"]["alone"], 0.03))
    series = (*of["p50"].values(), *of["excess"].values(), *of["time"].values())
    about = "calls in a lease while somebody looks; time is 1 / throughput; everything on one core"
    return [Group("watching", about, series, tuple(results), notes)]


def _taken_by_others(pids: set[int]) -> int:
    """Return the nanoseconds of processor time of all our threads but this one, and of `pids`."""
    ours = time.process_time_ns() - time.thread_time_ns()
    return ours + (procfs.activity(list(pids)).cpu_ns if pids else 0)


class _Stretch(NamedTuple):
    median: float  # seconds a call
    mean: float
    excess: float  # all calls, over the medians of their moments


def _stretch(call: Callable[[], Any], seconds: float) -> _Stretch:
    """Call for some time; return what the calls took."""
    clock, times = _clock_ns, []
    begin = start = clock()
    end = begin + int(seconds * 1e9)
    while start < end:
        call()
        now = clock()
        times.append(now - start)
        start = now
    total = start - begin
    usual = sum(statistics.median(moment) * len(moment) for moment in _moments(times))
    return _Stretch(statistics.median(times) / 1e9, total / len(times) / 1e9, total / usual)


def _moments(times: list[int]) -> Iterator[list[int]]:
    """Divide times into moments, one after the other."""
    first, length = 0, 0
    for index, time_ in enumerate(times, 1):
        length += time_
        if length >= _MOMENT_NS or index == len(times):
            yield times[first:index]
            first, length = index, 0


@contextlib.contextmanager
def _everything(pool: Pool[Any]) -> Iterator[None]:
    """Look at a pool in every way there is: from within, through a browser, from outside."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(Metrics(pool, interval=1.0))
        dashboard = pool.dashboard()
        stack.callback(dashboard.close)
        _reader(stack, [sys.executable, "-c", _READER, dashboard.url + "events"])
        if os.name == "posix":
            _top(stack)
        yield


def _reader(stack: contextlib.ExitStack, command: list[str], **files: Any) -> None:
    files = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **files}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **files)
    stack.callback(process.wait)
    stack.callback(process.kill)


def _top(stack: contextlib.ExitStack) -> None:
    """Run `top` on a terminal of its own, which somebody reads."""
    import pty  # not on every system

    ours, theirs = pty.openpty()
    stack.callback(os.close, ours)
    _reader(stack, ["cat"], stdin=ours)
    command = [sys.executable, "-m", __package__.rpartition(".")[0], "top", str(os.getpid())]
    _reader(stack, command, stdin=theirs, stdout=theirs, env={"TERM": "xterm", **os.environ})
    os.close(theirs)
