"""Pool: the public face. Hands out leases, makes calls, keeps sessions.

How it opens and ends is in `lifecycle`, what it tells of itself in `inspection`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Callable, Generic, Mapping, TypeVar, overload

from .engine.launch import Launcher
from .engine.passage import passage
from .errors import ConfigError
from .inspection import Inspection
from .lease import CALL_TIMEOUT, Lease, ObjectLease, seconds
from .retry import policy_of
from .views import CHECKOUT_TIMEOUT, PoolOptions, SessionScope, check_affinity

if TYPE_CHECKING:
    from typing_extensions import Concatenate, ParamSpec

    from .config import PoolConfig
    from .engine.pace import Budget

    P = ParamSpec("P")

W = TypeVar("W")
R = TypeVar("R")

_CLOSE_MARGIN = 5.0  # seconds a close may take longer than it was given, before it is given up


class Pool(Inspection, Generic[W]):
    """A pool of long-lived, stateful worker processes.

    `worker` is a class or factory, or the name of one ("package.module:Class"); each process
    makes one object of it, with `args` and `kwargs`, and keeps it. Without a worker the pool runs
    plain functions. All `options` are those of `PoolConfig`.

    The constructor starts nothing; `with`, `open()` or the first use does. A pool that could not
    be opened for its first use may be used again; one that was closed does not reopen. Every method
    may be called from any thread, and from signal handlers; none from a forked child, where each
    raises PoolForked.

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
        # Imported by who makes a pool: dataclasses cost as much as the rest.
        from .config import PoolConfig

        if config is None:
            config = PoolConfig.from_options(options)
        elif not isinstance(config, PoolConfig):
            raise ConfigError(
                f"config={config!r}: give a PoolConfig, as in `config=PoolConfig(**...)`, or the "
                f"options themselves",
                option="config",
                value=config,
            )
        super().__init__(Launcher(worker, args, kwargs, config))
        self._lease: type[Lease[W]] = Lease if worker is None else ObjectLease
        if config.autoscale:
            from .observe import fit_to_load

            fit_to_load(self)

    # -- using -------------------------------------------------------------------------------

    @passage
    def checkout(
        self,
        *,
        timeout: float | None | str = CHECKOUT_TIMEOUT,
        session: str | None = None,
        affinity: str | None = None,
        hint: str | None = None,
    ) -> Lease[W]:
        """Take a worker for yourself; use it as `with pool.checkout() as w: w.call(...)`.

        `timeout` is how many seconds to wait (0: not at all; None: for ever). The default is
        `checkout_timeout`, whose clock stands still while no worker serves and one is starting.
        Callers are served in the order they came.

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
            PoolStartError: this was the first use, or came while that was under way, and the pool
                could not be opened. It stays unopened: the next use tries again.
            CircuitOpen: no worker is there, and starting them failed too often to be tried now.
        """
        desk = self._desk
        if desk is None:
            return self._first_checkout(timeout, session, affinity, hint)
        limit = desk.checkout_timeout
        if timeout is not CHECKOUT_TIMEOUT:
            limit = seconds(timeout, "timeout")
        if session is not None:
            check_affinity(affinity, session, hint)
            return self._lease(desk, self._sessions.acquire(session, affinity, limit))
        if hint is not None or affinity is not None:
            check_affinity(affinity, session, hint)
            return self._lease(desk, self._sessions.nearness.acquire(str(hint), limit))
        lease = self._lease  # see `Desk.acquire`
        return lease(desk, desk.acquire(limit))

    @passage
    def _first_checkout(
        self,
        timeout: float | None | str,
        session: str | None,
        affinity: str | None,
        hint: str | None,
    ) -> Lease[W]:
        """Open the pool, then do as `checkout`; a timeout that was given is for both together."""
        limit, begun = None, time.monotonic()
        if timeout is not CHECKOUT_TIMEOUT:
            limit = seconds(timeout, "timeout")
        desk = self._opened(limit)
        allowed: Any = desk.checkout_timeout
        if timeout is not CHECKOUT_TIMEOUT:
            allowed = desk.manager.standstills.limit(limit, begun)
        if session is not None:
            check_affinity(affinity, session, hint)
            return self._lease(desk, self._sessions.acquire(session, affinity, allowed))
        if hint is not None or affinity is not None:
            check_affinity(affinity, session, hint)
            return self._lease(desk, self._sessions.nearness.acquire(str(hint), allowed))
        return self._lease(desk, desk.acquire(allowed))

    @passage
    def _checkout_until(
        self, budget: Budget, timeout: float | None, session: str | None, affinity: str | None
    ) -> Lease[W]:
        """As `checkout`, for one call, which together with it must not take longer than that."""
        desk = self._desk
        allowed: Any = timeout
        if desk is None:
            begun = time.monotonic()
            whole = budget[0] - begun
            whole = whole if timeout is None else min(whole, timeout)
            desk = self._opened(max(0.0, whole))
            allowed = desk.manager.standstills.limit(whole if timeout is None else timeout, begun)
        if session is not None:
            handle = self._sessions.acquire(session, affinity, allowed, budget)
        else:
            handle = desk.acquire(allowed, budget)
        return self._lease(desk, handle)

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
            idempotent: the call may run more than once: if its worker dies it is made again on
                another, three attempts in all, or as the option `retry` says.
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
            SessionExists: there is one of that id already; it is as it was.
            SessionError: there are too many, all in use; the store refused; or the state is too
                large to be sent.
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
        limit = None if timeout is CHECKOUT_TIMEOUT else seconds(timeout, "timeout")
        desk = self._opened(limit)
        if timeout is CHECKOUT_TIMEOUT:
            limit = desk.checkout_timeout
        self._sessions.end(session_id, limit)

    def session_state(self, session_id: str) -> dict[str, Any]:
        """Return a copy of a session's last committed state.

        Raises:
            SessionNotFound: there is none of that id. Exception: a value cannot be unpickled here.
        """
        self._opened()
        return dict(self._sessions.state(session_id))

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a pool cannot be pickled: open one in each process that needs it")
