"""The worker's end of its pipe, in the same two kinds as the parent's (see `channel`)."""

from __future__ import annotations

import os
import select
import sys
from types import FrameType, TracebackType
from typing import Any, Iterator

from . import wire
from .assignment import MAX_ASSIGNMENT
from .channel import CHUNK, PIECE, SHORT, SMALL, Unreceived, length_of, long_length, widen
from .descriptors import close_all

# Bound once: each name looked up on the way of a call is paid for by every call.
_read, _write = os.read, os.write
_unpack_request, _pack_reply = wire.REQUEST.unpack_from, wire.REPLY.pack
_NAME = wire.REQUEST.size  # where the name begins
_REPLY_HEADER = wire.REPLY.size
_LONGEST_HEADER = wire.LONG_LENGTH.size - 4 + _NAME  # as far as it is of one size


class _WorkerEnd:
    """What both kinds share: long requests, and the longest message that may be sent."""

    def __init__(self, conn: Any, fd: int, limit: int) -> None:
        self._conn, self._fd, self._limit = conn, fd, limit
        self._most = SHORT  # bytes to read at once

    def receive(self) -> tuple[int, int, bytes, bytes | memoryview]:
        """Wait for the next request; return its call id, kind, name and body.

        Raises:
            EOFError: the parent is gone or has closed the pipe.
            Unreceived: there is not enough memory for it; the pipe is well.
        """
        raise NotImplementedError

    def receive_assignment(self) -> bytes | memoryview:
        """Wait for the first request, which is of any length; return its body.

        Raises:
            EOFError: the parent is gone or has closed the pipe.
        """
        limit, self._limit = self._limit, MAX_ASSIGNMENT
        body = self.receive()[3]
        self._limit, self._most = limit, SHORT
        return body

    def was_waiting(self, trace: TracebackType | None) -> bool:
        """Tell whether a signal handler raised in `receive` before anything of a request was read.

        Not if reading itself did: it would again, for ever.
        Struck in the very moment between the read and its noting, it would be True for a request
        that is lost, and the caller would be told so by its timeout.
        """
        frames = list(_frames(trace))
        for frame in frames[:-1]:
            if frame.f_code is type(self).receive.__code__:
                return "frame" not in frame.f_locals
        return False

    def stop_waiting(self) -> None:
        """Have a wait for a request end in BlockingIOError. For a signal handler."""
        if self._fd >= 0:
            os.set_blocking(self._fd, False)

    def wait_on(self) -> None:
        """Have `receive` wait again."""
        os.set_blocking(self._fd, True)

    def _read_on(self, most: int) -> bytes:
        """Read more of what has begun to come, for which the worker waits in any case."""
        while True:
            try:
                return os.read(self._fd, most)
            except BlockingIOError:
                self.wait_on()

    def found_nothing(self, trace: TracebackType | None) -> bool:
        """Tell whether `receive` itself raised, before anything of a request was read."""
        last = list(_frames(trace))[-1:]
        return any(
            frame.f_code is type(self).receive.__code__ and "frame" not in frame.f_locals
            for frame in last
        )

    def has_ended(self, error: BaseException) -> bool:
        """Tell whether the pipe has ended, or is closed; `error` is what reading it has raised.

        The kernel is asked: a signal handler may raise EOFError and OSError as well.
        """
        if not isinstance(error, Exception):
            return False
        if not hasattr(select, "poll"):
            return isinstance(error, (EOFError, OSError))
        poll = select.poll()
        try:
            for fd in self._fds():
                poll.register(fd, 0)
        except ValueError:
            return True  # closed by us
        return bool(poll.poll(0))

    def _fds(self) -> tuple[int, ...]:
        return (self._fd,)

    def let_go(self) -> None:
        """Close the pipe in a process that was forked; what wants to use it from now on raises."""
        raise NotImplementedError

    def close_on_exec(self) -> None:
        """Let no program inherit the pipe that this process, or a child of it, becomes."""
        raise NotImplementedError

    def _receive_rest(self, frame: bytes) -> tuple[int, int, bytes, bytes | memoryview]:
        """Receive a request of which this is the beginning.

        Raises:
            EOFError: the parent is gone or has closed the pipe.
            Unreceived: there is not enough memory for it; the pipe is well.
        """
        if not frame:
            raise EOFError
        buffer, came = bytearray(frame), len(frame)
        try:
            while True:
                head, size = length_of(buffer, self._limit)
                if size is not None and came >= head + size:
                    return _parsed(memoryview(buffer)[head - 4 :])
                piece = self._read_on(min(PIECE, head + (size or 0) - came))
                if not piece:
                    raise EOFError
                came += len(piece)  # first, as there may be no room to keep it
                buffer += piece
        except MemoryError:
            begin = bytes(buffer[:_LONGEST_HEADER])
            if len(begin) < _LONGEST_HEADER:
                raise
        del buffer  # there is room for small things again
        raise self._drop(begin, came)

    def _drop(self, begin: bytes, came: int) -> Unreceived:
        """Take the rest of a request off the pipe, so that the next one is found behind it."""
        head, size = length_of(begin, self._limit)
        left = head + (size or 0) - came
        while left > 0:
            piece = self._read_on(min(SMALL, left))
            if not piece:
                raise EOFError
            left -= len(piece)
        return Unreceived(size or 0, _unpack_request(begin[head - 4 :])[1])

    def check(self, size: int) -> None:
        """Raise RemoteError if a reply with a body of `size` bytes would be too long."""
        if _REPLY_HEADER + wire.WORDS.size + size > self._limit:
            raise wire.too_long_result(size, self._limit)


