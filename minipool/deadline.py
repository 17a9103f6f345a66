"""Deadline: one time for a checkout and for the calls after it, as `options(timeout=)` gives it.

What the checkout leaves of it bounds the call, and a call that does not end in time costs its
worker, with all that it holds. So no call is sent that can hardly end in time (see `engine.pace`).
A caller that did not have to wait has all of its time, and is not looked at.
"""

from __future__ import annotations

import time
from typing import Any

from .engine.pace import MOST
from .engine.standstill import LATE
from .errors import CheckoutTimeout


class Deadline:
    """The time that one caller has, from now on. Of no use to any other thread.

    Time in which this process was stopped does not count (see `engine.standstill`).
    """

    __slots__ = ("_end", "_limit", "_pool", "_since", "_timeout")

    def __init__(self, pool: Any, timeout: float, limit: float | None = None) -> None:
        self._pool, self._timeout = pool, timeout
        self._limit = timeout if limit is None else min(limit, timeout)  # of each call
        self._since = time.monotonic()
        self._end = self._since + timeout

    @property
    def end(self) -> float:
        """When it is over, on the monotonic clock, as far as that is known now."""
        desk = self._pool._desk
        lost: float = 0.0 if desk is None else desk.manager.standstills.counted(self._since)
        return self._end + lost

    def _left(self, enough: float) -> float:
        """Return how many seconds are left, with all that was lost, if that is not enough else."""
        left = self.end - time.monotonic()
        if left > enough:
            return left
        self._pool._desk.manager.standstills.catch_up()
        return self.end - time.monotonic()

    def checkout(
        self, patience: float | None, session: str | None = None, affinity: str | None = None
    ) -> Any:
        """Take a worker as `Pool.checkout` does, waiting as long as leaves time for a call.

        Raises:
            CheckoutTimeout: there was none by then; `needed` is set if that ended the wait.
        """
        asked = time.monotonic()
        # What was lost is asked for, which costs, where that can be anything: not at first.
        end = self._end if asked - self._since < LATE else self.end
        try:
            return self._pool._checkout_until((end, self._limit), patience, session, affinity)
        except CheckoutTimeout as error:
            if patience is None or time.monotonic() - asked < patience:
                error.needed = needed = self._pool._desk.pace.needed(self._limit)
                error.args = (
                    f"{error}; checkout and call have {self._timeout} s together, and calls took "
                    f"{needed:.3g} s lately: it would have come too late, and was not sent",
                )
            if patience is not None:
                error.timeout = patience  # what was given, and not what that left for the line
            raise

    def left(self) -> float:
        """Return how many seconds the next call may take.

        Raises:
            CheckoutTimeout: such calls take longer than that; do not send it.
        """
        left = self._end - time.monotonic()
        if left <= MOST * self._limit:
            desk = self._pool._desk
            needed = desk.pace.needed(self._limit)
            left = self._left(needed)
            if left <= needed:
                raise desk.too_late(self._timeout, left, needed)
        return min(left, self._limit)

    def allows(self, pause: float) -> bool:
        """Tell whether a call can be made again after a pause of so many seconds."""
        needed = self._pool._desk.pace.needed(self._limit)
        left = self._left(needed + pause) - pause
        return left > 0 and left >= needed
