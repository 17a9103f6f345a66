"""Peers: other pools of processes, each as a plain `call()` that runs `identity(1)` in a worker.

The two of the standard library are always there; loky, pebble and mpire where they are installed.
All use the start method of the bench, but for loky, which has one of its own.
"""

from __future__ import annotations

import threading
from importlib import import_module
from multiprocessing import pool as multiprocessing_pool
from typing import Any, Callable, NamedTuple

from .floors import identity


class Peer(NamedTuple):
    """One pool of another kind, open."""

    name: str
    call: Callable[[], Any]
    close: Callable[[], None]

    def warm_up(self, threads: int) -> None:
        """Make calls from as many threads as there are workers, so that all of them exist."""
        callers = [threading.Thread(target=self._some_calls) for _ in range(threads)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()

    def _some_calls(self) -> None:
        for _ in range(20):
            self.call()


def _executor(context: Any, size: int) -> Peer:
    from concurrent.futures import ProcessPoolExecutor

    pool = ProcessPoolExecutor(size, mp_context=context)
    return Peer(EXECUTOR, lambda: pool.submit(identity, 1).result(), pool.shutdown)


def _multiprocessing(context: Any, size: int) -> Peer:
    pool: multiprocessing_pool.Pool = context.Pool(size)

    def close() -> None:
        pool.close()
        pool.join()

    return Peer(MULTIPROCESSING, lambda: pool.apply(identity, (1,)), close)


def _loky(context: Any, size: int) -> Peer:
    loky: Any = import_module("loky")

    pool = loky.ProcessPoolExecutor(max_workers=size)
    return Peer("loky", lambda: pool.submit(identity, 1).result(), pool.shutdown)


def _pebble(context: Any, size: int) -> Peer:
    pebble: Any = import_module("pebble")

    pool = pebble.ProcessPool(max_workers=size, context=context)

    def close() -> None:
        pool.close()
        pool.join()

    return Peer("pebble", lambda: pool.schedule(identity, args=(1,)).result(), close)


def _mpire(context: Any, size: int) -> Peer:
    mpire: Any = import_module("mpire")

    pool = mpire.WorkerPool(n_jobs=size, start_method=context.get_start_method())

    def close() -> None:
        pool.stop_and_join()

    return Peer("mpire", lambda: pool.apply(identity, (1,)), close)


EXECUTOR, MULTIPROCESSING = "ProcessPoolExecutor", "multiprocessing.Pool"
STANDARD = {EXECUTOR: _executor, MULTIPROCESSING: _multiprocessing}
OTHERS = {"loky": _loky, "pebble": _pebble, "mpire": _mpire}


def open_peers(context: Any, size: int, others: bool) -> tuple[list[Peer], list[str]]:
    """Open the standard library's pools, and `others` if asked; return them, and who is missing."""
    opened, missing = [], []
    for name, make in {**STANDARD, **(OTHERS if others else {})}.items():
        try:
            opened.append(make(context, size))
        except ImportError:
            missing.append(name)
    return opened, missing
