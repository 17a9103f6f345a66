"""Which files a store takes, how it makes its own, and what it does when they go away."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import scripts
from minipool import Pool, SessionBusy, SessionError, SessionNotFound
from minipool.store import SQLiteStore, files, rows

posix = pytest.mark.skipif(os.name != "posix", reason="there are no such rights")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


def committed(path: Path, key: str = "a") -> Any:
    """Return what a store that is opened now finds of a session."""
    store = SQLiteStore(str(path))
    try:
        return store.read(key)
    finally:
        store.close()


# -- the door --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (":memory:", "kept in memory anyway"),
        ("file:x", "'./file:x'"),
        ("", "no file has such a name"),
        ("a\0b", "no file has such a name"),
        ("\ud800", "cannot be made absolute"),
        ("/dev/null", "a device, not a regular file"),
        ("/", "a directory, not a regular file"),
        ("/nowhere/at/all", "make '/nowhere/at' first"),
        ("/etc/hostname/x", "Not a directory"),
    ],
)
def test_what_can_be_no_store_is_refused(name: str, says: str) -> None:
    with pytest.raises(SessionError, match=says):
        SQLiteStore(name)


@pytest.mark.parametrize("path", [5, None, b"bytes", object()])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(TypeError):
        SQLiteStore(path)


def test_fifo_or_socket_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, says in (("fifo", "a FIFO"), ("socket", "a socket")):
            with pytest.raises(SessionError, match=f"{says}, not a regular file"):
                SQLiteStore(str(tmp_path / name))


def test_relative_path_is_that_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = SQLiteStore("sessions.db")
    store.open("a")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store._database._close_idle(0)  # the next transaction has a new connection
    store.commit("a", 1, {"n": b"1"})
    store.close()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert committed(tmp_path / "sessions.db") == (1, {"n": b"1"})


@pytest.mark.parametrize(
    "name", ["with space.db", "per%20cent.db", "q?mode=memory.db", "#.db", "ü.db"]
)
def test_any_name_is_that_of_a_file(tmp_path: Path, name: str) -> None:
    store = SQLiteStore(str(tmp_path / name))
    store.create("a", {"n": b"1"})
    assert (tmp_path / name).exists() and (tmp_path / f"{name}-wal").exists()
    store.close()
    assert [found.name for found in tmp_path.iterdir()] == [name]


# -- rights ----------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_new_store_is_for_its_owner_alone(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = SQLiteStore(str(path))
        store.create("a", {"n": b"1"})
        modes = {found.name: stat.S_IMODE(found.stat().st_mode) for found in path.parent.iterdir()}
        store.close()
    finally:
        os.umask(before)
    assert modes == {path.name + suffix: 0o600 for suffix in ("", "-wal", "-shm")}


@posix
def test_store_that_everybody_can_write_to_is_refused(path: Path) -> None:
    """And the command that is told mends it. Group and readers are the administrator's decision."""
    SQLiteStore(str(path)).close()
    os.chmod(path, 0o666)
    with pytest.raises(SessionError, match=r"mode 0666.*: (chmod o-rwx '[^']*')") as caught:
        SQLiteStore(str(path))
    command = str(caught.value).partition("if you trust what is in it: ")[2].partition(";")[0]
    subprocess.run(command, shell=True, check=True)
    SQLiteStore(str(path)).close()
    os.chmod(path, 0o664)
    SQLiteStore(str(path)).close()
    log = Path(f"{path}-wal")
    log.touch()
    os.chmod(log, 0o666)
    with pytest.raises(SessionError, match=r"sessions\.db-wal"):
        SQLiteStore(str(path))


@posix
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_store_of_another_user_is_refused(path: Path) -> None:
    SQLiteStore(str(path)).close()
    os.chown(path, 12345, -1)
    with pytest.raises(SessionError, match=r"belongs to user 12345.*chown 0 ") as caught:
        SQLiteStore(str(path))
    command = str(caught.value).partition("if you trust what is in it: ")[2].partition(";")[0]
    subprocess.run(command, shell=True, check=True)
    SQLiteStore(str(path)).close()


