"""A session store in one SQLite file: sessions that outlive the application.

Each commit is one transaction (WAL, synchronous NORMAL: safe against the death of the process,
though the last commits may be lost with the power). Several processes may share the file: a
session belongs to one at a time, which says so in the file and renews that while it lives; the
sessions of a dead owner are taken over.

Any object with the same methods can be a store: `open`, `has`, `read`, `commit`, `delete`,
`beat`, `close`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import threading
import time
import uuid
from typing import Any, Dict, Mapping, Optional, Tuple

from .errors import SessionBusy, SessionError

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x6D706F6F  # "mpoo": so that no other program's file is taken for ours
_LEASE_S = 30.0  # how long an owner on another host is believed without a sign of life
_BEAT_S = 5.0

Loaded = Tuple[int, Optional[Dict[str, bytes]]]  # version, state by key as bytes

_SCHEMA = """
CREATE TABLE owner (id TEXT PRIMARY KEY, host TEXT, pid INTEGER, started TEXT, beat REAL);
CREATE TABLE session (id TEXT PRIMARY KEY, version INTEGER, owner TEXT) WITHOUT ROWID;
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
        self._lock = threading.RLock()
        self._beaten = 0.0
        self._pid = os.getpid()
        try:
            self._db = sqlite3.connect(
                self.path, timeout=10.0, isolation_level=None, check_same_thread=False
            )
            self._prepare()
        except sqlite3.Error as problem:
            raise self._unusable(problem) from problem

    def _prepare(self) -> None:
        db = self._db
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (kind,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if tables and kind != _APPLICATION_ID:
            raise self._unusable("it is another program's database")
        if tables and version != SCHEMA_VERSION:
            raise self._unusable(f"it has schema version {version}, not {SCHEMA_VERSION}")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        if not tables:
            self._create()
        self.beat(force=True)

    def _create(self) -> None:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
                if not tables:  # else another process was faster
                    for statement in _SCHEMA.strip().split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
                    self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    # -- what a store does -------------------------------------------------------------------

    def open(self, key: str) -> Loaded | None:
        """Make a session ours; return version and state, or None if it is new.

        Raises:
            SessionBusy: a living process has it.
        """
        with self._transaction(f"session {key!r} could not be opened"):
            row = self._db.execute(
                "SELECT version, owner FROM session WHERE id=?", (key,)
            ).fetchone()
            if row is None:
                self._db.execute("INSERT INTO session VALUES (?, 0, ?)", (key, self._owner))
                return None
            version, owner = row
            if owner is not None and owner != self._owner:
                self._refuse_if_alive(key, owner)
            self._db.execute("UPDATE session SET owner=? WHERE id=?", (self._owner, key))
            return version, self._state_of(key)

    def has(self, key: str) -> bool:
        """Tell whether there is such a session, whoever has it."""
        with self._lock:
            found = self._db.execute("SELECT 1 FROM session WHERE id=?", (key,)).fetchone()
        return found is not None

    def read(self, key: str) -> Loaded | None:
        """Return version and state of a session, whoever has it; None if there is none."""
        with self._lock:
            row = self._db.execute("SELECT version FROM session WHERE id=?", (key,)).fetchone()
            return None if row is None else (row[0], self._state_of(key))

    def commit(self, key: str, version: int, changes: Mapping[str, bytes | None]) -> None:
        """Keep the changes, all or none.

        Raises:
            SessionError: the file could not be written, or another process took the session.
        """
        with self._transaction(f"session {key!r} could not be committed"):
            done = self._db.execute(
                "UPDATE session SET version=? WHERE id=? AND owner=?", (version, key, self._owner)
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
                    self._db.execute("DELETE FROM state WHERE session=? AND key=?", (key, name))
                else:
                    self._db.execute("INSERT OR REPLACE INTO state VALUES (?,?,?)",
                                     (key, name, data))  # fmt: skip

    def delete(self, key: str) -> None:
        """Forget a session of ours."""
        with self._transaction(f"session {key!r} could not be deleted"):
            self._db.execute("DELETE FROM state WHERE session=?", (key,))
            self._db.execute("DELETE FROM session WHERE id=?", (key,))

    def beat(self, force: bool = False) -> None:
        """Give a sign of life, now and then."""
        now = time.time()
        if not force and now - self._beaten < _BEAT_S:
            return
        self._beaten = now
        with self._transaction("the sign of life could not be given"):
            self._db.execute(
                "INSERT OR REPLACE INTO owner VALUES (?,?,?,?,?)",
                (self._owner, socket.gethostname(), os.getpid(), _started(os.getpid()), now),
            )

    def close(self) -> None:
        """Let go of our sessions and the file."""
        with self._lock:
            if self._pid != os.getpid():
                return  # a fork must not touch the owner's connection
            with contextlib.suppress(sqlite3.Error):  # else their owner is found dead, later
                self._db.execute("UPDATE session SET owner=NULL WHERE owner=?", (self._owner,))
                self._db.execute("DELETE FROM owner WHERE id=?", (self._owner,))
            self._db.close()

    # -- how ---------------------------------------------------------------------------------

    def _state_of(self, key: str) -> dict[str, bytes] | None:
        rows = self._db.execute("SELECT key, value FROM state WHERE session=?", (key,))
        return dict(rows.fetchall()) or None

    def _refuse_if_alive(self, key: str, owner: str) -> None:
        row = self._db.execute(
            "SELECT host, pid, started, beat FROM owner WHERE id=?", (owner,)
        ).fetchone()
        if row is None:
            return
        host, pid, started, beat = row
        alive = _started(pid) == started if host == socket.gethostname() else False
        if host != socket.gethostname():
            alive = time.time() - beat < _LEASE_S
        if alive:
            raise SessionBusy(
                f"session {key!r} belongs to process {pid} on {host}, which is alive; end it "
                f"there, or wait for that process to close its pool",
                session_id=key,
                owner_pid=pid,
            )

    def _transaction(self, what: str) -> _Transaction:
        return _Transaction(self._db, self._lock, f"{what} in {self.path!r}")

    def _unusable(self, problem: Any) -> SessionError:
        return SessionError(
            f"session_store={self.path!r} cannot be used: {problem}; it was left as it is; give "
            f"the path of a session store, or one where a new file can be made"
        )


class _Transaction:
    """One transaction under the lock; what SQLite raises becomes a SessionError."""

    def __init__(self, db: sqlite3.Connection, lock: Any, what: str) -> None:
        self._db, self._lock, self._what = db, lock, what

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as problem:
            self._lock.release()
            raise SessionError(f"{self._what}: {problem}") from problem
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._db.execute("COMMIT" if error is None else "ROLLBACK")
        except sqlite3.Error as problem:
            if error is None:
                self._roll_back()
                raise SessionError(f"{self._what}: {problem}") from problem
        finally:
            self._lock.release()
        if isinstance(error, sqlite3.Error):
            raise SessionError(f"{self._what}: {error}; nothing was changed") from error

    def _roll_back(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # SQLite may have done it itself
            self._db.execute("ROLLBACK")


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
