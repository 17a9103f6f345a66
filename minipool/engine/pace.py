"""Pace: how long calls take, as the calls of the last minute tell.

What a queue leaves of a timeout bounds the call that comes after it, and a call that does not end
in time costs its worker. So a call is not sent when less time is left than such calls take, and
its caller leaves the line when it comes to that: an overloaded pool refuses, it does not kill.

Used by callers that had to queue, and by no other. One of them reads the histograms of the table,
once a second at most. Readings are kept for a minute; the difference between the first and the
last is what the last minute's calls took. Any thread may ask: what is kept is replaced, never
changed, so a reading that two threads make at once costs one of the two.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from typing import Callable, Iterable, Sequence, Tuple

from . import table as t

#: Monotonic time by which checkout and call must be done; seconds that the call may take at most.
Budget = Tuple[float, float]

WINDOW = 60.0  # seconds of calls that are looked at
_STEP = 10.0  # seconds between two readings that are kept
_FRESH = 1.0  # seconds for which a reading is believed
_SLOW = 0.999  # of the calls take no longer than is hoped for
MOST = 0.9  # of a call's timeout is the most that must be left of it
_FOREVER = 1e9  # seconds; as good as no limit
_SOON = 1e-6  # seconds; waits for nobody, and yet is not 0, which asks for other errors


class Pace:
    """How long calls of one pool take lately. Any thread may ask."""

    def __init__(
        self,
        rows: Callable[[], Iterable[memoryview]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rows, self._clock = rows, clock
        #: When, and how many calls had fallen into each bucket by then; oldest first.
        self._readings: tuple[tuple[float, Sequence[int]], ...] = ((clock(), [0] * t.BUCKETS),)
        self._read_at = 0.0
        self._up_to = [0] * t.BUCKETS  # how many calls of late are in a bucket or one before it

    def needed(self, limit: float) -> float:
        """Return how many seconds must be left for a call that may take `limit` at most.

        It is the median of the calls that took no longer than `limit` (others are of another
        kind: this one would have failed), or the time that 999 of 1,000 of them take, if that is no
        more than half of `limit`. If all took longer, it is nearly all of `limit`. 0: there were no
        calls, so nothing is known.
        """
        self._read()
        up_to = self._up_to
        if not up_to[-1]:
            return 0.0
        alike = up_to[t.bucket(int(min(limit, _FOREVER) * 1e9))]
        if not alike:
            return MOST * limit
        usual = t.bucket_start_ns(bisect_left(up_to, alike / 2) + 1) / 1e9
        slow = t.bucket_start_ns(bisect_left(up_to, _SLOW * alike) + 1) / 1e9
        return min(max(usual, min(slow, limit / 2)), MOST * limit)

    def patience(self, timeout: float | None, budget: Budget) -> float | None:
        """Return how long to wait for a worker: `timeout`, or until too little time is left."""
        end, limit = budget
        needed = self.needed(limit)
        if not needed:
            return timeout
        most = round(max(_SOON, end - self._clock() - needed), 6)
        return most if timeout is None else min(timeout, most)

    def _read(self) -> None:
        """Read the table, unless that was done a moment ago and there were calls."""
        now = self._clock()
        if self._up_to[-1] and now - self._read_at < _FRESH:
            return
        self._read_at = now
        counts = t.histograms(self._rows())[1]
        readings = self._readings
        while len(readings) > 1 and readings[1][0] <= now - WINDOW:
            readings = readings[1:]
        # A row that is being buried may be counted twice for a moment, so a count can fall.
        lately = (max(0, count - before) for count, before in zip(counts, readings[0][1]))
        self._up_to = list(itertools.accumulate(lately))
        if now - readings[-1][0] >= _STEP:
            readings += ((now, counts),)
        self._readings = readings