# -- a file that goes away -------------------------------------------------------------------


def remove(path: Path) -> None:
    for found in path.parent.glob(path.name + "*"):
        found.unlink()


@pytest.fixture
def backup(path: Path, tmp_path: Path) -> Path:
    """A store with a session in it, which was closed."""
    store = SQLiteStore(str(path))
    store.create("a", {"n": b"1"})
    store.close()
    made = tmp_path / "backup"
    shutil.copy(path, made)
    return made


BACKUP = (1, {"n": b"1"})


@pytest.mark.parametrize(
    ("how", "then"),
    [
        ("deleted", None),
        ("moved", None),
        ("replaced", BACKUP),
        ("renamed over", BACKUP),  # the log of the old one is there, and not taken for its own
        ("log deleted", (3, {"n": b"3"})),  # as it was in the end
    ],
)
def test_commit_to_a_file_that_is_not_there_any_more_is_refused(
    path: Path, backup: Path, how: str, then: Any, caplog: Any
) -> None:
    """What was acknowledged is in the file at the path, whatever becomes of that."""
    store = SQLiteStore(str(path))
    store.open("a")
    store.commit("a", 2, {"n": b"2"})
    if how == "moved":
        path.rename(path.parent / "moved")
    elif how == "renamed over":
        os.replace(shutil.copy(backup, path.parent / "new"), path)
    elif how == "log deleted":
        Path(f"{path}-wal").unlink()
    else:
        remove(path)
    if how == "replaced":
        shutil.copy(backup, path)
    with pytest.raises(SessionError, match=r"deleted while|replaced by another one while"):
        store.commit("a", 3, {"n": b"3"})
    assert any("in use, so what was just written may be lost" in text for text in caplog.messages)
    # From here on it is the file that is there now, and what is acknowledged is in it.
    if then is None or then == BACKUP:
        with pytest.raises(SessionBusy, match="nothing was committed"):
            store.commit("a", 3, {"n": b"3"})
    assert store.open("a") == then
    version = 0 if then is None else then[0]
    store.commit("a", version + 1, {"n": b"new"})
    store.close()
    assert committed(path) == (version + 1, {"n": b"new"})
    if how == "moved":
        assert committed(path.parent / "moved") == (3, {"n": b"3"})


def test_log_of_the_next_file_is_left_alone(path: Path, backup: Path) -> None:
    """Giving up a file that was replaced takes nothing from those that use the new one."""
    store = SQLiteStore(str(path))
    store.open("a")
    remove(path)
    shutil.copy(backup, path)
    program = """if True:
        import os, signal, sys
        from minipool.store import SQLiteStore
        store = SQLiteStore(sys.argv[1])
        store.open("a")
        store.commit("a", 2, {"n": b"theirs"})
        print("committed", flush=True)
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        env=scripts.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "committed\n"
    with pytest.raises(SessionError, match="replaced by another one while"):
        store.commit("a", 2, {"n": b"mine"})
    with pytest.raises(SessionBusy, match=f"process {process.pid}"):
        store.open("a")
    store.close()
    process.communicate("\n")
    assert committed(path) == (2, {"n": b"theirs"})


@pytest.mark.parametrize("use", ["commit", "beat", "close"])
def test_deleted_file_does_not_harm_the_one_made_in_its_place(path: Path, use: str) -> None:
    """Who had the deleted one open would write to the index of the next file's log."""
    old = SQLiteStore(str(path))
    old.open("a")
    old.commit("a", 1, {"n": b"1"})
    path.unlink()  # and not what lies beside it
    new = SQLiteStore(str(path))
    new.open("b")
    new.commit("b", 1, {"n": b"1"})
    if use == "commit":
        with pytest.raises(SessionError):
            old.commit("a", 2, {"n": b"2"})
    elif use == "beat":
        old._beaten -= 60
        old.beat()
    else:
        old.close()
    new.commit("b", 2, {"n": b"2"})
    assert new.read("b") == (2, {"n": b"2"})
    old.close()
    new.close()
    assert committed(path, "b") == (2, {"n": b"2"})


