"""What the replacement of one worker costs, however many there are."""

from __future__ import annotations

import collections
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import pytest

from ears import handle_of, wait_until
from minipool import Pool, PoolConfig, WorkerDied
from minipool.engine import manager as manager_module
from workers import identity


@pytest.mark.parametrize("in_call", [False, True], ids=["between calls", "in a call"])
def test_replacement_of_a_worker_is_no_reason_to_look_at_the_others(
    in_call: bool, start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the sweeps, which come by the clock: here, never."""
    monkeypatch.setattr(PoolConfig, "tick", 60.0)
    looked: collections.Counter[int] = collections.Counter()
    row = manager_module._row

    def look(handle: Any, *args: Any) -> Any:
        looked[handle.slot] += 1
        return row(handle, *args)

    with Pool(size=4, start_method=start_method) as pool:
        monkeypatch.setattr(manager_module, "_row", look)
        for lost in range(1, 6):
            prove(pool)
            looked.clear()
            if in_call:
                die_in_call(pool, 2)
            else:
                os.kill(handle_of(pool, 2).pid, signal.SIGKILL)
            wait_until(pool, lambda: pool.stats().workers_lost == lost)  # noqa: B023
            wait_until(pool, lambda: pool.stats().idle == 4)
            assert set(looked) <= {2}


@pytest.mark.parametrize("in_call", [False, True], ids=["between calls", "in a call"])
def test_steps_of_a_replacement_do_not_grow_with_the_workers(
    in_call: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, and not timed: every instruction that the manager's thread runs for it."""
    monkeypatch.setattr(PoolConfig, "tick", 60.0)

    def steps(size: int) -> int:
        with Pool(size=size) as pool:
            pool.wait_ready(timeout=60)
            replace(pool, 0)  # whatever is done but once has been done
            counter = StepCounter(pool, monkeypatch)
            counts = []
            for _ in range(5):  # the fewest turns that it takes: what comes late takes one more
                before = counter.steps
                replace(pool, size - 1, in_call)
                look_at_all(pool)  # not counted; what came before it has been done by then
                counts.append(counter.steps - before)
            return min(counts[1:])  # the first one is begun before all is traced

    few, many = steps(2), steps(12)
    assert few > 1000
    assert many < few * 1.2


def test_replacement_of_one_worker_asks_anew_for_nothing_that_the_others_can_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PoolConfig, "tick", 60.0)
    with Pool(size=4) as pool:
        pool.wait_ready(timeout=60)
        replace(pool, 0)
        look_at_all(pool)
        look_at_all(pool)  # and all of the first is done
        assert pool._desk is not None
        manager = pool._desk.manager
        asked: set[int] = set()
        watch = manager._watch

        def note(handle: Any) -> None:
            if not manager._whole:
                asked.add(handle.slot)
            watch(handle)

        monkeypatch.setattr(manager, "_watch", note)
        replace(pool, 2)
        assert asked == {2}


def test_deaths_of_all_workers_at_once_are_all_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of descriptors go from the dead to the next; nobody's death is taken for another's."""
    monkeypatch.setattr(PoolConfig, "tick", 60.0)
    with Pool(size=4) as pool:
        pool.wait_ready(timeout=60)
        for round in range(1, 4):
            prove(pool)
            before = {info.pid for info in pool.workers()}
            for slot in range(4):
                handle_of(pool, slot).kill()
            wait_until(pool, lambda: pool.stats().workers_lost == 4 * round)  # noqa: B023
            wait_until(pool, lambda: pool.stats().idle == 4)
            assert not before & {info.pid for info in pool.workers()}


class StepCounter:
    """Counts the instructions that the manager of a pool runs, from the next death on."""

    def __init__(self, pool: Pool[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        assert pool._desk is not None
        manager, ready = pool._desk.manager, threading.Event()
        self.steps = 0
        turn = manager._turn

        def traced(heard: dict[Any, int]) -> None:
            ready.set()
            sys.settrace(None if manager._orders else self._trace)
            turn(heard)

        monkeypatch.setattr(manager, "_turn", traced)
        look_at_all(pool)  # the turn that is done for that is not traced yet
        look_at_all(pool)
        assert ready.is_set() and not self.steps

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        self.steps += event == "opcode"
        return self._trace


def look_at_all(pool: Pool[Any]) -> None:
    """Have the manager do all that it does at a sweep."""
    done = threading.Event()
    assert pool._desk is not None
    pool._desk.manager.order(done.set)
    assert done.wait(20)


def prove(pool: Pool[Any]) -> None:
    """Let each worker make a call, so that its end is no failed start."""
    for lease in [pool.checkout(timeout=20) for _ in pool.workers()]:
        assert lease.call(identity, 1) == 1
        lease.release()


def die_in_call(pool: Pool[Any], slot: int) -> None:
    """End a worker in the middle of a call."""
    leases = [pool.checkout(timeout=20) for _ in pool.workers()]
    (dying,) = [lease for lease in leases if lease.worker_id == slot]
    with pytest.raises(WorkerDied):
        dying.call(os._exit, 3)
    for lease in leases:
        lease.release()


def replace(pool: Pool[Any], slot: int, in_call: bool = False) -> None:
    """Kill a worker, and return when another is in its place."""
    prove(pool)
    lost, size = pool.stats().workers_lost, len(pool.workers())
    if in_call:
        die_in_call(pool, slot)
    else:
        handle_of(pool, slot).kill()
    wait_until(pool, lambda: pool.stats().workers_lost == lost + 1)
    wait_until(pool, lambda: pool.stats().idle == size)
