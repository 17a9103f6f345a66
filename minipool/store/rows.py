"""What a store does with its rows; each function is the body of one transaction.

Any of them may be run again from its beginning, if the file was locked.
"""

from __future__ import annotations

import time
from typing import Any, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..errors import SessionBusy, SessionError
from . import host, owners, schema
from .open_files import Connection

Loaded = Tuple[int, Optional[Dict[str, bytes]]]  # version, state by key as bytes

_DELETING_S = 0.005  # how long one batch of expired sessions may keep others from writing


def checked_id(key: Any, what: str = "session id") -> str:
    """Return a text as given, if it can be written down.

    Raises:
        TypeError: it is no text. SessionError: it has lone surrogates.
    """
    if not isinstance(key, str):
        raise TypeError(f"a {what} is a text, not {key!r}")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise SessionError(
            f"{what} {key!r} has lone surrogates, which no file can hold; nothing was changed"
        ) from None
    return key


def checked_changes(changes: Mapping[str, bytes | None]) -> dict[str, bytes | None]:
    """Return what is to be changed in a session's state, as given.

    Raises:
        TypeError: a name is no text, or a value no bytes. SessionError: a name has lone surrogates.
    """
    for name, data in changes.items():
        checked_id(name, "state key")
        if data is not None and not isinstance(data, bytes):
            raise TypeError(f"the value of {name!r} is given as bytes, not {type(data).__name__}")
    return dict(changes)


class _Session(NamedTuple):
    version: int
    owner: str | None
    seal: int


def _session(db: Connection, key: str) -> _Session | None:
    row = db.execute("SELECT version, owner, seal FROM session WHERE id=?", (key,)).fetchone()
    if row is None:
        return None
    version, owner, seal = row
    if not (
        isinstance(version, int)
        and isinstance(seal, int)
        and (owner is None or isinstance(owner, str))
    ):
        raise schema.damaged(db.path, "session", key, f"it holds {row!r}")
    return _Session(version, owner, seal)


def _loaded(db: Connection, key: str, session: _Session) -> Loaded:
    state, crcs = {}, 0
    for name, value, crc in db.execute(
        "SELECT key, value, crc FROM state WHERE session=?", (key,)
    ).fetchall():
        if not isinstance(name, str) or not isinstance(value, bytes):
            raise schema.damaged(db.path, "state", (key, name), "a value is missing")
        if crc != schema.value_crc(key, name, value):
            raise schema.damaged(db.path, "state", (key, name), "its checksum is wrong")
        state[name] = value
        crcs += crc
    schema.check_session(db.path, key, session.version, crcs, session.seal)
    return session.version, state or None


def open_session(db: Connection, owner: str, key: str) -> Loaded | None:
    """See `SQLiteStore.open`."""
    _refuse_closed(owner)
    session = _session(db, key)
    if session is None:
        _begin(db, owner, key, {})
        return None
    if session.owner != owner:
        _refuse_if_alive(db, key, session.owner)
    loaded = _loaded(db, key, session)
    now = host.moment()
    db.execute(
        "UPDATE session SET owner=?, used=?, boot=?, used_boot=? WHERE id=?", (owner, *now, key)
    )
    return loaded


def create_session(db: Connection, owner: str, key: str, state: Mapping[str, bytes]) -> bool:
    """See `SQLiteStore.create`."""
    _refuse_closed(owner)
    if _session(db, key) is not None:
        return False
    _begin(db, owner, key, state)
    return True


def _begin(db: Connection, owner: str, key: str, state: Mapping[str, bytes]) -> None:
    if db.execute("SELECT 1 FROM state WHERE session=?", (key,)).fetchone() is not None:
        raise schema.damaged(db.path, "state", key, "there is no such session")
    crcs, version = 0, 1 if state else 0
    for name, data in state.items():
        crc = schema.value_crc(key, name, data)
        crcs += crc
        db.execute("INSERT INTO state (session, key, value, crc) VALUES (?,?,?,?)",
                   (key, name, data, crc))  # fmt: skip
    db.execute(
        "INSERT INTO session (id, version, owner, used, boot, used_boot, seal) "
        "VALUES (?,?,?,?,?,?,?)",
        (key, version, owner, *host.moment(), schema.seal_of(key, version, crcs)),
    )


def _refuse_closed(owner: str) -> None:
    if not owners.is_open(owner):
        raise SessionError("the store is closed; nothing was changed")


def _refuse_if_alive(db: Connection, key: str, owner: str | None) -> None:
    found = owners.living(db, db.path, owner)
    if found is not None:
        raise SessionBusy(
            f"session {key!r} belongs to process {found.pid} on {found.host}, which is alive; end "
            f"it there, or wait for that process to close its pool",
            session_id=key,
            owner_pid=found.pid,
        )


def has_session(db: Connection, key: str) -> bool:
    """See `SQLiteStore.has`."""
    return db.execute("SELECT 1 FROM session WHERE id=?", (key,)).fetchone() is not None


