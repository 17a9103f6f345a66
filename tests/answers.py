"""Calls whose outcome is easily taken for a fault of their worker.

A module of its own, without pytest, because every worker that uses it imports it.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from minipool import Pool, WorkerDied


def note(path: str) -> None:
    with open(path, "a") as file:
        file.write("1")


def raise_worker_died(path: str, started: bool) -> NoReturn:
    note(path)
    raise WorkerDied(
        "worker 3 of an inner pool died", worker_id=3, pid=1, exitcode=7, signal=None,
        started=started, target="t",
    )  # fmt: skip


def raise_bare() -> NoReturn:
    raise WorkerDied("bare")


def raise_key_error(path: str) -> NoReturn:
    note(path)
    raise KeyError(path)


def lose_an_inner_worker() -> Any:
    with Pool(size=1, start_method="fork") as pool:
        return pool.call(os._exit, 7)


class Raises:
    """A program whose execution raises what looks like the death of its worker."""

    def __init__(self, path: str) -> None:
        self.path = path

    def execute(self) -> NoReturn:
        raise_worker_died(self.path, started=False)


# -- exceptions that are hard to tell ------------------------------------------------------------


class LeavesAsItIsPickled(Exception):
    def __reduce__(self) -> NoReturn:
        raise SystemExit(5)


class InterruptsAsItIsPickled(Exception):
    def __reduce__(self) -> NoReturn:
        raise KeyboardInterrupt


class LeavesAsItIsShown(Exception):
    def __str__(self) -> NoReturn:
        raise SystemExit(5)


class InterruptsAsItIsShown(Exception):
    def __str__(self) -> NoReturn:
        raise KeyboardInterrupt


class LeavesAsItIsUnpickled(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return _leave_unless_in_worker, (os.getpid(),)


class LeavesAsAResult:
    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (5,)


def _leave_unless_in_worker(pid: int) -> Exception:
    if os.getpid() != pid:
        raise SystemExit(5)
    return LeavesAsItIsUnpickled()


def raise_hard(name: str) -> NoReturn:
    raise globals()[name]("what")


def result_that_leaves() -> LeavesAsAResult:
    return LeavesAsAResult()


def go_deep(frames: int) -> NoReturn:
    """Raise an exception whose traceback is so long; a recursion of C's would end sooner."""

    def level(left: int) -> NoReturn:
        try:
            raise ValueError("deep")
        except ValueError as error:
            trace = error.__traceback__
        assert trace is not None
        for _ in range(left):
            trace = type(trace)(trace, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)
        raise ValueError("deep").with_traceback(trace)

    try:
        level(frames)
    except ValueError as problem:
        raise RuntimeError("led to by a deep one") from problem
