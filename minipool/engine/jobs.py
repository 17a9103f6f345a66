"""A thread that does jobs one after the other, for threads that must not wait for them.

A job may be slow, raise, or never return: all it can hold up is the jobs behind it, and `close`
for as long as its caller wants. What may be waiting is for the user of this module to bound.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Callable

Job = Callable[[], object]


class JobThread:
    """The thread, and what waits for it. Any thread may `put`, a signal handler too."""

    def __init__(self, name: str) -> None:
        # `SimpleQueue.put` may be interrupted by itself, and waits for nothing.
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.silenced = False  # what is left is not done any more

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: there is none to be had; try again later.
        """
        self._thread.start()

    @property
    def here(self) -> bool:
        """Whether the calling thread is this one (a job runs in it)."""
        return threading.current_thread() is self._thread

    @property
    def empty(self) -> bool:
        """Whether no job is waiting; one may be under way."""
        return self._jobs.empty()

    def put(self, job: Job) -> None:
        """Have a job done after those before it. Never waits."""
        self._jobs.put(job)

    def close(self, timeout: float) -> bool:
        """Do what is left and end; after so many seconds, leave the rest and return False.

        A job that does not return keeps its thread, which ends with it.
        """
        self._ending = True
        self._jobs.put(None)
        self._thread.join(timeout)
        self.silenced = True
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not (self._ending and self._jobs.empty()):
            job = self._jobs.get()
            if job is not None and not self.silenced:
                with contextlib.suppress(BaseException):  # whoever puts it sees to its errors
                    job()
            del job  # it may hold much, and the next may be long in coming
