"""A pool that is closed by several at once: it ends as soon as any of them wants it to."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, Callable

import pytest

from minipool import LeaseRevoked, Pool
from minipool.engine.manager import Manager
from workers import getpid

SOON = 10.0
LONG = 600.0


class Interruption:
    """Calls `act` in the midst of `Manager.close`: before its line number `step` is run."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self._left, self._act = step, act

    @property
    def came(self) -> bool:
        return self._left < 0

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code is not Manager.close.__code__:
            return None
        if event == "line":
            self._left -= 1
            if self._left == -1:
                sys.settrace(None)
                self._act()
        return self.trace


def close_interrupted(step: int) -> bool:
    """Close a pool with all the time for its lease, and terminate it at a step of that."""
    pool = Pool(size=1, start_method="fork").open()
    assert pool._desk is not None
    lease, manager, before = pool.checkout(), pool._desk.manager, sys.gettrace()
    interruption = Interruption(step, lambda: pool._ask_to_end(at_once=True))
    sys.settrace(interruption.trace)
    try:
        manager.close(LONG)
    finally:
        sys.settrace(before)
    if not interruption.came:
        pool.terminate()
    try:
        assert manager.wait_done(SOON), f"what came at step {step} is lost"
        with pytest.raises(LeaseRevoked):
            lease.call(getpid)
    finally:
        pool.terminate()
    return interruption.came


def test_end_that_is_asked_for_in_the_midst_of_a_close_is_not_lost() -> None:
    """By a second signal, or by another thread."""
    steps = 0
    while close_interrupted(steps):
        steps += 1
    assert steps > 3


def test_later_close_with_more_time_puts_off_nothing() -> None:
    with Pool(size=1) as pool:
        assert pool._desk is not None
        lease, manager = pool.checkout(), pool._desk.manager
        manager.close(0.0)
        manager.close(LONG)
        assert manager.wait_done(SOON)
        with pytest.raises(LeaseRevoked):
            lease.call(getpid)
