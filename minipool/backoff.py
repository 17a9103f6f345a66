"""Backoff: how long to wait before the next try, after so many that failed.

Pure: no clock, no waiting, no thread. Each user has one of its own; see `Fleet` for the starts of
workers and `RetryPolicy` for calls. `random` is an argument, so that tests know what comes.
"""

from __future__ import annotations

import math
import random as _random
from typing import Any, Callable


class Backoff:
    """Gives pauses that grow: `base` seconds, then `multiplier` times as long, up to `cap`.

    Each is up to the share `jitter` longer or shorter, so that those who failed together do not
    come back together. With `decorrelated` each pause starts from the last one as it was, jitter
    included, so that two who once differ drift apart: what a crowd of callers needs.

    Raises:
        ValueError: an argument is no such number.
    """

    def __init__(
        self,
        base: float = 0.1,
        cap: float = 30.0,
        multiplier: float = 2.0,
        jitter: float = 0.25,
        *,
        decorrelated: bool = False,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self.base: float = at_least(0, "base", base)
        self.cap: float = at_least(base, "cap", cap)
        self.multiplier: float = at_least(1, "multiplier", multiplier)
        self.jitter: float = at_least(0, "jitter", jitter)
        if jitter > 1:
            raise ValueError(f"jitter={jitter!r}: give a share, from 0 to 1")
        self.failures = 0  # in a row
        self._decorrelated = decorrelated
        self._random = random
        self._last = 0.0

    def next(self) -> float:
        """Count one more failure; return the seconds to wait after it."""
        steady = self.base
        if self.failures:  # decorrelated, the last one may have been shorter than `base`
            steady = max(self.base, min(self.cap, self._last * self.multiplier))
        self.failures += 1
        pause = steady * (1 + self.jitter * (2 * self._random() - 1))
        self._last = pause if self._decorrelated else steady
        return pause

    def reset(self) -> None:
        """Begin anew: something succeeded."""
        self.failures = 0

    def __repr__(self) -> str:
        return f"<Backoff: {self.failures} failures in a row>"


def at_least(least: float, name: str, value: Any, whole: bool = False) -> Any:
    """Return an argument as given, if it is a finite number, large enough, and whole if asked for.

    Raises:
        ValueError: it is not.
    """
    kinds = int if whole else (int, float)
    right = isinstance(value, kinds) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or value < least:
        raise ValueError(f"{name}={value!r}: give a {'whole ' * whole}number, {least} or more")
    return value
