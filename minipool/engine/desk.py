"""The desk: from the turnstile to a usable worker, and back again.

Runs in the caller's thread. It adds to the turnstile what a turnstile does not know: that an idle
worker may have died a moment ago, what the table shall say, and how to tell a caller who gets
nothing why, and what to do about it.
"""

from __future__ import annotations

import errno
import functools
import os
import threading
import time
import weakref
from itertools import islice
from typing import TYPE_CHECKING, Any

from .._sync import Guard, guarded
from ..errors import (
    CheckoutTimeout,
    PoolClosed,
    PoolForked,
    PoolStartError,
    TooManyWaiters,
    WorkerError,
)
from ..telemetry import logger, warn
from . import shortage, wire
from . import table as t
from .handle import Handle
from .health import SENT_SIGTERM
from .manager import Crowded, Manager
from .pace import Budget, Pace
from .passage import passage, passages, waits
from .refusal import refusal
from .standstill import DefaultTimeout, TimeLimit
from .states import WorkerState as S
from .turnstile import Closed, Token, Turnstile, Waiter

if TYPE_CHECKING:
    from ..config import PoolConfig

_monotonic_ns, _get_ident = time.monotonic_ns, threading.get_ident
_TRUSTED_NS = 500_000_000  # a worker that answered so lately is not looked at before it is given

_COMPARED = 4  # idle workers at either end


class _StandIn:
    """Holds a worker for a lease that is not there yet or no more, while listeners hear of it."""

    __slots__ = ("__weakref__",)

    @staticmethod
    def holds(handle: Handle) -> bool:
        return True


