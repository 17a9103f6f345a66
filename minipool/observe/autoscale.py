"""Autoscale: carries out what the optimizer decides, for a pool with `autoscale=True`.

Runs in a thread of its own while the pool is open, and holds the pool weakly. It samples sixty
times in an `optimization_interval`, remembers five of them, and decides once in each.
"""

from __future__ import annotations

import collections
import weakref
from typing import TYPE_CHECKING, Any, Callable, Deque

from ..errors import ConfigError, PoolClosed
from ..telemetry import INFO, WARNING, remark
from .metrics import Metrics, Snapshot
from .optimizer import DOWN, Decision, decide
from .reading import Reading, read
from .ticker import Ticker

if TYPE_CHECKING:
    from ..pool import Pool

_SAMPLES = 60  # in an optimization interval


class Autoscaler:
    """Fits the size of one pool to its load."""

    def __init__(self, pool: Pool[Any], *, read: Callable[[Pool[Any]], Reading] = read) -> None:
        self._pool, self._config = weakref.ref(pool), pool.config
        self._metrics = Metrics(pool, interval=None, read=read)
        self._history: Deque[Snapshot] = collections.deque(maxlen=DOWN * _SAMPLES + 1)
        self._decided = float("-inf")
        interval = self._config.optimization_interval
        self._ticker = Ticker(pool, interval / _SAMPLES, self.tick, "minipool-autoscale")

    def tick(self) -> Decision | None:
        """Take a sample; if it is time, decide by what was seen, and do it.

        Raises:
            ReferenceError: the pool was collected.
        """
        snapshot = self._metrics.sample()
        if snapshot.status != "open":
            return None
        self._history.append(snapshot._replace(workers=()))
        if snapshot.at - self._decided < self._config.optimization_interval * 0.99:
            return None
        self._decided = snapshot.at
        decision = decide(list(self._history), self._config)
        if decision.resize_to is not None or decision.overflow is not None:
            self._carry_out(decision)
            self._history = collections.deque([snapshot], self._history.maxlen)
        return decision

    def _carry_out(self, decision: Decision) -> None:
        pool = self._pool()
        if pool is None or pool._desk is None:
            return
        remark(INFO, "%s: %s", self._config.name, decision)
        if decision.resize_to is not None:
            try:
                pool.resize(decision.resize_to, gentle=True)
            except PoolClosed:  # this moment
                return
            except ConfigError as problem:  # too few descriptors; what is there serves on
                remark(WARNING, "%s is not resized: %s", self._config.name, problem)
        if decision.overflow is not None:
            manager, overflow = pool._desk.manager, decision.overflow
            manager.command(lambda: manager.staff.allow_overflow(overflow))
