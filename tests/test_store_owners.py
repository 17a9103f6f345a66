"""Who owns a session: an owner is told dead by what is known of it, and by nothing else."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

from minipool import SessionBusy, SessionError
from minipool.store import SQLiteStore, host, owners

HERE = host.pid_namespace()
BOOT = host.boot_id()
linux = pytest.mark.skipif(HERE is None or BOOT is None, reason="there is no such /proc")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    made = SQLiteStore(str(tmp_path / "sessions.db"))
    yield made
    made.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Another process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate()


def owned(store: SQLiteStore, pid: int, started: Any = None, **facts: Any) -> None:
    """Have session "a" belong to an owner of which this is known; of ages ago, if nothing else is."""
    since_boot = host.moment().since_boot or 0.0
    row = {
        "id": "x", "host": host.host_name(), "pid": pid, "started": started, "beat": 1e9,
        "boot": BOOT, "namespace": HERE, "beat_boot": since_boot - 1000, **facts,
    }  # fmt: skip
    db = sqlite3.connect(store.path, isolation_level=None)
    db.execute(f"INSERT INTO owner ({','.join(row)}) VALUES (?,?,?,?,?,?,?,?)", tuple(row.values()))
    db.execute("UPDATE session SET owner='x' WHERE id='a'")
    db.close()


def is_dead(store: SQLiteStore) -> bool:
    """Tell whether session "a" can be had."""
    try:
        store.open("a")
    except SessionBusy:
        return False
    return True


def signs() -> dict[str, Any]:
    """A fresh sign of life."""
    return {"beat": time.time(), "beat_boot": host.moment().since_boot}


@linux
def test_process_that_can_be_seen_is_looked_at(store: SQLiteStore, sleeper: Any) -> None:
    """It lives, though it gave no sign for long; or it is dead, though it has just given one."""
    store.open("a")
    started = host.start_of(sleeper.pid)
    owned(store, sleeper.pid, started)
    assert not is_dead(store)
    with pytest.raises(SessionBusy) as caught:
        store.open("a")
    assert caught.value.owner_pid == sleeper.pid
    sleeper.communicate()
    assert is_dead(store)


@linux
@pytest.mark.parametrize(
    "facts",
    [
        {"namespace": "pid:[1]"},  # another container
        {"boot": "another"},  # another host, or this one before it was started again
        {"boot": None, "namespace": None, "started": None, "beat_boot": None},  # nothing to go by
    ],
)
def test_owner_elsewhere_is_judged_by_its_signs_of_life(
    store: SQLiteStore, facts: dict[str, Any]
) -> None:
    """Not by a process that happens to have its pid here, nor by there being none."""
    store.open("a")
    for pid, started in ((os.getpid(), host.start_of(os.getpid())), (2**22 - 1, "5")):
        owned(store, pid, **{"started": started, **signs(), **facts})
        assert not is_dead(store)
        db = sqlite3.connect(store.path, isolation_level=None)
        db.execute("UPDATE owner SET beat=beat-1000, beat_boot=beat_boot-1000 WHERE id='x'")
        assert is_dead(store)
        db.execute("DELETE FROM owner WHERE id='x'")
        db.close()


def test_sign_of_life_that_is_yet_to_come_is_none(store: SQLiteStore) -> None:
    """It is of an earlier boot, whose clock was ahead: nobody has to wait until it is past."""
    store.open("a")
    owned(store, 5, "5", beat=time.time() + 3600, boot="another", beat_boot=5.0)
    assert is_dead(store)


@linux
def test_sign_of_life_of_this_boot_is_not_judged_by_the_wall_clock(store: SQLiteStore) -> None:
    store.open("a")
    owned(store, 5, "5", **{**signs(), "namespace": "pid:[1]", "beat": 1e9})
    assert not is_dead(store)


@linux
def test_pid_that_was_used_again_is_another_process(store: SQLiteStore, sleeper: Any) -> None:
    store.open("a")
    owned(store, sleeper.pid, "1", **signs())
    assert is_dead(store)


@linux
def test_process_that_is_hidden_is_judged_by_its_signs_of_life(
    store: SQLiteStore, sleeper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `hidepid` other users' processes are not in /proc, and yet they live."""

    def hidden(path: Any, *args: Any, **more: Any) -> Any:
        if str(path) == f"/proc/{sleeper.pid}/stat":
            raise FileNotFoundError(path)
        return open(path, *args, **more)

    def kill(pid: int, signal: int) -> None:
        raise PermissionError(pid)

    store.open("a")
    owned(store, sleeper.pid, host.start_of(sleeper.pid), **signs())
    monkeypatch.setattr(host, "open", hidden, raising=False)
    monkeypatch.setattr(os, "kill", kill)
    assert host.start_of(sleeper.pid) is None
    assert not is_dead(store)
    db = sqlite3.connect(store.path, isolation_level=None)
    db.execute("UPDATE owner SET beat_boot=beat_boot-1000 WHERE id='x'")
    db.close()
    assert is_dead(store)


def test_process_is_never_signalled_where_that_would_end_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Windows `os.kill` is TerminateProcess, whatever the signal."""
    killed = []
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    monkeypatch.setattr(os, "name", "nt")
    assert host.start_of(2**22 - 1) is None and not killed


def test_start_of_a_process() -> None:
    assert host.start_of(os.getpid()) not in (None, host.GONE)
    assert host.start_of(2**22 - 1) == host.GONE
    assert host.start_of(2**70) is None
    zombie = os.fork()
    if not zombie:
        os._exit(0)
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
    assert host.start_of(zombie) == host.GONE
    os.waitpid(zombie, 0)


def test_owner_of_this_process_lives_as_long_as_its_store(tmp_path: Path) -> None:
    """Also one that was not closed, or could not write down that it was."""
    path = str(tmp_path / "sessions.db")
    first, second = SQLiteStore(path), SQLiteStore(path)
    first.create("a", {"n": b"1"})
    with pytest.raises(SessionBusy):
        second.open("a")
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    first.close()  # in vain, as far as the file goes
    assert db.execute("SELECT owner FROM session").fetchone() == (first._owner,)
    db.execute("ROLLBACK")
    db.close()
    assert second.open("a") == (1, {"n": b"1"})
    third = SQLiteStore(path)
    third.create("b", {})
    del third
    assert second.open("b") == (0, None)
    for use in (lambda: first.open("a"), lambda: first.commit("a", 2, {})):
        with pytest.raises(SessionError, match="closed"):
            use()
    second.close()


@linux
def test_owner_before_an_exec_is_dead_when_it_has_been_silent(store: SQLiteStore) -> None:
    """This pid and start, but no store of ours: it may be another copy of minipool in here."""
    store.open("a")
    owned(store, os.getpid(), host.start_of(os.getpid()), **signs())
    assert not is_dead(store)
    db = sqlite3.connect(store.path, isolation_level=None)
    db.execute("UPDATE owner SET beat_boot=beat_boot-1000 WHERE id='x'")
    db.close()
    assert is_dead(store)


def test_what_is_written_of_an_owner(store: SQLiteStore) -> None:
    db = sqlite3.connect(store.path)
    (row,) = db.execute(f"SELECT {owners.COLUMNS} FROM owner").fetchall()
    db.close()
    owner = owners.Owner(*row)
    assert (owner.host, owner.pid, owner.boot, owner.namespace) == (
        host.host_name(), os.getpid(), BOOT, HERE,
    )  # fmt: skip
    assert owner.lives()
