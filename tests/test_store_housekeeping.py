"""A store's housekeeping: uses are noted, and what nobody used is deleted, in small pieces."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from minipool import SessionBusy, SessionError
from minipool.store import SQLiteStore, host

DAY = 86400.0


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sessions.db")


@pytest.fixture
def store(path: str) -> Iterator[SQLiteStore]:
    made = SQLiteStore(path)
    yield made
    made.close()


def begun(path: str, *keys: str) -> None:
    """Have these sessions be there, and nobody have them."""
    store = SQLiteStore(path)
    for key in keys:
        store.create(key, {"n": b"1"})
    store.close()


def ask(path: str, statement: str) -> list[Any]:
    db = sqlite3.connect(path, isolation_level=None)
    try:
        return db.execute(statement).fetchall()
    finally:
        db.close()


def age(path: str, seconds: float, where: str = "1") -> None:
    ask(
        path, f"UPDATE session SET used=used-{seconds}, used_boot=used_boot-{seconds} WHERE {where}"
    )


def expire_all(store: SQLiteStore, seconds: float) -> int:
    """Expire until there is no more; return in how many batches."""
    batches = 1
    while store.expire(seconds):
        batches += 1
        assert batches < 1000, "it never ends"
    return batches


def keys(path: str) -> list[str]:
    return [key for (key,) in ask(path, "SELECT id FROM session ORDER BY id")]


def test_old_sessions_behind_those_of_the_living_are_deleted(path: str) -> None:
    """Each batch goes on where the last one stopped."""
    living, store = SQLiteStore(path), SQLiteStore(path)
    for number in range(1500):
        living.open(f"a{number:05}")
    begun(path, *(f"b{number:05}" for number in range(500)))
    age(path, 2 * 3600)
    assert expire_all(store, 3600) >= 4
    assert len(keys(path)) == 1500
    assert ask(path, "SELECT count(*) FROM state") == [(0,)]
    living.close()
    assert expire_all(store, 3600) >= 3
    assert keys(path) == []
    store.close()


def test_sessions_of_a_store_are_not_its_own_to_expire(path: str, store: SQLiteStore) -> None:
    """Not even when another process has taken this one for dead."""
    store.open("a")
    age(path, DAY)
    ask(path, "DELETE FROM owner")
    expire_all(store, 3600)
    assert keys(path) == ["a"]
    store.commit("a", 1, {"n": b"1"})


def test_a_batch_is_short_however_much_is_old(
    path: str, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its time is up it stops, and goes on there."""
    monkeypatch.setattr("minipool.store.rows._DELETING_S", 0.0)
    begun(path, *"abcde")
    age(path, DAY)
    for left in ("bcde", "cde", "de", "e"):
        assert store.expire(3600)
        assert keys(path) == list(left)
    assert not store.expire(3600)
    assert keys(path) == []