def read_session(db: Connection, key: str) -> Loaded | None:
    """See `SQLiteStore.read`."""
    session = _session(db, key)
    return None if session is None else _loaded(db, key, session)


def commit_session(
    db: Connection, owner: str, key: str, version: int, changes: Mapping[str, bytes | None]
) -> None:
    """See `SQLiteStore.commit`."""
    change = schema.seal_of(key, version, 0) - schema.seal_of(key, version - 1, 0)
    for name, data in changes.items():
        old = db.execute("SELECT crc FROM state WHERE session=? AND key=?", (key, name)).fetchone()
        if old is not None:
            if not isinstance(old[0], int):
                raise schema.damaged(db.path, "state", (key, name), "its checksum is missing")
            change -= old[0]
        if data is None:
            db.execute("DELETE FROM state WHERE session=? AND key=?", (key, name))
        else:
            crc = schema.value_crc(key, name, data)
            change += crc
            db.execute("INSERT OR REPLACE INTO state (session, key, value, crc) VALUES (?,?,?,?)",
                       (key, name, data, crc))  # fmt: skip
    done = db.execute(
        "UPDATE session SET version=?, used=?, boot=?, used_boot=?, seal=(seal+?)&4294967295 "
        "WHERE id=? AND owner=? AND version=?",
        (version, *host.moment(), change, key, owner, version - 1),
    )
    if done.rowcount != 1:
        raise _not_ours(db, owner, key, version)


def _not_ours(db: Connection, owner: str, key: str, version: int) -> SessionBusy:
    session, pid = _session(db, key), None
    if session is None:
        what = "is not in the file any more"
    elif session.owner == owner:
        what = f"has version {session.version} there, so version {version} does not follow"
    else:
        what = "was taken over by another process, which thought this one dead"
        found = owners.living(db, db.path, session.owner)
        pid = None if found is None else found.pid
    return SessionBusy(
        f"session {key!r} {what}; nothing was committed; check out again to go on with what is in "
        f"{db.path!r}",
        session_id=key,
        owner_pid=pid,
    )


def delete_session(db: Connection, owner: str, key: str) -> None:
    """See `SQLiteStore.delete`."""
    if db.execute("DELETE FROM session WHERE id=? AND owner=?", (key, owner)).rowcount:
        db.execute("DELETE FROM state WHERE session=?", (key,))


def let_one_go(db: Connection, owner: str, key: str) -> None:
    """See `SQLiteStore.let_go`."""
    db.execute("UPDATE session SET owner=NULL WHERE id=? AND owner=?", (key, owner))


def let_all_go(db: Connection, owner: str) -> None:
    """Give up all sessions of an owner, which ends."""
    db.execute("UPDATE session SET owner=NULL WHERE owner=?", (owner,))
    db.execute("DELETE FROM owner WHERE id=?", (owner,))


def nothing(db: Connection) -> None:
    """Change nothing: that it was its turn is all that the caller wants to know."""


def note_use(db: Connection, owner: str, used: Sequence[tuple[str, float]]) -> None:
    """Note that sessions were used so many seconds ago."""
    db.executemany(
        "UPDATE session SET used=?, boot=?, used_boot=? WHERE id=? AND owner=?",
        [(*host.moment(ago), key, owner) for key, ago in used],
    )


class Aged(NamedTuple):
    """A session as a look for old ones found it."""

    key: str
    owner: str | None
    used: float


def find_old(
    db: Connection, owner: str, after: str, count: int, seconds: float, by_wall: bool
) -> tuple[list[Aged], str | None]:
    """Return those of the next sessions that nobody living has, unused for so long; where to go on.

    `by_wall`: also those that were last used before this boot, as far as the wall clock tells.
    """
    rows = db.execute(
        "SELECT id, owner, used, boot, used_boot FROM session WHERE id > ? ORDER BY id LIMIT ?",
        (after, count),
    ).fetchall()
    now = host.moment()
    old = []
    for key, owner_id, used, boot, used_boot in rows:
        if boot is not None and boot == now.boot and isinstance(used_boot, float):
            aged = now.since_boot is not None and now.since_boot - used_boot > seconds
        else:
            aged = by_wall and isinstance(used, float) and now.wall - used > seconds
        if aged and owner_id != owner:
            old.append(Aged(key, owner_id, used))
    lives = {name: owners.living(db, db.path, name) is not None for name in {o.owner for o in old}}
    old = [found for found in old if not lives[found.owner]]
    return old, rows[-1][0] if len(rows) == count else None


def delete_old(db: Connection, old: Sequence[Aged]) -> str | None:
    """Delete sessions that nobody has taken since; return the last one there was time for."""
    until = time.monotonic() + _DELETING_S
    last = None
    for last, owner, used in old:
        done = db.execute(
            "DELETE FROM session WHERE id=? AND owner IS ? AND used IS ?", (last, owner, used)
        )
        if done.rowcount:
            db.execute("DELETE FROM state WHERE session=?", (last,))
        if time.monotonic() > until:
            break
    return last