class Desk:
    """Gives out workers and takes them back, for one pool. Any thread may call it."""

    __slots__ = (  # more attributes than CPython keeps quick in a dict
        "__weakref__", "_counting", "_handles", "_limit", "_origins", "_publish", "_try_take",
        "_turnstile", "baggage", "call_timeout", "checkout_timeout", "config", "discarded",
        "errors", "faults", "hooks", "manager", "on_checkin", "on_checkout", "on_dropped",
        "on_exception", "on_queue", "on_start", "on_stop", "pace", "pool_name", "queued",
        "sessions_lost", "sessions_moved", "sessions_new", "targets", "timed_out_ns", "timeouts",
        "turned_away",
    )  # fmt: skip

    def __init__(self, manager: Manager, targets: wire.Targets) -> None:
        self.manager = manager
        self.targets = targets
        self.hooks = manager.hooks
        self.config = manager.config
        self.pool_name = manager.config.name
        timeout = manager.config.checkout_timeout
        self.checkout_timeout: float | None
        self.checkout_timeout = None if timeout is None else DefaultTimeout(timeout)
        self.call_timeout = manager.config.call_timeout
        self.baggage = manager.fleet.baggage
        self.pace = Pace(manager.fleet.counted_rows)
        self._origins = manager.config.leak_warn_after is not None
        # The lists themselves: to find one empty is all an event costs that nobody listens to.
        self.on_checkout, self.on_checkin = (
            self.hooks["worker.checkout"],
            self.hooks["worker.checkin"],
        )
        self.on_start, self.on_stop = self.hooks["operation.start"], self.hooks["operation.stop"]
        self.on_exception, self.on_queue = (
            self.hooks["operation.exception"],
            self.hooks["queue.depth"],
        )
        # Made once: to bind the method anew is a cost of every lease. Weakly, as handles keep it.
        self.on_dropped = functools.partial(_dropped, weakref.ref(self))
        self._limit = manager.standstills.limit
        self._turnstile = manager.turnstile
        self._try_take = manager.turnstile.try_take
        self._publish = manager.turnstile.publish
        self._handles = manager.fleet.handles
        self._counting = Guard()  # of the slow ways
        self.queued = 0
        self.timeouts = 0
        self.timed_out_ns = 0  # when a checkout was in vain for the last time, monotonic
        self.turned_away = 0
        self.discarded = 0
        self.faults = 0
        self.errors: dict[str, int] = {}  # the faults, by type of error
        self.sessions_new = self.sessions_moved = self.sessions_lost = 0

    # -- taking ------------------------------------------------------------------------------

    def limit(self, timeout: float | TimeLimit | None) -> TimeLimit:
        """Return what limits a wait that begins now, or began when that limit was made."""
        return timeout if isinstance(timeout, TimeLimit) else self._limit(timeout)

    def acquire(self, timeout: float | TimeLimit | None, budget: Budget | None = None) -> Handle:
        """Take a worker that is ready and well; the caller owns it until `give_back`.

        With `budget` the caller leaves the line while there is time for its call.

        Raises:
            CheckoutTimeout, TooManyWaiters, PoolClosed, PoolForked: nothing was taken.
        """
        take = self._try_take  # CPython 3.11 is slow to call an attribute that is no method
        token = take()
        if token is None:
            return self._acquire_slowly(self.patience(timeout, budget))
        handle: Handle = token[1]
        if handle.sessions and self._turnstile.idle:
            handle = self._colder(handle)
        now = _monotonic_ns()
        if now - handle.idle_since_ns > _TRUSTED_NS and handle.channel.disturbed():
            self._refuse(handle)
            return self._acquire_slowly(self.patience(timeout, budget))
        handle.thread = _get_ident()
        row = handle.row
        row[t.LEASED_SINCE_NS] = now
        row[t.LEASES] += 1
        if self.on_checkout or self._origins:
            self._mark(handle, 0.0)
        return handle

    def patience(
        self, timeout: float | TimeLimit | None, budget: Budget | None
    ) -> float | TimeLimit | None:
        """Return how long a caller waits; with `budget`, while there is time for its call."""
        if budget is None:
            return timeout
        left = timeout.left() if isinstance(timeout, TimeLimit) else timeout
        patience = self.pace.patience(left, budget)
        return timeout if patience == left else patience

    def _colder(self, handle: Handle) -> Handle:
        """Exchange a worker for an idle one whose sessions are fewer or longer unused.

        For callers without a session: what is warm shall stay free for the sessions. Only some of
        the idle workers are compared: those that have been idle longest, whose sessions are likely
        to be unused longest, and those that came last, among which the ones without any are.
        """
        idle = self._turnstile.idle
        try:
            some = [*islice(idle.values(), _COMPARED), *islice(reversed(idle.values()), _COMPARED)]
        except RuntimeError:
            return handle  # another thread changed it meanwhile; the worker at hand will do
        other = min(some, key=_warmth, default=handle)
        if _warmth(other) < _warmth(handle) and self._turnstile.claim(other.slot, other):
            self._turnstile.publish(handle.slot, handle)
            return other
        return handle

    def try_acquire_this(self, slot: int, generation: int) -> Handle | None:
        """Take that very worker if it is idle and nobody waits; never waits."""
        token = self._turnstile.try_take_this(slot)
        if token is None:
            return None
        handle: Handle = token[1]
        now = _monotonic_ns()
        if handle.generation != generation:
            self._publish(slot, handle)
            return None
        if now - handle.idle_since_ns > _TRUSTED_NS and handle.channel.disturbed():
            self._refuse(handle)
            return None
        handle.thread = _get_ident()
        row = handle.row
        row[t.LEASED_SINCE_NS] = now
        row[t.LEASES] += 1
        if self.on_checkout or self._origins:
            self._mark(handle, 0.0)
        return handle

    def acquire_this(
        self, wanted: Handle, timeout: float | TimeLimit | None, widen_after: float | None
    ) -> Handle | None:
        """Take that very worker, or, `widen_after` seconds later (None: never), any.

        None: that worker is no more.
        """
        token = self._turnstile.try_take_this(wanted.slot)
        if token is not None:
            if token[1] is not wanted:
                self._publish(*token)
            elif wanted.channel.disturbed():
                self._refuse(wanted)
            else:
                return self._take_over(wanted, 0.0)
            return None
        if widen_after is not None and widen_after <= 0:
            return self.acquire(timeout)
        near = None
        if widen_after is not None:
            left = timeout.left() if isinstance(timeout, TimeLimit) else timeout
            near = self._limit(widen_after if left is None else float(min(widen_after, left)))
        try:
            handle = self._acquire_slowly(timeout, wanted.slot, near)
        except Closed:
            return None
        if handle is not wanted and (widen_after is None or handle.slot == wanted.slot):
            self.give_back(handle)
            return None
        return handle

    def _acquire_slowly(
        self,
        timeout: float | TimeLimit | None,
        wants: int | None = None,
        near: TimeLimit | None = None,
    ) -> Handle:
        """Queue for a worker, again if what comes turns out to be dead.

        That one which it `wants`, and when the time that is `near` is over, any.
        """
        self.check_open()
        waiting = len(self._turnstile.waiters)
        if self.config.max_waiting is not None and waiting >= self.config.max_waiting:
            raise self._too_many(waiting)
        if self.manager.here:
            timeout = 0.0  # a hook in the manager's thread waits for nobody but itself
        limit = self.limit(timeout)
        if limit.seconds is None or limit.seconds > 0:  # else it does not queue
            self.count("queued")
            if self.on_queue:
                self.hooks.emit("queue.depth", {"depth": waiting + 1})
        while True:
            self._check_circuit()
            try:
                token = self._take(limit, wants, near)
            except Crowded:
                raise self._too_many(len(self._turnstile.waiters)) from None
            except Closed:
                self.check_open()
                self._check_circuit()
                if wants is None:
                    continue  # there is hope again
                raise  # that one worker is no more
            if token is None:
                if wants is None:
                    self.manager.wish()  # with timeout 0 nobody queued, but somebody wanted one
                self.check_open()
                raise self._timed_out(limit)
            handle: Handle = token[1]
            if not handle.channel.disturbed():
                return self._take_over(handle, limit.waited)
            self._refuse(handle)

    def _take(self, limit: TimeLimit, wants: int | None, near: TimeLimit | None) -> Token | None:
        take = self._turnstile.take
        if near is None:
            return take(limit.first_wait(), wants, None, limit.next_wait)
        left = limit.left()  # witnesses of a stop are those who wait for `near`
        return take(left, wants, near.first_wait(), limit.next_wait, near.next_wait)

    def _take_over(self, handle: Handle, waited: float) -> Handle:
        row = handle.row
        handle.thread = _get_ident()
        row[t.LEASED_SINCE_NS] = _monotonic_ns()
        row[t.LEASES] += 1
        row[t.WAIT_TIMES + t.bucket(int(waited * 1e9))] += 1
        if self.on_checkout or self._origins:
            self._mark(handle, waited)
        return handle

    def _mark(self, handle: Handle, waited: float) -> None:
        """Note where a lease was taken, and tell of it, where anybody wants to know."""
        if self._origins:
            import traceback

            handle.origin = "".join(traceback.format_stack(limit=15)[:-3])
        stand_in = _StandIn()  # or a slow listener's worker would be taken for lost
        handle.lease = weakref.ref(stand_in)
        self.hooks.emit(
            "worker.checkout",
            {"wait": waited},
            worker_id=handle.slot,
            pid=handle.pid,
            generation=handle.generation,
        )

    def _refuse(self, handle: Handle) -> None:
        """Hand a worker that cannot be used to the manager, who replaces it."""
        if handle.left:  # it is closing its object, and is given the time for that
            handle.tainted = handle.tainted or SENT_SIGTERM
            return self.manager.refused(handle.slot, handle)
        handle.tainted = handle.tainted or "dead, or talking, when it was idle"
        handle.in_call = handle.failed = True  # so that it is killed and not asked to stop
        self.manager.refused(handle.slot, handle)

    # -- giving back -------------------------------------------------------------------------

    def give_back(self, handle: Handle) -> None:
        """Offer a worker again, or hand it to the manager if it is not fit for the next one."""
        if handle.in_call or handle.tainted is not None:
            return self._give_back_unfit(handle)
        handle.idle_since_ns = now = _monotonic_ns()
        row = handle.row
        since = row[t.LEASED_SINCE_NS]  # `Handle.end_lease`, written out: it is on every way
        row[t.LEASED_SINCE_NS] = 0
        if since:
            row[t.LEASED_NS] += now - since
        handle.lease = None
        handle.calls_before = handle.calls_sent
        if self.on_checkin or self._origins:
            self._unmark(handle, (now - since) / 1e9 if since else 0.0)
        if handle.session is not None or handle.sessions_over:
            return self._give_back_both(handle)
        publish = self._publish  # see `acquire`
        publish(handle.slot, handle)

    def _give_back_both(self, handle: Handle) -> None:
        """Offer a worker, and the session it was leased for; tell it of sessions that ended."""
        session = handle.session
        if session is not None:
            handle.session, handle.session_ended_ns = None, handle.idle_since_ns
        if handle.sessions_over:
            care = self.manager.care  # busy workers hear of it, too
            self.manager.order(lambda: care.ask(handle))
        else:
            self._publish(handle.slot, handle)
        if session is not None:
            session.sessions.give_back(session)

    def dropped(self, reference: weakref.ref[Any]) -> None:
        """Give back the worker of a lease that was collected without having been released.

        Called by the collector, in whatever thread it runs.
        """
        for handle in tuple(self._handles.values()):
            if handle.lease is reference:
                held = (time.monotonic_ns() - handle.row[t.LEASED_SINCE_NS]) / 1e9
                self.give_back(handle)
                self.hooks.emit("lease.leaked", {"seconds": held}, worker_id=handle.slot)
                warn(
                    f"a lease of worker {handle.slot} of {self.config.name} was dropped without "
                    f"release(); use `with pool.checkout() as w:`",
                    stacklevel=2,
                )

    def _give_back_unfit(self, handle: Handle) -> None:
        """Hand a worker to the manager that must not be used again."""
        if handle.abandoned:
            return  # the owner, in another process, will see to it
        held = handle.end_lease(_monotonic_ns())
        handle.lease = None
        handle.calls_before = handle.calls_sent  # it may serve on, if it is only worn
        if not handle.condemned and not handle.worn_out:
            self.count("discarded")
        if handle.in_call:
            handle.tainted = handle.tainted or "left in the middle of a call"
            handle.kill()  # at once: it may be working for nobody
        self._unmark(handle, held)
        session, handle.session = handle.session, None
        self.manager.refused(handle.slot, handle)
        if session is not None and handle.in_call:
            session.sessions.take_away(session)  # its call may be ending this moment
        elif session is not None:
            session.sessions.give_back(session)

    def _unmark(self, handle: Handle, held: float) -> None:
        """Tell of the end of a lease, the more so if it was reported as leaked."""
        leak_warned, handle.leak_warned = handle.leak_warned, 0
        if leak_warned and leak_warned == handle.row[t.LEASES]:
            logger().warning(
                "worker %d of %s, reported as leaked, was given back after %.1f s",
                handle.slot, self.config.name, held,
            )  # fmt: skip
        stand_in = _StandIn()
        handle.lease = weakref.ref(stand_in)
        self.hooks.emit(
            "worker.checkin",
            {"seconds": held},
            worker_id=handle.slot,
            pid=handle.pid,
            generation=handle.generation,
        )
        handle.lease = None

    # -- telling -----------------------------------------------------------------------------

    @guarded("_counting")
    def count(self, name: str) -> None:
        """Add one to a counter of things that are slow or rare."""
        setattr(self, name, getattr(self, name) + 1)

    @guarded("_counting")
    def count_fault(self, error: BaseException) -> None:
        """Count a call that got no reply."""
        name = type(error).__name__
        self.faults += 1
        self.errors[name] = self.errors.get(name, 0) + 1

    @property
    def forked(self) -> bool:
        """Whether this process was forked from the owner."""
        return self.manager.pid != os.getpid()

    def check_process(self) -> None:
        """Raise PoolForked in a process that was forked from the owner."""
        if self.forked:
            raise forked_error(self.config, self.manager.pid)

    def check_open(self) -> None:
        """Raise the error that tells why nothing can be had, if the pool is not open."""
        self.check_process()
        manager = self.manager
        if manager.closing:
            if manager.failure is not None and not manager.for_good:
                raise could_not_start(self.config.name, manager.failure, AGAIN)
            raise closed_error(self.config.name, manager.failure)

    def _check_circuit(self) -> None:
        fleet = self.manager.fleet
        if fleet.breaker is not None and fleet.hopeless:
            raise fleet.breaker.error(f"no worker of {self.config.name} is there")

    def _too_many(self, waiting: int) -> TooManyWaiters:
        self.count("turned_away")
        return TooManyWaiters(
            f"{waiting} callers are waiting for a worker of {self.config.name} already "
            f"(max_waiting={self.config.max_waiting}); come back later, or raise `size`",
            waiting=waiting,
            max_waiting=self.config.max_waiting,
        )

    def _timed_out(self, limit: TimeLimit) -> CheckoutTimeout:
        timeout = None if limit.seconds is None else float(limit.seconds)
        live = self.manager.fleet.live()
        starting = sum(handle.state is S.STARTING for handle in live)
        leaving = sum(handle.condemned for handle in live)
        counts = self._counts(live)
        why, remedy = refusal(self.manager, counts["held_by_this_thread"], limit.waited)
        error = CheckoutTimeout(
            f"no worker of {self.config.name} came free within {timeout} s (size "
            f"{counts['size']}, leased {counts['leased']}{_leaving(leaving)}, starting {starting}, "
            f"waiting {counts['waiting']}): {why}; {remedy}",
            timeout=timeout, waited=limit.waited, **counts,
        )  # fmt: skip
        error.__cause__ = self.manager.fleet.last_failure
        return error

    def _counts(self, live: list[Handle]) -> dict[str, int]:
        """Count a checkout that was in vain; return what its error tells of the pool."""
        self.count("timeouts")
        self.timed_out_ns = _monotonic_ns()
        leased = [handle for handle in live if handle.live_lease is not None]
        return {
            "size": self.manager.staff.target,
            "leased": len(leased),
            "waiting": len(self._turnstile.waiters),
            "held_by_this_thread": sum(handle.thread == _get_ident() for handle in leased),
        }

    def too_late(self, timeout: float, left: float, needed: float) -> CheckoutTimeout:
        """Describe a call that is not sent, because its worker came too late for it."""
        lately = f", and calls of {self.config.name} take {needed:.3g} s lately" if needed else ""
        return CheckoutTimeout(
            f"the call was not sent: {max(0.0, left):.3g} s of the {timeout} s that checkout and "
            f"call have together were left{lately}; nothing has run; raise `size` or the timeout",
            timeout=timeout, waited=timeout - left, needed=needed,
            **self._counts(self.manager.fleet.live()),
        )  # fmt: skip


