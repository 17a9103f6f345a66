"""Warm-up: the same calls made on each worker, by its slot, before the real work comes.

Runs in the caller's thread and helpers of its own: each takes one very worker, as any caller
would, and waits in the line for it if it is leased. Nothing is left to the chance of which worker
a checkout gets. (Workers that a pool starts with the option `warm_up` warm themselves up, in
`engine.child`, before they are offered at all.)
"""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from .commands import Command, commands_of
from .engine.launch import packed_command
from .engine.pace import MOST
from .engine.passage import passage
from .engine.standstill import TimeLimit
from .engine.states import WorkerState
from .errors import CallTimeout, CheckoutTimeout, WorkerError, answered
from .lease import Lease, seconds

if TYPE_CHECKING:
    from .engine.desk import Desk

STRATEGIES = ("parallel", "sequential", "staged")
_MARGIN = 5.0  # seconds after its deadline until a helper is no longer waited for


class CommandReport(NamedTuple):
    """How one command of a warm-up went. Durations are seconds, of those that succeeded."""

    target: str
    succeeded: int  #: on so many workers
    mean: Optional[float]
    max: Optional[float]
    failures: Dict[int, Exception]  #: worker id -> why it failed there


class WarmUpReport(NamedTuple):
    """How a warm-up went."""

    workers: int
    succeeded: int  #: workers on which every command succeeded
    success_rate: float
    seconds: float
    complete: bool  #: False: the time was over before each worker had been through
    commands: Tuple[CommandReport, ...]


