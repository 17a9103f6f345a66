"""A session store in one SQLite file: sessions that outlive the application.

Each commit is one transaction (WAL, synchronous NORMAL: safe against the death of the process,
though the last commits may be lost with the power). Several processes may share the file: a
session belongs to one at a time, which says so in the file and renews that while it lives; the
sessions of a dead owner are taken over.

Any object with the same methods can be a store: `open`, `has`, `read`, `commit`, `delete`,
`beat`, `close` (and `expire`, if it wants to). Any thread may call them. When they cannot do
what they are asked, they raise a SessionError, and nothing has changed.

The one connection is handed from thread to thread by a turnstile of one slot, and not guarded by a
lock: an exception may strike its holder between any two steps, and a lock would be held for ever.
What a struck holder has begun is rolled back by the next one; a connection that nobody has for two
seconds is given up for a new one, and SQLite sees to it that two cannot mix.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import struct
import threading
import time
import uuid
import weakref
from typing import Any, Dict, Mapping, Optional, Tuple

from .engine.turnstile import Closed, Turnstile
from .errors import SessionBusy, SessionError

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x6D706F6F  # "mpoo": so that no other program's file is taken for ours
_LEASE_S = 30.0  # how long an owner on another host is believed without a sign of life
_BEAT_S = 5.0
_PATIENCE_S = 10.0  # how long to wait for another process that is writing
_ASTRAY_S = 2.0  # nobody takes so long from getting the connection to saying so
_FILE = "file"  # the turnstile's one slot
_CHECKED_BYTES = 1 << 24  # a smaller file is checked for damage when it is opened

Loaded = Tuple[int, Optional[Dict[str, bytes]]]  # version, state by key as bytes

_SCHEMA = """
CREATE TABLE owner (id TEXT PRIMARY KEY, host TEXT, pid INTEGER, started TEXT, beat REAL);
CREATE TABLE session (id TEXT PRIMARY KEY, version INTEGER, owner TEXT, used REAL) WITHOUT ROWID;
CREATE TABLE state (session TEXT, key TEXT, value BLOB, PRIMARY KEY (session, key)) WITHOUT ROWID;
"""


class SQLiteStore:
    """Keeps sessions in the SQLite file at `path`. Any thread may call any method.

    Raises:
        SessionError: the file cannot be opened, is no session store, or is of another version.
            It is left as it was.
    """

    def __init__(self, path: str) -> None:
        self.path = os.fspath(path)
        self._owner = uuid.uuid4().hex
        self._line = Turnstile("fifo", on_refused=lambda slot, db: db.close())
        self._holder: weakref.ref[_Transaction] | None = None
        self._astray: tuple[sqlite3.Connection, float] | None = None  # with nobody, since when
        self._beaten = 0.0
        self._pid = os.getpid()
        self._check_file()
        try:
            db = self._connected()
        except sqlite3.Error as problem:
            raise self._unusable(problem) from problem
        try:
            self._prepare(db)
        except BaseException as problem:
            db.close()
            if isinstance(problem, sqlite3.Error):
                raise self._unusable(problem) from problem
            raise

    def _connected(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self.path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False
        )

    def _check_file(self) -> None:
        """Look at the file before SQLite does, which may tidy up what is not ours."""
        try:
            with open(self.path, "rb") as file:
                header = file.read(100)
        except FileNotFoundError:
            return
        except OSError as problem:
            raise self._unusable(problem) from problem
        if not header:
            return
        if not header.startswith(b"SQLite format 3\0") or len(header) < 100:
            raise self._unusable("it is no SQLite database, or a corrupt one")
        self._check_kind(*struct.unpack_from(">I4xI", header, 60)[::-1])

    def _check_kind(self, kind: int, version: int) -> None:
        if kind != _APPLICATION_ID:
            raise self._unusable("it is another program's database")
        if version != SCHEMA_VERSION:
            newer = "; use a newer minipool for it" if version > SCHEMA_VERSION else ""
            raise self._unusable(f"it has schema version {version}, not {SCHEMA_VERSION}{newer}")

    def _prepare(self, db: sqlite3.Connection) -> None:
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            self._create(db)
        (kind,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        self._check_kind(kind, version)
        if os.path.getsize(self.path) < _CHECKED_BYTES:
            (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise self._unusable(f"it is corrupt: {found}")
        # Only now: what was made above is in the file itself, where `_check_file` looks.
        db.execute("PRAGMA journal_mode=WAL")
        self._offer(db)
        self.beat(force=True)
        with self._transaction("dead owners could not be forgotten"):
            for owner, *facts in db.execute("SELECT id, host, pid, started, beat FROM owner"):
                if not _alive(*facts):
                    db.execute("DELETE FROM owner WHERE id=?", (owner,))

    def _create(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN IMMEDIATE")
        try:
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not tables:  # else another process was faster
                for statement in _SCHEMA.strip().split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise

    def _offer(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA synchronous=NORMAL")
        self._line.admit(_FILE, db)
        self._line.publish(_FILE, db)

    # -- what a store does -------------------------------------------------------------------

    def open(self, key: str) -> Loaded | None:
        """Make a session ours; return version and state, or None if it is new.

        Raises:
            SessionBusy: a living process has it.
        """
        with self._transaction(f"session {key!r} could not be opened") as db:
            row = db.execute("SELECT version, owner FROM session WHERE id=?", (key,)).fetchone()
            if row is None:
                db.execute(
                    "INSERT INTO session VALUES (?, 0, ?, ?)", (key, self._owner, time.time())
                )
                return None
            version, owner = row
            if owner is not None and owner != self._owner:
                self._refuse_if_alive(db, key, owner)
            db.execute(
                "UPDATE session SET owner=?, used=? WHERE id=?", (self._owner, time.time(), key)
            )
            return version, _state_of(db, key)

    def create(self, key: str, state: Mapping[str, bytes]) -> bool:
        """Begin a session with its state, all or nothing; False: there is one already."""
        with self._transaction(f"session {key!r} could not be begun") as db:
            if db.execute("SELECT 1 FROM session WHERE id=?", (key,)).fetchone() is not None:
                return False
            row = (key, int(bool(state)), self._owner, time.time())
            db.execute("INSERT INTO session VALUES (?,?,?,?)", row)
            db.executemany(
                "INSERT INTO state VALUES (?,?,?)",
                [(key, name, data) for name, data in state.items()],
            )
            return True

    def has(self, key: str) -> bool:
        """Tell whether there is such a session, whoever has it."""
        with self._transaction(f"session {key!r} could not be looked up", "DEFERRED") as db:
            found = db.execute("SELECT 1 FROM session WHERE id=?", (key,)).fetchone()
        return found is not None

    def read(self, key: str) -> Loaded | None:
        """Return version and state of a session, whoever has it; None if there is none."""
        with self._transaction(f"session {key!r} could not be read", "DEFERRED") as db:
            row = db.execute("SELECT version FROM session WHERE id=?", (key,)).fetchone()
            return None if row is None else (row[0], _state_of(db, key))

    def commit(self, key: str, version: int, changes: Mapping[str, bytes | None]) -> None:
        """Keep the changes, all or none.

        Raises:
            SessionError: the file could not be written, or another process took the session.
        """
        with self._transaction(f"session {key!r} could not be committed") as db:
            done = db.execute(
                "UPDATE session SET version=?, used=? WHERE id=? AND owner=?",
                (version, time.time(), key, self._owner),
            )
            if done.rowcount != 1:
                raise SessionBusy(
                    f"session {key!r} was taken over by another process, which thought this one "
                    f"dead; nothing was committed",
                    session_id=key,
                    owner_pid=None,
                )
            for name, data in changes.items():
                if data is None:
                    db.execute("DELETE FROM state WHERE session=? AND key=?", (key, name))
                else:
                    db.execute("INSERT OR REPLACE INTO state VALUES (?,?,?)",
                                     (key, name, data))  # fmt: skip

    def delete(self, key: str) -> None:
        """Forget a session, if it is ours."""
        with self._transaction(f"session {key!r} could not be deleted") as db:
            done = db.execute("DELETE FROM session WHERE id=? AND owner=?", (key, self._owner))
            if done.rowcount:
                db.execute("DELETE FROM state WHERE session=?", (key,))

    def expire(self, seconds: float) -> bool:
        """Forget sessions that no living process has, and nobody had for so long."""
        with self._transaction("old sessions could not be deleted", patience=0.0) as db:
            old = db.execute(
                "SELECT id, owner FROM session WHERE used < ? AND owner IS NOT ? LIMIT 1000",
                (time.time() - seconds, self._owner),
            ).fetchall()
            dead = {owner: _owner_alive(db, owner) is None for owner in {o for _, o in old}}
            keys = [(key,) for key, owner in old if dead[owner]]
            db.executemany("DELETE FROM session WHERE id=?", keys)
            db.executemany("DELETE FROM state WHERE session=?", keys)
            return len(keys) == 1000

    def beat(self, used: Mapping[str, float] | None = None, force: bool = False) -> None:
        """Give a sign of life, now and then; note which sessions were used, seconds ago."""
        self._find_astray()
        if used:
            with self._transaction("uses could not be noted", patience=0.0) as db:
                db.executemany(
                    "UPDATE session SET used=max(used, ?) WHERE id=? AND owner=?",
                    [(time.time() - ago, key, self._owner) for key, ago in used.items()],
                )
        now = time.time()
        if not force and 0 <= now - self._beaten < _BEAT_S:
            return
        with self._transaction("the sign of life could not be given", patience=0.0) as db:
            db.execute(
                "INSERT OR REPLACE INTO owner VALUES (?,?,?,?,?)",
                (self._owner, socket.gethostname(), os.getpid(), _started(os.getpid()), now),
            )
        self._beaten = now

    def _find_astray(self) -> None:
        """Give up a connection whose holder was struck before he could give it back.

        If he is there after all, only very slow, his transaction fails, and nothing else.
        """
        holder = None if self._holder is None else self._holder()
        current: sqlite3.Connection | None = self._line.current.get(_FILE)
        before, self._astray = self._astray, None
        if holder is not None or current is None or self._line.idle:
            return
        now = time.monotonic()
        self._astray = before if before is not None and before[0] is current else (current, now)
        if now - self._astray[1] > _ASTRAY_S:
            self._line.fence(_FILE)
            current.close()
            self._offer(self._connected())

    def close(self) -> None:
        """Let go of our sessions and the file."""
        if self._pid != os.getpid():
            return  # a fork must not touch the owner's connection
        with contextlib.suppress(SessionError):  # else their owner is found dead, later
            with self._transaction("sessions could not be let go") as db:
                db.execute("UPDATE session SET owner=NULL WHERE owner=?", (self._owner,))
                db.execute("DELETE FROM owner WHERE id=?", (self._owner,))
        for _, db in self._line.close():
            db.close()

    # -- how ---------------------------------------------------------------------------------

    def _refuse_if_alive(self, db: sqlite3.Connection, key: str, owner: str) -> None:
        found = _owner_alive(db, owner)
        if found is not None:
            host, pid = found
            raise SessionBusy(
                f"session {key!r} belongs to process {pid} on {host}, which is alive; end it "
                f"there, or wait for that process to close its pool",
                session_id=key,
                owner_pid=pid,
            )

    def _transaction(
        self, what: str, mode: str = "IMMEDIATE", patience: float = _PATIENCE_S
    ) -> _Transaction:
        if self._pid != os.getpid():
            raise SessionError(
                f"{what}: the store was opened by process {self._pid}; open one of your own here"
            )
        return _Transaction(self, f"{what} in {self.path!r}", mode, patience)

    def _unusable(self, problem: Any) -> SessionError:
        return SessionError(
            f"session_store={self.path!r} cannot be used: {problem}; it was left as it is; give "
            f"the path of a session store, or one where a new file can be made"
        )


class _Transaction:
    """One transaction on the connection; what SQLite raises becomes a SessionError.

    It lives as long as the `with` block's frame, which tells whether its thread is still at it.
    """

    def __init__(self, store: SQLiteStore, what: str, mode: str, patience: float) -> None:
        self._store, self._what, self._mode, self._patience = store, what, mode, patience
        self.thread = threading.get_ident()

    def __enter__(self) -> sqlite3.Connection:
        try:
            self._db = db = self._taken()
        except BaseException:
            self._take_back()
            raise
        try:
            if db.in_transaction:
                db.execute("ROLLBACK")  # its last holder was struck
            self._be_patient(self._patience)
            try:
                db.execute(f"BEGIN {self._mode}")
            finally:
                self._be_patient(_PATIENCE_S)
        except sqlite3.Error as problem:
            self._give_back()
            raise SessionError(f"{self._what}: {problem}; nothing was changed") from problem
        except BaseException:
            self._give_back()
            raise
        return db

    def _taken(self) -> sqlite3.Connection:
        """Take the connection, after those who came before."""
        store, me = self._store, weakref.ref(self)
        holder = None if store._holder is None else store._holder()
        if holder is not None and holder.thread == self.thread:
            patience = 0.0  # a signal handler in the midst of it: it would wait for itself
        else:
            patience = self._patience
        try:
            token = store._line.take(patience)
        except Closed:
            raise SessionError(f"{self._what}: the store is closed") from None
        if token is None:
            raise SessionError(f"{self._what}: it is being written to; try again")
        store._holder = me
        db: sqlite3.Connection = token[1]
        return db

    def _be_patient(self, seconds: float) -> None:
        if self._patience != _PATIENCE_S:
            self._db.execute(f"PRAGMA busy_timeout={int(seconds * 1000)}")

    def _take_back(self) -> None:
        """Give back the connection if an interrupt came when we had just got it."""
        store = self._store
        if store._holder is not None and store._holder() is self:
            self._db = store._line.current[_FILE]
            self._give_back()

    def _give_back(self) -> None:
        self._store._holder = None
        self._store._line.publish(_FILE, self._db)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._db.execute("COMMIT" if error is None else "ROLLBACK")
        except sqlite3.Error as problem:
            if error is None:
                with contextlib.suppress(sqlite3.Error):  # SQLite may have done it itself
                    self._db.execute("ROLLBACK")
                raise SessionError(f"{self._what}: {problem}; nothing was changed") from problem
        finally:
            self._give_back()
        if isinstance(error, sqlite3.Error):
            raise SessionError(f"{self._what}: {error}; nothing was changed") from error


def _state_of(db: sqlite3.Connection, key: str) -> dict[str, bytes] | None:
    rows = db.execute("SELECT key, value FROM state WHERE session=?", (key,))
    return dict(rows.fetchall()) or None


def _owner_alive(db: sqlite3.Connection, owner: str | None) -> tuple[str, int] | None:
    """Return host and pid of a session's owner, if he is alive."""
    row = db.execute("SELECT host, pid, started, beat FROM owner WHERE id=?", (owner,)).fetchone()
    return None if row is None or not _alive(*row) else (row[0], row[1])


def _alive(host: str, pid: int, started: str | None, beat: float) -> bool:
    """Tell whether an owner lives: here by its process, elsewhere by its last sign of life."""
    if host == socket.gethostname():
        return started is not None and _started(pid) == started
    return time.time() - beat < _LEASE_S


def _started(pid: int) -> str | None:
    """Return when a process began, to tell it from a later one of that pid; None: no such one."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            words = file.read().rpartition(")")[2].split()
            return None if words[0] == "Z" else words[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "?" if not os.path.isdir("/proc/self") else None
