"""Exceptions that a signal or another thread raises in the midst of a store, at every step.

After each the file is as it was or as it was to be, nobody is kept from writing, and in the end no
descriptor is left.
"""

from __future__ import annotations

import gc
import os
import sqlite3
import sys
import tempfile
from typing import Any, Callable, Iterator

import pytest

from minipool.store import SQLiteStore
from strikes import strike_everywhere, unstruck

# A file of /proc that was struck as it was opened is closed by the collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def modules() -> list[Any]:
    return [
        module
        for name, module in sys.modules.items()
        if name.startswith("minipool.store") or name == "minipool.engine.turnstile"
    ]


def nobody_writes(path: str) -> None:
    """Assert that the file is not locked: a process that is struck must not stop the others."""
    db = sqlite3.connect(path, isolation_level=None, timeout=0)
    db.execute("BEGIN IMMEDIATE")
    db.execute("ROLLBACK")
    db.close()


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a store can be made; in memory if possible, for there are thousands."""
    monkeypatch.setattr("minipool.store.database._ASTRAY_S", 0.01)
    memory = "/dev/shm"
    folder = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=folder) as made:
        yield os.path.join(made, "sessions.db")


def test_interrupted_commit_is_made_or_not(path: str) -> None:
    store = SQLiteStore(path)
    store.create("a", {"n": b"1"})
    version = 1

    def commit() -> None:
        nonlocal version
        with unstruck():
            nobody_writes(path)
            loaded = store.open("a")
            assert loaded in (
                (version, {"n": b"%d" % version}),
                (version + 1, {"n": b"%d" % (version + 1)}),
            )
            version = loaded[0]
        store.commit("a", version + 1, {"n": b"%d" % (version + 1)})

    commit()
    assert strike_everywhere(commit, *modules()) > 20
    store.close()


def test_interrupted_create_is_made_or_not(path: str) -> None:
    store = SQLiteStore(path)
    made = 0

    def create() -> None:
        nonlocal made
        with unstruck():
            nobody_writes(path)
            assert store.read(f"s{made}") in (None, (1, {"n": b"1"}))
            made += 1
        assert store.create(f"s{made}", {"n": b"1"})

    create()
    assert strike_everywhere(create, *modules()) > 20
    store.close()


def use_open(store: SQLiteStore) -> None:
    store.open("a")


def use_delete(store: SQLiteStore) -> None:
    store.open("b")
    store.delete("b")


def use_read(store: SQLiteStore) -> None:
    assert store.read("a") == (1, {"n": b"1"}) and store.has("a")


def use_housekeeping(store: SQLiteStore) -> None:
    store._beaten -= 5.0
    store.beat({"a": 1.0})
    store.expire(3600.0)


def use_new_connection(store: SQLiteStore) -> None:
    store._database._close_idle(0)
    store.beat({"a": 1.0})


@pytest.mark.parametrize(
    "use", [use_open, use_delete, use_read, use_housekeeping, use_new_connection]
)
def test_interrupted_use_leaves_the_store_whole(
    path: str, use: Callable[[SQLiteStore], None]
) -> None:
    store = SQLiteStore(path)
    store.create("a", {"n": b"1"})

    def act() -> None:
        with unstruck():
            nobody_writes(path)
            assert store.read("a") == (1, {"n": b"1"})
        use(store)

    act()
    assert strike_everywhere(act, *modules()) > 15
    store.close()


def test_connection_that_came_back_in_the_midst_of_a_transaction_is_used_again(path: str) -> None:
    """Its user was struck a second time, as it rolled back after the first."""
    store = SQLiteStore(path)
    store.create("a", {"n": b"1", "m": b"1"})
    (db,) = store._database._idle
    db.execute("BEGIN IMMEDIATE")
    db.execute("DELETE FROM state WHERE key='m'")
    store.commit("a", 2, {"n": b"2"})
    assert store.read("a") == (2, {"n": b"2", "m": b"1"})
    store.close()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_interrupted_opening_or_closing_leaves_nothing(path: str) -> None:
    """What was committed is there, and the next store can have it at once."""
    number = 0

    def act() -> None:
        nonlocal number
        with unstruck():
            gc.collect()
            kept = SQLiteStore(path)
            assert kept.open("a") in (None, (0, None))
            kept.close()
            number += 1
        store = SQLiteStore(path if number % 2 else f"{path}{number}")
        store.close()

    act()
    assert strike_everywhere(act, *modules()) > 100
