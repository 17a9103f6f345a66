"""Staff: brings the number of workers to where `sizing.plan` says it should be.

Used by the manager's thread alone, but for reading. Growth is asked for by callers that queue and
done here, only while somebody waits; up to `Wish.full` it is done at once, beyond it one by one,
so a spike of short calls is over before it has started a worker too many.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from . import table as t
from .care import Care
from .fleet import Fleet
from .handle import Handle
from .health import SECOND_NS
from .sizing import LetGo, Member, Plan, Situation, Wish, nearly_used_up, plan
from .states import WorkerState as S
from .turnstile import Turnstile

if TYPE_CHECKING:
    from ..config import PoolConfig

HEAD_START = 0.005  # seconds that a served caller has, before a start takes the interpreter's lock


class Staff:
    """The wanted number of workers of one pool, and what is done to reach it."""

    def __init__(self, config: PoolConfig, turnstile: Turnstile, fleet: Fleet, care: Care) -> None:
        #: How many are wanted. Replaced as a whole, by the manager's thread: any thread may read.
        self.wish = Wish(
            target=config.initial_size,
            full=config.size or 0,
            floor=config.min_size or 0,
            ceiling=config.max_size or 0,
            overflow=config.max_overflow,
        )
        self.may_grow = True  # there is room for one more
        self.wished = False  # somebody wanted a worker and did not wait for it
        self.raise_at = 0.0  # monotonic: no start for the reserve sooner than this
        self.last_shrink_ns = time.monotonic_ns()  # or of any other change of the target
        self._config = config
        self._overflow_idle_ns = int(config.overflow_idle * SECOND_NS)
        self._max_idle_ns = None if config.max_idle is None else int(config.max_idle * SECOND_NS)
        self._soon = None if config.max_calls is None else nearly_used_up(config.max_calls)
        self._turnstile = turnstile
        self._fleet = fleet
        self._care = care

    @property
    def target(self) -> int:
        """How many workers are wanted now."""
        return self.wish.target

    # -- orders (manager's thread) -----------------------------------------------------------

    def resize(self, size: int, gentle: bool = False) -> None:
        """Want `size` workers from now on; what is too much goes.

        With `gentle` only idle workers go that have no session warm, and the target sinks no
        further than that.
        """
        self._adjust(resize=size, gentle=gentle)

    def want_at_least(self, count: int) -> None:
        """Raise the target, if it is lower."""
        self.wish = self.wish._replace(target=max(self.wish.target, count))

    def allow_overflow(self, count: int) -> None:
        """Let so many workers come beyond the ceiling while callers queue."""
        self.wish = self.wish._replace(overflow=count)

    def drain(self) -> None:
        """Let every worker that is ready now go, as soon as another can take its place."""
        for handle in [*self._fleet.staying(), *self._fleet.reserve()]:
            if handle.state is not S.STARTING:
                handle.worn = handle.worn or "the pool was drained"

    # -- from what there is to what there should be ------------------------------------------

    def reconcile(self, whole: bool = True) -> bool:
        """Fill, exchange, retire and start what there is a cause for; tell if there was any.

        Unless `whole`, the workers that were found settled, and have not moved since, are counted
        but not looked at: what becomes due of them by the clock is left to the next sweep.
        """
        idle = self._turnstile.idle
        for slot, handle in (idle.copy() if whole else self._fleet.unsettled.copy()).items():
            # Dismissed in the moment it was given back?
            if slot in idle and handle.tainted is not None and self._turnstile.claim(slot, handle):
                self._care.take_back(handle)
        return self._adjust(whole=whole)

    def _adjust(self, resize: int | None = None, gentle: bool = False, whole: bool = True) -> bool:
        if self._care.closing:
            return False
        situation = self._situation(resize, gentle, whole)
        decided = plan(situation)
        if decided.wish.target > situation.wish.target or resize is not None:
            self.last_shrink_ns = time.monotonic_ns()
        self.wish = decided.wish
        return self._carry_out(decided)

    def _situation(self, resize: int | None, gentle: bool, whole: bool) -> Situation:
        fleet, now_ns, now = self._fleet, time.monotonic_ns(), time.monotonic()
        members = self._members(now_ns, whole)
        if whole:
            fleet.settle({member.slot for member in members if not member.settled})
        staying = fleet.count_staying()
        self.may_grow = staying < self.wish.most
        waiting = self._turnstile.general_waiters()  # afterwards: it sees the flag, or is seen
        if not whole and (waiting or self.wished or staying > self.wish.target):
            return self._situation(resize, gentle, whole=True)  # it matters who is idle
        asked, self.wished = self.wished, False
        return Situation(
            members=members,
            wish=self.wish,
            waiting=waiting,
            asked=asked,
            resize=resize,
            gentle=gentle,
            spares=self._config.spares,
            startup_batch=self._config.startup_batch,
            others=len(fleet.handles) - len(members),
            room=t.MAX_ROWS - len(fleet.handles),
            dying=fleet.dying(),  # each is replaced in its own slot, a moment from now
            may_start=now >= fleet.not_before,
            may_raise=now >= self.raise_at,
            failing=fleet.failures_in_a_row > 0,
            overflow_idle_ns=self._overflow_idle_ns,
            max_idle_ns=self._max_idle_ns if whole else None,
            since_change_ns=now_ns - self.last_shrink_ns,
        )

    def _members(self, now_ns: int, whole: bool) -> list[Member]:
        """Return what the plan is to know of each worker. Called on every turn, so it is brief."""
        handles = self._fleet.handles if whole else self._fleet.unsettled
        free, most, soon = self._turnstile.idle, self._config.max_calls, self._soon
        members = []
        for slot, handle in tuple(handles.items()):
            idle = handle.state is S.IDLE and slot in free
            members.append(
                Member(
                    slot,
                    handle.state,
                    idle,
                    now_ns - handle.idle_since_ns if idle else 0,
                    handle.reserve,
                    handle.condemned,
                    handle.tainted is not None,
                    handle.worn is not None,
                    most is not None and handle.calls_sent >= most,
                    soon is not None and handle.calls_sent >= soon,
                    bool(handle.sessions),
                )
            )
        return members

    def _carry_out(self, decided: Plan) -> bool:
        """Take the steps of a plan. What a caller was faster at is planned anew, a turn later."""
        for letting in decided.let_go:
            self._let_go(letting)
        called = [self._care.call_up(self._fleet.handles[slot]) for slot in decided.call_up]
        if any(called):
            self.raise_at = time.monotonic() + HEAD_START
        for old, new in decided.exchange:
            self._exchange(self._fleet.handles[old], self._fleet.handles[new])
        for letting in decided.dismiss:
            handle = self._fleet.handles[letting.slot]
            if handle.reserve:
                self._care.dismiss(handle, handle.worn or letting.reason)
        if decided.start:
            self._fleet.spawn(decided.start, reserve=decided.reserve)
        return any(decided[1:6])

    def _let_go(self, letting: LetGo) -> None:
        """Let a worker go: at once if it is idle or booting, else when it is given back."""
        handle = self._fleet.handles[letting.slot]
        if not letting.if_idle:
            handle.tainted, handle.condemned = handle.tainted or letting.reason, True
            self._fleet.unsettled[handle.slot] = handle
            if handle.state is S.STARTING:
                return self._care.condemn(handle, letting.reason)
        if handle.state is not S.IDLE or not self._turnstile.claim(handle.slot, handle):
            return None
        handle.tainted = handle.tainted or letting.reason
        self._care.retire(handle)
        if letting.if_idle:
            self.last_shrink_ns = time.monotonic_ns()
        if letting.shrink:
            self.wish = self.wish._replace(target=self.wish.target - 1)

    def _exchange(self, worn: Handle, stand_in: Handle) -> None:
        """Take a worn worker out of service, for one of the reserve that is ready."""
        if not self._turnstile.claim(worn.slot, worn):
            worn.tainted = worn.tainted or worn.worn  # it goes when it is given back
        elif self._care.call_up(stand_in):
            self._care.set_aside(worn)
        else:
            self._turnstile.publish(worn.slot, worn)
