"""A database: one SQLite file as all stores of this process use it, and its transactions.

Connections lie in a deque. To pop one *is* to own it; it is put back when its transaction has
ended, and another one is made where there is none. None is ever closed, or rolled back, from
outside: one that its user lost, struck by an exception, goes with the last reference to it.

Who writes next is arbitrated by SQLite. It polls, so it is neither quick nor fair; therefore the
threads of one process stand in line here first. The line is a courtesy: a turn that was lost with
a thread that was struck is replaced after `_ASTRAY_S`, and if its holder is there after all, two
threads ask SQLite at the same time. A store's housekeeping stands in line for a while only.

A commit is acknowledged when it is in the file at the path: after each transaction the file, and
its write-ahead log, must be those that the connection has open.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import sqlite3
import sys
import time
import urllib.parse
import weakref
from typing import Any, Callable, TypeVar

from ..engine.turnstile import Turnstile
from ..errors import SessionError
from ..telemetry import logger
from . import files, open_files, schema
from .files import File
from .open_files import Connection

T = TypeVar("T")

PATIENCE_S = 10.0  # how long to wait for others that write
_ASTRAY_S = 2.0  # nobody has the turn for so long, unless the file is locked from outside
_POLL_S = 0.01  # for this long SQLite polls a lock by itself, every few ms; then signals are heard
_KEPT = 4  # idle connections
_TURN = "turn"  # the line's one slot
_AUTOCHECKPOINT = 4000  # pages: where there is no housekeeping, the thread that commits does it
_LONG_LOG_BYTES = 1 << 22  # a longer write-ahead log is put into the file by the housekeeping
_PRAGMAS = (
    "PRAGMA trusted_schema=OFF",
    "PRAGMA cell_size_check=ON",
    f"PRAGMA wal_autocheckpoint={_AUTOCHECKPOINT}",
    "PRAGMA journal_size_limit=67108864",
)
#: Whatever sqlite3 raises for a damaged file, its own messages that are no UTF-8 included.
_TROUBLE = (sqlite3.Error, sqlite3.Warning, UnicodeError, MemoryError, OverflowError)


class _Held:
    """What one transaction holds: its turn in the line, and its connection."""

    __slots__ = ("db", "turn")

    def __init__(self) -> None:
        self.turn: Any = None
        self.db: Connection | None = None


class Database:
    """The file at a path. Any thread may call any method."""

    def __init__(self, path: str, file: File) -> None:
        self.path = path
        self.file = file
        self.closed = False  # or not at the path any more
        self._wal_path = path + "-wal"
        self._idle: collections.deque[Connection] = collections.deque()
        self._line = Turnstile("fifo")
        self._turned = 0.0  # when the turn was taken
        self._users: dict[int, weakref.ref[Any]] = {}
        self._renew_turn()

    # -- which file --------------------------------------------------------------------------

    @classmethod
    def at(cls, path: str, user: object) -> Database:
        """Return the database of a path for a user, who will `leave` it; new, if nobody has it.

        Raises:
            SessionError: the file cannot be used. It is left as it was.
        """
        try:
            real = os.path.realpath(path)
            while True:
                found = cls._found_or_made(real)
                found._users[id(user)] = weakref.ref(user)
                if not found.closed:  # `leave` looks for users after it has set this
                    return found
        except (schema.Unfit, ValueError, OSError, *_TROUBLE) as problem:
            raise _unusable(path, problem) from problem

    @classmethod
    def _found_or_made(cls, path: str) -> Database:
        file = files.ready(path)
        open_files.refuse_inherited(file)
        for other in open_files.databases():
            if other.path == path and other.file != file and not other.closed:
                other._leave_path()
        found: Database | None = open_files.database(file)
        if found is None or found.closed:
            made = cls(path, file)
            try:
                made._prepare()
                found = open_files.share(file, made)
            finally:
                if found is not made:
                    made._close()
        if found.path != path:
            raise ValueError(
                f"it is the same file as {found.path!r}, which this process uses; two names of one "
                f"file have two logs, and that destroys it: use one of them"
            )
        return found

    def _prepare(self) -> None:
        """Make the file a store of this schema, if it can be one."""
        if files.size_of(self.path):
            peeking = Connection(self.path, self.file, self._uri("ro&immutable=1"), 0.0)
            try:
                schema.peek(peeking)
            finally:
                peeking.close()
        version = self.transact(None, schema.version_of, mode="DEFERRED")
        if version is None:
            self.transact(None, schema.make)
        elif version == 1 and self.transact(None, schema.upgrade):
            files.keep_from_others(self.path)  # it was made for all to read
        self.transact(None, schema.check, files.size_of(self.path), mode="DEFERRED")
        # Only now: what was made above is in the file itself, where `peek` looks.
        self._choose_journal()

    def _leave_path(self) -> None:
        """Have a file that is not at the path any more be noticed now, and be closed.

        Who goes on with it uses the log of the next file, as that has the same name, and its index.
        """
        with contextlib.suppress(SessionError):
            self.transact("the file could not be kept open", _nothing, mode="DEFERRED")

    def leave(self, user: object) -> None:
        """Close the file, unless others use it."""
        self._users.pop(id(user), None)
        if not self._used():
            self.closed = True
            if self._used():
                self.closed = False  # somebody came in between
                return
            self._close()

    def _used(self) -> bool:
        for number, user in list(self._users.items()):
            if user() is None and self._users.get(number) is user:
                self._users.pop(number, None)
        return bool(self._users)

    def _close(self) -> None:
        self.closed = True
        open_files.withdraw(self)
        self._close_idle(0)

    def _close_idle(self, kept: int) -> None:
        while len(self._idle) > kept:
            with contextlib.suppress(IndexError, sqlite3.Error):
                self._idle.popleft().close()

    # -- transactions ------------------------------------------------------------------------

    def transact(
        self,
        what: str | None,
        work: Callable[..., T],
        *args: Any,
        mode: str = "IMMEDIATE",
        patience: float = PATIENCE_S,
        queue: float = PATIENCE_S,
    ) -> T:
        """Run `work(connection, *args)` in a transaction, again if the file was locked meanwhile.

        Waits `patience` seconds for others, `queue` of them at most for those of this process.
        `what` begins the text of an error; None while the file is being opened.

        Raises:
            SessionError: it could not be done, and nothing was changed, unless it is `in_doubt`.
        """
        held = _Held()
        deadline = time.monotonic() + patience
        try:
            held.turn = self._line.try_take()
            if held.turn is None and (mode == "DEFERRED" or not self._interrupted(what)):
                held.turn = self._queue(what, deadline, queue)
            self._turned = time.monotonic()
            return self._attempt(held, deadline, what, f"BEGIN {mode}", work, args)
        except (*_TROUBLE, schema.Unfit) as problem:
            if what is None:
                raise _unusable(self.path, problem) from problem
            raise SessionError(
                f"{what} in {self.path!r}: {problem}; nothing was changed"
            ) from problem
        finally:
            db = held.db
            try:
                if db is not None:
                    try:
                        if db.raw.in_transaction:
                            db.execute("ROLLBACK")
                    finally:
                        self._idle.append(db)
                if self.closed or len(self._idle) > _KEPT:
                    self._close_idle(0 if self.closed else _KEPT)
            finally:
                if held.turn is not None:
                    self._line.publish(*held.turn)

    def _attempt(
        self,
        held: _Held,
        deadline: float,
        what: str | None,
        begin: str,
        work: Callable[..., T],
        args: tuple[Any, ...],
    ) -> T:
        """Do the transaction; again while the file is locked, and once if there was no room."""
        tidied = False
        while True:
            try:
                try:
                    db = held.db = self._idle.pop() if held.db is None else held.db
                except IndexError:
                    db = held.db = self._connect()
                if db.raw.in_transaction:
                    db.execute("ROLLBACK")  # its last user was struck
                db.execute(begin)
                result = work(db, *args)
                db.execute("COMMIT")
                self._refuse_moved(what, db)
                return result
            except _TROUBLE as problem:
                found = held.db
                if found is not None and found.raw.in_transaction:
                    found.execute("ROLLBACK")
                if _is_locked(problem) and time.monotonic() < deadline:
                    continue
                if not tidied and found is not None and _is_full(problem):
                    tidied = True
                    self._restart_log(found)
                    continue
                self._refuse_moved(what, found)
                raise

    def _interrupted(self, what: str | None) -> bool:
        """Refuse what a signal handler or finaliser asks for in the midst of a transaction.

        It would wait for the thread that it is in.
        """
        frame = sys._getframe(1).f_back
        while frame is not None:
            if frame.f_code is _TRANSACT and frame.f_locals.get("self") is self:
                raise self._busy(what)
            frame = frame.f_back
        return False

    def _queue(self, what: str | None, deadline: float, queue: float) -> Any:
        """Wait in line; None if that took longer than the caller means to queue."""
        turn = None
        until = min(deadline, time.monotonic() + queue)
        while turn is None:
            left = until - time.monotonic()
            turn = self._line.take(max(0.0, min(left, _ASTRAY_S)))
            if turn is None and left <= _ASTRAY_S:
                if until < deadline:
                    return None
                raise self._busy(what)
            if turn is None and time.monotonic() - self._turned > _ASTRAY_S:
                self._renew_turn()
        return turn

    def _renew_turn(self) -> None:
        """Give the turn to the next in line; if its holder still works, SQLite arbitrates."""
        turn = object()
        self._turned = time.monotonic()
        self._line.fence(_TURN)
        self._line.admit(_TURN, turn)
        self._line.publish(_TURN, turn)

    def _busy(self, what: str | None) -> SessionError:
        problem = "it is being written to; try again"
        if what is None:
            return _unusable(self.path, problem)
        return SessionError(f"{what} in {self.path!r}: {problem}; nothing was changed")

    def _refuse_moved(self, what: str | None, db: Connection | None) -> None:
        """Refuse to go on with a file that is not at the path any more, nor its log."""
        log = None if db is None else db.wal
        if files.leads_elsewhere(self.path, self.file) or (
            log is not None and files.leads_elsewhere(self._wal_path, log)
        ):
            raise self._moved(what, db)

    def _moved(self, what: str | None, db: Connection | None) -> SessionError:
        """Give up a file that is not at the path any more; return the error that tells of it."""
        self.closed = True  # its stores begin anew, with what is there then
        open_files.withdraw(self)
        name = self._wal_path
        if files.identity(self.path) != self.file:
            name = self.path
            if db is not None:
                # Or else the log, which is found by its name, was taken for the next file's.
                with contextlib.suppress(sqlite3.Error):
                    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        happened = "deleted" if files.identity(name) is None else "replaced by another one"
        text = (
            f"{what or 'the store could not be opened'} in {self.path!r}: {name!r} was {happened} "
            f"while it was in use, so what was just written may be lost; the next use begins with "
            f"the file that is there then, or with a new one; to restore a backup, stop all that "
            f"use the store first"
        )
        logger().warning("%s", text)
        return SessionError(text, in_doubt=True)

    # -- connections -------------------------------------------------------------------------

    def _uri(self, mode: str) -> str:
        return f"file:{urllib.parse.quote(os.fsencode(self.path))}?mode={mode}"

    def _connect(self) -> Connection:
        db = Connection(self.path, self.file, self._uri("rw"), _POLL_S)
        try:
            for pragma in _PRAGMAS:
                db.execute(pragma)
            (mode,) = db.execute("PRAGMA journal_mode").fetchone()
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()  # opens the log
            self._note_journal(db, mode)
        except BaseException:
            db.close()
            raise
        return db

    def _note_journal(self, db: Connection, mode: str) -> None:
        """Take care that a commit outlives the process, whatever the journal mode."""
        logged = mode == "wal"
        db.execute(f"PRAGMA synchronous={'NORMAL' if logged else 'FULL'}")
        db.wal = files.identity(self._wal_path) if logged else None

    def _choose_journal(self) -> None:
        """Have a write-ahead log, if that is possible where the file is."""
        db = self._idle.pop() if self._idle else self._connect()
        try:
            network = files.network_filesystem(self.path)
            wished = "delete" if network else "wal"
            (mode,) = db.execute("PRAGMA journal_mode").fetchone()
            if mode != wished:
                mode = self._switch_journal(db, wished, mode)
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            self._note_journal(db, mode)
        finally:
            self._idle.append(db)
        if network:
            logger().warning(
                "%r is on a network file system (%s): session stores are for one host, whose "
                "processes share memory; it works without a write-ahead log there (journal mode "
                "%s), slowly, and only as well as its locks do; put it on a local disk",
                self.path, network, mode,
            )  # fmt: skip
        elif mode != wished:
            logger().warning(
                "%r can have no write-ahead log where it is (journal mode %s): it works, but "
                "slowly; put it on a local disk",
                self.path, mode,
            )  # fmt: skip

    def _switch_journal(self, db: Connection, wished: str, mode: str) -> str:
        """Change the journal mode, when nobody else is at it; return what it is then."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                (mode,) = db.execute(f"PRAGMA journal_mode={wished}").fetchone()
                return mode
            except sqlite3.OperationalError as problem:
                if not _is_locked(problem):
                    raise
                if time.monotonic() > deadline:
                    return mode
            with contextlib.suppress(sqlite3.OperationalError):
                # The switch itself does not wait for others; this does.
                db.execute("BEGIN EXCLUSIVE")
            if db.raw.in_transaction:
                db.execute("ROLLBACK")

    def _restart_log(self, db: Connection) -> None:
        """Put the log into the file, so that it is written from its beginning: it needs no room."""
        with contextlib.suppress(sqlite3.Error):
            db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()

    def put_away_log(self) -> None:
        """Put the log into the file if it is long, lest a thread that commits has to."""
        if files.size_of(self._wal_path) < _LONG_LOG_BYTES:
            return
        try:
            db = self._connect()
            try:
                db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            finally:
                self._idle.append(db)
                self._close_idle(0 if self.closed else _KEPT)
        except _TROUBLE as problem:
            raise SessionError(
                f"the log of {self.path!r} cannot be put away: {problem}"
            ) from problem