def test_process_with_a_deleted_file_does_not_harm_those_with_the_next_one(path: Path) -> None:
    program = """if True:
        import sys
        from minipool import SessionError
        from minipool.store import SQLiteStore
        store = SQLiteStore(sys.argv[1])
        store.open("a")
        store.commit("a", 1, {"n": b"1"})
        db = store._database._connect()
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()  # as housekeeping does
        db.close()
        print("committed", flush=True)
        sys.stdin.readline()
        try:
            store.commit("a", 2, {"n": bytes(20000)})
        except SessionError:
            print("refused", flush=True)
        sys.stdin.readline()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        env=scripts.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "committed\n"
    path.unlink()  # and not what lies beside it
    store = SQLiteStore(str(path))
    store.open("b")
    store.commit("b", 1, {"n": b"1"})
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "refused\n"
    store.commit("b", 2, {"n": b"2"})
    assert store.read("b") == (2, {"n": b"2"})
    process.communicate("\n")
    store.close()
    assert committed(path, "b") == (2, {"n": b"2"})


def test_pool_goes_on_with_a_file_that_was_replaced(path: Path, backup: Path) -> None:
    with Pool(size=1, session_store=path) as pool:
        pool.create_session("b", {"n": 1})
        remove(path)
        with pytest.raises(SessionError, match="deleted while it was in use"):
            pool.create_session("c", {"n": 1})
        pool.create_session("d", {"n": 1})
    assert committed(path, "d") is not None


# -- links -----------------------------------------------------------------------------------


@pytest.fixture
def current(tmp_path: Path) -> Path:
    """A link to the first of two releases, each with a folder that may have a store."""
    for name in ("release1", "release2"):
        (tmp_path / name).mkdir()
    link = tmp_path / "current"
    link.symlink_to("release1")
    return link


def turn(link: Path, to: str) -> None:
    """Have a link lead elsewhere, in one step, as deployments do."""
    new = link.parent / "new"
    new.symlink_to(to)
    new.replace(link)


@pytest.mark.parametrize("shared", [False, True])
def test_commit_to_a_file_that_the_path_leads_to_no_more_is_refused(
    current: Path, caplog: Any, shared: bool
) -> None:
    """A program that is started now would not find it."""
    path, old = current / "store", current.resolve() / "store"
    store = SQLiteStore(str(path))
    other = SQLiteStore(str(old)) if shared else None
    store.open("a")
    store.commit("a", 1, {"n": b"1"})
    left = store._database
    turn(current, "release2")
    with pytest.raises(SessionError, match=r"link was turned.*release2.*nothing was changed"):
        store.commit("a", 2, {"n": b"2"})
    assert any("a link was turned" in text for text in caplog.messages)
    with pytest.raises(SessionBusy, match="nothing was committed"):
        store.commit("a", 2, {"n": b"2"})
    assert store.open("a") is None
    store.commit("a", 1, {"n": b"new"})
    assert left.closed is not shared
    if other is not None:
        assert other.open("a") == (1, {"n": b"1"}), "it was not let go"
        other.commit("a", 2, {"n": b"2"})
        other.close()
    assert left.closed and not left._idle
    store.close()
    assert committed(path) == (1, {"n": b"new"})
    assert committed(old) == ((2, {"n": b"2"}) if shared else (1, {"n": b"1"}))


def test_commit_during_which_the_link_was_turned_is_refused(
    current: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SQLiteStore(str(current / "store"))
    store.open("a")
    commit_session = rows.commit_session

    def commit(*args: Any) -> None:
        commit_session(*args)
        turn(current, "release2")

    monkeypatch.setattr(rows, "commit_session", commit)
    with pytest.raises(SessionError, match="what was just written may be lost"):
        store.commit("a", 1, {"n": b"1"})
    monkeypatch.undo()
    assert store.read("a") is None
    store.close()


@pytest.mark.parametrize("of_the_file", [False, True], ids=["folder", "file"])
def test_link_that_is_missing_for_a_moment_costs_no_session(
    current: Path, of_the_file: bool
) -> None:
    """It was not turned in one step: removed, and made again."""
    link, path = current, current / "store"
    if of_the_file:
        SQLiteStore(str(path)).close()
        link = path = current.parent / "store"
        link.symlink_to("release1/store")
    store = SQLiteStore(str(path))
    store.create("a", {"n": b"1"})
    leads_to = link.readlink() if hasattr(link, "readlink") else os.readlink(link)
    link.unlink()
    for _ in range(2):
        with pytest.raises(SessionError):
            store.has("a")
        assert not os.path.lexists(link), "a new store is made in its place"
    link.symlink_to(leads_to)
    store.commit("a", 2, {"n": b"2"})
    assert store.read("a") == (2, {"n": b"2"})
    store.close()


def test_link_that_was_turned_back_leads_to_what_was_there(current: Path) -> None:
    store = SQLiteStore(str(current / "store"))
    other = SQLiteStore(str(current.resolve() / "store"))
    store.create("a", {"n": b"1"})
    for release, found in (("release2", False), ("release1", True)):
        turn(current, release)
        with pytest.raises(SessionError, match="link was turned"):
            store.has("a")
        assert store.has("a") is found
    turn(current, "release2")
    with pytest.raises(SessionError, match="link was turned"):
        store.has("a")
    turn(current, "release1")
    assert store.open("a") == (1, {"n": b"1"})
    assert store.has("a")
    with pytest.raises(SessionBusy):
        other.open("a")
    store.close()
    other.close()


def test_commit_that_was_refused_afterwards_is_found_when_the_path_leads_back(
    current: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was made, only the store knows: a commit that follows it goes on from there."""
    with Pool(size=1, session_store=current / "store") as pool:
        pool.create_session("a", {"n": 1})
        commit = rows.commit_session

        def turned_meanwhile(*args: Any) -> None:
            commit(*args)
            turn(current, "release2")

        monkeypatch.setattr(rows, "commit_session", turned_meanwhile)
        with pool.checkout(session="a") as w:
            with pytest.raises(SessionError, match="link was turned") as caught:
                w.state["n"] = 2
            monkeypatch.undo()
            turn(current, "release1")
            assert caught.value.in_doubt
            assert w.state["n"] == 2
            w.state["m"] = 3
        assert pool.session_state("a") == {"n": 2, "m": 3}
        turn(current, "release2")
        with pytest.raises(SessionError, match="link was turned") as caught:
            pool.create_session("b")
        assert not caught.value.in_doubt
        turn(current, "release1")
    assert committed(current / "store", "a") is not None


