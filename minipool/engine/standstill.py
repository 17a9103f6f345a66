"""Standstill: the time that counts against no deadline, because nothing could be done in it.

There are two kinds. A *stop* is time in which this process did not run: it was stopped by SIGSTOP,
its container was paused, its function was frozen. The monotonic clock goes on meanwhile. A
*drought* is time in which no worker serves and one is starting: it counts against no checkout for
which the caller gave no timeout of its own.

The manager keeps the account. It says by when it will be heard of again, and what it comes late by
is a stop, if that is more than `LATE`. A caller whose wait has ended asks what was lost since the
wait began, and goes on for that. If the manager is late at that moment, the caller waits for it:
at a thaw all threads wake at once, and any may be first. A manager that is in a turn may be held up
by a listener, in a process that runs, and cannot tell that from a stop. So it is given a moment
only, and callers that wait are witnesses: one whose own wait ends much too late tells of it.

Periods are replaced, never changed, so any thread may read them; the manager alone writes, but for
what witnesses append.
"""

from __future__ import annotations

import collections
import math
import threading
import time
from typing import Callable, Tuple

from .._sync import Notice

Periods = Tuple[Tuple[float, float], ...]  # begin and end, monotonic; in order, without overlaps

LATE = 1.0  # seconds; what is less late may have been kept from running by other threads
_PATIENCE = 1.0  # seconds to wait for a manager that should be back from its rest
_MOMENT = 0.05  # seconds to wait for one that is late with a turn; a listener may hold it up
_BREATH = 0.25  # seconds; as long, at least, is waited at once for the end of a drought
_MOST = 256  # periods that are kept apart


class DefaultTimeout(float):
    """A `checkout_timeout` that stands for all checkouts to which none was given."""


