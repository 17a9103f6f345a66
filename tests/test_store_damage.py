"""Damage to a store's file is told, whatever it is; an older schema is brought up to date."""

from __future__ import annotations

import errno
import os
import random
import socket
import sqlite3
import stat
import time
from pathlib import Path
from typing import Any, Callable

import pytest

from minipool import SessionError
from minipool.store import SQLiteStore, host
from minipool.store.database import Database
from minipool.store.schema import value_crc

STATE = {
    f"s{number}": {f"k{key}": b"%d %d " % (number, key) * 90 for key in range(4)}
    for number in range(40)
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


def fill(path: Path) -> None:
    store = SQLiteStore(str(path))
    for key, state in STATE.items():
        store.create(key, state)
    store.close()


def change(path: Path, *statements: str) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        db.execute(statement)
    db.close()


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes of a file after an accident."""
    kind = chance.choice(["flip", "flip", "flips", "cut", "garbage", "zeros", "moved"])
    page = chance.randrange(len(data) // 4096) * 4096
    if kind == "cut":
        return data[: chance.randrange(len(data))]
    if kind in ("garbage", "zeros", "moved"):
        other = chance.randrange(len(data) // 4096) * 4096
        put = {
            "garbage": chance.randbytes(4096),
            "zeros": bytes(4096),
            "moved": data[other : other + 4096],
        }[kind]
        return data[:page] + put + data[page + 4096 :]
    hurt = bytearray(data)
    for _ in range(1 if kind == "flip" else 8):
        hurt[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(hurt)


@pytest.mark.parametrize("seed", range(5))
def test_corrupt_file_is_told_or_harmless(path: Path, seed: int) -> None:
    """A hundred accidents: what is read is what was written, or a SessionError says why not."""
    fill(path)
    data = path.read_bytes()
    chance = random.Random(seed)
    told = 0
    for _ in range(100):
        path.write_bytes(damaged(data, chance))
        for suffix in ("-wal", "-shm", "-journal"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        try:
            store = SQLiteStore(str(path))
        except SessionError as problem:
            assert str(path) in str(problem)
            told += 1
            continue
        for key, state in STATE.items():
            try:
                assert store.read(key) == (1, state), key
                assert store.open(key) == (1, state), key
                store.commit(key, 2, {"k1": b"new"})
                assert store.read(key) == (2, {**state, "k1": b"new"}), key
                store.delete(key)
            except SessionError as problem:
                assert str(path) in str(problem)
                told += 1
        store.close()
    assert told > 50


def test_one_flipped_bit_of_a_value_is_noticed(path: Path) -> None:
    """Only the session that it belongs to is lost."""
    fill(path)
    data = path.read_bytes()
    at = data.index(STATE["s7"]["k2"]) + 100
    path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    store = SQLiteStore(str(path))
    for use in (store.open, store.read):
        with pytest.raises(SessionError, match=r"sessions.db.*'s7', 'k2'.*state.*checksum"):
            use("s7")
    assert store.open("s8") == (1, STATE["s8"])
    store.close()


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE session SET version=7 WHERE id='s1'", "'s1' of table session"),
        ("UPDATE session SET version=NULL WHERE id='s1'", "'s1' of table session"),
        ("UPDATE session SET id='s1x' WHERE id='s1'", "'s1x' of table session"),
        ("UPDATE session SET id=x'ff' WHERE id='s1'", "of table session"),
        ("UPDATE session SET id=CAST(x'ff' AS TEXT) WHERE id='s1'", "UTF-8"),
        ("DELETE FROM session WHERE id='s1'", "'s1' of table state: there is no such session"),
        ("DELETE FROM state WHERE session='s1' AND key='k1'", "'s1' of table session"),
        ("UPDATE state SET crc='x' WHERE session='s1'", "'s1' of table session"),
        ("INSERT INTO owner VALUES ('y','elsewhere',1,'5','soon',NULL,NULL,NULL)", "'y' of table owner"),
        ("INSERT INTO owner VALUES ('y','elsewhere','p','5',1,NULL,NULL,NULL)", "'y' of table owner"),
        ("DROP TABLE state", "no such table"),
        ("ALTER TABLE session RENAME COLUMN seal TO signet", "no such column"),
    ],
)  # fmt: skip
def test_damaged_row_is_named(path: Path, statement: str, says: str) -> None:
    fill(path)
    change(path, statement)
    with pytest.raises(SessionError, match=says) as caught:
        SQLiteStore(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE state SET value=NULL WHERE session='s1' AND key='k1'", "a value is missing"),
        ("UPDATE state SET value='text' WHERE session='s1' AND key='k1'", "a value is missing"),
        ("UPDATE session SET owner=5.5 WHERE id='s1'", None),
        ("UPDATE session SET owner=x'00' WHERE id='s1'", "'s1' of table session"),
        ("UPDATE session SET used='x', used_boot='y' WHERE id='s1'", None),
    ],
)  # fmt: skip
def test_damage_to_one_session_leaves_the_others(path: Path, statement: str, says: Any) -> None:
    fill(path)
    change(path, statement)
    store = SQLiteStore(str(path))
    store.expire(3600.0)
    if says is None:
        assert store.open("s1") == (1, STATE["s1"])
    else:
        with pytest.raises(SessionError, match=says):
            store.open("s1")
    assert store.open("s2") == (1, STATE["s2"])
    store.close()


@pytest.mark.parametrize("use", [
    lambda store: store.open(5), lambda store: store.has(b"a"), lambda store: store.read(None),
    lambda store: store.delete([]), lambda store: store.create({}, {}),
    lambda store: store.create("a", {5: b""}), lambda store: store.create("a", {"k": "text"}),
    lambda store: store.commit(5, 1, {}), lambda store: store.commit("a", 1, {"k": 1}),
])  # fmt: skip
def test_what_is_no_id_or_value_is_refused_at_the_door(path: Path, use: Any) -> None:
    store = SQLiteStore(str(path))
    with pytest.raises(TypeError):
        use(store)
    assert not store.has("a")
    store.close()


def test_half_a_character_is_refused_at_the_door(path: Path) -> None:
    store = SQLiteStore(str(path))
    store.open("a")
    uses: list[Callable[[], Any]] = [
        lambda: store.open("\udcff"),
        lambda: store.read("\udcff"),
        lambda: store.commit("a", 1, {"\udcff": b""}),
        lambda: store.create("b", {"\udcff": b""}),
    ]
    for use in uses:
        with pytest.raises(SessionError, match=r"udcff.*lone surrogates"):
            use()
    assert store.read("a") == (0, None) and not store.has("b")
    store.close()


SCHEMA_1 = (
    "CREATE TABLE owner (id TEXT PRIMARY KEY, host TEXT, pid INTEGER, started TEXT, beat REAL)",
    "CREATE TABLE session (id TEXT PRIMARY KEY, version INTEGER, owner TEXT, used REAL) WITHOUT ROWID",
    "CREATE TABLE state (session TEXT, key TEXT, value BLOB, PRIMARY KEY (session, key)) WITHOUT ROWID",
    "PRAGMA application_id=1836085103",
    "PRAGMA user_version=1",
    "INSERT INTO session VALUES ('a', 3, 'gone', 1e9)",
    "INSERT INTO session VALUES ('empty', 0, NULL, 1e9)",
    "INSERT INTO state VALUES ('a', 'n', x'31')",
    "INSERT INTO state VALUES ('a', 'm', x'32')",
    "PRAGMA journal_mode=WAL",
)


def test_schema_1_is_brought_up_to_date(path: Path) -> None:
    """And what it had made for all to read is kept from strangers from then on."""
    change(path, *SCHEMA_1)
    os.chmod(path, 0o664)
    for _ in range(2):
        store = SQLiteStore(str(path))
        assert store.open("a") == (3, {"n": b"1", "m": b"2"})
        assert store.read("empty") == (0, None)
        store.close()
    store = SQLiteStore(str(path))
    store.open("a")
    store.commit("a", 4, {"n": None, "o": b"3"})
    assert store.read("a") == (4, {"m": b"2", "o": b"3"})
    store.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (2,)
    assert db.execute("SELECT crc FROM state WHERE key='o'").fetchone() == (
        value_crc("a", "o", b"3"),
    )
    db.close()


def test_schema_1_is_left_to_those_that_use_it(path: Path) -> None:
    change(path, *SCHEMA_1)
    here, elsewhere = socket.gethostname(), "elsewhere"
    living = f"INSERT INTO owner VALUES ('x', '{here}', 1, '{host.start_of(1)}', 0)"
    beating = f"INSERT INTO owner VALUES ('x', '{elsewhere}', 77, '5', {time.time()})"
    silent = f"INSERT INTO owner VALUES ('x', '{elsewhere}', 77, '5', {time.time() - 100})"
    for owner, pid, name in ((living, 1, here), (beating, 77, elsewhere)):
        change(path, "DELETE FROM owner", owner)
        before = path.read_bytes()
        with pytest.raises(SessionError, match=f"schema version 1, and process {pid} on {name}"):
            SQLiteStore(str(path))
        assert path.read_bytes() == before
    change(path, "DELETE FROM owner", silent)
    store = SQLiteStore(str(path))
    assert store.open("a") == (3, {"n": b"1", "m": b"2"})
    store.close()


def test_damaged_file_of_schema_1_is_left_as_it_is(path: Path) -> None:
    change(path, *SCHEMA_1, "UPDATE state SET value=NULL WHERE key='n'")
    before = path.read_bytes()
    with pytest.raises(SessionError, match="cannot be used"):
        SQLiteStore(str(path))
    assert path.read_bytes() == before


# -- what helps when a file cannot be opened -----------------------------------------------------


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=f"does not exist: make '{tmp_path / 'no'}' first"):
        SQLiteStore(str(tmp_path / "no" / "store"))


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [
        (sqlite3.OperationalError("database is locked"), "try again after that"),
        (sqlite3.OperationalError("database or disk is full"), "make room in"),
        (sqlite3.OperationalError("disk I/O error"), "make room in"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "let this user write"),
        (sqlite3.OperationalError("unable to open database file"), "let this user write"),
        (PermissionError(errno.EACCES, "Permission denied"), "let this user write"),
        (OSError(errno.EROFS, "Read-only file system"), "let this user write"),
        (ValueError("it is a FIFO, not a regular file"), "give the path of a session store"),
    ],
    ids=str,
)
def test_remedy_fits_the_problem(
    path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception, remedy: str
) -> None:
    """SQLite's words do not say what to do, and another path is seldom the answer."""

    def fails(database: Database) -> None:
        raise problem

    monkeypatch.setattr(Database, "_prepare", fails)
    with pytest.raises(SessionError, match=remedy) as caught:
        SQLiteStore(str(path))
    assert str(problem) in str(caught.value)
