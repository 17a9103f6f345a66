"""RetryPolicy: how often, when and after which errors an idempotent call is made again.

Pure: it decides, and `PoolOptions.call` acts in the caller's thread. Only calls that were said to
be idempotent come here; each attempt has a fresh lease, and all of them share one deadline.
"""

from __future__ import annotations

import random as _random
from typing import Callable, Iterator

from .backoff import Backoff, at_least
from .errors import MinipoolError, WorkerError, answered

_MOST_DEATHS = 100  # that an error tells of
_SHOWN = 5  # of them in its text


class RetryPolicy:
    """Makes a call up to `attempts` times in all, with growing pauses in between.

    The pauses are `base` seconds and then each `multiplier` times the one before, up to `cap`,
    with `jitter` (a share of it, up or down) that carries over from one to the next. A call is
    made again after the exceptions of `retry_on`, which may be of your own code, too. Those of
    minipool mean this pool: what a pool of the worker's own raised there is no reason. The
    timeout of the call bounds all attempts and pauses together; `attempt_timeout` the seconds on
    a worker of each, so that after a `CallTimeout` there is time left for another.

    Raises:
        ValueError: an argument is no such number. TypeError: `retry_on` is no exception class.
    """

    def __init__(
        self,
        attempts: int = 3,
        base: float = 0.1,
        cap: float = 30.0,
        multiplier: float = 2.0,
        jitter: float = 0.25,
        retry_on: type[Exception] | tuple[type[Exception], ...] = (WorkerError,),
        *,
        attempt_timeout: float | None = None,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self.attempts = at_least(1, "attempts", attempts, whole=True)
        self.attempt_timeout = attempt_timeout
        if attempt_timeout is not None:
            at_least(0, "attempt_timeout", attempt_timeout)
        self.retry_on = retry_on if isinstance(retry_on, tuple) else (retry_on,)
        for kind in self.retry_on:
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise TypeError(f"retry_on={retry_on!r}: give exception classes")
        Backoff(base, cap, multiplier, jitter)  # refuses what is wrong, and now
        self._shape = base, cap, multiplier, jitter
        self._random = random

    def pauses(self) -> Iterator[float]:
        """Return the seconds to wait after each attempt but the last, for one call."""
        backoff = Backoff(*self._shape, decorrelated=True, random=self._random)
        return (backoff.next() for _ in range(self.attempts - 1))

    def covers(self, error: Exception) -> bool:
        """Tell whether a call that ended so is to be made again."""
        kinds = self.retry_on
        if answered(error):
            kinds = tuple(kind for kind in kinds if not issubclass(kind, MinipoolError))
        return isinstance(error, kinds)

    def with_attempts(self, attempts: int) -> RetryPolicy:
        """Return a policy that differs in this only."""
        return RetryPolicy(
            attempts, *self._shape, self.retry_on,
            attempt_timeout=self.attempt_timeout, random=self._random,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"RetryPolicy(attempts={self.attempts})"


class Attempts:
    """On which workers one call was tried, and how these ended. Of no use to any other thread."""

    __slots__ = ("_deaths", "_died", "_most", "tries")

    def __init__(self, most: int) -> None:
        self._most = most
        self._deaths: list[str] = []  # the first ones
        self._died = 0
        self.tries = 0

    @property
    def over(self) -> bool:
        """Whether there were as many as there may be."""
        return self.tries >= self._most

    def note(self, error: WorkerError) -> None:
        """Count the failure of a worker, or of as many as the call was tried on by then."""
        self.tries += error.tries
        self._died += len(error.deaths)
        self._deaths += error.deaths[: _MOST_DEATHS - len(self._deaths)]

    def told(self, error: WorkerError) -> WorkerError:
        """Return the error of the last attempt, which tells of all the others."""
        deaths = self._deaths
        if self.tries > error.tries:
            error.tries, error.deaths = self.tries, tuple(deaths)
            shown = "; ".join(deaths[:_SHOWN])
            more = f"; and {self._died - _SHOWN} more" if self._died > _SHOWN else ""
            error.args = (
                f"{error}; that was try {self.tries} of {max(self.tries, self._most)}, each on "
                f"another worker, and {self._died} of these died ({shown}{more}): look at what "
                f"the call sends",
            )
        return error


def policy_of(
    option: int | RetryPolicy | None, idempotent: bool, retries: int | None
) -> RetryPolicy | None:
    """Return how a call is made again: by the pool's option, unless told otherwise.

    Raises:
        ValueError: it may not run twice, and shall be made again.
    """
    if retries is not None and not idempotent:
        raise ValueError(
            f"retries={retries!r}: only what may run twice is made again; if this call may, give "
            f"idempotent=True as well"
        )
    if not idempotent:
        return None
    policy = RetryPolicy(option) if isinstance(option, int) else option
    if retries is None:
        return policy
    at_least(0, "retries", retries, whole=True)
    return (policy or RetryPolicy()).with_attempts(retries + 1)
