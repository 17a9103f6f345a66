"""The parent's end of a worker's pipe, in a fast and a portable kind.

The fast kind makes one write and one read for a small message. The portable kind uses
`multiprocessing.Connection` and `connection.wait` and runs everywhere. Both write the same bytes,
so either can talk to either kind of worker's end (see `workerend`).

A parent's end is used by one thread at a time, the one that owns the worker. Neither end is ever
left with half a frame by a failed attempt to *make* one; what breaks in mid-frame stays broken,
and its worker is replaced.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import threading
import time
from typing import Any, Callable

from . import wire

SMALL = 32 * 1024  # up to here one write takes all: the socket's buffer is far larger and empty
CHUNK = 64 * 1024
#: What an end reads at once until a frame was longer: so short a bytes object needs no `malloc`.
SHORT = 448
_FOREVER = 2e6  # seconds; what `poll` can take in milliseconds
_LOOK = 1.0  # seconds; a signal that comes a moment before a wait begins does not end it
_SOON = 1e-6  # seconds; 0 would mean non-blocking, which fails in another way
PIECE = 8 << 20  # grow the buffer of a long frame by this much, never by what it claims to be

# Bound once: each name looked up on the way of a call is paid for by every call.
_write = os.write
_pack_request, _unpack_reply = wire.REQUEST.pack, wire.REPLY.unpack_from
_REQUEST_HEADER = wire.REQUEST.size - 4  # what the length counts of it
_REPLY_HEADER = wire.REPLY.size


class PeerGone(Exception):
    """The worker died or closed its end before the whole reply was here."""


class TimedOut(Exception):
    """The reply is not here in time. The pipe must not be used again: it may still come."""


class Garbled(Exception):
    """What came is no frame. The pipe must not be used again."""


class TooLong(Exception):
    """The request is longer than `max_message`. Nothing was sent; the pipe is as good as before."""


class _QuietSocket(socket.socket):
    """Closes itself when it is collected: a lease may outlive its worker, and then has the last
    hold of the pipe. That is no reason for a ResourceWarning."""

    def __del__(self) -> None:
        self.close()


class _End:
    """What both kinds share: frames are put together from whatever pieces they come in."""

    def __init__(self, limit: int) -> None:
        self._limit = limit  # bytes in a frame; one that claims more is garbage
        self._got = bytearray()  # what came and was not yet taken

    def _receive_piece(self, most: int, deadline: float | None) -> bytes:
        """Wait for some bytes; b"" is the end of the pipe."""
        raise NotImplementedError

    def _piece_now(self) -> bytes | None:
        """Return the bytes that are there, b"" at the end of the pipe; None if there are none."""
        raise NotImplementedError

    def receive_now(self) -> memoryview | None:
        """Return the frame that is there, or None if it is not there whole. Never waits.

        Raises:
            PeerGone, Garbled: the worker is of no more use.
        """
        while self._missing():
            piece = self._piece_now()
            if piece is None:
                return None
            self._add(piece)
        frame = self._take()
        self._expect_no_more()
        return frame

    def _receive(self, call_id: int, deadline: float | None) -> tuple[int, bytes | memoryview]:
        """Wait until a whole frame is here, and take it; return its status and body.

        What is no reply to this call is found by its header: the length before it means nothing.
        """
        while True:
            missing = self._missing()
            if not missing:
                return _checked(call_id, self._take())
            start = length_of(self._got, self._limit)[0] - 4
            if len(self._got) >= start + _REPLY_HEADER:
                _checked(call_id, bytes(self._got[start : start + _REPLY_HEADER]))
            self._add(self._receive_piece(max(CHUNK, min(PIECE, missing)), deadline))

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise TooLong(size)

    def _add(self, piece: bytes) -> None:
        if not piece:
            raise PeerGone
        self._got += piece

    def _missing(self) -> int:
        """Return how many bytes must come before there is a whole frame."""
        head, size = length_of(self._got, self._limit)
        return max(0, head + (size or 0) - len(self._got)) if size is not None else 1

    def _take(self) -> memoryview:
        head, size = length_of(self._got, self._limit)
        end = head + (size or 0)
        whole, self._got = self._got, self._got[end:]
        return memoryview(whole)[head - 4 : end]

    def _expect_no_more(self) -> None:
        if self._got:
            raise Garbled("more came than one reply")


class FastEnd(_End):
    """The parent's end, on a socket. `death_fd` becomes readable when the worker is gone.

    `socket.recv` with a timeout polls and reads in one C call, keeps its deadline through signals,
    and is the cheapest wait there is from Python. It does not watch `death_fd`: the end of the
    pipe tells of a death as fast. Where siblings hold copies of the worker's end, so that it does
    not end, the manager sees the death and calls `hang_up`, which ends the wait.
    """

    def __init__(self, sock: socket.socket, death_fd: int, limit: int) -> None:
        super().__init__(limit)
        self._sock = sock  # owns the descriptor
        self.fd = sock.fileno()
        self._death_fd = death_fd
        self._timeout: float | None = -1.0
        self._set_timeout(None)
        self._recv = sock.recv
        self._most = SHORT  # bytes to read at once

    def _set_timeout(self, timeout: float | None) -> None:
        """Let `recv` wait so long. It costs a system call, and most calls have the same."""
        limit = _LOOK if timeout is None else min(max(_SOON, timeout), _LOOK)
        self._sock.settimeout(limit)
        self._timeout = timeout

    def exchange(
        self, call_id: int, kind: int, name: bytes, body: bytes, timeout: float | None, start: int
    ) -> tuple[int, bytes | memoryview]:
        """Send one request; return status and body of the one reply. The way of every call.

        `start` is when it began, in monotonic nanoseconds: the `timeout` counts from there.

        Raises:
            PeerGone, TimedOut, Garbled: the worker is of no more use.
            TooLong: nothing was sent.
        """
        size = _REQUEST_HEADER + len(name) + len(body)
        if size > SMALL:
            deadline = _deadline(timeout, start)
            self._check(size)
            head = wire.REQUEST.pack(0, call_id, kind, len(name))[4:]
            self._send_long(head + name, body, deadline)
            return self._reply_to(call_id, deadline)
        recv = self._recv  # see `Handle.request`
        try:
            if timeout != self._timeout:
                self._set_timeout(timeout)
            if _write(self.fd, _pack_request(size, call_id, kind, len(name)) + name + body) < size:
                raise Garbled("the pipe to an idle worker was full")
            reply = recv(self._most)
            size, got_id, status = _unpack_reply(reply)
        except socket.timeout:  # at least one look is over
            return self._reply_to(call_id, _deadline(timeout, start))
        except OSError:
            raise PeerGone from None
        except struct.error:
            size = got_id = -1  # less than a header, or the end
        if size + 4 != len(reply) or got_id != call_id:
            self._most = CHUNK
            self._add(reply)
            return self._reply_to(call_id, _deadline(timeout, start))
        return status, reply[_REPLY_HEADER:]

    def _reply_to(self, call_id: int, deadline: float | None) -> tuple[int, bytes | memoryview]:
        reply = self._receive(call_id, deadline)
        self._expect_no_more()
        return reply

    def send(self, call_id: int, kind: int, body: bytes = b"") -> None:
        """Send a small request without a name, without waiting for anything.

        Raises:
            PeerGone: the worker is dead, or has not read what was sent before.
        """
        try:
            size = _REQUEST_HEADER + len(body)
            os.write(self.fd, _pack_request(size, call_id, kind, 0) + body)
        except OSError:
            raise PeerGone from None

    def _piece_now(self) -> bytes | None:
        try:
            return os.read(self.fd, CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            raise PeerGone from None

    def disturbed(self) -> bool:
        """Tell whether an idle worker's pipe has something to read, or the worker is dead."""
        poll = select.poll()
        try:
            poll.register(self.fd, select.POLLIN)
        except ValueError:
            return True  # closed
        poll.register(self._death_fd, select.POLLIN)
        return bool(poll.poll(0))

    def _receive_piece(self, most: int, deadline: float | None) -> bytes:
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            try:
                self._set_timeout(left)
                return self._recv(most)
            except socket.timeout:
                if left is not None and left <= _LOOK:
                    raise TimedOut from None
            except OSError:
                raise PeerGone from None

    def _send_long(self, head: bytes, body: bytes, deadline: float | None) -> None:
        """Write a frame that may not fit the socket's buffer, watching the worker and the clock."""
        size = len(head) + len(body)
        length = wire.LENGTH.pack(size) if size <= wire.SHORT_FRAME else long_length(size)
        poll = select.poll()
        try:
            poll.register(self.fd, select.POLLOUT)
        except ValueError:
            raise PeerGone from None  # closed
        poll.register(self._death_fd, select.POLLIN)
        for part in (memoryview(length + head), memoryview(body)):
            while part:
                try:
                    part = part[os.write(self.fd, part) :]
                except BlockingIOError:
                    events = poll.poll(_left_ms(deadline))
                    if not events:
                        raise TimedOut from None
                    if any(fd == self._death_fd for fd, _ in events):
                        raise PeerGone from None
                except OSError:
                    raise PeerGone from None

    def hang_up(self) -> None:
        """End the wait of whoever waits for this worker, which is dead."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the pipe. A thread that still wants to use it gets PeerGone."""
        self.fd = -1
        self._sock.close()


