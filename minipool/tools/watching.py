"""Watching: what it costs a pool's callers that somebody looks. Measured by turns.

Nobody looks; then metrics are taken each second; then a dashboard is shown and `top` runs, too.
The same pool, lease and call each time; the stretches are long enough for what comes each second.
Where that can be had, all of it shares one core, so that what the watchers take is seen whole.
The processor time they take is measured, too: it bounds what callers lose to them, and a machine
that is not quiet does not disturb it. All times are in seconds.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from typing import Any, Callable, ContextManager, Iterator

from ..observe.metrics import Metrics
from ..pool import Pool
from . import procfs
from .figures import Group, Result, Series, above, over
from .floors import identity
from .rounds import Plan, Rounds

_clock_ns = time.perf_counter_ns
_READER = "import sys, urllib.request as u\nfor line in u.urlopen(sys.argv[1], timeout=60): pass"
_ABOUT = {
    "alone": "nobody looks",
    "metrics": "Metrics(pool, interval=1.0)",
    "all": "the same, a dashboard that is shown, and top",
}


def watching(plan: Plan) -> list[Group]:
    """Make calls in a lease, one after the other, while nobody looks, and while all do."""
    latencies: Rounds = {name: [] for name in _ABOUT}
    rates: Rounds = {name: [] for name in _ABOUT}
    shares: Rounds = {name: [] for name in _ABOUT}
    notes = () if os.name == "posix" else ("top is not for this system, and not measured",)
    with plan.pool(1) as pool, procfs.pinned():
        watchers: dict[str, Callable[[], ContextManager[Any]]] = {
            "alone": contextlib.nullcontext,
            "metrics": lambda: Metrics(pool, interval=1.0),
            "all": lambda: _everything(pool),
        }
        with pool.checkout() as w:
            known = procfs.descendants() if procfs.available() else set()
            for _ in range(plan.repeats):
                for name, watcher in watchers.items():
                    with watcher():
                        _stretch(lambda: w.call(identity, 1), 3 * plan.stretch)  # all are there
                        pids = procfs.descendants() - known if procfs.available() else set()
                        before, start = _taken_by_others(pids), _clock_ns()
                        median, rate = _stretch(lambda: w.call(identity, 1), 10 * plan.stretch)
                        taken, took = _taken_by_others(pids) - before, _clock_ns() - start
                    latencies[name].append(median)
                    rates[name].append(1 / rate)
                    shares[name].append(taken / took)
    series: list[Series] = []
    results: list[Result] = []
    for what, found in (("p50", latencies), ("time", rates)):
        of = {
            name: Series(f"watched_{what}_{name}", f"{what} of a call, {about}", "s",
                         tuple(found[name]))
            for name, about in _ABOUT.items()
        }  # fmt: skip
        series += of.values()
        for name, about in (("metrics", "metrics"), ("all", "metrics, dashboard, top")):
            about = f"{what} of a call: {about} / nobody looks"
            results.append(over(f"watched_{what}_{name}", about, of[name], of["alone"], 1.03))
    share = {
        name: Series(f"watched_cpu_{name}", f"processor time a second, {about}", "s",
                     tuple(shares[name]))
        for name, about in _ABOUT.items()
    }  # fmt: skip
    about = "processor time a second of metrics, dashboard, top"
    results.append(above("watched_cpu_all", about, share["all"], share["alone"], 0.03))
    about = "calls in a lease while somebody looks; time is 1 / throughput; everything on one core"
    return [Group("watching", about, tuple(series), tuple(results), notes)]


def _taken_by_others(pids: set[int]) -> int:
    """Return the nanoseconds of processor time of all our threads but this one, and of `pids`."""
    ours = time.process_time_ns() - time.thread_time_ns()
    return ours + (procfs.activity(list(pids)).cpu_ns if pids else 0)


def _stretch(call: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Call for some time; return the median time of a call, and the calls per second."""
    clock, times = _clock_ns, []
    begin = start = clock()
    end = begin + int(seconds * 1e9)
    while start < end:
        call()
        now = clock()
        times.append(now - start)
        start = now
    return statistics.median(times) / 1e9, len(times) / ((start - begin) / 1e9)


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
