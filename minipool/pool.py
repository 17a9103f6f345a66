"""Pool: the public face. Opens and closes, hands out leases, tells how things are."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, Callable, Generic, Iterable, Mapping, TypeVar, overload

from .engine.desk import Desk
from .engine.handle import Handle
from .engine.launch import Launcher
from .engine.manager import Manager
from .engine.states import WorkerState
from .errors import CheckoutTimeout, ConfigError, PoolClosed
from .lease import CALL_TIMEOUT, Lease, seconds
from .opening import note_pool, open_desk, ready_count, wait_started
from .retry import policy_of
from .sessions import SessionInfo
from .telemetry import Hooks
from .views import CHECKOUT_TIMEOUT, PoolOptions, SessionScope, check_affinity

if TYPE_CHECKING:
    from typing_extensions import Concatenate, ParamSpec, Self

    from .breaker import CircuitBreaker
    from .config import PoolConfig
    from .engine.inquest import Death
    from .observe import Dashboard
    from .signals import SignalHandlers
    from .status import HealthReport, PoolStats, WorkerInfo
    from .warmup import WarmUpReport

    P = ParamSpec("P")

W = TypeVar("W")
R = TypeVar("R")

_CLOSE_MARGIN = 5.0  # seconds a close may take longer than it was given, before it is given up


class Pool(Generic[W]):
    """A pool of long-lived, stateful worker processes.

    `worker` is a class or factory, or the name of one ("package.module:Class"); each process
    makes one object of it, with `args` and `kwargs`, and keeps it. Without a worker the pool runs
    plain functions. All `options` are those of `PoolConfig`.

    The constructor starts nothing; `with`, `open()` or the first use does. A closed pool does not
    reopen. Every method may be called from any thread, and from signal handlers; none from a
    forked child, where each raises PoolForked.

    Raises:
        ConfigError: an option is wrong, or `worker` could not be made in another process.
    """

    @overload
    def __init__(self: Pool[None], worker: None = None, **options: Any) -> None: ...

    @overload
    def __init__(
        self,
        worker: Callable[..., W],
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        config: PoolConfig | None = None,
        **options: Any,
    ) -> None: ...

    @overload
    def __init__(
        self: Pool[Any],
        worker: str,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        config: PoolConfig | None = None,
        **options: Any,
    ) -> None: ...

    def __init__(
        self,
        worker: Any = None,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        config: PoolConfig | None = None,
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise ConfigError(
                f"both config= and options {sorted(options)}: give one or the other; "
                f"dataclasses.replace() changes a config",
                option="config",
                value=config,
            )
        if config is None:  # imported by who makes a pool: dataclasses cost as much as the rest
            from .config import PoolConfig

            config = PoolConfig.from_options(options)
        self.config = config
        self.hooks = Hooks(self.config.name or "")
        self._launcher = Launcher(worker, args, kwargs, self.config)
        self._opening = threading.RLock()
        self._desk: Desk | None = None  # None: not opened yet
        self._closed = False
        self._signals: SignalHandlers | None = None
        if config.autoscale:
            from .observe import fit_to_load

            fit_to_load(self)

    # -- opening and closing -----------------------------------------------------------------

    def open(self, wait: bool = True) -> Self:
        """Start the workers; wait until they are ready. Does nothing if the pool is open.

        Raises:
            PoolStartError: they did not start, with the reason as cause. The pool is closed.
            PoolClosed: it was closed before; make a new one.
        """
        self._open(self.config.initial_size if wait else 0)
        return self

    def _open(self, wait_for: int) -> Desk:
        desk = self._desk or self._open_now()  # no lock, which a fork may have copied as held
        desk.check_open()
        if wait_for and not desk.manager.here:
            failure = wait_started(desk, wait_for)
            if failure is not None:
                self.terminate()
                raise failure
        return desk

    def _open_now(self) -> Desk:
        with self._opening:
            if self._desk is not None:
                return self._desk
            if self._closed:
                raise PoolClosed(f"{self.config.name} is closed; make a new pool")
            desk, self._sessions = open_desk(self._launcher, self.config, self.hooks)
            self._desk = desk
        note_pool(self)
        if self._closed:  # by a signal handler, which the lock does not keep out
            desk.manager.close(0.0, kill=True)
        self.hooks.emit("pool.init", {"size": self.config.size})
        return desk

    def wait_ready(self, workers: int | None = None, timeout: float | None = None) -> None:
        """Open the pool, and wait until so many workers (None: all of the size) are ready.

        `timeout` is in seconds; None is `init_timeout`.

        Raises:
            CheckoutTimeout: they were not ready in time; the pool is closed.
            ValueError: more workers than the pool may have.
        """
        desk = self._open(0)
        manager = desk.manager
        wanted = manager.staff.target if workers is None else workers
        most = manager.staff.ceiling + manager.staff.overflow
        if wanted > most:
            raise ValueError(f"workers={workers!r}: the pool has {most} at most")
        limit = self.config.init_timeout if timeout is None else seconds(timeout, "timeout")
        if wanted > manager.staff.target:
            staff = manager.staff
            manager.order(lambda: setattr(staff, "target", max(staff.target, wanted)))
        if not manager.wait_for(lambda: ready_count(manager) >= wanted, limit):
            ready = ready_count(manager)
            cause = manager.fleet.last_failure
            self.terminate()
            raise CheckoutTimeout(
                f"{ready} of {wanted} workers of {self.config.name} were ready within {limit} s; "
                f"the pool is closed; raise the timeout, or look at the cause",
                timeout=limit, waited=limit, size=wanted, leased=0, waiting=0,
                held_by_this_thread=0,
            ) from cause  # fmt: skip
        desk.check_open()

    def close(self, timeout: float | None = None) -> None:
        """End the pool in good order. Does nothing the second time but wait.

        New work is refused and every waiter woken, at once. Leases may finish for `timeout`
        seconds (None: `close_timeout`), then they are revoked. Workers call their object's
        `close()` and end; who does not is killed. Afterwards no process, thread or descriptor of
        the pool is left. In the manager's own thread (a hook) it only begins all that.
        """
        grace = self.config.close_timeout
        if timeout is not None:
            grace = seconds(timeout, "timeout") or 0.0
        self._end(grace, kill=False)

    def terminate(self) -> None:
        """End the pool now: leases are revoked and workers killed, whatever they do."""
        self._end(0.0, kill=True)

    def _end(self, grace: float, kill: bool) -> None:
        if self._desk is not None:
            self._desk.check_process()  # before the lock, which a fork may have copied as held
        with self._opening:
            self._closed = True
            desk = self._desk
        if desk is None:
            return
        manager = desk.manager
        manager.close(grace, kill)
        if not manager.here and manager.wait_done(grace + _CLOSE_MARGIN):
            manager.join(1.0)
            if self._signals is not None:
                self._signals.restore()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None = None, *exc_info: object) -> None:
        if self._desk is None or not self._desk.forked:
            interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
            self.close(0.0 if interrupted else None)  # who presses Ctrl-C waits for no lease

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
        if self._desk is not None:
            self._desk.check_process()
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
            ConfigError: it is not a size this pool can have; nothing has changed.
        """
        manager = self._open(0).manager
        fixed = manager.staff.floor == manager.staff.ceiling
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"size={size!r}: give a whole number, 1 or more", option="size",
                              value=size)  # fmt: skip
        from .config import MAX_WORKERS

        if size + manager.staff.overflow + self.config.spares > MAX_WORKERS:
            raise ConfigError(f"size={size!r}: with max_overflow and spares it may be "
                              f"{MAX_WORKERS} at most", option="size", value=size)  # fmt: skip
        if not fixed and not manager.staff.floor <= size <= manager.staff.ceiling:
            raise ConfigError(
                f"size={size!r}: it is not between min_size={manager.staff.floor} and "
                f"max_size={manager.staff.ceiling}; make the pool with wider bounds",
                option="size",
                value=size,
            )
        previous = manager.staff.target
        smaller = gentle and size < previous
        resize = manager.staff.shrink if smaller else manager.staff.resize
        manager.command(lambda: resize(size))
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

    # -- using -------------------------------------------------------------------------------

    def checkout(
        self,
        *,
        timeout: float | None | str = CHECKOUT_TIMEOUT,
        session: str | None = None,
        affinity: str | None = None,
        hint: str | None = None,
    ) -> Lease[W]:
        """Take a worker for yourself; use it as `with pool.checkout() as w: w.call(...)`.

        `timeout` is how many seconds to wait for one (default: `checkout_timeout`; 0: not at all;
        None: for ever). Callers are served in the order they came.

        With `session`, its state goes along, whatever worker it is; a session has one lease at a
        time, and is begun by its first use (but see `strict_sessions`). `affinity` is which worker
        it gets (default: the option of that name). `hint` is for those who only want a warm cache:
        the worker that served the same hint last, if it is idle.

        Raises:
            CheckoutTimeout, TooManyWaiters, PoolClosed: nothing was taken.
            SessionBusy: the session is in use, with `timeout=0`; or another process has it.
            SessionNotFound: there is no such session, and `strict_sessions` is set.
            SessionLost: with "strict" affinity, its worker is gone. Check out again.
            SessionError: the store refused, or there are too many sessions, all in use.
            PoolStartError: this was the first use, and the pool could not be opened.
        """
        desk = self._desk
        if desk is None:
            desk = self._open(wait_for=min(1, self.config.initial_size))
        limit = desk.checkout_timeout
        if timeout is not CHECKOUT_TIMEOUT:
            limit = seconds(timeout, "timeout")
        if session is not None:
            check_affinity(affinity, session, hint)
            return Lease(desk, self._sessions.acquire(session, affinity, limit))
        if hint is not None or affinity is not None:
            check_affinity(affinity, session, hint)
            return Lease(desk, self._sessions.nearness.acquire(str(hint), limit))
        return Lease(desk, desk.acquire(limit))

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
        """Run one call in any worker; the same as a checkout, `Lease.call` and release."""
        lease = self.checkout()
        try:
            return lease.call(target, *args, **kwargs)
        finally:
            lease.release()

    def options(
        self,
        *,
        timeout: float | None | str = CALL_TIMEOUT,
        idempotent: bool = False,
        session: str | None = None,
        affinity: str | None = None,
        retries: int | None = None,
    ) -> PoolOptions[W]:
        """Return a caller with other options: `pool.options(timeout=0.5).call("predict", x)`.

        Args:
            timeout: seconds for checkout and call together; None waits for ever.
            idempotent: the call may run twice: if its worker dies it is made again on another,
                or as the option `retry` says.
            session, affinity: as for `checkout`.
            retries: how often an idempotent call is made again at most, with growing pauses.

        Raises:
            ValueError: they do not go together.
        """
        policy = policy_of(self.config.retry, idempotent, retries)
        return PoolOptions(self, timeout, idempotent, session, affinity, policy, self._pause)

    def _pause(self, seconds: float) -> bool:
        """Wait between two attempts; False if the pool is being closed."""
        manager = (self._desk or self._open_now()).manager
        manager.wait_for(lambda: manager.closing, seconds)
        return not manager.closing

    # -- sessions ----------------------------------------------------------------------------

    def session(self, session_id: str, state: Mapping[str, Any] | None = None) -> SessionScope:
        """Return a session for a `with` block, which begins and ends it.

        `with pool.session("user_1") as s: s.call("ask", question)`
        """
        return SessionScope(self, session_id, state)

    def create_session(self, session_id: str, state: Mapping[str, Any] | None = None) -> None:
        """Begin a session, with a state.

        Raises:
            SessionExists: there is one of that id already.
            SessionError: there are too many, all in use; or the store refused.
            CallMismatch: a value of `state` cannot be pickled. Nothing was begun.
        """
        self._opened()
        self._sessions.create(session_id, state)

    def end_session(self, session_id: str, timeout: float | None | str = CHECKOUT_TIMEOUT) -> None:
        """End a session once its present lease is over; does nothing if there is none.

        Its worker's object hears `session_ended(session)`.

        Raises:
            CheckoutTimeout, SessionBusy: it was in use all the time, or elsewhere; it goes on.
        """
        desk = self._opened()
        limit = desk.checkout_timeout
        if timeout is not CHECKOUT_TIMEOUT:
            limit = seconds(timeout, "timeout")
        self._sessions.end(session_id, limit)

    def session_state(self, session_id: str) -> dict[str, Any]:
        """Return a copy of a session's last committed state.

        Raises:
            SessionNotFound: there is none of that id.
        """
        self._opened()
        return self._sessions.state(session_id)

    def sessions(self) -> list[SessionInfo]:
        """Return what is known of each session of this process."""
        if self._desk is None:
            return []
        self._desk.check_process()
        return self._sessions.infos()

    def _opened(self) -> Desk:
        """Return the desk, opening the pool if this is its first use."""
        desk = self._desk or self._open(wait_for=min(1, self.config.initial_size))
        desk.check_open()
        return desk

    # -- looking -----------------------------------------------------------------------------

    def workers(self) -> list[WorkerInfo]:
        """Return what each worker is doing now, in the order of their ids."""
        from .status import worker_info  # reports are imported when somebody asks for one

        handles = self._handles()
        return [worker_info(handles[slot]) for slot in sorted(handles)]

    def worker(self, worker_id: int) -> WorkerInfo:
        """Return what one worker is doing now.

        Raises:
            KeyError: there is no such worker at the moment.
        """
        from .status import worker_info

        handle = self._handles().get(worker_id)
        if handle is None:
            raise KeyError(f"{self.config.name} has no worker {worker_id!r} now")
        return worker_info(handle)

    def _handles(self) -> dict[int, Handle]:
        desk = self._desk
        if desk is None:
            return {}
        desk.check_process()
        return dict(desk.manager.fleet.handles)

    def deaths(self) -> list[Death]:
        """Return how the last 100 workers ended that nobody had told to, oldest first."""
        self._handles()
        return [] if self._desk is None else self._desk.manager.fleet.known_deaths()

    def dump(self) -> dict[int, str]:
        """Return the Python stacks of every worker, by its id, and stop none of them.

        Also of workers that are busy in C. Takes half a second at most; the text is empty for one
        that did not answer: it is booting, or was stopped.
        """
        from .engine.blackbox import stacks_of

        return stacks_of(self._handles().values())

    def stats(self) -> PoolStats:
        """Return what the pool did so far and how it stands; also after it was closed."""
        from .status import pool_stats

        return pool_stats(self.config, self._desk, len(self._sessions) if self._desk else 0)

    def health_check(self, probe: bool = False) -> HealthReport:
        """Tell whether the pool is well: healthy, degraded or unhealthy, and why.

        With `probe`, every idle worker is asked first; that takes `health_check_timeout` at most.
        """
        from .status import health_report

        desk = self._desk
        if desk is not None:
            desk.check_process()
            if probe and not desk.manager.closing:
                self._probe_all(desk.manager)
        return health_report(self.config, desk, self._closed)

    def _probe_all(self, manager: Manager) -> None:
        asked: list[Handle] = []
        placed = threading.Event()

        def probe_idle() -> None:
            for slot in tuple(manager.turnstile.idle):
                handle = manager.fleet.handles[slot]
                manager.care.probe(handle)
                asked.append(handle)
            placed.set()

        manager.order(probe_idle)
        if not manager.here:
            manager.wait_for(placed.is_set, self.config.health_check_timeout)
            manager.wait_for(
                lambda: not any(handle.state is WorkerState.PROBING for handle in asked),
                self.config.health_check_timeout + 0.5,
            )

    def dashboard(
        self, port: int = 0, *, host: str = "127.0.0.1", token: str | None = None
    ) -> Dashboard:
        """Serve a web page that shows this pool, and all others of this process; see its `url`.

        Opens the pool. The page is served until `close()`, or the end of this pool. Port 0 is any
        free one. Where `host` is not of this machine alone, visitors must show the token.

        Raises:
            OSError: the address is taken, or not this machine's.
            ValueError: the token has more in it than letters, digits and ._~-
        """
        from .observe import serve

        return serve(self, self._open(0).manager, host, port, token)

    @property
    def breaker(self) -> CircuitBreaker | None:
        """What stops starting workers when that keeps failing; `breaker.reset()` goes on now.

        None: the option `breaker` is off. Opens the pool if this is its first use.
        """
        return (self._desk or self._open_now()).manager.fleet.breaker

    @property
    def closed(self) -> bool:
        """Whether the pool was closed, or is being closed."""
        return self._closed

    def __repr__(self) -> str:
        desk = self._desk
        if desk is None:
            status = "closed" if self._closed else "not open yet"
        elif desk.forked:
            status = f"belongs to process {desk.manager.pid}"
        elif desk.manager.done:
            status = "closed"
        else:
            s = self.stats()
            status = "closing, " if desk.manager.closing else ""
            status += f"{s.workers} of {s.size} workers: {s.idle} idle, {s.leased} leased, "
            status += f"{s.starting} starting; {s.waiting} waiting"
        return f"<Pool {self.config.name}: {status}>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a pool cannot be pickled: open one in each process that needs it")
