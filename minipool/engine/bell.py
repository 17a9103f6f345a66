"""The bell: how any thread wakes the one that waits for everything, and how that one waits.

A pipe that takes a byte each time, until it is full. Nothing else remembers that it was rung, so an
exception that strikes a ringing thread between two steps cannot mute it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from functools import partial  # see `descriptors`
from itertools import islice
from multiprocessing import connection
from typing import Any, Callable

from .._sync import Latch
from .descriptors import pipe_into

_FULL = 1 << 16  # bytes; what a pipe holds


class Bell:
    """Wakes the manager, from any thread, a signal handler or a finaliser. Never waits."""

    reader: Any = None
    _close_reader: Callable[[], object] = bool  # nothing to close
    _close_writer: Callable[[], object] = bool

    def __init__(self) -> None:
        if sys.platform == "win32":
            self.reader, self._conn = connection.Pipe(duplex=False)
            self._close_reader, self._close_writer = self.reader.close, self._conn.close
            return
        fds: list[int] = []  # the read end, and then the write end
        self._close_reader = partial(any, map(os.close, islice(fds, 1)))
        self._close_writer = partial(any, map(os.close, islice(fds, 1, None)))
        pipe_into(fds)
        for fd in fds:
            os.set_blocking(fd, False)
        self.reader = fds[0]
        # A file that is closed in the midst of a ring is not written to. The number of its
        # descriptor may be another's by then.
        self._file = io.FileIO(fds[1], "w", closefd=False)

    def ring(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed: there is nobody to wake
            if sys.platform != "win32":
                self._file.write(b"!")  # nothing, if it is full
            else:
                self._conn.send_bytes(b"!")

    def silence(self) -> None:
        """Take what is there: who looks at everything afterwards has heard all of it."""
        if sys.platform != "win32":
            with contextlib.suppress(BlockingIOError):
                os.read(self.reader, _FULL)
        else:
            while self.reader.poll(0):
                self.reader.recv_bytes()

    def close(self) -> None:
        if sys.platform != "win32":
            self._file.close()
        self.__del__()

    def __del__(self) -> None:  # for an opening that was interrupted
        self._close_writer()  # first: a ring that is under way finds a reader, or no pipe at all
        self._close_reader()


class Closing(Latch):
    """The close of a pool. What waits in the manager's thread can poll `bell`, rung after it."""

    __slots__ = ("bell",)

    def __init__(self) -> None:
        super().__init__()
        self.bell: Bell | None = None


def ready(sources: list[Any], timeout: float) -> set[Any]:
    """Return those that have something to say."""
    return set(connection.wait(sources, timeout))
