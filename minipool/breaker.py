"""CircuitBreaker: after failures in a row, refuse at once instead of trying in vain.

              so many failures in a row                    retry_after is over
    closed ----------------------------> open <-----------------------------> half-open
       ^                                           a trial failed                 |
       `----------------- so many successes --------------------------------------'

Runs in the threads of its users; nothing here waits, and its lock is held for a few steps, never
under a listener. Each try has a *permit*, which carries the verdict back once it is known. A
permit is of one era: a verdict from before the breaker last opened, closed or was reset changes
nothing, however late it comes. (Named in M. Nygard's "Release It!"; states and the counting of
trials in flight are those of resilience4j, the eras answer App-vNext/Polly#216.)
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, List, TypeVar

from .backoff import at_least
from .errors import CircuitOpen, MinipoolError, WorkerError, is_answer
from .telemetry import logger

R = TypeVar("R")

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"

if TYPE_CHECKING:
    Listener = Callable[["CircuitBreaker"], object]


class CircuitBreaker:
    """Opens after `failures` in a row, tries after `retry_after` s, closes after `successes`.

    While it is half-open, at most `trials` tries are in flight at once. When they have brought no
    verdict for `retry_after` s (a second at least) they hang: the next try is permitted, and what
    they say afterwards counts for nothing. A pool has one breaker for the starts of its workers
    (`pool.breaker`). One of your own may guard calls: `breaker.call(f, x)` counts the faults of
    workers (`failing_on`); what your code raises is no failure.

    Any thread may use it. Each of `listeners` is called with the breaker when its state has
    changed; one that raises is logged and removed.

    Raises:
        ValueError: an argument is no such number.
    """

    def __init__(
        self,
        failures: int = 5,
        retry_after: float = 30.0,
        successes: int = 3,
        *,
        trials: int = 1,
        failing_on: tuple[type[BaseException], ...] = (WorkerError,),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failures_to_open = at_least(1, "failures", failures, whole=True)
        self.retry_after = at_least(0, "retry_after", retry_after)
        self.successes_to_close = at_least(1, "successes", successes, whole=True)
        self.trials = at_least(1, "trials", trials, whole=True)
        self.failing_on = failing_on
        self.listeners: List[Listener] = []
        self.state = CLOSED
        self.cause: BaseException | None = None  # the last failure, until a success
        self.failures = 0  # in a row
        self.opened = 0  # how often, in all
        self._clock = clock
        self._changing = threading.RLock()  # a signal handler may come in between
        self._era = object()
        self._successes = self._in_flight = 0
        self._retry_at = 0.0
        self._patient_until = 0.0  # for the last trial that was permitted

    # -- asking ------------------------------------------------------------------------------

    @property
    def retry_in(self) -> float:
        """Seconds until the next trial is due; 0 if one may be made now."""
        return max(0.0, self._retry_at - self._clock()) if self.state == OPEN else 0.0

    def permit(self) -> Permit | None:
        """Return leave to try once; None if the breaker is open, or enough trials are under way."""
        if self.state == OPEN and self.retry_in > 0:
            return None
        changed = False
        with self._changing:
            if self.state == OPEN:
                changed = self._become(HALF_OPEN)
            half_open, now = self.state == HALF_OPEN, self._clock()
            if half_open and self._in_flight >= self.trials:
                if now < self._patient_until:
                    return None
                self._become(HALF_OPEN)  # those in flight hang: their verdicts count no more
            permit = Permit(self, self._era)
            # No call between these, so that no interrupt: what flies is counted, and lands.
            self._patient_until = now + (self.retry_after if self.retry_after > 1 else 1.0)
            permit.in_flight = True
            self._in_flight += half_open
        self._tell(changed)
        return permit

    def call(self, function: Callable[..., R], /, *args: Any, **kwargs: Any) -> R:
        """Call a function, unless the breaker is open; count how it went.

        Raises:
            CircuitOpen: it was not called; the last failure is the cause.
            BaseException: whatever the function raised.
        """
        permit = self.permit()
        if permit is None:
            raise self.error("this call was not made")
        try:
            result = function(*args, **kwargs)
        except self.failing_on as error:
            if is_answer(error):
                permit.succeeded()
            else:
                permit.failed(error)
            raise
        except Exception as error:
            if is_answer(error) or not isinstance(error, MinipoolError):
                permit.succeeded()  # your code raised it, so all else is well
            raise  # else nothing was tried: no worker came free, say
        else:
            permit.succeeded()
        finally:
            permit.give_up()
        return result

    def error(self, what: str) -> CircuitOpen:
        """Return the error that tells why something is not tried, and when it will be."""
        error = CircuitOpen(
            f"{what}: the circuit breaker is {self.state} after {self.failures} failures in a row; "
            f"the next trial is due in {self.retry_in:.1f} s; mend the cause, then wait, or call "
            f"reset()",
            failures=self.failures,
            retry_in=self.retry_in,
        )
        error.__cause__ = self.cause
        return error

    # -- changing ----------------------------------------------------------------------------

    def reset(self) -> None:
        """Close it now, whatever has failed before."""
        with self._changing:
            self.failures, self.cause = 0, None
            changed = self._become(CLOSED)
        self._tell(changed)

    def _become(self, state: str) -> bool:
        """Change the state; what was begun before counts no more."""
        changed = state != self.state
        self.state, self._era = state, object()
        self._successes = self._in_flight = 0
        if state == OPEN:
            self.opened += 1
            self._retry_at = self._clock() + self.retry_after
        return changed

    def _succeeded(self, permit: Permit, count: int) -> None:
        changed = False
        with self._changing:
            if permit.era is not self._era:
                return
            self._land(permit)
            if self.state == CLOSED:
                self.failures, self.cause = 0, None
                return
            self._successes += count
            if self._successes >= self.successes_to_close:
                self.failures, self.cause = 0, None
                changed = self._become(CLOSED)
        self._tell(changed)

    def _failed(self, permit: Permit, cause: BaseException | None) -> None:
        changed = False
        with self._changing:
            if permit.era is not self._era:
                return
            self._land(permit)
            self.failures, self.cause = self.failures + 1, cause
            if self.failures >= self.failures_to_open:  # a trial's, too: they count until it closes
                changed = self._become(OPEN)
        self._tell(changed)

    def _land(self, permit: Permit) -> None:
        with self._changing:
            if permit.in_flight and permit.era is self._era:
                permit.in_flight = False
                self._in_flight -= self.state == HALF_OPEN

    def _tell(self, changed: bool) -> None:
        if not changed:
            return
        for listener in tuple(self.listeners):
            try:
                listener(self)
            except Exception:
                logger().exception("listener %r of %r failed and was removed", listener, self)
                with contextlib.suppress(ValueError):  # another thread removed it first
                    self.listeners.remove(listener)

    def __repr__(self) -> str:
        return f"<CircuitBreaker: {self.state}, {self.failures} failures in a row>"


class Permit:
    """Leave to try once. Tell how it went; one that is dropped without a verdict is given up."""

    __slots__ = ("_breaker", "era", "in_flight", "successes")

    def __init__(self, breaker: CircuitBreaker, era: object) -> None:
        self._breaker, self.era, self.in_flight = breaker, era, False
        self.successes = 0  # counted so far

    def succeeded(self, count: int = 1) -> None:
        """Count successes. What was tried may go on to succeed: more may be counted later."""
        self.successes += count
        self._breaker._succeeded(self, count)

    def failed(self, cause: BaseException | None = None) -> None:
        """Count a failure, and end the try."""
        self._breaker._failed(self, cause)

    def give_up(self) -> None:
        """End the try without a verdict. Does nothing after one."""
        self._breaker._land(self)

    def __del__(self) -> None:
        self.give_up()