class FastWorkerEnd(_WorkerEnd):
    """The worker's end, on two pipes: blocking, because a worker has nothing else to do."""

    def __init__(self, conn: wire.Ends, limit: int) -> None:
        super().__init__(conn, conn.reader.fd, limit)
        self._out = conn.writer.fd
        self._narrow = True

    def receive(self) -> tuple[int, int, bytes, bytes | memoryview]:
        frame = _read(self._fd, self._most)
        if len(frame) >= _NAME:
            size, call_id, kind, name_size = _unpack_request(frame)
            if size == len(frame) - 4:
                body = _NAME + name_size
                return call_id, kind, frame[_NAME:body], frame[body:]
        self._most = CHUNK
        return self._receive_rest(frame)

    def _fds(self) -> tuple[int, ...]:
        return self._fd, self._out

    def let_go(self) -> None:
        fds = [fd for fd in (self._fd, self._out) if fd >= 0]
        self._fd = self._out = -1
        close_all(fds)

    def close_on_exec(self) -> None:
        os.set_inheritable(self._fd, False)
        os.set_inheritable(self._out, False)

    def send(self, call_id: int, status: int, body: bytes) -> None:
        """Send one reply, blocking until the parent has taken it."""
        size = _REPLY_HEADER - 4 + len(body)
        if size <= SMALL:
            frame = _pack_reply(size, call_id, status) + body
            sent = _write(self._out, frame)
            if sent != size + 4:
                self._send_all(frame[sent:])
            return None
        if size > self._limit:
            return self.send(call_id, *_refusal(status, body, size, self._limit))
        if self._narrow:
            self._narrow = False
            widen(self._out)
        length = wire.LENGTH.pack(size) if size <= wire.SHORT_FRAME else long_length(size)
        self._send_all(length + _pack_reply(0, call_id, status)[4:])
        self._send_all(body)

    def _send_all(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._out, rest) :]


class PortableWorkerEnd(_WorkerEnd):
    """The worker's end, on `multiprocessing.Connection`."""

    def __init__(self, conn: Any, limit: int) -> None:
        super().__init__(conn, conn.fileno(), limit)

    def receive(self) -> tuple[int, int, bytes, bytes | memoryview]:
        if sys.platform == "win32":  # there a message comes whole
            return _parsed(memoryview(b"\0\0\0\0" + self._conn.recv_bytes()))
        frame = os.read(self._fd, wire.LENGTH.size)
        return self._receive_rest(frame)

    def let_go(self) -> None:
        self._fd = -1
        self._conn.close()

    def close_on_exec(self) -> None:
        os.set_inheritable(self._conn.fileno(), False)

    def send(self, call_id: int, status: int, body: bytes) -> None:
        size = _REPLY_HEADER - 4 + len(body)
        if size > self._limit:
            return self.send(call_id, *_refusal(status, body, size, self._limit))
        self._conn.send_bytes(_pack_reply(0, call_id, status)[4:] + body)


def _frames(trace: TracebackType | None) -> Iterator[FrameType]:
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _refusal(status: int, body: bytes, size: int, limit: int) -> tuple[int, bytes]:
    """Return status and body of what is sent in place of a reply that is too long."""
    flags = status & (wire.WITH_WORDS | wire.LEAVING)
    status ^= flags
    words = body[: wire.WORDS.size] if flags & wire.WITH_WORDS else b""
    if status not in (*wire.ERRORS, wire.START_FAILED):
        status = wire.REFUSED
    return status | flags, words + wire.pack_error(wire.too_long_result(size, limit))


def _parsed(frame: memoryview) -> tuple[int, int, bytes, memoryview]:
    _, call_id, kind, name_size = _unpack_request(frame)
    body = _NAME + name_size
    return call_id, kind, bytes(frame[_NAME:body]), frame[body:]