def test_session_that_was_taken_meanwhile_is_not_deleted(
    path: str, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(path, "a", "b")
    age(path, DAY)
    other = SQLiteStore(path)
    keep_house = store._keep_house

    def taken_first(*args: Any) -> Any:
        other.open("a")
        return keep_house(*args)

    monkeypatch.setattr(store, "_keep_house", taken_first)
    store.expire(3600)
    assert keys(path) == ["a"]
    other.commit("a", 2, {"n": b"2"})
    other.close()


def test_session_that_was_used_and_given_back_meanwhile_is_not_deleted(
    path: str, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(path, "a", "b")
    age(path, DAY)
    keep_house = store._keep_house

    def used_first(*args: Any) -> Any:
        other = SQLiteStore(path)
        other.open("a")
        other.close()
        return keep_house(*args)

    monkeypatch.setattr(store, "_keep_house", used_first)
    store.expire(3600)
    assert keys(path) == ["a"]


def test_use_is_noted_in_bulk(path: str, store: SQLiteStore) -> None:
    """What was read and not changed has been used; by others it has not."""
    numbers = [f"s{number:04}" for number in range(1200)]
    for key in numbers:
        store.open(key)
    other = SQLiteStore(path)
    other.open("other's")
    age(path, DAY)
    other.beat(dict.fromkeys(numbers[:10], 5.0))  # they are not its own
    store.beat({**dict.fromkeys(numbers[:-1], 10.0), "not there": 0.0})
    other.close()
    store.close()
    store = SQLiteStore(path)
    expire_all(store, 3600)
    assert keys(path) == numbers[:-1]
    expire_all(store, 9)
    assert keys(path) == []
    store.close()


def test_sign_of_life_is_given_when_it_is_due(path: str, store: SQLiteStore) -> None:
    ask(path, "UPDATE owner SET beat=5")
    store.beat()
    assert ask(path, "SELECT beat FROM owner") == [(5.0,)]
    store._beaten -= 5.0
    store.beat({})
    assert ask(path, "SELECT beat FROM owner") != [(5.0,)]


def test_sign_of_life_that_was_given_is_not_due_again(path: str, store: SQLiteStore) -> None:
    store._beaten -= 5.0
    store.beat()
    ask(path, "UPDATE owner SET beat=5")
    store.beat()
    assert ask(path, "SELECT beat FROM owner") == [(5.0,)]
    store._beaten -= 5.0
    store.beat()
    assert ask(path, "SELECT beat FROM owner") != [(5.0,)]


def test_housekeeping_waits_for_nobody_for_long(path: str, store: SQLiteStore) -> None:
    """A locked file: an error within about a second, and the next time it is well."""
    store.open("a")
    store._beaten -= 5.0
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    with pytest.raises(SessionError, match=r"sign of life.*locked"):
        store.beat()
    with pytest.raises(SessionError, match=r"uses could not.*locked"):
        store._beaten += 100
        store.beat({"a": 0.0})
    with pytest.raises(SessionError, match=r"nothing could be written.*locked"):
        store.beat()
    db.execute("ROLLBACK")
    db.close()
    store.beat({"a": 0.0})


def test_long_log_is_put_into_the_file(
    path: str, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the housekeeping, so that no thread that commits has to."""
    store.create("a", {"blob": b"x" * 8_000_000})
    size = os.stat(path).st_size
    assert size < 1_000_000
    store.beat()
    assert os.stat(path).st_size > 8_000_000


# -- clocks ----------------------------------------------------------------------------------


def clock(
    monkeypatch: pytest.MonkeyPatch, wall: float = 0.0, boot: str | None = "", since: float = 0.0
) -> None:
    """Have the clocks be set by so much, or another boot."""
    real = host.moment

    def moment(seconds_ago: float = 0.0) -> host.Moment:
        now = real(seconds_ago)
        since_boot = None if boot is None else (now.since_boot or 0.0) + since
        return host.Moment(now.wall + wall, now.boot if boot == "" else boot, since_boot)

    monkeypatch.setattr(host, "moment", moment)


booted = pytest.mark.skipif(host.boot_id() is None, reason="no clock counts from the boot")


@booted
@pytest.mark.parametrize("by", [DAY, -DAY])
def test_clock_that_was_set_deletes_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    """Within a boot the clock that nobody sets decides."""
    begun(path, "a", "b")
    age(path, 3000, "id='b'")
    clock(monkeypatch, wall=by)
    store = SQLiteStore(path)
    expire_all(store, 3600)
    assert keys(path) == ["a", "b"]
    expire_all(store, 2000)
    assert keys(path) == ["a"]
    store.close()


@pytest.mark.parametrize("boot", ["another", None])
def test_after_a_boot_the_wall_clock_decides_after_a_while(
    path: str, monkeypatch: pytest.MonkeyPatch, boot: str | None
) -> None:
    """It may be wrong while the system comes up."""
    begun(path, "a", "b")
    age(path, DAY, "id='b'")
    clock(monkeypatch, boot=boot, since=-1e9)
    store = SQLiteStore(path)
    expire_all(store, 3600)
    assert keys(path) == ["a", "b"]
    store._opened -= 599.0
    expire_all(store, 3600)
    assert keys(path) == ["a", "b"]
    store._opened -= 2.0
    expire_all(store, 3600)
    assert keys(path) == ["a"]
    store.close()


# -- taken over ------------------------------------------------------------------------------


def taken_over(path: str) -> None:
    ask(path, "UPDATE session SET owner='x'")


def given_back(path: str) -> None:
    other = SQLiteStore(path)
    ask(path, f"UPDATE session SET owner='{other._owner}'")
    other.open("a")
    other.commit("a", 3, {"n": b"3"})
    other.close()


def deleted(path: str) -> None:
    ask(path, "DELETE FROM session")
    ask(path, "DELETE FROM state")


@pytest.mark.parametrize(
    ("what", "then"),
    [(taken_over, (2, {"n": b"2"})), (given_back, (3, {"n": b"3"})), (deleted, None)],
)
def test_session_that_was_taken_is_told_at_the_commit_and_can_be_had_again(
    path: str, store: SQLiteStore, what: Callable[[str], None], then: Any
) -> None:
    store.create("a", {"n": b"1"})
    store.commit("a", 2, {"n": b"2"})
    what(path)
    with pytest.raises(SessionBusy, match="nothing was committed"):
        store.commit("a", 3, {"n": b"mine"})
    assert store.read("a") == then
    assert store.open("a") == then
    version = 0 if then is None else then[0]
    store.commit("a", version + 1, {"n": b"mine"})
    assert store.read("a") == (version + 1, {"n": b"mine"})


def test_version_that_does_not_follow_is_refused(path: str, store: SQLiteStore) -> None:
    """Whoever commits has not seen what was committed last."""
    store.create("a", {"n": b"1"})
    for version in (1, 3):
        with pytest.raises(SessionBusy, match=f"version 1 there, so version {version} does not"):
            store.commit("a", version, {"n": b"2"})
    assert store.read("a") == (1, {"n": b"1"})


@pytest.mark.parametrize("state", [{}, {"n": b"1", "m": b"2"}])
def test_session_is_created_with_its_state_or_not_at_all(
    path: str, store: SQLiteStore, state: dict[str, bytes]
) -> None:
    assert store.create("a", state)
    assert store.open("a") == store.read("a") == (1 if state else 0, state or None)
    assert not store.create("a", {"n": b"9"})
    other = SQLiteStore(path)
    assert not other.create("a", {"n": b"9"})
    other.close()
    assert store.read("a") == (1 if state else 0, state or None)
    store.delete("a")
    assert store.create("a", state)
