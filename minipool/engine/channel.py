"""The parent's end of a worker's pipe: what all kinds share, and the fast kind.

The fast kind has a pipe for each direction, and makes one write and one read for a small message.
The other is in `portable`. Both write the same bytes, so either can talk to either kind of
worker's end (see `workerend`).

A parent's end is used by one thread at a time, the one that owns the worker. Neither end is ever
left with half a frame by a failed attempt to *make* one; what breaks in mid-frame stays broken,
and its worker is replaced.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import struct
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Iterable

from . import sigpipe, wire
from .descriptors import close_all, lift_connection, pipe_into

if TYPE_CHECKING:
    import threading  # which no worker needs for this

SMALL = 32 * 1024  # up to here one write takes all, as a rule: a pipe has room for twice as much
CHUNK = 64 * 1024
#: What an end reads at once until a frame was longer: so short a bytes object needs no `malloc`.
SHORT = 448
LOOK = 1.0  # seconds; a signal that comes a moment before a wait begins does not end it
PIECE = 256 * 1024  # grow the buffer of a long frame by this much, never by what it claims to be
_F_SETPIPE_SZ = 1031  # of Linux; `fcntl` knows it from Python 3.10 on

# Bound once: each name looked up on the way of a call is paid for by every call.
_read, _write = os.read, os.write
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


class Unsent(Exception):
    """There was no memory to make a frame of. Nothing was sent; the pipe is as good as before."""


class Unreceived(Exception):
    """There was no memory for a message. It is off the pipe, which is as good as before."""

    def __init__(self, size: int, call_id: int) -> None:
        super().__init__(size, call_id)
        self.size, self.call_id = size, call_id


class _Ends:
    """Ours of the two pipes. Closed once, whoever comes, and at the latest when it is collected:
    a lease may outlive its worker, and then has the last hold of it."""

    __slots__ = ("__del__", "reader", "writer")

    def __init__(self, reader: int, writer: int, *more: int) -> None:
        self.reader, self.writer = reader, writer
        # In C, and so in one step: where code in Python begins, an interrupt may come in.
        self.__del__ = partial(any, map(os.close, iter((reader, writer, *more))))
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)

    def close(self) -> None:
        self.__del__()


class End:
    """What both kinds share: frames are put together from whatever pieces they come in."""

    def __init__(self, limit: int) -> None:
        self._limit = limit  # bytes in a frame; one that claims more is garbage
        self._got = bytearray()  # what came and was not yet taken
        self._began = 0.0  # the call under way, monotonic; known once it is not answered at once
        self._due: float | None = None  # when it is to be answered, as it was when it began
        #: Returns how many seconds since then counted against no deadline; see `standstill`.
        self.lost: Callable[[float], float] = _nothing
        #: Hears by when each wait in vain was to end, as it ends; see `Standstills.witness`.
        self.witness: Callable[[float], object] = bool

    #: The thread that sends, or has sent, what the pipe may not have room for, if there is one.
    sender: threading.Thread | None = None

    def _deadline(self, timeout: float | None, start: int) -> float | None:
        """Return by when the call under way is to be answered, on the monotonic clock."""
        self._began = start / 1e9
        self._due = None if timeout is None else self._began + timeout
        return self._due

    def _after_look(self, deadline: float | None, left: float | None) -> float | None:
        """Return until when the call under way may take, after a wait in vain, begun with `left`.

        Raises:
            TimedOut: no longer.
        """
        if deadline is None or left is None:
            return None
        rest = max(0.0, left - LOOK)
        self.witness(deadline - min(left, 0.0) - rest)
        return deadline if rest else self._extended(deadline)

    def _extended(self, deadline: float) -> float:
        if self._due is None or deadline < self._due:
            raise TimedOut  # it was no wait for the reply
        later = self._due + self.lost(self._began)
        if later <= deadline:
            raise TimedOut
        return later

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

    def hear_out(self) -> None:
        """Take what a dead worker has said of the call under way; that is in the table already."""

    def _receive(self, call_id: int, deadline: float | None) -> tuple[int, bytes | memoryview]:
        """Wait until a whole frame is here, and take it; return its status and body.

        What is no reply to this call is found by its header: the length before it means nothing.
        """
        missing, piece = 1, b""
        try:
            while True:
                missing, piece = self._missing(), b""
                if not missing:
                    return _checked(call_id, self._take())
                start = length_of(self._got, self._limit)[0] - 4
                if len(self._got) >= start + _REPLY_HEADER:
                    _checked(call_id, bytes(self._got[start : start + _REPLY_HEADER]))
                piece = self._receive_piece(max(CHUNK, min(PIECE, missing)), deadline)
                self._add(piece)
        except MemoryError:
            size = length_of(self._got, self._limit)[1]
            if size is None:
                raise
        self._got = bytearray()  # there is room for small things again
        self._drop(missing - len(piece), deadline)
        raise Unreceived(size, call_id)

    def _drop(self, missing: int, deadline: float | None) -> None:
        """Take so many bytes off the pipe: the rest of a reply that there is no room for."""
        while missing > 0:
            piece = self._receive_piece(min(SMALL, missing), deadline)
            if not piece:
                raise PeerGone
            missing -= len(piece)
        if missing < 0:
            raise Garbled("more came than one reply")

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


class FastEnd(End):
    """The parent's end, on two pipes. `death_fd` becomes readable when the worker is gone.

    Pipes, because they take three microseconds less there and back than a pair of sockets: nothing
    is allocated for a message, and to take one wakes nobody who waits for another. Each wait is a
    `poll` of the pipe and of `death_fd`: where siblings hold copies of the worker's end, or what
    the worker has started does, the pipe does not end with it.
    """

    def __init__(self, ends: _Ends, death_fd: int, limit: int) -> None:
        super().__init__(limit)
        self._ends = ends  # owns the descriptors
        self.fd, self._out = ends.reader, ends.writer
        self._death_fd = death_fd
        self._dead = False
        poll = select.poll()  # used by who owns the worker
        poll.register(self.fd, select.POLLIN)
        poll.register(death_fd, select.POLLIN)
        self._poll = poll.poll
        self._set_timeout(None)
        self._most = SHORT  # bytes to read at once
        self._narrow = True
        #: What the manager has posted and the pipe has not taken yet.
        self.unsent: collections.deque[memoryview] = collections.deque()

    def _set_timeout(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._look = _look_ms(timeout)

    def exchange(
        self, call_id: int, kind: int, name: bytes, body: bytes, timeout: float | None, start: int
    ) -> tuple[int, bytes | memoryview]:
        """Send one request; return status and body of the one reply. The way of every call.

        `start` is when it began, in monotonic nanoseconds: the `timeout` counts from there.

        Raises:
            PeerGone, TimedOut, Garbled: the worker is of no more use.
            TooLong: nothing was sent. Unreceived: nothing of the reply was kept.
        """
        size = _REQUEST_HEADER + len(name) + len(body)
        if size > SMALL:
            deadline = self._deadline(timeout, start)
            self._check(size)
            head = wire.REQUEST.pack(0, call_id, kind, len(name))[4:]
            length = wire.LENGTH.pack(size) if size <= wire.SHORT_FRAME else long_length(size)
            self._send_long((length + head + name, body), deadline)
            return self._reply_to(call_id, deadline)
        poll = self._poll  # see `Handle.request`
        try:
            if timeout != self._timeout:
                self._set_timeout(timeout)
            frame = _pack_request(size, call_id, kind, len(name)) + name + body
            sent = _write(self._out, frame)
            if sent != size + 4:  # a pipe of a user who has very many is small
                self._send_long((frame[sent:],), self._deadline(timeout, start))
            if not poll(self._look):  # at least one look is over
                return self._reply_to(call_id, self._deadline(timeout, start))
            reply = _read(self.fd, self._most)
            size, got_id, status = _unpack_reply(reply)
        except OSError:  # it is dead, and has said nothing
            raise PeerGone from None
        except struct.error:
            size = got_id = -1  # less than a header, or the end
        if size + 4 != len(reply) or got_id != call_id:
            self._most = CHUNK
            self._add(reply)
            return self._reply_to(call_id, self._deadline(timeout, start))
        return status, reply[_REPLY_HEADER:]

    def _reply_to(self, call_id: int, deadline: float | None) -> tuple[int, bytes | memoryview]:
        reply = self._receive(call_id, deadline)
        self._expect_no_more()
        return reply

    @property
    def out(self) -> int:
        """The descriptor that `flush` writes to."""
        return self._out

    def post(self, call_id: int, kind: int, *parts: bytes) -> None:
        """Send a request without a name as far as the pipe takes it now; `flush` sends the rest.

        By the manager, to a worker that it owns: nobody may call it before all is sent.

        Raises:
            PeerGone: the worker is dead.
        """
        size = _REQUEST_HEADER + sum(map(len, parts))
        length = wire.LENGTH.pack(size) if size <= wire.SHORT_FRAME else long_length(size)
        frame = (length + _pack_request(0, call_id, kind, 0)[4:], *parts)
        if size <= SMALL:
            frame = (b"".join(frame),)
        self.unsent.extend(memoryview(part) for part in frame if part)
        self.flush()

    def flush(self) -> None:
        """Send what is left of what was posted, as far as the pipe takes it. Never waits.

        Raises:
            PeerGone: the worker is dead; nothing is left.
        """
        if self.unsent and self._has_gone():
            self.unsent.clear()
            raise PeerGone
        while self.unsent:
            part = self.unsent.popleft()  # first: whatever strikes here, nothing is sent twice
            try:
                rest = part[os.write(self._out, part) :]
            except BlockingIOError:
                self.unsent.appendleft(part)
                return
            except OSError:
                self.unsent.clear()
                raise PeerGone from None
            except BaseException:
                self.unsent.clear()  # without that part the others would be garbage
                raise
            if rest:
                self.unsent.appendleft(rest)
                self._widen_once()

    def _has_gone(self) -> bool:
        """Tell whether nobody reads what is sent: a write would not tell, see `sigpipe`."""
        if self._dead:
            return True
        events = self._poll(0)
        return any(fd == self._death_fd or event & select.POLLHUP for fd, event in events)

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
                if self._poll(0 if self._dead else _look_ms(left)):
                    return os.read(self.fd, most)
            except OSError:  # it is dead and has said no more, or our end is closed
                raise PeerGone from None
            if self._dead:
                raise PeerGone
            deadline = self._after_look(deadline, left)

    def _send_long(self, parts: Iterable[bytes], deadline: float | None) -> None:
        """Write what may not fit the pipe's buffer, watching the worker and the clock."""
        poll = select.poll()
        try:
            poll.register(self._out, select.POLLOUT)
            poll.register(self.fd, 0)  # its hang-up: one that leaves has let go of both pipes
        except ValueError:
            raise PeerGone from None  # closed
        self._widen_once()
        poll.register(self._death_fd, select.POLLIN)
        for part in parts:
            rest = memoryview(part)
            while rest:
                try:
                    rest = rest[os.write(self._out, rest) :]
                except BlockingIOError:
                    left = None if deadline is None else deadline - time.monotonic()
                    events = poll.poll(0 if self._dead else _look_ms(left))
                    if self._dead or any(fd != self._out for fd, _ in events):
                        raise PeerGone from None
                    if not events:
                        deadline = self._after_look(deadline, left)
                except OSError:
                    raise PeerGone from None

    def _widen_once(self) -> None:
        if self._narrow:
            self._narrow = False
            widen(self._out)

    def hang_up(self) -> None:
        """Hear that the worker is dead: from now on its `death_fd` may be that of another."""
        self._dead = True

    def close(self) -> None:
        """Close the pipes. A thread that still wants to use them gets PeerGone."""
        self.fd, self._out, self._dead = -1, -1, True
        self.unsent.clear()
        self._ends.close()


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


def _nothing(since: float) -> float:
    return 0.0


def pair(context: Any, portable: bool) -> tuple[Any, Any]:
    """Make a pipe; return what becomes the parent's end and what travels to the worker."""
    if portable:
        ends: tuple[Any, Any] = context.Pipe(duplex=True)
        for end in ends:
            lift_connection(end)
        return ends
    fds: list[int] = []
    try:
        pipe_into(fds)
        pipe_into(fds)
        out = sigpipe.lasting(*fds[:2])
    except OSError:
        close_all(fds)
        raise
    theirs = wire.Ends(wire.Descriptor(fds[0]), wire.Descriptor(fds[3]))
    return _Ends(fds[2], *out), theirs


def widen(fd: int) -> None:
    """Give a pipe that long frames are written to more room, if the kernel has it for this user."""
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, _F_SETPIPE_SZ, PIECE)


def _look_ms(timeout: float | None) -> float:
    """Return how long to wait at once: a signal that comes just before does not end a wait."""
    return 1000 * (LOOK if timeout is None else min(max(0.0, timeout), LOOK))