class PortableEnd(_End):
    """The parent's end, on `multiprocessing.Connection`; made for platforms without `poll`."""

    def __init__(self, conn: Any, sentinel: int, limit: int) -> None:
        super().__init__(limit)
        self._conn = conn
        self._open = [conn]  # whoever pops it closes it
        self._closed = self._sending = False
        self.fd = conn  # what `connection.wait` takes in place of a descriptor
        self._sentinel = sentinel
        #: Called with the words that a worker without a shared table sends along.
        self.on_words: Callable[[bytes | memoryview], None] = lambda words: None

    def exchange(
        self, call_id: int, kind: int, name: bytes, body: bytes, timeout: float | None, start: int
    ) -> tuple[int, bytes | memoryview]:
        deadline = _deadline(timeout, start)
        payload = wire.REQUEST.pack(0, call_id, kind, len(name))[4:] + name + body
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

    def send(self, call_id: int, kind: int, body: bytes = b"") -> None:
        self._send(wire.REQUEST.pack(0, call_id, kind, 0)[4:] + body)

    def _piece_now(self) -> bytes | None:
        return self._receive_piece(CHUNK, time.monotonic()) if self._readable() else None

    def hang_up(self) -> None:
        pass  # `_receive` watches the sentinel itself

    def disturbed(self) -> bool:
        try:
            return bool(_ready([self._conn, self._sentinel], 0))
        except (OSError, ValueError):
            return True  # closed

    def _readable(self) -> bool:
        try:
            return bool(self._conn.poll(0))
        except (OSError, EOFError):
            raise PeerGone from None

    def _send(self, payload: bytes) -> None:
        try:
            self._conn.send_bytes(payload)
        except (OSError, ValueError):
            raise PeerGone from None

    def _send_watched(self, payload: bytes, deadline: float | None) -> None:
        """Send from a thread of its own, because a blocking send cannot be given a deadline.

        If it does not end in time the worker is killed, which ends the send as well.
        """
        done = threading.Event()

        def send() -> None:
            try:
                self._conn.send_bytes(payload)
            except (OSError, ValueError):
                pass  # the wait for the reply finds the worker dead
            finally:
                self._sending = False
                done.set()
                if self._closed:
                    self.close()

        self._sending = True
        threading.Thread(target=send, name="minipool-send", daemon=True).start()
        if not done.wait(_left(deadline)):
            raise TimedOut

    def _receive_piece(self, most: int, deadline: float | None) -> bytes:
        try:
            ready: list[Any] = []
            while not ready:
                left = _left(deadline)
                ready = _ready(
                    [self._conn, self._sentinel], _LOOK if left is None else min(left, _LOOK)
                )
                if not ready and left is not None and left <= _LOOK:
                    raise TimedOut
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


