"""The bell: how any thread wakes the one that waits for everything, and how that one waits.

A pipe with one byte in it at most. Ringing never waits, so signal handlers and finalisers may.
"""

from __future__ import annotations

import contextlib
import select
from multiprocessing import connection
from typing import Any


class Bell:
    """Wakes the manager, from any thread, a signal handler or a finaliser. Never waits."""

    def __init__(self) -> None:
        self.reader, self._writer = connection.Pipe(duplex=False)
        self._rung = False

    def ring(self) -> None:
        if not self._rung:  # one byte is enough: the manager looks at everything
            self._rung = True
            with contextlib.suppress(OSError, ValueError):  # closed: nobody needs waking any more
                self._writer.send_bytes(b"!")

    def silence(self) -> None:
        """Take the byte, then forget that it came: what is written later rings again."""
        if self.reader.poll(0):
            self.reader.recv_bytes()
        self._rung = False

    def close(self) -> None:
        self.reader.close()
        self._writer.close()


def ready(sources: list[Any], timeout: float) -> set[Any]:
    """Return those that have something to say: `connection.wait` without its cost, if it can be."""
    if not hasattr(select, "poll"):
        return set(connection.wait(sources, timeout))
    poll, known = select.poll(), {}
    for source in sources:
        fd = source if isinstance(source, int) else source.fileno()
        known[fd] = source
        poll.register(fd, select.POLLIN)
    return {known[fd] for fd, _ in poll.poll(timeout * 1000)}
