"""The parent's end of a worker's pipe in its portable kind, for platforms without `poll`.

On `multiprocessing.Connection` and `connection.wait`; slower than the fast kind (see `channel`),
and made of what every platform has.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import threading
import time
from multiprocessing import connection
from typing import Any, Callable

from .._sync import Latch
from . import wire
from .channel import (
    CHUNK,
    LOOK,
    SMALL,
    End,
    Garbled,
    PeerGone,
    TimedOut,
    Unsent,
    long_length,
)
from .sigpipe import unsignalled

_FITS = 4096  # bytes; an idle worker's pipe has room for them on every platform
_FOREVER = 2e6  # seconds; what `connection.wait` can take in milliseconds


class PortableEnd(End):
    """The parent's end, on `multiprocessing.Connection`."""

    def __init__(self, conn: Any, sentinel: int, limit: int) -> None:
        super().__init__(limit)
        self._conn = conn
        self._open = [conn]  # whoever pops it closes it
        self._closed = self._sending = self._dead = False
        self.fd = conn  # what `connection.wait` takes in place of a descriptor
        self._sentinel = sentinel
        #: Called with the words that a worker without a shared table sends along.
        self.on_words: Callable[[bytes | memoryview], None] = lambda words: None

    def exchange(
        self, call_id: int, kind: int, name: bytes, body: bytes, timeout: float | None, start: int
    ) -> tuple[int, bytes | memoryview]:
        deadline = self._deadline(timeout, start)
        try:
            payload = wire.REQUEST.pack(0, call_id, kind, len(name))[4:] + name + body
        except MemoryError:
            raise Unsent from None
        if len(payload) > SMALL:
            self._check(len(payload))
            self._send_watched(payload, deadline)
        else:
            self._send(payload)
        while True:
            status, reply = self._receive(call_id, deadline)
            if status & wire.WITH_WORDS:
                if len(reply) < wire.WORDS.size:
                    raise Garbled("a reply without the words it should have")
                self.on_words(reply)
                status, reply = status & ~wire.WITH_WORDS, reply[wire.WORDS.size :]
            if status != wire.BEGUN:
                self._expect_no_more()
                return status, reply

    #: Nothing is ever left for the manager to send: what may not fit goes by a thread.
    unsent: tuple[memoryview, ...] = ()
    out = -1

    def post(self, call_id: int, kind: int, *parts: bytes) -> None:
        """As `FastEnd.post`.

        Raises:
            PeerGone: the worker is dead.
            RuntimeError: out of threads; nothing was sent.
        """
        payload = b"".join((wire.REQUEST.pack(0, call_id, kind, 0)[4:], *parts))
        if len(payload) > _FITS:
            self._send_aside(payload)
        else:
            self._send(payload)

    def flush(self) -> None:
        pass

    def _piece_now(self) -> bytes | None:
        return self._receive_piece(CHUNK, time.monotonic()) if self._readable() else None

    def hear_out(self) -> None:
        """Take what a dead worker has said of the call under way: the first frame tells it."""
        with contextlib.suppress(PeerGone, TimedOut, Garbled, struct.error):
            while self._missing():
                piece = self._piece_now()
                if piece is None:
                    return
                self._add(piece)
            frame = self._take()
            if wire.REPLY.unpack_from(frame)[2] & wire.WITH_WORDS:
                self.on_words(frame[wire.REPLY.size :])

    def hang_up(self) -> None:
        self._dead = True

    def disturbed(self) -> bool:
        try:
            return bool(connection.wait([self._conn, self._sentinel], 0))
        except (OSError, ValueError):
            return True  # closed

    def _readable(self) -> bool:
        try:
            return bool(self._conn.poll(0))
        except (OSError, EOFError):
            raise PeerGone from None

    def _send(self, payload: bytes) -> None:
        try:
            unsignalled(self._conn.send_bytes, payload)
        except (OSError, ValueError):
            raise PeerGone from None

    def _send_watched(self, payload: bytes, deadline: float | None) -> None:
        """Send from a thread of its own, because a blocking send cannot be given a deadline.

        If it does not end in time the worker is killed, which ends the send as well.
        """
        sent = self._send_aside(payload)
        while not sent.happened:
            left = _left(deadline)
            if sent.wait(LOOK if left is None else min(left, LOOK)):
                return
            if self._dead or connection.wait([self._sentinel], 0):
                raise PeerGone  # though what it has started may hold its end of the pipe
            if deadline is not None and left is not None and left <= LOOK:
                deadline = self._extended(deadline)

    def _send_aside(self, payload: bytes) -> Latch:
        """Send from a thread of its own; return what tells of its end, good or bad."""
        done = Latch()

        def send() -> None:
            try:
                unsignalled(self._conn.send_bytes, payload)
            except (OSError, ValueError):
                pass  # the wait for the reply finds the worker dead
            finally:
                self._sending = False
                done.set()
                if self._closed:
                    self.close()

        self._sending = True
        sender = threading.Thread(target=send, name="minipool-send", daemon=True)
        try:
            sender.start()
        except RuntimeError:  # out of threads
            self._sending = False
            raise
        self.sender = sender
        return done

    def _receive_piece(self, most: int, deadline: float | None) -> bytes:
        try:
            ready: list[Any] = []
            while not ready:
                left = _left(deadline)
                ready = connection.wait(
                    [self._conn, self._sentinel], LOOK if left is None else min(left, LOOK)
                )
                if not ready and self._dead:
                    raise PeerGone
                if not ready:
                    deadline = self._after_look(deadline, left)
            if self._conn not in ready and not self._conn.poll(0):
                raise PeerGone
            if sys.platform != "win32":  # there a message comes whole, here it may never end
                return os.read(self._conn.fileno(), most)
            message: bytes = self._conn.recv_bytes()
            short = len(message) <= wire.SHORT_FRAME
            return (wire.LENGTH.pack if short else long_length)(len(message)) + message
        except (EOFError, OSError, ValueError, TypeError):  # at its end, or closed meanwhile
            raise PeerGone from None

    def close(self) -> None:
        """Close the pipe, once: two threads may come, and `Connection.close` is no single step.

        While a request is being sent, which nobody waits for any more, its sender will close it.
        """
        self._closed = True
        while self._open and not self._sending:
            with contextlib.suppress(IndexError):
                self._open.pop().close()


def _left(deadline: float | None) -> float | None:
    """Return the seconds until then, as far as they can be waited for."""
    return None if deadline is None else min(max(0.0, deadline - time.monotonic()), _FOREVER)