class Standstills:
    """Stops and droughts of one pool. The manager writes, any thread reads.

    `most` is how many seconds of droughts one wait is spared at most; None: no limit.
    """

    def __init__(
        self, most: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._most = math.inf if most is None else most
        #: What the manager does now: from when it is late, by when it will be heard of again, and
        #: how long a caller waits for it if it is late.
        self._phase = (math.inf, math.inf, 0.0)
        self._heard_of = Notice()
        self._stops: Periods = ()
        #: Stops that callers tell of; any thread appends.
        self._witnessed: collections.deque[tuple[float, float]] = collections.deque(maxlen=_MOST)
        self._droughts: Periods = ()
        self._starting_since: float | None = None  # a drought is under way
        self._thread = 0  # the manager's

    # -- by the manager ----------------------------------------------------------------------

    def rest(self, patience: float, tick: float, counts: bool = True) -> None:
        """Begin a wait of so many seconds at most. What was before does not count if not `counts`.

        Of a wait that came late, no more than a tick is taken for time in which the process ran.
        """
        now = self._clock()
        self._begin(now, now + min(patience, tick), now + patience, counts, _PATIENCE)

    def turn(self) -> None:
        """Begin a turn, which takes no time to speak of."""
        now = self._clock()
        self._begin(now, now, now, counts=True, wait=_MOMENT)

    def end(self) -> None:
        """Hear that the manager will not be heard of any more."""
        self._begin(self._clock(), math.inf, math.inf, counts=False, wait=0.0)

    def _begin(self, now: float, late_from: float, due: float, counts: bool, wait: float) -> None:
        self._thread = threading.get_ident()
        before, was_due, _ = self._phase
        if counts and now - was_due > LATE:
            self._stops = _with(self._stops, before, now)
        # After that: a caller that finds it in time finds the stop as well.
        self._phase = late_from, due, wait
        self._heard_of.post()

    def note_starting(self, alone: bool) -> None:
        """Note whether, at this moment, no worker serves and one is starting."""
        since = self._starting_since
        if alone and since is None:
            self._starting_since = self._clock()
        elif since is not None and not alone:
            self._droughts = _with(self._droughts, since, self._clock())
            self._starting_since = None  # afterwards: a reader may find it twice, and never not

    # -- by any thread -----------------------------------------------------------------------

    @property
    def stopped(self) -> bool:
        """Whether the process was ever stopped."""
        return bool(self._stops or self._witnessed)

    def witness(self, due: float) -> None:
        """Note that a wait of this thread, which was to end then, has ended now."""
        now = self._clock()
        if now - due > LATE and self.counted(due) < now - due:
            self._witnessed.append((due, now))

    def lost(self, since: float) -> float:
        """Return how many seconds since then the process did not run.

        For a caller whose time is over, as it may wait for the manager.
        """
        self.catch_up()
        return self.counted(since)

    def counted(self, since: float) -> float:
        """Return how many of these seconds the manager has counted. Never waits."""
        return _length(self._known(), since)

    def _known(self) -> Periods:
        """Return all stops there is an account of."""
        if not self._witnessed:
            return self._stops
        return _union((*self._stops, *self._witnessed.copy()))

    def counted_or_starting(self, since: float) -> float:
        """As `counted`, and those in which no worker served and one was starting."""
        begun, now = self._starting_since, self._clock()  # before the droughts that have ended
        droughts = _after(self._droughts, since)
        if begun is not None:
            droughts = (*droughts, (begun, now))
        stops = _after(self._known(), since)
        if not droughts:
            return _length(stops, since)
        stopped = _length(stops, since)
        either = _length(_union((*stops, *droughts)), since)
        return stopped + min(either - stopped, self._most)

    @property
    def starting(self) -> bool:
        """Whether a drought is under way."""
        return self._starting_since is not None

    def catch_up(self) -> None:
        """Wait for the manager, for a while, if it is late."""
        if self._is_late() and threading.get_ident() != self._thread:
            self._heard_of.wait_for(lambda: not self._is_late(), self._phase[2])

    def _is_late(self) -> bool:
        return self._clock() - self._phase[1] > LATE

    def limit(self, seconds: float | None, since: float | None = None) -> TimeLimit:
        """Return a limit of so many seconds, from now on or since then; None: for ever."""
        return TimeLimit(self, seconds, self._clock() if since is None else since, self._clock)


class TimeLimit:
    """So many seconds, not counting those in which nothing could be done. For one thread."""

    __slots__ = ("_account", "_clock", "_default", "_due", "seconds", "since")

    def __init__(
        self,
        account: Standstills,
        seconds: float | None,
        since: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._account, self._clock = account, clock
        self._default = isinstance(seconds, DefaultTimeout)
        self.seconds, self.since = seconds, since
        self._due = math.inf  # when the wait that is under way is to end

    def first_wait(self) -> float | None:
        """Return how many seconds to wait at once; then ask for the `next_wait`."""
        left = self.left()
        if left is not None and self.seconds:
            self._due = self._clock() + left
        return left

    def next_wait(self) -> float | None:
        """Return the same, when such a wait is over and nothing else was done meanwhile."""
        self._account.witness(self._due)
        return self.first_wait()

    def left(self) -> float | None:
        """Return how many seconds are left, 0 if none; None: it goes on for ever."""
        self._due = math.inf
        if self.seconds is None:
            return None
        if self.seconds <= 0:
            return 0.0
        left = self._left(self.seconds)
        if left <= 0:
            self._account.catch_up()
            left = self._left(self.seconds)
        if left > 0 and self._default and self._account.starting:
            return max(_BREATH, left)  # it stands still: who looked more often would learn nothing
        return max(0.0, left)

    def _left(self, seconds: float) -> float:
        account = self._account
        count = account.counted_or_starting if self._default else account.counted
        return seconds + self.since - self._clock() + count(self.since)

    @property
    def waited(self) -> float:
        """How many seconds have gone by on the clock."""
        return self._clock() - self.since


def _with(periods: Periods, begin: float, end: float) -> Periods:
    """Return them with one more at their end; the oldest are put together where they are many."""
    if len(periods) >= _MOST:
        (first, first_end), (second, second_end), *rest = periods
        periods = ((second - (first_end - first), second_end), *rest)
    return (*periods, (begin, end))


def _after(periods: Periods, since: float) -> Periods:
    """Return those that ended later."""
    first = len(periods)
    while first and periods[first - 1][1] > since:
        first -= 1
    return periods[first:]


def _length(periods: Periods, since: float) -> float:
    """Return how much time since then they take."""
    return sum(end - max(begin, since) for begin, end in _after(periods, since))


def _union(periods: Periods) -> Periods:
    """Return the time that is in any of them."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(periods):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return tuple(found)