def warm_up(
    desk: Desk,
    given: Any,
    strategy: str,
    timeout: float | None,
    stage_timeout: float | None,
    command_timeout: float | None,
) -> WarmUpReport:
    """Make some calls on every worker there is; see `Pool.warm_up`."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: give one of {STRATEGIES}")
    timeout, stage = seconds(timeout, "timeout"), seconds(stage_timeout, "stage_timeout")
    each = seconds(command_timeout, "command_timeout")
    commands = commands_of(given)
    for command in commands:
        packed_command(desk.targets, desk.config.codec, command)  # refuses what cannot be sent
    start, whole = time.monotonic(), _clock(desk, timeout)
    slots = sorted(handle.slot for handle in desk.manager.fleet.staying())
    run = _WarmUp(desk, commands, math.inf if each is None else each)
    for stage_slots in _stages(slots, strategy):
        its_own = _clock(desk, stage if strategy == "staged" else None)
        run.stage(stage_slots, _shorter(whole, its_own))
    desk.check_open()
    report = run.report(slots, time.monotonic() - start)
    numbers = {name: getattr(report, name) for name in ("seconds", "workers", "succeeded")}
    desk.hooks.emit("pool.warmup", numbers, strategy=strategy)
    return report


def _clock(desk: Desk, timeout: float | None) -> Callable[[], float]:
    """Return what tells how many seconds are left of a time that begins now; None: infinity."""
    if timeout is None:
        return lambda: math.inf
    limit = TimeLimit(desk.manager.standstills, timeout, time.monotonic(), time.monotonic)
    return lambda: limit.left() or 0.0


def _shorter(one: Callable[[], float], other: Callable[[], float]) -> Callable[[], float]:
    return lambda: min(one(), other())


def _stages(slots: Sequence[int], strategy: str) -> list[Sequence[int]]:
    size = {"parallel": len(slots), "sequential": 1, "staged": len(slots) // 3}[strategy]
    size = max(1, size)
    return [slots[first : first + size] for first in range(0, len(slots), size)]


class _WarmUp:
    """One warm-up, and what is known of it so far. Lists and dicts are added to by helpers."""

    def __init__(self, desk: Desk, commands: Sequence[Command], command_timeout: float) -> None:
        self._desk = desk
        self._commands = commands
        self._limit = command_timeout
        self._whole = command_timeout  # seconds that a call of the present stage may take at most
        self._took: List[List[float]] = [[] for _ in commands]
        self._failures: List[Dict[int, Exception]] = [{} for _ in commands]
        self._warm: List[int] = []
        self._through: List[int] = []  # they had their turn, however it went
        self._over = False  # nobody waits for it any more

    def stage(self, slots: Sequence[int], left: Callable[[], float]) -> None:
        """Warm up some workers at once, while any seconds are left."""
        self._whole = min(self._limit, left())
        if len(slots) == 1 or self._desk.manager.here:  # a hook cannot wait for a helper
            for slot in slots:
                self._warm_up(slot, left)
            return
        helpers = [
            threading.Thread(
                target=self._warm_up,
                args=(slot, left),
                name=f"minipool-warm-up-{slot}",
                daemon=True,
            )
            for slot in slots
        ]
        try:
            for helper in helpers:
                helper.start()
            for helper in helpers:
                seconds_left = math.inf
                while helper.is_alive() and seconds_left > 0:  # a stop gives more, meanwhile
                    seconds_left = left()
                    helper.join(min(threading.TIMEOUT_MAX, seconds_left + _MARGIN))
        except BaseException:
            self._over = True
            raise

    def _warm_up(self, slot: int, left: Callable[[], float]) -> None:
        """Take the worker of a slot, and make all calls there."""
        well = False
        try:
            with self._take(slot, left) as lease:
                made = [self._make(i, slot, lease, left) for i in range(len(self._commands))]
                well = all(made)
        except CheckoutTimeout:
            return  # the time is over
        except WorkerError:
            pass  # noted by `_make`; what was still to be called there has no worker any more
        except Exception as error:
            for failures in self._failures[:1]:
                failures[slot] = error
        self._through.append(slot)
        if well:
            self._warm.append(slot)

    def _make(self, index: int, slot: int, lease: Lease[Any], left: Callable[[], float]) -> bool:
        """Make one call; return whether it succeeded.

        Raises:
            CheckoutTimeout: the time is over. WorkerError: the worker is gone.
        """
        command, start = self._commands[index], time.monotonic()
        limit = min(self._limit, left())
        # What is left of the time would be the end of a worker that is well.
        hasty = limit < MOST * self._whole and limit < self._desk.pace.needed(self._whole)
        if limit <= 0 or hasty or self._over:
            raise self._too_late(slot)
        options = lease.options(timeout=None if limit == math.inf else limit)
        try:
            options.call(command.target, *command.args, **command.kwargs)
        except Exception as error:
            self._failures[index][slot] = error
            if not isinstance(error, WorkerError) or answered(error):
                return False
            if isinstance(error, CallTimeout) and limit < self._limit:
                raise self._too_late(slot) from error
            raise
        self._took[index].append(time.monotonic() - start)
        return True

    @passage
    def _take(self, slot: int, left: Callable[[], float]) -> Lease[Any]:
        """Take the worker that is in a slot, or the next one there, once it is free."""
        desk, manager = self._desk, self._desk.manager
        handles, fleet, staff = manager.fleet.handles, manager.fleet, manager.staff

        def in_service() -> bool:
            handle = handles.get(slot)
            return handle is not None and handle.state in (WorkerState.IDLE, WorkerState.PROBING)

        def given_up() -> bool:
            return slot not in handles and len(fleet.staying()) >= staff.target

        while True:
            desk.check_open()
            seconds_left = left()
            patience = None if seconds_left == math.inf else seconds_left
            manager.wait_for(lambda: in_service() or given_up() or manager.closing, patience)
            handle = handles.get(slot)
            if handle is not None and in_service():
                taken = desk.acquire_this(handle, patience, None)
                if taken is not None:
                    return Lease(desk, taken)
            elif given_up():
                raise LookupError(f"worker {slot} was let go, and nobody took its place")
            if left() <= 0:
                raise self._too_late(slot)

    def _too_late(self, slot: int) -> CheckoutTimeout:
        return CheckoutTimeout(f"worker {slot} could not be warmed up in time; raise `timeout`")

    def report(self, slots: Sequence[int], took: float) -> WarmUpReport:
        """Tell how it went, as far as it is known."""
        return WarmUpReport(
            workers=len(slots),
            succeeded=len(self._warm),
            success_rate=len(self._warm) / len(slots) if slots else 1.0,
            seconds=took,
            complete=len(self._through) == len(slots),
            commands=tuple(
                CommandReport(
                    target=str(getattr(command.target, "__qualname__", command.target)),
                    succeeded=len(times),
                    mean=sum(times) / len(times) if times else None,
                    max=max(times, default=None),
                    failures=dict(failures),
                )
                for command, times, failures in zip(self._commands, self._took, self._failures)
            ),
        )
