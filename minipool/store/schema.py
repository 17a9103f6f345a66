"""The schema of a store's file: making it, checking it, bringing an older one up to date.

Schema 2 keeps a CRC-32 with each value (`crc`), which covers session, key and value, and with each
session (`seal`), which covers its id, its version and which values it has: SQLite itself notices
only damage to the structure of its pages.
"""

from __future__ import annotations

import sqlite3
import zlib
from typing import Any

from ..errors import SessionError
from . import host
from .open_files import Connection
from .owners import LEASE_S

SCHEMA_VERSION = 2
_APPLICATION_ID = 0x6D706F6F  # "mpoo": so that no other program's file is taken for ours
_CHECKED_BYTES = 1 << 24  # a smaller file is checked for damage when it is opened
_BITS = 0xFFFFFFFF

_TABLES = """
CREATE TABLE owner (id TEXT PRIMARY KEY, host TEXT, pid INTEGER, started TEXT, beat REAL,
                    boot TEXT, namespace TEXT, beat_boot REAL);
CREATE TABLE session (id TEXT PRIMARY KEY, version INTEGER, owner TEXT, used REAL,
                      boot TEXT, used_boot REAL, seal INTEGER) WITHOUT ROWID;
CREATE TABLE state (session TEXT, key TEXT, value BLOB, crc INTEGER,
                    PRIMARY KEY (session, key)) WITHOUT ROWID;
"""
_ADDED_IN_2 = (
    "owner ADD COLUMN boot TEXT", "owner ADD COLUMN namespace TEXT",
    "owner ADD COLUMN beat_boot REAL", "session ADD COLUMN boot TEXT",
    "session ADD COLUMN used_boot REAL", "session ADD COLUMN seal INTEGER",
    "state ADD COLUMN crc INTEGER",
)  # fmt: skip


class Unfit(Exception):
    """The file cannot be used as a store; the text says why."""


def value_crc(session: str, key: str, value: bytes) -> int:
    """Return the checksum of one value of a session's state."""
    return zlib.crc32(value, zlib.crc32(f"{len(session)} {session}{key}".encode()))


def seal_of(session: str, version: int, crcs: int) -> int:
    """Return the checksum of a session, given the sum of its values' checksums."""
    return (zlib.crc32(f"{version} {session}".encode()) + crcs) & _BITS


def check_kind(kind: Any, version: Any) -> None:
    """Refuse a database that is no store, or a later one.

    Raises:
        Unfit: it is.
    """
    if kind != _APPLICATION_ID:
        raise Unfit("it is another program's database")
    if version not in (1, SCHEMA_VERSION):
        newer = "; use a newer minipool for it" if version > SCHEMA_VERSION else ""
        raise Unfit(f"it has schema version {version}, not {SCHEMA_VERSION}{newer}")


def peek(db: Connection) -> None:
    """Look whose file it is, on a connection that locks and changes nothing (`immutable`).

    Another process may be writing, so what only looks damaged is left for `check` to find.

    Raises:
        Unfit: it is no store, or a later one.
    """
    try:
        (kind,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as problem:
        if "not a database" in str(problem):
            raise Unfit("it is no SQLite database, or a corrupt one") from problem
    else:
        check_kind(kind, version)


def version_of(db: Connection) -> int | None:
    """Return the version of a store's schema; None where nothing was made yet.

    Raises:
        Unfit: it is no store, or a later one.
    """
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables:
        return None
    (kind,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    check_kind(kind, version)
    found: int = version
    return found


def make(db: Connection) -> None:
    """Make the tables, unless another process was faster."""
    if version_of(db) is None:
        for statement in _TABLES.strip().split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def upgrade(db: Connection) -> bool:
    """Bring schema 1 up to date; False if another process has done so already.

    Raises:
        Unfit: another process uses the file by that schema.
    """
    if version_of(db) != 1:
        return False
    _refuse_users_of_1(db)
    for change in _ADDED_IN_2:
        db.execute(f"ALTER TABLE {change}")
    db.raw.create_function("value_crc", 3, value_crc)
    db.raw.create_function("seal_of", 3, seal_of)
    db.execute("DELETE FROM owner")
    db.execute("UPDATE state SET crc=value_crc(session, key, value)")
    db.execute(
        "UPDATE session SET owner=NULL, seal=seal_of(id, version, (SELECT ifnull(sum(crc), 0) "
        "FROM state WHERE state.session=session.id))"
    )
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    return True


def _refuse_users_of_1(db: Connection) -> None:
    """Refuse to change what an older minipool uses: by pid if it can be seen, and sign of life."""
    now, here = host.moment().wall, host.host_name()
    for owner, name, pid, started, beat in db.execute(
        "SELECT id, host, pid, started, beat FROM owner"
    ).fetchall():
        if not isinstance(pid, int) or not isinstance(beat, (int, float)):
            raise Unfit(f"row {owner!r} of table owner is damaged")
        silent = now - beat
        if (name == here and host.start_of(pid) == started) or silent < LEASE_S:
            raise Unfit(
                f"it has schema version 1, and process {pid} on {name} uses it by that (last sign "
                f"of life {silent:.0f} s ago); close the store there first, or, if that process "
                f"is dead, try again in {LEASE_S:.0f} s"
            )


def check(db: Connection, size_bytes: int) -> None:
    """Look for damage, if the file is small; a larger one shows it when it is used.

    Raises:
        Unfit: it is corrupt. SessionError: a row is damaged. sqlite3.Error: so is more.
    """
    if size_bytes >= _CHECKED_BYTES:
        return
    (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise Unfit(f"it is corrupt: {found}")
    crcs = dict(db.execute("SELECT session, sum(crc) FROM state GROUP BY session").fetchall())
    for session, version, seal in db.execute("SELECT id, version, seal FROM session").fetchall():
        check_session(db.path, session, version, crcs.pop(session, 0), seal)
    for session in crcs:
        raise damaged(db.path, "state", session, "there is no such session")


def check_session(path: str, session: Any, version: Any, crcs: Any, seal: Any) -> None:
    """Check what is written of a session, but for its values.

    Raises:
        SessionError: it is damaged.
    """
    right = isinstance(session, str) and isinstance(version, int) and isinstance(crcs, int)
    if not right or version < 0 or seal != seal_of(session, version, crcs):
        raise damaged(path, "session", session, "its checksum is wrong")


def damaged(path: str, table: str, row: Any, what: str) -> SessionError:
    """Return the error that tells of a row that is not as it was written."""
    return SessionError(
        f"{path!r} is damaged: row {row!r} of table {table}: {what}; restore a backup of the "
        f"file, or delete what there is of that session"
    )