def test_session_whose_file_is_not_there_any_more_does_not_go_on_empty(
    current: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit that was in doubt is with all the others in the file that the path has left."""
    with Pool(size=1, session_store=current / "store", strict_sessions=True) as pool:
        pool.create_session("a", {"n": 1, "m": 1})
        commit = rows.commit_session

        def turned_meanwhile(*args: Any) -> None:
            commit(*args)
            turn(current, "release2")

        with pool.checkout(session="a") as w:
            monkeypatch.setattr(rows, "commit_session", turned_meanwhile)
            with pytest.raises(SessionError, match="link was turned"):
                w.state["n"] = 2
            monkeypatch.undo()
            with pytest.raises(SessionBusy, match="not in the store any more"):
                w.state["n"] = 3
        with pytest.raises(SessionNotFound):
            pool.checkout(session="a")
    assert committed(current / "store", "a") is None


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_file_behind_a_link_that_was_deleted_or_replaced_is_told_as_such(
    current: Path, how: str
) -> None:
    path, real = current / "store", current.resolve() / "store"
    store = SQLiteStore(str(path))
    store.open("a")
    remove(real)
    if how == "replaced":
        SQLiteStore(str(current / "other")).close()
        (current / "other").rename(real)
    with pytest.raises(SessionError, match=f"{how}.* while it was in use"):
        store.commit("a", 1, {"n": b"1"})
    assert store.open("a") is None
    store.close()


def test_pool_goes_on_with_the_file_that_a_link_leads_to(current: Path) -> None:
    with Pool(size=1, session_store=current / "store") as pool:
        pool.create_session("a", {"n": 1})
        turn(current, "release2")
        with pytest.raises(SessionError, match="link was turned"):
            pool.create_session("b", {"n": 1})
        pool.create_session("c", {"n": 1})
    assert committed(current / "store", "c") is not None
    assert committed(current.parent / "release1" / "store", "b") is None


# -- journal modes ---------------------------------------------------------------------------


def journal_mode(path: Path) -> str:
    db = sqlite3.connect(path)
    try:
        return str(db.execute("PRAGMA journal_mode").fetchone()[0])
    finally:
        db.close()


def mounts(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point = str(path.parent).replace(" ", "\\040")
    lines = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
        f"23 22 0:50 / {point} rw,relatime shared:2 - {kind} server:/export rw\n"
        f"24 22 0:51 / {point}-other rw - tmpfs none rw\n"
    )
    (tmp_path / "mountinfo").write_text(lines)
    monkeypatch.setattr(files, "_MOUNTS", str(tmp_path / "mountinfo"))


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs"])
def test_network_file_system_gets_no_log(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Processes of several hosts share no memory. It works without, and says so."""
    path = tmp_path / "on the server" / "sessions.db"
    path.parent.mkdir()
    SQLiteStore(str(path)).close()
    assert journal_mode(path) == "wal"
    mounts(path, kind, monkeypatch, tmp_path)
    for _ in range(2):
        caplog.clear()
        store = SQLiteStore(str(path))
        assert any(f"network file system ({kind})" in text for text in caplog.messages)
        store.open("a")
        store.close()
    store = SQLiteStore(str(path))
    store.create("b", {"n": b"1"})
    other = SQLiteStore(str(path))
    assert other.read("b") == (1, {"n": b"1"})
    other.close()
    store.close()
    assert journal_mode(path) == "delete"


def test_local_file_system_beside_others_gets_a_log(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    mounts(path, "ext4", monkeypatch, tmp_path)
    SQLiteStore(str(path)).close()
    assert journal_mode(path) == "wal" and not caplog.messages


def test_last_file_system_mounted_somewhere_is_the_one_that_is_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mounts(path, "nfs", monkeypatch, tmp_path)
    assert files.network_filesystem(str(path)) == "nfs"
    with (tmp_path / "mountinfo").open("a") as lines:
        lines.write(f"25 23 0:52 / {path.parent} rw - ext4 /dev/over rw\n")
    assert files.network_filesystem(str(path)) is None


NORMAL, FULL = 1, 2


def synchronous(store: SQLiteStore) -> int:
    db = store._database._idle[-1]
    found: int = db.execute("PRAGMA synchronous").fetchone()[0]
    return found


def test_log_is_written_as_fast_as_the_death_of_a_process_allows(path: Path) -> None:
    store = SQLiteStore(str(path))
    assert synchronous(store) == NORMAL
    store.close()


def test_where_no_log_is_possible_it_says_so_and_works(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The answer to the wish for one is heard."""
    connection = "minipool.store.database.Database._switch_journal"
    monkeypatch.setattr(connection, lambda self, db, wished, mode: mode)
    store = SQLiteStore(str(path))
    assert any("can have no write-ahead log" in text for text in caplog.messages)
    assert synchronous(store) == FULL, "the file itself is written to: not even power may break it"
    store.create("a", {"n": b"1"})
    store.commit("a", 2, {"n": b"2"})
    store.close()
    assert committed(path) == (2, {"n": b"2"})


# -- no room ---------------------------------------------------------------------------------

SMALL_DISK = """
import contextlib, os, subprocess, sys
from minipool import SessionError
from minipool.store import SQLiteStore, database

os.chdir(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", "."], check=True)
os.chdir(sys.argv[1])

def fill_up():
    with contextlib.suppress(OSError), open("filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(512))

def fill_store(store, size):
    made = 0
    try:
        while True:
            store.create(f"{size} {made}", {"blob": b"x" * size})
            made += 1
    except SessionError as problem:
        assert "full" in str(problem) and "nothing was changed" in str(problem), problem
        return made

"""
# What was put into the file leaves room in the log, which is begun anew when it is full.
USED_WHILE_FULL = """
database._LONG_LOG_BYTES = 1
store = SQLiteStore("sessions.db")
for number in range(15):
    store.create(f"s{number}", {"blob": b"x" * 20_000})
store.beat()
fill_up()
for turn in range(10):
    for number in range(15):
        store.delete(f"s{number}")
        assert not store.has(f"s{number}")
    for number in range(15):
        assert store.create(f"s{number}", {"blob": b"%d" % turn * 20_000})
store.close()
"""
USED_ONCE_THERE_IS_ROOM = """
store = SQLiteStore("sessions.db")
made = fill_store(store, 20_000)
fill_up()
fill_store(store, 1)
assert made > 10 and store.read("20000 0") == (1, {"blob": b"x" * 20_000})
store.close()
os.unlink("filler")
subprocess.run(["mount", "-o", "remount,size=4m", sys.argv[1]], check=True)
store = SQLiteStore("sessions.db")
for number in range(made):
    assert store.open(f"20000 {number}") == (1, {"blob": b"x" * 20_000})
    store.delete(f"20000 {number}")
store.close()
assert os.listdir(".") == ["sessions.db"]
"""


@pytest.mark.parametrize("program", [USED_WHILE_FULL, USED_ONCE_THERE_IS_ROOM])
def test_full_disk_is_told_and_survived(tmp_path: Path, program: str) -> None:
    """A process with a file system of its own, which holds 1 MiB."""
    own_mounts = ["unshare", "--map-root-user", "--mount"]
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("no file system can be mounted")
    trial = subprocess.run([*own_mounts, "mount", "-t", "tmpfs", "none", str(tmp_path)])
    if trial.returncode:
        pytest.skip("no file system can be mounted")
    done = subprocess.run(
        [*own_mounts, sys.executable, "-c", SMALL_DISK + program, str(tmp_path)],
        env=scripts.environment(), timeout=50, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# -- a file that is locked -------------------------------------------------------------------


def test_locked_file_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening and committing wait for whoever writes; what is read does not."""
    store = SQLiteStore(str(path))
    store.create("a", {"n": b"1"})
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    opened: list[Any] = []

    def open_and_commit() -> None:
        opened.append(SQLiteStore(str(path)))
        opened[0].create("b", {})

    thread = threading.Thread(target=open_and_commit)
    thread.start()
    assert store.read("a") == (1, {"n": b"1"}) and not store.has("b")
    thread.join(0.3)
    assert thread.is_alive()
    other.execute("ROLLBACK")
    other.close()
    thread.join(10)
    assert store.has("b")
    for each in (opened[0], store):
        each.close()


def test_close_waits_a_second_for_a_locked_file_at_most(path: Path) -> None:
    """Its sessions can be had in this process at once, though the file still says they are its."""
    import time

    store = SQLiteStore(str(path))
    store.create("a", {"n": b"1"})
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    start = time.monotonic()
    store.close()
    assert time.monotonic() - start < 3.0
    other.execute("ROLLBACK")
    other.close()
    again = SQLiteStore(str(path))
    assert again.open("a") == (1, {"n": b"1"})
    again.close()
