"""Speed: latency, throughput, and calls that sleep, minipool beside the floor and its peers.

Each function makes what it compares, measures it by turns, and takes away everything it made.
All times are in seconds.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import Any, Callable, Sequence

from ..lease import Lease
from ..pool import Pool
from . import procfs
from .figures import Group, Result, Series, over
from .floors import Bare, identity
from .peers import EXECUTOR, MULTIPROCESSING, Peer
from .rounds import Plan, Rounds, Subjects, alternate, bare_processes, median_time, opened_peers

_clock = time.perf_counter

# -- latency -------------------------------------------------------------------------------------

_ABOUT = {
    "floor": "floor: pickle, os.write, os.read, both ways",
    "floor_pipes": "the same over two pipes",
    "lease_call": "w.call(identity, 1), lease held",
    "checkout_call": "with pool.checkout() as w: w.call(identity, 1)",
    "pool_call": "pool.call(identity, 1)",
    "checkout_checkin": "checkout and checkin alone",
    "queue": "queue.Queue: put and get",
    EXECUTOR: "ProcessPoolExecutor(1).submit(identity, 1).result()",
    MULTIPROCESSING: "multiprocessing.Pool(1).apply(identity, (1,))",
}
_RATIOS = (  # name, what is compared, measured, floor, target when pinned
    ("lease_call", "call in a lease / floor", "lease_call", "floor", 1.35),
    ("checkout_call", "checkout + call / floor", "checkout_call", "floor", 1.5),
    ("pool_call", "pool.call / floor", "pool_call", "floor", None),
    ("lease_call_over_pipes", "call in a lease / floor over pipes",
     "lease_call", "floor_pipes", None),
    ("checkout_call_over_executor", f"checkout + call / {EXECUTOR}",
     "checkout_call", EXECUTOR, 0.25),
    ("checkout_call_over_multiprocessing", f"checkout + call / {MULTIPROCESSING}",
     "checkout_call", MULTIPROCESSING, 0.6),
    ("checkout_checkin", "checkout + checkin / queue put + get",
     "checkout_checkin", "queue", 1.3),
)  # fmt: skip


def latency(plan: Plan) -> list[Group]:
    """Time one call at a time, everything on one core, then wherever the kernel puts it."""
    groups = []
    with contextlib.ExitStack() as stack:
        (bare,) = stack.enter_context(bare_processes(plan, 1))
        piped = stack.enter_context(Bare(plan.context, pipes=True))
        piped.wait_ready()
        pool = stack.enter_context(plan.pool(1))
        peers, notes = stack.enter_context(opened_peers(plan, 1))
        subjects = {**_calls(pool, bare, peers), "floor_pipes": piped.caller()}
        with procfs.pinned() as core:
            if core is None:
                notes += ("nothing can be pinned to a core here, so no target is looked at",)
            else:
                found = _alternate_leased(pool, subjects, plan)
                about = f"one call at a time, every process and thread on core {core}"
                groups.append(_latency_group("latency", about, found, notes, pinned=True))
        found = _alternate_leased(pool, subjects, plan)
        about = "the same, wherever the kernel puts it"
        groups.append(_latency_group("latency_unpinned", about, found, notes, pinned=False))
    return groups


def _calls(pool: Pool[None], bare: Bare, peers: Sequence[Peer]) -> Subjects:
    def checkout_call() -> Any:
        with pool.checkout() as w:
            return w.call(identity, 1)

    def checkout_checkin() -> None:
        with pool.checkout():
            pass

    line: queue.Queue[int] = queue.Queue()

    def put_get() -> int:
        line.put(1)
        return line.get()

    return {
        "floor": bare.caller(),
        "checkout_call": checkout_call,
        "pool_call": lambda: pool.call(identity, 1),
        "checkout_checkin": checkout_checkin,
        "queue": put_get,
        **{peer.name: peer.call for peer in peers},
    }


def _lease_call(w: Lease[None]) -> Callable[[], Any]:
    return lambda: w.call(identity, 1)


def _alternate_leased(pool: Pool[None], subjects: Subjects, plan: Plan) -> Rounds:
    """Add to the subjects what needs a lease that is held through a whole batch."""
    found: Rounds = {name: [] for name in (*subjects, "lease_call")}
    for _ in range(plan.rounds):
        with pool.checkout() as w:
            found["lease_call"].append(median_time(_lease_call(w), plan.batch))
        for name, times in alternate(subjects, 1, plan.batch).items():
            found[name] += times
    return found


def _latency_group(
    name: str, about: str, found: Rounds, notes: tuple[str, ...], pinned: bool
) -> Group:
    series = {
        key: Series(key, _ABOUT.get(key, f"{key}: the same call"), "s", tuple(found[key]))
        for key in (*(key for key in _ABOUT if key in found), *found)
    }
    results = [
        over(key, about, series[measured], series[floor],
             target if pinned else None)
        for key, about, measured, floor, target in _RATIOS
    ]  # fmt: skip
    return Group(name, about, tuple(series.values()), tuple(results), notes)


# -- throughput ----------------------------------------------------------------------------------


def throughput(plan: Plan) -> list[Group]:
    """Count the calls that 1, 2, 4 and 8 threads get done, each with a worker of its own."""
    series: list[Series] = []
    results: list[Result] = []
    most = 8
    with contextlib.ExitStack() as stack:
        bare = [one.caller() for one in stack.enter_context(bare_processes(plan, most))]
        pool = stack.enter_context(plan.pool(most))
        peers, notes = stack.enter_context(opened_peers(plan, most))

        def checkout_call() -> Any:
            with pool.checkout() as w:
                return w.call(identity, 1)

        for threads in (1, 2, 4, 8):
            callers: dict[str, list[Callable[[], Any]]] = {
                "floor": bare[:threads],
                "minipool": [checkout_call] * threads,
                **{peer.name: [peer.call] * threads for peer in peers if plan.peers},
            }
            found: Rounds = {name: [] for name in callers}
            for _ in range(plan.repeats):
                for name, calls in callers.items():
                    found[name].append(_rate(calls, plan.stretch))
            of = {
                name: Series(f"{name}_{threads}", f"{name}, {_threads(threads)}", "1/s",
                             tuple(rates))
                for name, rates in found.items()
            }  # fmt: skip
            series += of.values()
            about = f"minipool / floor, {_threads(threads)}"
            results.append(over(f"throughput_{threads}", about, of["minipool"], of["floor"]))
    about = "calls a second, checkout included; the floor has one pipe for each thread"
    return [Group("throughput", about, tuple(series), tuple(results), notes)]


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _rate(calls: Sequence[Callable[[], Any]], seconds: float) -> float:
    """Call each of `calls` in a thread of its own for some time; return calls per second."""
    counts = [0] * len(calls)
    barrier = threading.Barrier(len(calls) + 1)

    def work(index: int, call: Callable[[], Any]) -> None:
        done, clock = 0, _clock
        barrier.wait()
        end = clock() + seconds
        while clock() < end:
            call()
            done += 1
        counts[index] = done

    took = _run_together([(work, (index, call)) for index, call in enumerate(calls)], barrier)
    return sum(counts) / took


def _run_together(
    jobs: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], barrier: threading.Barrier
) -> float:
    """Run jobs in threads that wait at the barrier; return the time from there to the last end."""
    threads = [threading.Thread(target=target, args=args) for target, args in jobs]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = _clock()
    for thread in threads:
        thread.join()
    return _clock() - start


# -- sleepers ------------------------------------------------------------------------------------


def sleepers(plan: Plan) -> list[Group]:
    """Run 64 calls that sleep 50 ms on 8 workers from 8 threads: ideally 8 x 50 ms."""
    nap, each = 0.05, 8
    ideal = nap * each
    found: Rounds = {"minipool": [], "threads": []}
    with plan.pool(8) as pool:
        for _ in range(max(1, plan.repeats // 2)):
            found["minipool"].append(_nap_together(lambda: pool.call(time.sleep, nap), each))
            found["threads"].append(_nap_together(lambda: time.sleep(nap), each))
    about = {"minipool": "in workers", "threads": "in the threads themselves"}
    series = {
        name: Series(name, f"64 x 50 ms {about[name]}", "s", tuple(times))
        for name, times in found.items()
    }
    ratios = tuple(took / ideal for took in found["minipool"])
    result = Result(Series("sleepers", "64 sleeping calls / the ideal 400 ms", "x", ratios), 1.05)
    about_all = "64 calls that sleep 50 ms, on 8 workers from 8 threads"
    return [Group("sleepers", about_all, tuple(series.values()), (result,))]


def _nap_together(call: Callable[[], Any], each: int, threads: int = 8) -> float:
    barrier = threading.Barrier(threads + 1)

    def work() -> None:
        barrier.wait()
        for _ in range(each):
            call()

    return _run_together([(work, ())] * threads, barrier)
