"""The log relay: writes what the manager logs, in a thread of its own.

A log handler may be slow, and standard error a pipe that nobody reads: the manager, which replaces
workers, must wait for neither. The thread is started by the first record. What waits for it is
bounded; what does not fit is dropped, and the number is told. Records keep their order, and the
time and the thread they were made in (see `telemetry.log_through`).
"""

from __future__ import annotations

import collections
import contextlib
from typing import Callable

from ..telemetry import WARNING, logger
from .jobs import JobThread

MOST = 1000  # records that wait


class LogRelay:
    """Writes the log records of one manager. Used by its thread, but for `here`."""

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self._thread: JobThread | None = None  # None: nothing was logged yet
        self._unsaid: collections.deque[Callable[[], object]] = collections.deque()
        self._dropped = self._told = 0  # one is the manager's, the other the thread's

    @property
    def here(self) -> bool:
        """Whether a log handler is running in the calling thread, called by this relay."""
        return self._thread is not None and self._thread.here

    def put(self, write: Callable[[], object]) -> None:
        """Have a record written after those before it. Never waits.

        Where no thread is to be had, the record waits for the next one, or for `close`.
        """
        if len(self._unsaid) >= MOST:
            self._dropped += 1
            return
        self._unsaid.append(write)
        if self._thread is not None or self._started():
            self._ask()

    def _started(self) -> bool:
        thread = JobThread(f"minipool-{self._pool}-log")
        try:
            thread.start()
        except RuntimeError:
            return False
        self._thread = thread
        return True

    def _ask(self) -> None:
        assert self._thread is not None
        self._thread.put(self._write_next)

    def close(self, timeout: float) -> None:
        """Write what is left; after so many seconds, leave the rest.

        A handler that does not return keeps its thread, which ends with it.
        """
        if self._thread is not None:
            self._ask()  # for what came before there was a thread
            self._thread.close(timeout)
        else:  # no thread was to be had, and there is nothing left to hold up
            with contextlib.suppress(Exception):
                self._write_next()

    # -- the thread --------------------------------------------------------------------------

    def _write_next(self) -> None:
        """Write what there is; how many were dropped is told when all has been written."""
        while self._unsaid and not (self._thread is not None and self._thread.silenced):
            write = self._unsaid[0]  # counted as waiting while it is written
            try:
                write()
            finally:
                self._unsaid.popleft()
                del write
        dropped = self._dropped - self._told
        if dropped:
            self._told += dropped
            logger().log(
                WARNING,
                "%s: %d log records of the manager were dropped; they came faster than their "
                "handlers took them", self._pool, dropped,
            )  # fmt: skip
