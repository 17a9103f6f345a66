"""Views: a pool seen through other call options, or as one session."""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Any, Callable, Generic, Mapping, TypeVar, overload

from .deadline import Deadline
from .errors import MinipoolError, is_answer
from .lease import CALL_TIMEOUT, seconds
from .nearness import checked_key
from .retry import RetryPolicy

if TYPE_CHECKING:
    from typing_extensions import Concatenate, ParamSpec

    P = ParamSpec("P")

W = TypeVar("W")
R = TypeVar("R")

CHECKOUT_TIMEOUT = "checkout_timeout"  # the option's name stands for its value


class PoolOptions(Generic[W]):
    """A pool seen through other call options; see `Pool.options`."""

    def __init__(
        self,
        pool: Any,
        timeout: float | None | str,
        idempotent: bool,
        session: str | None = None,
        affinity: str | None = None,
        policy: RetryPolicy | None = None,
        pause: Callable[[float], bool] = bool,
    ) -> None:
        check_affinity(affinity, session, None)
        self._pool, self._idempotent = pool, idempotent
        self._policy, self._pause = policy, pause
        self._session, self._affinity = session, affinity
        self._own_timeout = timeout != CALL_TIMEOUT
        self._timeout = pool.config.call_timeout
        if self._own_timeout:
            self._timeout = seconds(timeout, "timeout")

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
        """As `Pool.call`, all within the one timeout that was given.

        A call that had to wait is not sent when less time is left than such calls took in the
        last minute: the worker would be killed for it, and nothing won.

        Raises:
            CheckoutTimeout: no worker came in time, or came too late for the call (`needed`).
        """
        policy, deadline = self._policy, None
        if self._timeout is not None and (self._own_timeout or policy is not None):
            limit = None if policy is None else policy.attempt_timeout
            deadline = Deadline(self._pool, self._timeout, limit)
        if policy is not None:
            return self._call_again(policy, deadline, target, args, kwargs)
        return self._attempt(deadline, self._patience, self._timeout, target, args, kwargs)

    @property
    def _patience(self) -> float | None:
        limit: float | None = self._pool.config.checkout_timeout
        return self._timeout if self._own_timeout else limit

    def _call_again(
        self,
        policy: RetryPolicy,
        deadline: Deadline | None,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Make a call as often as the policy allows, and as there is time for another attempt."""
        pauses, patience = policy.pauses(), _least(self._timeout, self._patience)
        limit = policy.attempt_timeout
        while True:
            try:
                return self._attempt(deadline, patience, limit, target, args, kwargs)
            except policy.retry_on as error:
                if is_answer(error):
                    raise  # the call has run to its end
                pause = next(pauses, None)
                in_time = pause is not None and (deadline is None or deadline.allows(pause))
                if pause is None or not in_time or not self._pause(pause):
                    raise
            if deadline is not None:
                patience = _least(deadline.end - time.monotonic(), self._patience)

    def _attempt(
        self,
        deadline: Deadline | None,
        patience: float | None,
        timeout: float | None,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Check out within `patience` and call within `timeout`, or both within the deadline."""
        session, affinity = self._session, self._affinity
        if deadline is not None:
            lease = deadline.checkout(patience, session, affinity)
        else:
            lease = self._pool.checkout(timeout=patience, session=session, affinity=affinity)
        try:
            left = timeout if deadline is None else deadline.left()
            # A policy counts the attempts that may have begun; what had not is made again anyhow.
            again = self._idempotent and self._policy is None
            return lease.options(timeout=left, idempotent=again).call(target, *args, **kwargs)
        finally:
            lease.release()


class SessionScope:
    """A session for the length of a `with` block: begun at its start, ended at its end.

    Where there is a session store, a process that dies in the block leaves the session there. The
    next block of that id ends what is left, and begins anew.
    """

    def __init__(self, pool: Any, key: str, state: Mapping[str, Any] | None) -> None:
        self.id = checked_key(key)
        self._pool = pool
        self._state = state

    def __enter__(self) -> SessionScope:
        self._pool._opened()
        self._pool._sessions.create(self.id, self._state, scoped=True)
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *exc_info: object) -> None:
        if kind is None or issubclass(kind, Exception):
            self._pool.end_session(self.id)
            return
        with contextlib.suppress(MinipoolError):  # or it would take the place of an interrupt
            self._pool.end_session(self.id, timeout=0.0)

    def checkout(self, **options: Any) -> Any:
        """As `Pool.checkout`, for this session."""
        return self._pool.checkout(session=self.id, **options)

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As `Pool.call`, in this session."""
        with self.checkout() as lease:
            return lease.call(target, *args, **kwargs)

    @property
    def state(self) -> dict[str, Any]:
        """A copy of the committed state."""
        copy: dict[str, Any] = self._pool.session_state(self.id)
        return copy


def _least(left: float | None, limit: float | None) -> float | None:
    """Return the shorter of two times; None and infinity are no limits."""
    shorter = min(math.inf if each is None else each for each in (left, limit))
    return None if shorter == math.inf else max(0.0, shorter)


def check_affinity(affinity: str | None, session: str | None, hint: str | None) -> None:
    """Refuse options of a checkout that do not go together."""
    if affinity is not None:
        from .config import AFFINITIES

        if affinity not in AFFINITIES:
            raise ValueError(f"affinity={affinity!r}: give one of {AFFINITIES}")
    if affinity is not None and session is None:
        raise ValueError(f"affinity={affinity!r}: it is for sessions; give session= as well")
    if hint is not None and session is not None:
        raise ValueError(f"hint={hint!r}: a session has its own worker; give session= or hint=")
    if hint is not None and not isinstance(hint, str):
        raise TypeError(f"hint={hint!r}: give a text")
