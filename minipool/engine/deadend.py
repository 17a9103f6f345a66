"""The parent's end of a worker that was started and could not be given a real one.

The worker is killed, and ends like any other: the manager finds a pipe at its end.
"""

from __future__ import annotations

from typing import Any, NoReturn

from .channel import End, PeerGone


class DeadEnd(End):
    """Has nothing to say, and nobody to say it to. Owns the pipe, to close it."""

    unsent: tuple[memoryview, ...] = ()
    out = -1

    def __init__(self, conn: Any) -> None:
        super().__init__(0)
        self._conn = conn
        self.fd = getattr(conn, "reader", conn)  # what can be waited for: it ends with the worker

    def _piece_now(self) -> bytes:
        return b""

    def exchange(self, *request: Any) -> NoReturn:
        raise PeerGone

    def post(self, call_id: int, kind: int, *parts: bytes) -> NoReturn:
        raise PeerGone

    def flush(self) -> None:
        pass

    def hang_up(self) -> None:
        pass

    def disturbed(self) -> bool:
        return True

    def close(self) -> None:
        self._conn.close()
