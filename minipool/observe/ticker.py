"""A ticker: calls something every so often, in a thread of its own, while a pool is open.

The thread starts when the pool is opened, or at once if it is open, and has ended when `close()`
of the pool returns; a pool that is never opened costs none. The pool is not held.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, Callable

from .._sync import Guard, Latch, guarded
from ..engine.shortage import in_words
from ..telemetry import logger

if TYPE_CHECKING:
    from ..pool import Pool


class Ticker:
    """Calls `tick` at the opening of a pool, every `interval` seconds, and once after its end.

    A tick that raises is logged, and the next one comes as if nothing had been; ReferenceError
    (what the tick is about was collected) ends it all.
    """

    def __init__(
        self, pool: Pool[Any], interval: float, tick: Callable[[], object], name: str
    ) -> None:
        self._interval, self._tick, self._name = interval, tick, name
        self._beginning = Guard()  # a signal handler may close what begins
        self._over = Latch()
        self._thread: threading.Thread | None = None
        self._hooks, self._pid = pool.hooks, os.getpid()
        self._hooks["pool.init"].append(self._begin)
        self._hooks["pool.terminate"].append(self._end)
        if pool._desk is not None:
            self._begin()

    @guarded("_beginning")
    def _begin(self, *event: Any) -> None:
        if self._thread is not None or self._over.happened:
            return
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as problem:
            raise RuntimeError(f"{self._name}: {in_words(problem)}") from problem
        self._thread = thread  # now: who is interrupted before leaves nothing to be joined

    def _run(self) -> None:
        while self._ticked() and not self._over.wait(self._interval):
            pass

    def _ticked(self) -> bool:
        try:
            self._tick()
        except ReferenceError:
            return False
        except Exception:
            logger().exception("%s missed a tick and goes on", self._name)
        return True

    def _end(self, *event: Any) -> None:
        """End with the pool, in whose manager's thread this is called; see the last of it."""
        self._stop()
        self._ticked()

    def close(self) -> None:
        """Stop. No tick is under way afterwards, or begins."""
        for event, listener in (("pool.init", self._begin), ("pool.terminate", self._end)):
            with contextlib.suppress(ValueError):
                self._hooks[event].remove(listener)
        self._stop()

    def _stop(self) -> None:
        if self._pid != os.getpid():
            return  # the thread is the other process's, and a lock may have been copied as held
        self._over.set()
        thread = self._beginning.run(lambda: self._thread)
        if thread is not None and thread is not threading.current_thread():
            thread.join(1.0)
