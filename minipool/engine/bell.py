"""The bell: how any thread wakes the one that waits for everything, and how that one waits.

A pipe that takes a byte each time, until it is full. Nothing else remembers that it was rung, so an
exception that strikes a ringing thread between two steps cannot mute it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from multiprocessing import connection
from typing import Any

from .descriptors import lift_connection

_FULL = 1 << 16  # bytes; what a pipe holds


class Bell:
    """Wakes the manager, from any thread, a signal handler or a finaliser. Never waits."""

    def __init__(self) -> None:
        self.reader, self._conn = connection.Pipe(duplex=False)
        lift_connection(self.reader)
        lift_connection(self._conn)
        if sys.platform != "win32":
            os.set_blocking(self.reader.fileno(), False)
            os.set_blocking(self._conn.fileno(), False)
            # A file that is closed in the midst of a ring is not written to. The number of its
            # descriptor may be another's by then.
            self._file = io.FileIO(self._conn.fileno(), "w", closefd=False)

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
                os.read(self.reader.fileno(), _FULL)
        else:
            while self.reader.poll(0):
                self.reader.recv_bytes()

    def close(self) -> None:
        if sys.platform != "win32":
            self._file.close()
        self._conn.close()  # first: a ring that is under way finds a reader, or no pipe at all
        self.reader.close()


def ready(sources: list[Any], timeout: float) -> set[Any]:
    """Return those that have something to say."""
    return set(connection.wait(sources, timeout))
