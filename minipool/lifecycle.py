"""Lifecycle: how a pool comes up, changes its size, and ends. The ground that `Pool` stands on."""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Iterable

from ._sync import Guard
from .engine.desk import AGAIN, ANEW, Desk, closed_error, could_not_start, forked_error
from .engine.holdups import Departure
from .engine.launch import Launcher
from .engine.shortage import expect_descriptors_for
from .errors import CheckoutTimeout, ConfigError, MinipoolError
from .lease import seconds
from .opening import (
    PENDING,
    close_lent,
    give_up,
    note_pool,
    open_desk,
    ready_count,
    wait_started,
)
from .telemetry import Hooks, logger

if TYPE_CHECKING:
    from typing_extensions import Self

    from .breaker import CircuitBreaker
    from .engine.manager import Manager
    from .errors import PoolStartError
    from .sessions import Sessions
    from .signals import SignalHandlers
    from .warmup import WarmUpReport

_CLOSE_MARGIN = 5.0  # seconds a close may take longer than it was given, before it is given up
_LONGEST_TEXT = 200  # characters of an exception, in the log


class Lifecycle:
    """What opens and ends a pool. Any thread may call any method, and signal handlers may."""

    def __init__(self, launcher: Launcher) -> None:
        self.config = launcher.config
        self.hooks = Hooks(self.config.name or "")
        self._launcher = launcher
        self._opening = Guard()
        self._desk: Desk | None = None  # None: not opened yet
        self._maker = 0  # the process that has made its desk, or is about to
        self._closed = False
        self._opener: object | None = None  # whose failure ends the pool; None: nobody's
        self._failure: BaseException | None = None  # of the last opening, until one succeeds
        self._breaker: CircuitBreaker | None = None  # one for all openings, since the first
        self._served_with = 0  # so many workers an opening has waited for with success
        self._told = False  # listeners have heard `pool.init`
        self._sessions: Sessions  # since it was opened
        self._signals: SignalHandlers | None = None
        self._entered: dict[int, int] = {}  # which threads are in the block; since when, in ns

    def open(self, wait: bool = True, workers: int | None = None) -> Self:
        """Start the workers; wait until they are ready. Does nothing if the pool is open.

        Args:
            wait: False returns at once; starts that fail are repeated in the background.
            workers: how many to wait for; None: all that are started at first. With fewer, the
                pool goes on with those that serve, whatever becomes of the others.

        An explicit `open()`, or `with`, closes the pool if its workers cannot be started: that,
        and no more, is what it has opened. The first use of a pool opens it too; when that fails,
        the pool is as before, and the next use tries again.

        Raises:
            PoolStartError: fewer can be started, which is known as soon as the class or a preload
                has raised, or the breaker has opened; the reason is the cause. The pool is
                closed, unless another call has opened it: then it goes on. Or nothing could be
                opened for want of a descriptor, a thread, a module: the pool is as before, try
                again.
            SessionError: the session store cannot be opened now, or is another pool's. The pool is
                as before: try again.
            CircuitOpen: so many openings have failed that none is tried now. Nothing has changed.
            PoolClosed: it was closed before; make a new one.
            ValueError: more workers than the pool may have, or none.
        """
        self._check_count(workers)
        count = self.config.initial_size if workers is None else workers
        self._open(count if wait else 0, explicit=True)
        return self

    def _check_count(self, workers: int | None) -> None:
        config, desk = self.config, self._desk
        most = config.max_size or 0
        if desk is not None:
            most = desk.manager.staff.wish.ceiling
        if workers is None:
            return
        if isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= most:
            raise ValueError(f"workers={workers!r}: give a number from 1 to {most}, the most that "
                             f"{config.name} may have")  # fmt: skip

    def _open(self, wait_for: int, explicit: bool = False, limit: float | None = None) -> Desk:
        """Return the desk, opened if need be, when so many workers are ready.

        After `limit` seconds it is returned in any case, unless they are known not to come.
        """
        desk = self._desk  # no lock, which a fork may have copied as held
        since, me = 0.0 if desk is None else time.monotonic(), object()
        if desk is None:
            if wait_for:
                self._check_circuit()
            desk = self._open_now(me if wait_for else None)
        desk.check_open()
        manager = desk.manager
        if wait_for <= self._served_with or manager.here:
            return desk
        if wait_for > manager.staff.target:
            manager.command(lambda: manager.staff.want_at_least(wait_for))
        failure = wait_started(desk, wait_for, since, limit)
        if failure is PENDING:
            return desk
        if failure is None:
            self._failure, self._served_with = None, max(wait_for, self._served_with)
            return desk
        if self._opener is me:
            raise self._given_up(desk, failure, explicit)
        ready = ready_count(manager)
        what_then = f"with {ready} workers" if ready else "trying, as another call has opened it"
        raise could_not_start(self.config.name, failure, f"the pool goes on {what_then}")

    def _check_circuit(self) -> None:
        """Raise CircuitOpen, if opening has failed so often that it is not tried for a while."""
        if self._breaker is not None and self._breaker.retry_in > 0 and not self._closed:
            raise self._breaker.error(f"{self.config.name} was not opened")

    def _given_up(self, desk: Desk, failure: BaseException, for_good: bool) -> PoolStartError:
        """End an opening that failed; return the error to be raised.

        Until all has ended, whoever comes gets the same error: one that opened the pool beside
        it would share what is being given back. No lock is held meanwhile, as a listener in the
        manager's thread may want it.
        """
        self._failure = failure
        if for_good:
            desk.manager.give_up(failure, for_good=True)
            self.terminate()
            return could_not_start(self.config.name, failure, ANEW)
        this, manager = weakref.ref(self), desk.manager

        def forget() -> None:
            pool = this()
            if pool is not None and pool._desk is not None and pool._desk.manager is manager:
                pool._desk, pool._maker = None, 0

        give_up(desk, failure, forget)
        return could_not_start(self.config.name, failure, AGAIN)

    def _open_now(self, opener: object | None = None) -> Desk:
        """Return the desk, opened if need be; then `opener` waits for it, or nobody does."""
        desk, opened = self._opening.run(self._make_desk, opener)
        if not opened:
            return desk
        note_pool(self)
        if self._closed:  # by a signal handler, which the lock does not keep out
            desk.manager.close(0.0, kill=True)
        if not self._told:  # an opening that failed before was told of
            self._told = True
            self.hooks.emit("pool.init", {"size": self.config.size})
        return desk

    def _make_desk(self, opener: object | None) -> tuple[Desk, bool]:
        """Return the desk, and whether it was made now."""
        if self._desk is not None:
            return self._desk, False
        self._check_process()
        if self._closed:
            raise closed_error(self.config.name, self._failure)
        self._maker = os.getpid()
        try:
            desk, self._sessions = open_desk(self._launcher, self.config, self.hooks, self._breaker)
        except Exception as problem:  # nothing was opened, so there is nothing to close
            self._maker = 0
            self._failure = problem
            if isinstance(problem, MinipoolError):
                raise
            raise could_not_start(self.config.name, problem, AGAIN) from problem
        except BaseException:
            self._maker = 0
            raise
        self._breaker = desk.manager.fleet.breaker
        self._opener = opener
        if opener is None:  # nobody waits to see more of it
            self._failure = None
        self._desk = desk
        return desk, True

    def wait_ready(self, workers: int | None = None, timeout: float | None = None) -> None:
        """Open the pool, and wait until so many workers (None: all of the size) are ready.

        `timeout` is in seconds; None is `init_timeout`.

        Raises:
            CheckoutTimeout: they were not ready in time; the pool goes on starting them.
            ValueError: more workers than the pool may have, or none.
        """
        self._check_count(workers)
        desk = self._open(0)
        manager = desk.manager
        wanted = manager.staff.target if workers is None else workers
        limit = self.config.init_timeout if timeout is None else seconds(timeout, "timeout")
        if wanted > manager.staff.target:
            manager.order(lambda: manager.staff.want_at_least(wanted))
        if not manager.wait_for(lambda: ready_count(manager) >= wanted, limit):
            leased = sum(handle.live_lease is not None for handle in manager.fleet.live())
            raise CheckoutTimeout(
                f"{ready_count(manager)} of {wanted} workers of {self.config.name} were ready "
                f"within {limit} s; raise the timeout, or look at the cause",
                timeout=limit, waited=limit, size=manager.staff.target, leased=leased,
                waiting=len(manager.turnstile.waiters), held_by_this_thread=0,
            ) from manager.fleet.last_failure  # fmt: skip
        desk.check_open()

    def close(self, timeout: float | None = None) -> None:
        """End the pool in good order. Does nothing the second time but wait.

        New work is refused and every waiter woken, at once. Leases may finish for `timeout`
        seconds (None: `close_timeout`), then they are revoked. Workers call their object's
        `close()` and end; who does not is killed. Afterwards no process, thread or descriptor of
        the pool is left. In the manager's own thread (a hook) it only begins all that.

        After a second a WARNING tells which leases are waited for. An exception that breaks the
        wait off, as Ctrl-C does, revokes them at once, and is raised when the pool has ended; a
        second one kills the workers, and is raised without waiting.
        """
        grace = self.config.close_timeout
        if timeout is not None:
            grace = seconds(timeout, "timeout") or 0.0
        self._end(grace, kill=False)

    def terminate(self) -> None:
        """End the pool now: leases are revoked and workers killed, whatever they do."""
        self._end(0.0, kill=True)

    def _end(self, grace: float, kill: bool, *left_by: Any) -> None:
        """End the pool; `left_by` are type and value of what has left its block and waits here."""
        try:
            self._check_process()
            desk = self._opening.run(self._note_closed)
            if desk is not None:
                self._close_and_wait(desk.manager, grace, kill, *left_by)
            elif self._failure is not None:  # a store of the user's own was kept for the next try
                close_lent(self.config)
        except BaseException:
            self._wait_for_no_lease()
            raise

    def _close_and_wait(self, manager: Manager, grace: float, kill: bool, *left_by: Any) -> None:
        if not manager.here:
            me = threading.get_ident()
            manager.holdups.closers.append(me)
            if left_by:
                since_ns = self._entered.get(me, time.monotonic_ns())
                manager.holdups.departures.append(Departure(me, since_ns, _named(*left_by)))
        manager.close(grace, kill)
        self._wait_ended(manager, grace)

    def _wait_ended(self, manager: Manager, grace: float) -> None:
        if manager.here:
            return
        since = time.monotonic()
        if manager.wait_done(grace + _CLOSE_MARGIN):
            manager.join(1.0)
            if self._signals is not None:
                self._signals.restore()
        elif not manager.tells:
            logger().warning(
                "%s has not ended within %.1f s: %d workers are left, and its thread is busy; "
                "close() returns, and it ends in the background",
                self.config.name, time.monotonic() - since, len(manager.fleet.handles),
            )  # fmt: skip

    @property
    def _forked(self) -> bool:
        """Whether this process was forked from the owner, maybe in the midst of an opening."""
        desk = self._desk
        return desk.forked if desk is not None else self._maker not in (0, os.getpid())

    def _check_process(self) -> None:
        """Raise PoolForked in a process that was forked from the owner."""
        if self._forked:
            desk = self._desk
            raise forked_error(self.config, self._maker if desk is None else desk.manager.pid)

    def _note_closed(self) -> Desk | None:
        self._closed = True
        return self._desk

    def _wait_for_no_lease(self) -> None:
        """End the pool soon, as whoever closes it has no more patience; wait for that, once."""
        desk = self._desk
        if self._forked:
            return
        self._closed = True  # seen by who is about to open
        if desk is None:
            return
        desk.manager.close(0.0)
        try:
            self._wait_ended(desk.manager, 0.0)
        except BaseException:
            desk.manager.close(0.0, kill=True)
            raise

    def __enter__(self) -> Self:
        # A thread's number is given anew after its end, but that of the main thread.
        main = threading.current_thread() is threading.main_thread()
        self._entered[threading.get_ident()] = 0 if main else time.monotonic_ns()
        if self._desk is None:
            return self.open()
        self._open(0)  # it was opened as its user wanted it
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: object = None,
    ) -> None:
        """Close the pool, for an interrupt without waiting for leases; see `close`.

        An interrupt is what is no `Exception`: KeyboardInterrupt, the cancellation of a task,
        GeneratorExit; but SystemExit, by which a program ends in good order. For that and for an
        `Exception` the leases that this thread took (in the block, if it is not the main thread)
        are not waited for, unless another thread is in a call with them.
        """
        if self._forked:
            return
        if kind is None:
            self.close()
        elif issubclass(kind, (Exception, SystemExit)):
            self._end(self.config.close_timeout, False, kind, error)
        else:
            self.close(0.0)

    def install_signal_handlers(self, *signums: int) -> None:
        """Have the pool end in good order when a signal (SIGTERM, or those given) comes.

        The first one begins what `close()` does, and waits for nothing: leases may finish, and
        what you do before you release them. When the last worker is gone, what the signal did
        before happens: the former handler, or the end of the program. A second signal revokes all
        leases. `close()` in the main thread restores the former handlers; where another thread
        closes the pool, ours give way to them.

        Raises:
            RuntimeError: this is not the main thread, which alone may do so.
        """
        self._check_process()
        from .signals import SignalHandlers

        if self._signals is not None:
            self._signals.restore()
        self._signals = SignalHandlers(weakref.WeakMethod(self._ask_to_end), signums)
        self._signals.install()
        self.hooks["pool.terminate"].append(self._signals.ended)

    def _ask_to_end(self, at_once: bool) -> bool:
        """Begin to end; return whether there is nothing (more) to wait for. Takes no lock."""
        desk = self._desk
        if desk is not None and desk.forked:
            return True
        self._closed = True  # seen by who is about to open
        if desk is None:
            return True
        desk.manager.close(0.0 if at_once else self.config.close_timeout, kill=at_once)
        return desk.manager.done

    def drain(self) -> None:
        """Replace every worker, each as soon as another is ready to take its place.

        Leased ones go when they are given back. If no other can be started, the old ones serve on.
        """
        manager = self._open(0).manager
        manager.command(manager.staff.drain)

    def resize(self, size: int, gentle: bool = False) -> None:
        """Keep `size` workers from now on.

        More are started in the background. What is too many goes: booting ones, idle ones, then
        busy ones when they are given back. A fixed pool takes any size, an elastic one what is
        between `min_size` and `max_size`. With `gentle` only idle workers go that have no session
        warm, and the size sinks no further than that.

        Raises:
            ConfigError: it is not a size this pool can have, or there are too few descriptors for
                it; nothing has changed.
        """
        manager = self._open(0).manager
        wish = manager.staff.wish
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"size={size!r}: give a whole number, 1 or more", option="size",
                              value=size)  # fmt: skip
        from .config import MAX_WORKERS

        if size + wish.overflow + self.config.spares > MAX_WORKERS:
            raise ConfigError(f"size={size!r}: with max_overflow and spares it may be "
                              f"{MAX_WORKERS} at most", option="size", value=size)  # fmt: skip
        if wish.floor != wish.ceiling and not wish.floor <= size <= wish.ceiling:
            raise ConfigError(
                f"size={size!r}: it is not between min_size={wish.floor} and "
                f"max_size={wish.ceiling}; make the pool with wider bounds",
                option="size",
                value=size,
            )
        expect_descriptors_for(self.config, size, len(manager.fleet.handles))
        previous = wish.target
        smaller = gentle and size < previous
        manager.command(lambda: manager.staff.resize(size, gentle))
        reached = manager.staff.target if smaller else size
        if reached != previous or not smaller:  # else nobody could go
            self.hooks.emit("pool.resized", {"size": reached, "previous": previous})

    def warm_up(
        self,
        commands: Iterable[Any],
        strategy: str = "parallel",
        timeout: float | None = 30.0,
        stage_timeout: float | None = 15.0,
        command_timeout: float | None = 10.0,
    ) -> WarmUpReport:
        """Make the same calls on every worker there is, each by its slot; tell how it went.

        A command is a target, as for `call`, or (target, args, kwargs). Workers are taken all at
        once ("parallel"), one by one ("sequential"), or a third of them at a time ("staged").
        One that is leased is waited for. Workers that start later are not warmed up: see the
        option `warm_up`.

        Args:
            timeout: seconds for all; stage_timeout: for each stage of "staged"; command_timeout:
                for each call. None is no limit. A worker in mid-call when its time is over is
                killed and replaced; the report then tells what was done.

        Raises:
            ValueError, CallMismatch: a command is none, or cannot be sent. Nothing has run.
            PoolClosed: the pool was closed meanwhile.
        """
        from .warmup import warm_up

        return warm_up(self._opened(), commands, strategy, timeout, stage_timeout, command_timeout)

    def _opened(self, limit: float | None = None) -> Desk:
        """Return the desk, opening the pool if this is its first use, for so many seconds."""
        desk = self._desk
        if desk is None:
            desk = self._open(wait_for=min(1, self.config.initial_size), limit=limit)
        desk.check_open()
        return desk

    @property
    def closed(self) -> bool:
        """Whether the pool was closed, or is being closed."""
        return self._closed


def _named(kind: type[BaseException], error: BaseException | None) -> str:
    """Return an exception as a traceback would end with it."""
    try:
        text = str(error)
    except Exception:  # it is the user's
        text = ""
    return f"{kind.__name__}: {text[:_LONGEST_TEXT]}" if text else kind.__name__
