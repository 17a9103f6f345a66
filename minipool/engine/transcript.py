"""What one worker has said: the parent's ends of the pipes of its `voice`, and its last lines.

Read by the scribe's thread as it comes, by whoever has to tell of the worker's death, and by the
manager, once more and to the end, when it is buried: one at a time, under the lock. What was
written before a death is in the pipe, however suddenly it came. The scribe alone passes it on.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import sys
from typing import Any, Collection, Dict, Tuple

from .._sync import Guard
from . import wire
from .descriptors import pipe
from .voice import FIRST, LAST, MARK, PIECE, Packed, Voice

LAST_LINES = 20
STREAMS = {1: "stdout", 2: "stderr"}
RECORD, LOST, GARBLED = "record", "lost", "garbled"
_CHUNK = 64 * 1024
_MOST = 4 << 20  # bytes that are read at once; a child of a dead worker may go on writing for ever
_LONGEST_LINE = 64 * 1024  # a longer one is cut in pieces
_PIPE_SIZE = 512 * 1024  # for bursts of records; more would soon use up what a user may have
_F_SETPIPE_SZ = 1031  # Linux; the fcntl module has no name for it before 3.10
_PATIENCE = 1.0  # seconds that one reader waits for another, who may be interrupted by a signal

Item = Tuple[str, bytes]  # a stream's name and a line of it, or RECORD and what was packed


class Transcript:
    """The pipes of one worker, and the last of what came through them."""

    def __init__(
        self,
        slot: int,
        generation: int,
        streams: Collection[int],
        levels: dict[str, int] | None,
    ) -> None:
        """Make the pipes: for the descriptors in `streams`, and with `levels` for log records.

        Raises:
            OSError: there is no room for one more; nothing is left.
        """
        self.slot = slot
        self.generation = generation
        self.pid: int | None = None
        # Lines and records, so far. The scribe counts what it passed on and dropped, the teller
        # what it has heard, and how many of the dropped it has told of: one writer each.
        self.passed_on = self.heard = self.dropped = self.told = 0
        self.unsaid: collections.deque[Item] = collections.deque()  # not yet passed on
        self._reading = Guard()
        self._last: collections.deque[Item] = collections.deque(maxlen=LAST_LINES)
        self._pipes: Dict[int, Any] = {}  # descriptor -> who makes items of its bytes
        log: wire.Descriptor | None = None
        pens: dict[int, wire.Descriptor] = {}
        try:
            if levels is not None:  # read first: of the last lines, output is what tells more
                log = self._pipe(Records())
                os.set_blocking(log.fd, False)
                _enlarge(log.fd)
            for fd in streams:
                pens[fd] = self._pipe(Lines(STREAMS[fd]))
        except OSError:
            Voice(log, pens, {}).close()
            self.abandon()
            raise
        self.voice = Voice(log, pens, levels or {})

    def _pipe(self, reader: Any) -> wire.Descriptor:
        ours, theirs = pipe()
        os.set_blocking(ours, False)
        self._pipes[ours] = reader
        return wire.Descriptor(theirs)

    @property
    def fds(self) -> tuple[int, ...]:
        """What there is to read from."""
        return tuple(self._pipes)

    def read(self, fd: int, most: int = _CHUNK, end: bool = False) -> bool:
        """Take what is there, about so much at most; False: nothing more will come."""
        more = self._reading.run_within(_PATIENCE, self._read, fd, most, end)
        return more is None or more

    def _read(self, fd: int, most: int, end: bool) -> bool:
        reader = self._pipes.get(fd)
        if reader is None:
            return False
        with contextlib.suppress(BlockingIOError):
            while most > 0 and not reader.ended:
                data = os.read(fd, _CHUNK)
                most -= len(data)
                self._note(reader.feed(data))
        if end:
            self._note(reader.feed(b""))
        return not reader.ended

    def _note(self, items: list[Item]) -> None:
        self.unsaid.extend(items)
        self._last.extend(item for item in items if item[0] not in (LOST, GARBLED))

    def finish(self) -> None:
        """Take the rest of what a dead worker said."""
        for fd in self.fds:
            self.read(fd, _MOST, end=True)

    def last_lines(self) -> tuple[str, ...]:
        """Return the last lines of what a worker that has just died said."""
        for fd in self.fds:
            self.read(fd, _MOST)
        lines: list[str] = []
        for kind, data in tuple(self._last):
            lines += _lines_of_record(data) if kind == RECORD else [text_of(data)]
        for reader in tuple(self._pipes.values()):
            lines += reader.unfinished
        return tuple(lines[-LAST_LINES:])

    def close(self) -> bool:
        """Close the pipes, by the thread that watches them; False: another is reading still."""
        return bool(self._reading.run_within(_PATIENCE, self.abandon))

    def abandon(self) -> bool:
        """Close the pipes; also in a process that was forked from the owner."""
        while self._pipes:
            os.close(self._pipes.popitem()[0])
        return True


class Lines:
    """Makes lines of what comes through a pipe."""

    def __init__(self, stream: str) -> None:
        self.ended = False
        self._stream = stream
        self._rest = b""

    def feed(self, data: bytes) -> list[Item]:
        """Return the lines that are whole now; no data: the last one ends here."""
        if not data:
            self.ended = True
            *lines, self._rest = [self._rest, b""] if self._rest else [b""]
        else:
            *lines, self._rest = (self._rest + data).split(b"\n")
            while len(self._rest) > _LONGEST_LINE:
                lines.append(self._rest[:_LONGEST_LINE])
                self._rest = self._rest[_LONGEST_LINE:]
        return [(self._stream, line) for line in lines]

    @property
    def unfinished(self) -> list[str]:
        return [text_of(self._rest)] if self._rest else []


class Records:
    """Makes log records of the pieces that come through a pipe."""

    unfinished: tuple[str, ...] = ()
    _MANY = 100  # records that are begun at the same time; some may have lost their end

    def __init__(self) -> None:
        self.ended = False
        self._rest = b""
        self._begun: dict[tuple[int, int], bytearray] = {}

    def feed(self, data: bytes) -> list[Item]:
        """Return the records that are whole now, and how many were lost."""
        self.ended = not data
        found: list[Item] = []
        data, start = self._rest + data, 0
        while len(data) - start >= PIECE.size:
            mark, flags, size, pid, number, dropped = PIECE.unpack_from(data, start)
            if mark != MARK:  # worker code has written to a descriptor that is not its own
                self.ended, self._rest = True, b""
                return [*found, (GARBLED, b"")]
            end = start + PIECE.size + size
            if end > len(data):
                break
            if dropped:
                found.append((LOST, b"%d" % dropped))
            whole = self._whole((pid, number), flags, data[start + PIECE.size : end])
            if whole:
                found.append((RECORD, whole))
            start = end
        self._rest = data[start:]
        return found

    def _whole(self, key: tuple[int, int], flags: int, piece: bytes) -> bytes | None:
        if flags == FIRST | LAST:
            return piece
        if flags & FIRST:
            self._begun[key] = bytearray()
            if len(self._begun) > self._MANY:
                del self._begun[next(iter(self._begun))]
        if key not in self._begun:
            return None
        self._begun[key] += piece
        return bytes(self._begun.pop(key)) if flags & LAST else None


def _enlarge(fd: int) -> None:
    if sys.platform.startswith("linux"):
        import fcntl

        with contextlib.suppress(OSError):  # the user has too many already
            fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE_SIZE)


def text_of(line: bytes) -> str:
    """Return a line as text, without what ends it."""
    return line.rstrip(b"\r").decode(errors="backslashreplace")


def _lines_of_record(data: bytes) -> list[str]:
    standard = Packed(*pickle.loads(data)).standard
    text = f"{standard['levelname']} {standard['name']}: {standard['msg']}"
    return [*text.splitlines(), *(standard["exc_text"] or "").splitlines()]
