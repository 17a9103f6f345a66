"""Staff: how many workers there should be, and the steps from here to there.

Used by the manager's thread alone, but for reading. Growth is asked for by those who queue and
done here, only while somebody waits; up to `size` it is done at once, beyond it one by one, so a
spike of short calls is over before it has started a worker too many.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .care import Care
from .fleet import Fleet
from .handle import Handle
from .reserve import Reserve
from .states import WorkerState as S
from .turnstile import Turnstile

if TYPE_CHECKING:
    from ..config import PoolConfig

HEAD_START = 0.005  # seconds that who waited has, before a start takes the interpreter's lock


class Staff:
    """The wanted number of workers of one pool, and its bounds."""

    def __init__(self, config: PoolConfig, turnstile: Turnstile, fleet: Fleet, care: Care) -> None:
        self.target = config.initial_size
        self.floor, self.ceiling = config.min_size or 0, config.max_size or 0
        self.overflow = config.max_overflow
        self.may_grow = True  # there is room for one more
        self.wished = False  # somebody wanted a worker and did not wait for it
        self.raise_at = 0.0  # monotonic: no start for the reserve sooner than this
        self.last_shrink_ns = time.monotonic_ns()
        self._config = config
        self._turnstile = turnstile
        self._fleet = fleet
        self._care = care
        self._reserve = Reserve(config, turnstile, fleet, care)

    def retired(self, shrink: bool) -> None:
        """Hear that an idle worker was let go; with `shrink` it was one of those wanted."""
        self.target -= shrink
        self.last_shrink_ns = time.monotonic_ns()

    def reconcile(self) -> None:
        """Fill, exchange and start what is missing, and what the queue asks for."""
        for handle in self._fleet.live():  # dismissed in the moment it was given back?
            if handle.tainted is not None and self._turnstile.claim(handle.slot, handle):
                self._care.take_back(handle)
        live = self._fleet.live()
        starting = sum(handle.state is S.STARTING for handle in live)
        dying = self._fleet.dying()  # each is replaced in its own slot, a moment from now
        self.may_grow = len(live) < self.ceiling + self.overflow
        waiting = len(self._turnstile.waiters)  # after that: who queues sees it, or is seen
        wanted = self.target
        wished, self.wished = max(waiting, self.wished), False
        if wished > starting and self.target < (self._config.size or 0):
            wanted = self.target = min(self._config.size or 0, self.target + wished - starting)
        elif waiting > starting and starting == 0 and dying == 0:
            wanted = self._grown(len(live))
        if self._reserve.fill(wanted - len(live)):
            self.raise_at = time.monotonic() + HEAD_START
        self._reserve.exchange()
        live = self._fleet.live()
        booting = any(handle.state is S.STARTING for handle in live)
        self._reserve.trim(complete=len(live) >= wanted and not booting)
        if time.monotonic() < self._fleet.not_before:
            return
        missing = wanted - len(live)
        if missing <= 0 and not booting:  # who stands by comes after who serves
            missing = self._reserve.missing() if time.monotonic() >= self.raise_at else 0
        room = self._config.startup_batch - self._fleet.count(S.STARTING)
        self._fleet.spawn(min(missing - dying, room), reserve=len(live) >= wanted)

    def _grown(self, live: int) -> int:
        """Return one more than now, if the limits allow: a spike is over before it is there."""
        if live < self.target:
            return self.target
        if live < self.ceiling:
            self.target = live + 1
            self.last_shrink_ns = time.monotonic_ns()
            return self.target
        return min(live + 1, self.ceiling + self.overflow)

    def resize(self, size: int) -> None:
        """Want `size` workers from now on; what is too much goes. Manager's thread only."""
        if self.floor == self.ceiling:
            self.floor = self.ceiling = size
        self.target = size
        live = self._fleet.live()
        order = {S.STARTING: 1, S.IDLE: 3, S.PROBING: 4}
        idle = self._turnstile.idle
        live.sort(key=lambda h: 0 if h.condemned else 2 if h.slot in idle else order[h.state])
        for handle in live[: max(0, len(live) - size)]:
            self.dismiss(handle, "the pool was made smaller")

    def shrink(self, size: int) -> None:
        """Want fewer workers: idle ones go that have no session warm, and no more than there are.

        Manager's thread only.
        """
        left = len(self._fleet.live())
        for slot, handle in self._turnstile.idle.copy().items():  # the longest idle one first
            if left > size and not handle.sessions and self._turnstile.claim(slot, handle):
                handle.tainted = "the pool has more workers than its load needs"
                self._care.retire(handle)
                left -= 1
        self.target = max(size, min(self.target, left))

    def dismiss(self, handle: Handle, reason: str) -> None:
        """Let a worker go: at once if it is idle or booting, else when it is given back."""
        handle.tainted, handle.condemned = handle.tainted or reason, True
        if handle.state is S.STARTING:
            self._care.condemn(handle, reason)
        elif handle.state is S.IDLE and self._turnstile.claim(handle.slot, handle):
            self._care.retire(handle)

    def drain(self) -> None:
        """Let every worker that is ready now go, as soon as another can take its place."""
        for handle in [*self._fleet.live(), *self._fleet.reserve()]:
            if handle.state is not S.STARTING:
                handle.worn = handle.worn or "the pool was drained"