AGAIN, ANEW = "the next use tries again", "open a new pool"


def forked_error(config: PoolConfig, owner_pid: int) -> PoolForked:
    """Return the error that refuses a pool in a process that was forked from its owner."""
    stored = isinstance(config.session_store, (str, os.PathLike))
    return PoolForked(
        f"{config.name} belongs to process {owner_pid}; this is a fork of it ({os.getpid()}), "
        f"which cannot share its workers; open a pool of your own here"
        f"{', on a session_store that was not open at the fork' if stored else ''}",
        owner_pid=owner_pid,
    )


def could_not_start(name: str | None, failure: BaseException, what_then: str) -> PoolStartError:
    """Return the error that tells why a pool is not open; a new one for each caller."""
    cause = failure.__cause__ or failure
    why = shortage.in_words(failure)
    for theirs in (AGAIN, ANEW):  # of a pool that the worker was to have
        why = why.replace(f"; {theirs}", "")
    told = "; ".join(filter(None, (why, _remedy(cause), what_then)))
    error = PoolStartError(f"{name} could not start: {told}")
    error.__cause__ = cause
    return error


def _remedy(cause: BaseException) -> str:
    """Say what helps against what kept a worker, or the manager, from being started.

    Nothing if the cause does so itself.
    """
    number = getattr(cause, "errno", None)
    if shortage.of_memory(cause) and shortage.address_space() is not None:
        return ""
    if isinstance(cause.__cause__, wire.RemoteTraceback):  # raised in the worker, by its code
        traced = "that raised it (the cause has its traceback)"
        if isinstance(cause, (AttributeError, ImportError)):
            return f"correct that name, or the worker's code {traced}"
        return f"correct the worker's code {traced}"
    if isinstance(cause, (PoolStartError, WorkerError)):
        return ""
    if number in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (`ulimit -n`), or lower `size`"
    if number == errno.EAGAIN or "start new thread" in str(cause):
        return "raise the limits of processes and memory (`ulimit -u`, `pids.max`), or lower `size`"
    if "interpreter shutdown" in str(cause):
        return "open the pool before the main thread has ended: after that Python starts no thread"
    if isinstance(cause, EOFError) and shortage.lost_directory() is not None:
        return ""
    if isinstance(cause, EOFError):
        return (
            "the fork server has ended, and its standard error tells why: often it is a limit of "
            "processes (`ulimit -u`, `pids.max`)"
        )
    return "correct what raised that"


def closed_error(name: str | None, failure: BaseException | None) -> PoolClosed:
    """Return the error that tells that a pool is closed, and why, if it could not start."""
    why = "" if failure is None else f", because it could not start: {failure}"
    error = PoolClosed(f"{name} is closed{why}; a pool does not reopen: make a new one")
    if failure is not None:
        error.__cause__ = failure.__cause__ or failure
    return error


waits(Waiter.wait, Manager.wait_for)
for _room in (Turnstile, Desk):
    passages(_room)


@passage
def _dropped(desk: weakref.ref[Desk], lease: weakref.ref[Any]) -> None:
    its_desk = desk()
    if its_desk is not None:  # the lease has kept it until now
        its_desk.dropped(lease)


def _warmth(handle: Handle) -> tuple[bool, int]:
    return bool(handle.sessions), handle.session_ended_ns


def _leaving(count: int) -> str:
    return f" ({count} of them on their way out)" if count else ""