def _checked(call_id: int, frame: bytes | memoryview) -> tuple[int, bytes | memoryview]:
    """Return status and body of a reply, if it is the reply to that call."""
    try:
        _, got_id, status = _unpack_reply(frame)
    except struct.error:
        raise Garbled(f"a frame of {len(frame)} bytes") from None
    if got_id != call_id:
        raise Garbled(f"a reply to call {got_id} instead of {call_id}")
    return status, frame[_REPLY_HEADER:]


def length_of(buffer: bytes | bytearray, limit: int) -> tuple[int, int | None]:
    """Return the size of the length field and the payload's size, None if not here yet.

    Raises:
        Garbled: it claims to be longer than `limit` bytes.
    """
    if len(buffer) < 4:
        return 4, None
    (size,) = wire.LENGTH.unpack_from(buffer)
    head = 4
    if size == -1:
        if len(buffer) < wire.LONG_LENGTH.size:
            return wire.LONG_LENGTH.size, None
        head, size = wire.LONG_LENGTH.size, wire.LONG_LENGTH.unpack_from(buffer)[1]
    if not 0 <= size <= limit:
        raise Garbled(f"a frame claims to be {size} bytes long")
    return head, size


def long_length(size: int) -> bytes:
    return wire.LONG_LENGTH.pack(-1, size)


def _deadline(timeout: float | None, start: int) -> float | None:
    return None if timeout is None else start / 1e9 + timeout


def _left(deadline: float | None) -> float | None:
    """Return the seconds until then, as far as they can be waited for."""
    return None if deadline is None else min(max(0.0, deadline - time.monotonic()), _FOREVER)


def _ready(sources: list[Any], timeout: float | None) -> list[Any]:
    from multiprocessing import connection  # imports much that most workers can do without

    return connection.wait(sources, timeout)


def pair(context: Any, portable: bool) -> tuple[Any, Any]:
    """Make a pipe; return what becomes the parent's end and what travels to the worker."""
    if portable:
        ends: tuple[Any, Any] = context.Pipe(duplex=True)
        return ends
    ours, theirs = socket.socketpair()
    ours = _QuietSocket(ours.family, ours.type, 0, ours.detach())
    theirs.setblocking(True)  # which `socket.setdefaulttimeout` would have changed
    return ours, wire.Descriptor(theirs.detach())


def _left_ms(deadline: float | None) -> float | None:
    left = _left(deadline)
    return None if left is None else left * 1000
