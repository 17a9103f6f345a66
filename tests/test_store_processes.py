"""A store that several threads, stores and processes use at once: no commit is lost, nobody starves.

POSIX locks belong to a process and a file, not to a descriptor; these tests are about that.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, Callable

import pytest

from minipool import Pool, PoolStartError, SessionError
from minipool.store import SQLiteStore, database, open_files
from workers import RaisesAtStart

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sessions.db")


def python(program: str, *args: str, **more: Any) -> subprocess.Popen[str]:
    """Run a program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **more,
    )  # fmt: skip


def done(process: subprocess.Popen[str]) -> str:
    """Let a process go on, and return what it says until its end."""
    out, _ = process.communicate("\n", timeout=50)
    return out


def in_child(action: Callable[[], str]) -> str:
    """Return what an action returns in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, action().encode())
        except BaseException as problem:
            os.write(writer, f"{type(problem).__name__}: {problem}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as told:
        text = told.read()
    os.waitpid(child, 0)
    return text


COMES_AND_GOES = """
import sys
from minipool.store import SQLiteStore
store = SQLiteStore(sys.argv[1])
store.open("passing")
store.close()
"""
COMMITS_AND_IS_KILLED = """
import os, signal, sys
from minipool.store import SQLiteStore
stores = [SQLiteStore(sys.argv[1])]
stores[0].create("ada", {"n": b"0"})
if sys.argv[2] == "two":
    stores.append(SQLiteStore(sys.argv[1]))
    SQLiteStore(sys.argv[1]).close()
print("ready", flush=True)
sys.stdin.readline()
for number in range(1, 101):
    stores[0].commit("ada", number + 1, {"n": b"%d" % number})
