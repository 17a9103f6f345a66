"""Costs: start-up, recovery, memory, idle cost and import, minipool beside bare processes.

Each function makes what it compares, measures it by turns, and takes away everything it made.
All times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

from ..errors import WorkerDied
from ..pool import Pool
from . import procfs
from .figures import Group, Result, Series, above, over
from .floors import identity, started
from .rounds import Plan, Rounds, bare_processes

_PACKAGE = __name__.rpartition(".tools.")[0]  # wherever this package was copied to
_clock = time.perf_counter

# -- start-up and recovery -----------------------------------------------------------------------


def startup(plan: Plan) -> list[Group]:
    """Time the start of 8 workers, from `Pool(...)` until all are ready, over 8 bare processes."""
    found: Rounds = {"minipool": [], "floor": []}
    for _ in range(plan.repeats):
        start = _clock()
        bare = started(plan.context, 8)
        found["floor"].append(_clock() - start)
        for one in bare:
            one.close()
        start = _clock()
        pool = plan.pool(8).open()
        found["minipool"].append(_clock() - start)
        pool.close()
    floor = Series("floor", "8 bare processes report ready", "s", tuple(found["floor"]))
    ours = Series("minipool", "Pool(size=8).open(): 8 workers ready", "s", tuple(found["minipool"]))
    result = over("startup", "8 workers ready / 8 bare processes ready", ours, floor, 1.3)
    about = f"start method {plan.method}; a fork server runs already, with both sides' code loaded"
    return [Group("startup", about, (floor, ours), (result,))]


def recovery(plan: Plan) -> list[Group]:
    """Kill the only worker of a pool; time from the kill to the next good reply."""
    found: Rounds = {"minipool": [], "floor": [], "spare": _recoveries_by_spares(plan)}
    with plan.pool(1) as pool:
        for _ in range(2 * plan.repeats):
            pool.call(identity, 1)
            start = _clock()
            bare = started(plan.context)[0]
            found["floor"].append(_clock() - start)
            bare.close()
            found["minipool"].append(_recover(pool))
    floor = Series("floor", "one bare process reports ready", "s", tuple(found["floor"]))
    ours = Series("minipool", "SIGKILL to the next good reply", "s", tuple(found["minipool"]))
    spare = Series(
        "spare", "SIGKILL in a call to the next good reply, spares=1", "s", tuple(found["spare"])
    )
    results = (
        over("recovery", "recovery from SIGKILL / start of a bare process", ours, floor, 2.5),
        Result(ours._replace(name="recovery_time"), 0.05),
        Result(spare._replace(name="recovery_spare"), 0.003),
    )
    about = "the only worker of a pool is killed, and replaced by one that answers"
    return [Group("recovery", about, (floor, ours, spare), results)]


def _recoveries_by_spares(plan: Plan) -> list[float]:
    """Have the only worker killed in a call, again and again, while a spare stands by."""
    found, ready = [], threading.Semaphore(0)
    with plan.pool(1, spares=1) as pool:
        pool.hooks["worker.init"].append(lambda *_: ready.release())
        for _ in range(4 * plan.repeats):
            while pool.stats().spare == 0:
                assert ready.acquire(timeout=30), "no spare came"
            pool.call(identity, 1)
            start = _clock()
            with contextlib.suppress(WorkerDied):
                pool.call(signal.raise_signal, int(signal.SIGKILL))
            pool.call(identity, 1)
            found.append(_clock() - start)
    return found


def _recover(pool: Pool[None]) -> float:
    (worker,) = pool.workers()
    assert worker.pid is not None
    start = _clock()
    os.kill(worker.pid, signal.SIGKILL)
    while True:
        with contextlib.suppress(WorkerDied):
            pool.call(identity, 1)
            return _clock() - start


# -- memory and idle cost ------------------------------------------------------------------------


def memory(plan: Plan) -> list[Group]:
    """Compare the memory of workers with that of bare processes, all alive together."""
    about = "4 workers and 4 bare processes side by side, each after one call"
    if not procfs.available():
        return [Group("memory", about, (), (), ("not to be measured on this system",))]
    count = 4
    with plan.pool(count) as pool, bare_processes(plan, count) as bare:
        for one in bare:
            one.caller()()
        leases = [pool.checkout() for _ in range(count)]
        for lease in leases:
            lease.call(identity, 1)
        ours = [procfs.memory(lease.pid) for lease in leases if lease.pid]
        floors = [procfs.memory(one.pid) for one in bare]
        for lease in leases:
            lease.release()
    series, results = [], []
    kinds = (("rss", "resident", 2e6), ("pss", "proportional", 1e6))
    for index, (short, word, target) in enumerate(kinds):
        floor = Series(f"floor_{short}", f"bare process, {word}", "B",
                       tuple(sizes[index] for sizes in floors))  # fmt: skip
        worker = Series(f"minipool_{short}", f"worker, {word}", "B",
                        tuple(sizes[index] for sizes in ours))  # fmt: skip
        series += [floor, worker]
        results.append(
            above(f"memory_{short}", f"{word} memory: worker - bare process", worker, floor, target)
        )
    return [Group("memory", about, tuple(series), tuple(results))]


def idle(plan: Plan) -> list[Group]:
    """Watch an idle pool of 8: how often anything of it wakes up, and what it costs."""
    about = f"a pool of 8 that nobody uses, over {plan.idle_seconds:g} s; parent and workers"
    if not procfs.available():
        return [Group("idle", about, (), (), ("not to be measured on this system",))]
    with plan.pool(8) as pool:
        pids = [os.getpid(), *(worker.pid for worker in pool.workers() if worker.pid)]
        time.sleep(min(1.0, plan.idle_seconds))  # what opening it set going has come to rest
        before, start = procfs.activity(pids), _clock()
        time.sleep(plan.idle_seconds)
        seconds, done = _clock() - start, procfs.activity(pids).since(before)
    share = done.cpu_ns / 1e9 / seconds
    results = (
        Result(Series("idle_wakeups", "idle pool: voluntary context switches a second", "1/s",
                      (done.wakeups / seconds,)), 5.0),
        # One tick is what the clock may be off by: less than two is nothing that can be measured.
        Result(Series("idle_ticks", "idle pool: processor time in clock ticks", "ticks",
                      (float(done.ticks),)), 1.0),
        Result(Series("idle_cpu", "idle pool: processor time a second, precisely", "s",
                      (share,))),
    )  # fmt: skip
    return [Group("idle", about, (), results)]


# -- import --------------------------------------------------------------------------------------

_TIMED = "import time; t = time.perf_counter_ns(); {}; print(time.perf_counter_ns() - t)"


def imports(plan: Plan) -> list[Group]:
    """Time the import in fresh interpreters, over that of what any such pool must import."""
    found: Rounds = {"floor": [], "package": [], "minipool": []}
    statements = {
        "floor": "import multiprocessing.connection",
        "package": f"import {_PACKAGE}",
        "minipool": f"import {_PACKAGE}; from {_PACKAGE} import Pool",
    }
    with tempfile.TemporaryDirectory() as cache:
        for turn in range(2 * plan.repeats + 1):
            for name, statement in statements.items():
                took = _import_time(statement, cache)
                if turn:  # the first has compiled everything
                    found[name].append(took)
    floor, package, ours = series = tuple(
        Series(name, statement, "s", tuple(found[name])) for name, statement in statements.items()
    )
    results = (
        above("import", "import of Pool - multiprocessing.connection", ours, floor, 0.01),
        above("import_package", "import of the package alone - the same", package, floor),
    )
    return [Group("import", "in fresh interpreters, from compiled files", series, results)]


def _import_time(statement: str, cache: str) -> float:
    """Time an import in an interpreter that keeps its compiled files in `cache`."""
    top = os.path.abspath(__file__)
    for _ in __name__.split("."):
        top = os.path.dirname(top)
    env = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [top, os.environ.get("PYTHONPATH")]))
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", _TIMED.format(statement)]
    return int(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout) / 1e9
