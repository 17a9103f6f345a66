"""What is done to a pool while the callers use it, drawn from a seed so that it can be replayed."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from callers import Callers

from minipool import Pool

LEAST, MOST = 2, 6  # workers


class Storm:
    """One episode's blows. `rage` deals them out until its time is over; `calm` mends all."""

    def __init__(
        self, pool: Pool[Any], callers: Callers, folder: Path, dice: random.Random, clock: Clock
    ) -> None:
        self._pool, self._callers, self._dice, self._clock = pool, callers, dice, clock
        self._slow, self._failing = folder / "slow", folder / "failing"
        self._stopped: list[Any] = []
        self.blows: list[str] = []

    def rage(self, seconds: float) -> None:
        """Deal out a blow every few ms."""
        until = time.monotonic() + seconds
        blows: dict[Callable[[], object], int] = {
            self._kill: 8, self._crash: 2, self._freeze: 2, self._thaw: 8, self._strike: 12,
            self._slow_down: 1, self._fail_starts: 1, self._mend_starts: 12, self._resize: 1,
            self._drain: 1, self._jump: 2, self._look: 3,
        }  # fmt: skip
        kinds, weights = list(blows), list(blows.values())
        while not self._callers.stop.wait(self._dice.expovariate(1 / 0.03)):
            if time.monotonic() > until:
                return
            blow = self._dice.choices(kinds, weights)[0]
            self.blows.append(blow.__name__.strip("_"))
            blow()

    def calm(self) -> None:
        """Take away everything that would keep the pool from becoming whole."""
        self._mend_starts()
        while self._stopped:
            self._thaw()
        self._clock.jump(0.0)

    def _victim(self) -> Any | None:
        handles = list(self._pool._handles().values())
        alive = [handle for handle in handles if handle.ready_ns and not handle.ended_ns]
        return self._dice.choice(alive) if alive else None

    def _signal(self, signum: int) -> Any | None:
        victim = self._victim()
        if victim is not None:
            with contextlib.suppress(ProcessLookupError):
                victim.kill(signum)
        return victim

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _crash(self) -> None:
        self._signal(self._dice.choice([signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS]))

    def _freeze(self) -> None:
        victim = self._signal(signal.SIGSTOP)
        if victim is not None:
            self._stopped.append(victim)

    def _thaw(self) -> None:
        if self._stopped:
            self._stopped.pop(0).kill(signal.SIGCONT)

    def _strike(self) -> None:
        self._callers.strike(self._dice)

    def _slow_down(self) -> None:
        self._slow.touch()

    def _fail_starts(self) -> None:
        self._failing.touch()

    def _mend_starts(self) -> None:
        for path in (self._slow, self._failing):
            path.unlink(missing_ok=True)

    def _resize(self) -> None:
        self._pool.resize(self._dice.randint(LEAST, MOST))

    def _drain(self) -> None:
        self._pool.drain()

    def _jump(self) -> None:
        self._clock.jump(self._dice.uniform(-3000, 3000))

    def _look(self) -> None:
        """Ask for everything that can be asked for."""
        self._pool.health_check(probe=self._dice.random() < 0.2)
        self._pool.stats(), self._pool.workers(), self._pool.sessions(), repr(self._pool)


class Clock:
    """The time of day, as the pool's process sees it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._offset, self._true = 0.0, time.time
        patch.setattr(time, "time", lambda: self._true() + self._offset)

    def jump(self, offset: float) -> None:
        """Be so many seconds off from now on."""
        self._offset = offset