print("committed", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("stores", ["one", "two"])
def test_commits_survive_though_others_come_and_go(path: str, stores: str) -> None:
    """A store that opens or closes the file takes no lock away from the others of its process."""
    process = python(COMMITS_AND_IS_KILLED, path, stores)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    done(python(COMES_AND_GOES, path))
    assert done(process) == "committed\n"
    store = SQLiteStore(path)
    assert store.read("ada") == (101, {"n": b"100"})
    store.close()


def test_stores_on_one_file_share_its_connections(path: str, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(path)
    first, second = SQLiteStore(path), SQLiteStore(str(tmp_path / "link.db"))
    assert first._database is second._database
    first.open("a")
    assert second.read("a") == (0, None)
    first.close()
    second.open("a")
    second.close()
    assert open_files.database(second._database.file) is None
    assert not second._database._idle


@pytest.mark.parametrize("comes", [True, False])
def test_store_that_comes_as_the_last_one_leaves_keeps_the_file_open(
    path: str, comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have found the file in use just before; what it commits is kept."""
    last, newcomer = SQLiteStore(path), SQLiteStore(path + "2")
    shared = last._database
    used = shared._used

    def looked() -> bool:
        found = used()
        if comes:
            shared._users[id(newcomer)] = weakref.ref(newcomer)
        return found

    monkeypatch.setattr(shared, "_used", looked)
    shared.leave(last)
    assert shared.closed is not comes
    monkeypatch.undo()
    shared.leave(newcomer)
    assert shared.closed
    last.close()
    newcomer.close()


def test_second_name_of_a_file_in_use_is_refused(path: str, tmp_path: Path) -> None:
    """SQLite would keep a log for each name, and each would destroy what is in the other one."""
    store = SQLiteStore(path)
    os.link(path, tmp_path / "second.db")
    with pytest.raises(SessionError, match="two names of one file"):
        SQLiteStore(str(tmp_path / "second.db"))
    store.close()


def test_connections_are_closed_by_their_users_alone(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though each turn is taken for lost at once, eight threads commit without an error."""
    monkeypatch.setattr(database, "_ASTRAY_S", 0.0)
    monkeypatch.setattr(database, "_KEPT", 1)
    used: dict[int, int] = {}
    closed_by_others = []

    class Watched(open_files.Connection):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.execute = self.watched

        def watched(self, *args: Any) -> Any:
            used[id(self)] = threading.get_ident()
            try:
                return self.raw.execute(*args)
            finally:
                used.pop(id(self), None)

        def close(self) -> None:
            if used.get(id(self), threading.get_ident()) != threading.get_ident():
                closed_by_others.append(self)
            super().close()

    monkeypatch.setattr(database, "Connection", Watched)
    store = SQLiteStore(path)
    problems: list[BaseException] = []

    def commit(key: str) -> None:
        try:
            store.open(key)
            for number in range(1, 101):
                store.commit(key, number, {"n": b"%d" % number})
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=commit, args=(f"s{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    while threads:
        store.beat()
        threads[0].join(0.01)
        threads = [thread for thread in threads if thread.is_alive()]
    assert not problems and not closed_by_others
    assert all(store.read(f"s{number}") == (100, {"n": b"100"}) for number in range(8))
    store.close()


def test_connection_that_is_lost_with_its_user_is_closed(path: str) -> None:
    """What it had begun is rolled back, and others can write at once."""
    store = SQLiteStore(path)
    lost = store._database._connect()
    lost.execute("BEGIN IMMEDIATE")
    lost.execute("DELETE FROM owner")
    del lost
    store.open("a")
    store.commit("a", 1, {"n": b"1"})
    assert store.read("a") == (1, {"n": b"1"})
    store.close()


def test_file_that_was_open_at_a_fork_is_refused(path: str) -> None:
    """SQLite's table of locks is copied by a fork, and the locks are not."""
    store = SQLiteStore(path)
    store.open("a")

    def use() -> str:
        for action in (lambda: SQLiteStore(path), lambda: store.commit("a", 1, {})):
            with pytest.raises(SessionError, match="fork") as caught:
                action()
            if "had it open" in str(caught.value):
                told = str(caught.value)
        return told + in_child(lambda: str(SQLiteStore(path)))

    told = in_child(use)
    assert f"process {os.getpid()} had it open" in told
    assert "subprocess" in told and "SessionError" in told  # and in a grandchild
    store.close()
    assert in_child(opened_and_closed(path)) == "closed"  # nobody had it open at this fork


def test_forked_child_is_told_which_store_it_can_open(path: str) -> None:
    with Pool(size=1, session_store=path, start_method="spawn") as pool:
        assert "PoolForked" in (told := in_child(lambda: str(pool.call(os.getpid))))
        assert "on a session_store that was not open at the fork" in told
    with Pool(size=1, start_method="spawn") as pool:
        assert "session_store" not in in_child(lambda: str(pool.call(os.getpid)))


def opened_and_closed(path: str) -> Callable[[], str]:
    def action() -> str:
        SQLiteStore(path).close()
        return "closed"

    return action


FORKS = """
import os, sys, threading
from minipool.store import SQLiteStore

def commit(store, key, ended):
    store.open(key)
    number = 0
    while not ended.is_set():
        number += 1
        store.commit(key, number, {"n": b"x" * 10_000})

store, ended = SQLiteStore(sys.argv[1]), threading.Event()
threads = [threading.Thread(target=commit, args=(store, f"s{n}", ended)) for n in range(2)]
for thread in threads:
    thread.start()
for number in range(20):
    if not os.fork():
        sys.exit(0)
    assert os.wait()[1] == 0
ended.set()
for thread in threads:
    thread.join()
store.close()
print("whole")
"""


def test_child_forked_in_the_midst_of_a_commit_ends(path: str) -> None:
    """It closes nothing that it inherited: nobody would release SQLite's mutex in it."""
    assert done(python(FORKS, path)) == "whole\n"
    store = SQLiteStore(path)
    assert store.read("s0") is not None
    store.close()


OPENS = """
import sys
from minipool.store import SQLiteStore
sys.stdin.readline()
for number in range(int(sys.argv[2])):
    SQLiteStore(sys.argv[1]).close()
print("opened")
"""
COMMITS = """
import sys, threading
from minipool.store import SQLiteStore
store = SQLiteStore(sys.argv[1])
key = sys.argv[2]
store.open(key)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()
print("ready", flush=True)
number = 0
while not ended.is_set():
    number += 1
    store.commit(key, number, {"n": b"%d" % number})
store.close()
print(number)
"""


ENDING_CHILD = """
import os, sys
from minipool.store import SQLiteStore
from minipool.store.open_files import Connection

TOLD = '''
import os
from minipool.store.open_files import Connection

def close(self, write=os.write, real=Connection.close, pid=os.getpid, parent=os.getpid()):
    if pid() != parent:
        write(1, b"closed;")
    real(self)

Connection.close = close
'''
exec(TOLD, {})  # with globals of its own: those of the main module would keep the store
store = SQLiteStore(sys.argv[1])
store.open("a")
child = os.fork()
if not child:
    sys.exit()
os.waitpid(child, 0)
store.commit("a", 1, {"n": b"1"})
store.close()
print("committed")
"""


def test_child_that_ends_closes_nothing_of_what_it_has_inherited(path: str) -> None:
    """A thread of the parent may have been in SQLite at the fork: to close would wait for it."""
    assert done(python(ENDING_CHILD, path)) == "committed\n"


@pytest.mark.parametrize("opens", [60, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_opening_waits_for_those_that_commit(path: str, opens: int) -> None:
    committers = [python(COMMITS, path, f"s{number}") for number in range(4)]
    for process in committers:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    try:
        for _ in range(opens):
            SQLiteStore(path).close()
    finally:
        counts = [int(done(process)) for process in committers]
    store = SQLiteStore(path)
    for number, count in enumerate(counts):
        assert store.read(f"s{number}") == (count, {"n": b"%d" % count})
    store.close()


def test_many_can_be_the_first_to_open(path: str) -> None:
    """Whoever makes the tables and the log, all wait for it."""
    for turn in range(5):
        openers = [python(OPENS, f"{path}{turn}", "2") for _ in range(4)]
        for process in openers:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        assert [done(process) for process in openers] == ["opened\n"] * 4


def test_signs_of_life_do_not_starve(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads that commit flat out let one through that was promised to come."""
    monkeypatch.setattr("minipool.store.sqlite_store._BEAT_S", 0.05)
    store = SQLiteStore(path)
    ended = threading.Event()

    def commit(key: str) -> None:
        store.open(key)
        number = 0
        while not ended.is_set():
            number += 1
            store.commit(key, number, {"n": b"x" * 2000})

    threads = [threading.Thread(target=commit, args=(f"s{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    late = []
    try:
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            asked = time.monotonic()
            store._beaten = asked - 1.0  # one is due
            store.beat({"s1": 0.0})
            store.expire(3600.0)
            late.append(time.monotonic() - asked)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        store.close()
    assert len(late) > 3 and max(late) < 1.0, late


TAKES = """
import sys
from minipool.store import SQLiteStore
sys.stdin.readline()
store = SQLiteStore(sys.argv[1])
print(store.open("a"))
store.close()
"""


def test_file_that_was_locked_as_its_store_was_closed_is_let_go_of_afterwards(path: str) -> None:
    """Another process may have the sessions then, though this one lives on."""
    store = SQLiteStore(path)
    store.create("a", {"n": b"1"})
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    store.close()
    (going_on,) = [each for each in threading.enumerate() if each.name == "minipool-store-close"]
    lock.execute("ROLLBACK")
    lock.close()
    going_on.join(20)
    assert not going_on.is_alive()
    assert done(python(TAKES, path)).strip() == "(1, {'n': b'1'})"


def test_store_serves_one_pool_at_a_time_and_none_once_it_is_closed(path: str) -> None:
    """What one of them lets expire, the other would be using."""
    store = SQLiteStore(path)
    with Pool(size=1, session_store=store) as pool:
        pool.create_session("a", {"n": 1})
        with pytest.raises(SessionError, match=r"in use by .*give each pool a store of its own"):
            Pool(size=1, session_store=store).open()
        assert pool.session_state("a") == {"n": 1}
    assert store.is_closed
    with pytest.raises(SessionError, match=r"is closed.*make a new one"):
        Pool(size=1, session_store=store).open()


def test_store_that_was_kept_for_a_second_try_is_closed_with_its_pool(path: str) -> None:
    store = SQLiteStore(path)
    pool = Pool(RaisesAtStart, size=1, session_store=store)
    with pytest.raises(PoolStartError):
        pool.call("anything")
    assert not store.is_closed
    pool.close()
    assert store.is_closed