_TRANSACT = Database.transact.__code__


def _nothing(db: Connection) -> None:
    """Change nothing: that the file is looked at afterwards is all that is wanted."""


def _unusable(path: str, problem: Any) -> SessionError:
    if isinstance(problem, UnicodeError):  # SQLite's own message quotes what it found
        problem = f"it is corrupt: {problem}"
    return SessionError(
        f"session_store={path!r} cannot be used: {problem}; it was left as it is; "
        f"{_remedy(path, problem)}"
    )


def _remedy(path: str, problem: BaseException | str) -> str:
    """Say what helps when a file cannot be opened; SQLite's own words often do not."""
    number = getattr(problem, "errno", None)
    folder = os.path.dirname(path)
    if isinstance(problem, sqlite3.OperationalError):
        if _is_locked(problem):
            return "somebody keeps it locked, perhaps for a backup: try again after that"
        if _is_full(problem):
            number = errno.ENOSPC
        elif "readonly" in str(problem) or "unable to open" in str(problem):
            number = errno.EACCES
    if number == errno.ENOENT and not os.path.isdir(folder):
        return f"its directory does not exist: make {folder!r} first"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"let this user write to it, and into {folder!r}: a store has files beside it"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"make room in {folder!r}; if there is room, look for errors of the disk"
    return "give the path of a session store, or one where a new file can be made"


def _is_locked(problem: BaseException) -> bool:
    text = str(problem)  # Python tells the error's code from 3.11 on
    return isinstance(problem, sqlite3.OperationalError) and "lock" in text


def _is_full(problem: BaseException) -> bool:
    text = str(problem)
    return isinstance(problem, sqlite3.OperationalError) and ("full" in text or "I/O" in text)
