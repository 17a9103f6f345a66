"""Lease: exclusive use of one worker, which is what `Pool.checkout()` returns."""

from __future__ import annotations

import functools
import time
import weakref
from typing import TYPE_CHECKING, Any, Callable, Generic, TypeVar, overload

from .engine import wire
from .engine.desk import Desk
from .engine.handle import Handle
from .engine.passage import passage
from .errors import (
    CallMismatch,
    LeaseError,
    LeaseReleased,
    LeaseRevoked,
    PoolError,
    SessionError,
    WorkerDied,
    WorkerError,
)
from .records import State
from .retry import Attempts
from .telemetry import drop, tell

if TYPE_CHECKING:
    from typing_extensions import Concatenate, ParamSpec, Self

    P = ParamSpec("P")

W = TypeVar("W")
R = TypeVar("R")

_ref, _monotonic = weakref.ref, time.monotonic
CALL_TIMEOUT = "call_timeout"  # the option's name stands for its value
ATTEMPTS = 3  # on how many workers a call is tried at most, unasked, because they die


class Lease(Generic[W]):
    """Exclusive use of one worker, from `Pool.checkout()` until the `with` block ends.

    What a call leaves in the worker (a loaded model, an open file) is there for the next. One
    thread at a time may use a lease; any may release it. It cannot be pickled. A lease that is
    dropped without being released is given back by the collector, with a ResourceWarning.
    """

    __slots__ = ("__weakref__", "_desk", "_held", "_timeout")
    _idempotent = False  # of the lease itself; a view has its own

    @passage
    def __init__(self, desk: Desk, handle: Handle) -> None:
        self._held = [handle]  # `pop` is atomic: of two who release at once, one does
        self._desk = desk
        self._timeout = desk.call_timeout
        # Release drops this reference. If the lease is collected before, `dropped` is called.
        handle.lease = _ref(self, desk.on_dropped)

    # -- calling -----------------------------------------------------------------------------

    if TYPE_CHECKING:

        @overload
        def call(self, target: str, /, *args: Any, **kwargs: Any) -> Any: ...

        @overload
        def call(
            self, target: Callable[Concatenate[W, P], R], /, *args: P.args, **kwargs: P.kwargs
        ) -> R: ...

        @overload
        def call(self, target: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run a method of the worker's object, or a function, in the worker; return its result.

        Waits `call_timeout` seconds (see `options`). On expiry the worker is killed: a late reply
        would otherwise answer the next caller's question. If the worker dies before the call has
        begun, and this is the lease's first, another worker runs it, within the same time; this
        happens twice at most, and not when less time is left than such calls took lately.

        Raises:
            Exception: whatever `target` raised. The worker is well and still yours.
            RemoteError: what it returned or raised cannot travel. The worker is well.
            CallMismatch: it cannot be sent, there is no such method, or the arguments are not those
                that it takes. Nothing has run.
            CallTimeout, WorkerDied, ProtocolError: the worker and its state are gone; take a new
                lease.
            LeaseReleased, LeaseRevoked: this lease has no worker any more.
        """
        try:
            handle = self._held[0]
        except IndexError:
            raise self._gone(target) from None
        if handle.in_call:
            raise self._busy(target)
        desk = self._desk
        try:
            kind, name, counts, shape, text = desk.targets[target]
        except CallMismatch:
            raise
        except TypeError:  # not hashable
            kind, name, counts, shape, text = desk.targets.resolve(target)
        if kwargs or len(args) not in counts:
            shape.check(args, kwargs)
            if kind == wire.SHIPPED:
                args = (target, args, kwargs)
        if desk.on_start or desk.on_stop or desk.on_exception:
            return self._observed(handle, kind, name, text, args, kwargs)
        try:
            return handle.request(kind, name, args, kwargs, self._timeout)
        except WorkerError as error:
            if not handle.failed_with(error):
                raise  # an answer: the code that was called has raised it, and the worker is well
            return self._recover(error, handle, kind, name, args, kwargs)

    def _recover(
        self,
        error: WorkerError,
        handle: Handle,
        kind: int,
        name: bytes,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a call again on another worker while that is safe and in time; else raise why.

        `error` tells of the worker's failure (see `Handle.failed_with`), and so do all that are
        looked at here. Not for ever: what ends every worker must not go through all of them.

        Raises:
            WorkerError: the last failure; its cause, if any, is why no other worker could be had.
        """
        self._desk.count_fault(error)
        limit, attempts = self._timeout, Attempts(ATTEMPTS)
        begun = error.sent_ns / 1e9
        while True:
            if handle.revoked is not None:
                raise self._taken_away(handle, name.decode()) from error
            # What earlier calls of this lease left in the worker is gone: the caller must know.
            first = handle.calls_sent == handle.calls_before + 1
            session = handle.session
            if session is not None and session.strict and session.affinity == "hit":
                raise error  # nowhere else; who checks out next is told that it is lost
            attempts.note(error)
            if not first or not self._safe(error) or attempts.over:
                raise attempts.told(error)
            needed = 0.0 if limit is None else self._desk.pace.needed(limit)
            left = self._left(begun, needed)
            if left is not None and left <= needed:
                raise attempts.told(error)
            try:
                handle = self._move(None if left is None else left - needed)
            except PoolError as refusal:  # why there is no other worker; not what became of it
                raise attempts.told(error) from refusal
            left = self._left(begun, needed)
            if left is not None and left < needed:
                raise attempts.told(error)  # a worker came, and too late
            try:
                return handle.request(kind, name, args, kwargs, left)
            except WorkerError as again:
                if not handle.failed_with(again):
                    raise
                error = again

    def _left(self, begun: float, enough: float) -> float | None:
        """Return how many seconds a call has left; where that is not enough, stops do not count."""
        if self._timeout is None:
            return None
        left = begun + self._timeout - time.monotonic()
        return left if left > enough else left + self._desk.manager.standstills.lost(begun)

    def _safe(self, error: WorkerError) -> bool:
        """Tell whether the call that failed so may be made again."""
        return isinstance(error, WorkerDied) and (self._idempotent or not error.started)

    @passage
    def _move(self, timeout: float | None) -> Handle:
        """Exchange the dead worker for another one, within the same lease."""
        try:
            dead = self._held.pop()
        except IndexError:
            raise self._gone("the call") from None
        session, dead.session = dead.session, None  # it stays ours
        if session is None:
            self._desk.give_back(dead)
            handle = self._desk.acquire(timeout)
        else:
            handle = session.sessions.exchange(session, dead, timeout)
        self._held.append(handle)
        handle.lease = _ref(self._whole(), self._desk.on_dropped)
        return handle

    def _observed(
        self,
        handle: Handle,
        kind: int,
        name: bytes,
        text: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Make the call with its events. `telemetry.tell` is written out: it costs all of them."""
        desk = self._desk
        facts: dict[str, Any]
        facts = {"worker_id": handle.slot, "target": text, "pool": desk.pool_name}
        if desk.baggage is not None:
            facts["context"] = desk.baggage.values()
        for listener in tuple(desk.on_start):
            try:
                listener("operation.start", {}, facts)
            except Exception:
                drop("operation.start", desk.on_start, listener)
        start = _monotonic()
        try:
            try:
                result = handle.request(kind, name, args, kwargs, self._timeout)
            except WorkerError as error:
                if not handle.failed_with(error):
                    raise
                result = self._recover(error, handle, kind, name, args, kwargs)
                for held in self._held[:1]:
                    facts = {**facts, "worker_id": held.slot}  # another one has done it
        except BaseException as error:
            numbers, facts = {"seconds": _monotonic() - start}, {**facts, "error": error}
            tell("operation.exception", desk.on_exception, numbers, facts)
            raise
        took = _monotonic() - start
        for listener in tuple(desk.on_stop):
            try:
                listener("operation.stop", {"seconds": took}, facts)
            except Exception:
                drop("operation.stop", desk.on_stop, listener)
        return result

    def options(
        self, *, timeout: float | None | str = CALL_TIMEOUT, idempotent: bool = False
    ) -> Lease[W]:
        """Return this lease with other call options: `w.options(timeout=0.5).call("predict", x)`.

        Args:
            timeout: seconds for each call; None waits for ever.
            idempotent: a call may run more than once: when its worker dies it is made again on
                another, three attempts in all, within `timeout`, if it was the first of this lease.
        """
        limit = self._desk.call_timeout
        if timeout != CALL_TIMEOUT:
            limit = seconds(timeout, "timeout")
        return _View(self, limit, idempotent)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...

    # -- the end -----------------------------------------------------------------------------

    @passage
    def release(self) -> None:
        """Give the worker back. Does nothing the second time, also if another has it by then.

        A call that is still under way (in another thread, or interrupted) is abandoned: its
        worker is killed and replaced.
        """
        try:
            handle = self._held.pop()
        except IndexError:
            return
        self._desk.give_back(handle)

    def discard(self, reason: str) -> None:
        """Give the worker back to be replaced: it is well enough to stop, but not to go on."""
        for handle in self._held[:1]:
            if handle.tainted in (None, handle.worn):
                handle.tainted = f"discarded: {reason}"
        self.release()

    def __enter__(self) -> Self:
        return self

    @passage
    def __exit__(self, kind: object = None, error: object = None, trace: object = None) -> None:
        try:  # as `release`, one step shorter
            handle = self._held.pop()
        except IndexError:
            return
        self._desk.give_back(handle)

    def holds(self, handle: Handle) -> bool:
        """Tell whether this lease has that very worker now."""
        return handle in self._held

    # -- looking -----------------------------------------------------------------------------

    @property
    def _handle(self) -> Handle:
        try:
            return self._held[0]
        except IndexError:
            raise self._gone("attributes") from None

    @property
    def worker_id(self) -> int:
        """The slot of the worker. Who takes its place may have the same one, or its own."""
        return self._handle.slot

    @property
    def pid(self) -> int | None:
        """The worker's process."""
        return self._handle.pid

    @property
    def generation(self) -> int:
        """Tells workers apart that had the same slot, one after the other."""
        return self._handle.generation

    @property
    def session(self) -> str | None:
        """The id of the session this lease is for, or None."""
        record = self._handle.session
        return None if record is None else str(record.key)

    @property
    def affinity(self) -> str | None:
        """How the session's worker was found; None without a session.

        "hit": the one that has it warm; "new": its first; "moved": another than before, to which
        the state went; "lost": another, because the one before is dead.
        """
        record = self._handle.session
        return None if record is None else str(record.affinity)

    @property
    def state(self) -> State:
        """The session's committed state. Reading gives copies, setting a key commits at once.

        Raises:
            SessionError: this lease has no session.
        """
        record = self._handle.session
        if record is None:
            raise SessionError("this lease has no session; check out with `checkout(session=...)`")
        return State(record, self._held)

    def __repr__(self) -> str:
        held = self._held[:1]
        what = f"worker {held[0].slot}, pid {held[0].pid}" if held else "released"
        return f"<Lease of {self._desk.config.name}: {what}>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a lease cannot be pickled: it is one process's hold of one worker")

    def _whole(self) -> Lease[W]:
        """Return the lease itself; `self`, but for a view with other options."""
        return self

    def _gone(self, target: Any) -> LeaseError:
        self._desk.check_process()
        return LeaseReleased(f"cannot call {target!r}: lease already released; take a new one")

    def _taken_away(self, handle: Handle, target: Any) -> LeaseRevoked:
        return LeaseRevoked(
            f"cannot call {target!r}: the lease of worker {handle.slot} was revoked: "
            f"{handle.why_revoked}; take a new one",
            reason=handle.why_revoked,
        )

    def _busy(self, target: Any) -> LeaseError:
        self._desk.check_process()
        for handle in self._held[:1]:
            if handle.revoked is not None:
                return self._taken_away(handle, target)
        return LeaseError(
            f"cannot call {target!r}: another call of this lease is under way, or broke off and "
            f"its reply may still come; use one lease per thread, and a new one after that"
        )


class ObjectLease(Lease[W]):
    """A lease of a worker that has an object, whose methods are the lease's own: `w.predict(x)`.

    Before CPython 3.12 `__getattr__` makes every attribute of its class slow.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(f"a lease has no attribute {name!r}")
        return functools.partial(self.call, name)


class _View(ObjectLease[W]):
    """A lease seen through other call options."""

    __slots__ = ("_idempotent", "_lease")

    def __init__(self, lease: Lease[W], timeout: float | None, idempotent: bool) -> None:
        self._lease = lease._whole()  # a lease that nobody holds is given back
        self._held, self._desk = lease._held, lease._desk
        self._timeout, self._idempotent = timeout, idempotent

    def _whole(self) -> Lease[W]:
        return self._lease


def seconds(value: Any, name: str) -> float | None:
    """Return a timeout as given, if it is one.

    Raises:
        ValueError: it is negative or NaN. TypeError: it is no number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: give seconds as a number, or None")
    if not value >= 0:
        raise ValueError(f"{name}={value!r}: give seconds, 0 or more, or None to wait for ever")
    return value
