"""The voice of a worker: how its log records and its stray output get out of it.

Made in the parent and begun in the worker; imported only where an option asks for it.

Log records go through a pipe that never blocks: what does not fit is dropped, and counted. Each
record is cut into pieces that the system writes whole or not at all, so no lock is needed,
threads, signal handlers and forked children may come in between, and nothing is ever half
written. Each piece tells how many records were dropped since the last one.

    piece: mark (1), flags (1), length (2), pid (4), number of the record (4), dropped (4) | bytes

Descriptors 1 and 2 are pipes that do block, as any program expects of them; the parent always
reads them, whatever its log handlers do.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import select
import struct
import sys
from typing import Any, Callable, Dict, NamedTuple, Optional

from .._sync import Guard
from . import table as t
from . import wire
from .baggage import Baggage

PIECE = struct.Struct("!BBHIII")
MARK = 0xA7
FIRST, LAST = 1, 2
MAX_TEXT = 100_000  # characters of a message or traceback, bytes of an `extra`; the rest is cut
_ROOM = getattr(select, "PIPE_BUF", 512) - PIECE.size
_kept: list[Any] = []  # of before; whatever is in it must not be closed
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__)


class Packed(NamedTuple):
    """A log record as it travels: of plain things only what the standard record has."""

    standard: Dict[str, Any]
    extra: Dict[str, bytes]  # each pickled on its own: one that does not unpickle costs itself
    call_id: Optional[int]
    session: Optional[str]
    context: Dict[str, bytes]


class Voice:
    """The write ends of a worker's pipes, and what it must know to use them."""

    def __init__(
        self,
        log: wire.Descriptor | None,
        streams: dict[int, wire.Descriptor],
        levels: dict[str, int],
    ) -> None:
        self._log = log
        self._streams = streams  # by the descriptor that each takes the place of
        self.levels = levels
        self._handler: Forwarder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the levels, which may be many: they come with the assignment."""
        return {**self.__dict__, "levels": {}}

    @property
    def descriptors(self) -> tuple[wire.Descriptor | None, ...]:
        """All that it has; None where there is none."""
        return self._log, *self._streams.values()

    def begin(
        self, words: memoryview, session_id: Callable[[], str | None], baggage: Baggage | None
    ) -> None:
        """Use the pipes from now on. First thing in a worker."""
        for fd, pipe in self._streams.items():
            os.dup2(pipe.fd, fd)
            pipe.close()
        if self._streams:
            _write_by_lines()
        if self._log is not None:
            os.set_inheritable(self._log.fd, False)
            self._handler = Forwarder(self._log.fd, words, session_id, baggage)
            _take_over(self._handler, self.levels)

    def tell_dropped(self) -> None:
        """Tell how many records were dropped, if that could not be told yet."""
        if self._handler is not None:
            self._handler.tell_dropped()

    def close(self) -> None:
        """Close the pipes, in the parent: the worker has them by now, or there will be none."""
        for pipe in self.descriptors:
            if pipe is not None:
                pipe.close()
        self._log, self._streams = None, {}


class Forwarder(logging.Handler):
    """Sends log records to the parent. Never waits."""

    def __init__(
        self,
        fd: int,
        words: memoryview,
        session_id: Callable[[], str | None],
        baggage: Baggage | None,
    ) -> None:
        super().__init__()
        self._fd = fd
        self._words = words
        self._session_id = session_id
        self._baggage = baggage
        self._numbers = itertools.count(1)
        self._dropped = 0
        self._pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(pickle.dumps(tuple(self._packed(record)), 5))
        except Exception:
            self.handleError(record)

    def _packed(self, record: logging.LogRecord) -> Packed:
        fields = record.__dict__.copy()
        fields["msg"] = _cut(record.getMessage())
        if record.exc_info and not record.exc_text:
            fields["exc_text"] = _trace_of(record.exc_info)
        if fields["exc_text"]:
            fields["exc_text"] = _cut(fields["exc_text"])
        fields["args"] = fields["exc_info"] = None
        words = self._words
        running = words[t.CALL_STARTED_NS] > words[t.BEAT_NS]
        return Packed(
            {name: _plain(value) for name, value in fields.items() if name in _STANDARD},
            {name: _pickled(value) for name, value in fields.items() if name not in _STANDARD},
            words[t.CALL_ID] if running else None,
            self._session_id(),
            {} if self._baggage is None else _pickled_values(self._baggage.values()),
        )

    def _send(self, data: bytes) -> None:
        pid = os.getpid()
        if pid != self._pid:  # a child that worker code forked
            self._pid, self._dropped = pid, 0
        number = next(self._numbers) & 0xFFFFFFFF
        for start in range(0, len(data), _ROOM):
            flags = FIRST * (start == 0) | LAST * (start + _ROOM >= len(data))
            if not self._write(flags, pid, number, data[start : start + _ROOM]):
                self._dropped += 1
                return

    def _write(self, flags: int, pid: int, number: int, data: bytes) -> bool:
        dropped = self._dropped
        head = PIECE.pack(MARK, flags, len(data), pid, number, min(dropped, 0xFFFFFFFF))
        try:
            os.write(self._fd, head + data)
        except OSError:  # full; or closed, by worker code or as the parent is gone
            return False
        self._dropped -= dropped
        return True

    def tell_dropped(self) -> None:
        """Send the number alone."""
        if not self._dropped:
            return
        # Another thread may be logging.
        Guard(self.lock).run(self._write, FIRST | LAST, os.getpid(), 0, b"")


def _write_by_lines() -> None:
    """Have each line written when it ends, as on a terminal: buffers are lost in a death.

    The old objects stay: they may hold what a process has to write of which this is a fork.
    """
    _kept.append((sys.stdout, sys.stderr))
    for name, fd in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(fd, "w", 1, "utf-8", "backslashreplace", closefd=False))  # noqa: SIM115
    with contextlib.suppress(Exception):  # not everywhere, and then C's lines come late
        import ctypes

        c = ctypes.CDLL(None)
        c.setvbuf(ctypes.c_void_p.in_dll(c, "stdout"), None, 1, 0)  # _IOLBF


def _take_over(handler: logging.Handler, levels: dict[str, int]) -> None:
    """Make this the one handler of all loggers, which have the parent's levels.

    A forked worker has the parent's handlers as well, and would write each record twice. They are
    not closed: what they hold is the parent's.
    """
    root = logging.getLogger()
    for logger in tuple(root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            _kept.append(logger.handlers)
            logger.handlers, logger.propagate = [], True
    _kept.append(root.handlers)
    root.handlers = [handler]
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)


def _plain(value: Any) -> Any:
    """Return a standard field as what it should be; a subclass might not unpickle in the parent."""
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else repr(value)


def _pickled(value: Any) -> bytes:
    """Pickle what a record brings along; its `repr` where that cannot be, or is too large."""
    try:
        data = pickle.dumps(value, 5)
        if len(data) <= MAX_TEXT:
            return data
    except Exception:
        pass
    try:
        return pickle.dumps(_cut(repr(value)), 5)
    except Exception as problem:
        return pickle.dumps(f"<repr() of it failed with {type(problem).__name__}>", 5)


def _pickled_values(values: dict[str, Any]) -> dict[str, bytes]:
    return {name: _pickled(value) for name, value in values.items()}


def _trace_of(exc_info: Any) -> str:
    """Return what `logging.Formatter` makes of an exception, but of bounded length."""
    kind, error, trace = exc_info
    if error is None or trace is not error.__traceback__:
        return logging.Formatter().formatException((kind, error, trace))
    return wire.text_of(error).removesuffix("\n")


def _cut(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]}... ({len(text)} characters)"
