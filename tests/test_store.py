"""The session store: what is committed survives the application's own death."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Any, Mapping

import pytest

import chatters
import scripts
from chatters import add, append, get, put
from ears import Ear, handle_of, wait_until
from minipool import (
    Pool,
    PoolStartError,
    SessionBusy,
    SessionError,
    SessionExists,
    SessionLost,
    SessionNotFound,
)
from minipool.store import SQLiteStore
from minipool.store import rows as rows_of_stores

APPLICATION = """
    import os, signal, sys
    from minipool import Pool
    from chatters import add, append, put

    def tell(*words):
        print(*words, flush=True)

    if __name__ == "__main__":
        with Pool(size=1, session_store=sys.argv[1]) as pool:
            {body}
"""


def application(tmp_path: Path, body: str, store: Path, **more: Any) -> Any:
    """Start an application with a pool on a store; it ends on its own or when it is killed."""
    folder = tmp_path / f"application {len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return scripts.start(folder, APPLICATION.replace("{body}", body), str(store), **more)


def call(pool: Pool[Any], session: str, target: Any, *args: Any) -> Any:
    return pool.options(session=session, timeout=20).call(target, *args)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


def test_sessions_survive_closing_and_opening(store: Path) -> None:
    with Pool(size=1, session_store=store) as pool:
        pool.create_session("empty")
        call(pool, "a", append, "log", "one")
        call(pool, "a", put, "gone", 1)
        call(pool, "a", chatters.drop, "gone")
    with Pool(size=1, session_store=str(store)) as pool:
        assert pool.session_state("a") == {"log": ["one"]}
        assert pool.session_state("empty") == {}
        assert call(pool, "a", append, "log", "two") == 2
        with pytest.raises(SessionExists):
            pool.create_session("empty")
        assert call(pool, "empty", chatters.keys) == []


def test_stored_session_needs_no_beginning(store: Path) -> None:
    with Pool(size=1, session_store=store, strict_sessions=True) as pool:
        pool.create_session("a", {"n": 1})
    with Pool(size=1, session_store=store, strict_sessions=True) as pool:
        assert call(pool, "a", add) == 2
        with pytest.raises(SessionNotFound):
            pool.checkout(session="b")


def test_ended_sessions_leave_the_store(store: Path) -> None:
    with Pool(size=1, session_store=store) as pool:
        for key in "ab":
            call(pool, key, add)
        pool.end_session("a")
    with Pool(size=1, session_store=store) as pool:
        pool.end_session("b")  # not used in this process
        pool.end_session("b")
        for key in "ab":
            with pytest.raises(SessionNotFound):
                pool.session_state(key)
    assert rows(store, "session") == rows(store, "state") == []


def test_expired_and_evicted_sessions_leave_the_store(store: Path) -> None:
    with Pool(size=1, session_store=store, session_ttl=0.2, max_sessions=2) as pool:
        ear = Ear(pool, "session.lost")
        for key in "abc":
            call(pool, key, add)
        ear.wait("session.lost", 3)
        wait_until(pool, lambda: not pool.sessions())
    assert rows(store, "session") == rows(store, "state") == []


def test_forgotten_sessions_of_dead_owners_expire(store: Path) -> None:
    with Pool(size=1, session_store=store) as pool:
        call(pool, "old", add)
    with Pool(size=1, session_store=store, session_ttl=0.2) as pool:
        wait_until(pool, lambda: rows(store, "session") == [])
        with pytest.raises(SessionNotFound):
            pool.session_state("old")


def rows(path: Path, table: str) -> list[Any]:
    db = sqlite3.connect(path)
    try:
        return db.execute(f"SELECT * FROM {table}").fetchall()
    finally:
        db.close()


def test_sessions_survive_the_death_of_the_application(tmp_path: Path, store: Path) -> None:
    """kill -9 of the whole process group, in the middle of its work; then go on."""
    body = "[tell(pool.options(session='a').call(add)) for _ in iter(int, 1)]"
    process = application(tmp_path, body, store)
    told = 0
    while told < 20:
        told = int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGKILL)
    told = max([told, *map(int, process.stdout.read().split("\n")[:-1])])
    killed_if_alive(process)
    with Pool(size=1, session_store=store) as pool:
        n = pool.session_state("a")["n"]
        assert told <= n <= told + 1
        assert call(pool, "a", add) == n + 1


def test_commit_is_in_the_store_before_the_caller_sees_the_reply(
    tmp_path: Path, store: Path
) -> None:
    """An application that kills itself right after a reply has committed what it was told."""
    body = "pool.options(session='a').call(add); os.kill(os.getpid(), signal.SIGKILL)"
    for turn in range(1, 4):
        process = application(tmp_path, body, store)
        assert scripts.finish(process)[0] == -signal.SIGKILL
        with Pool(size=1, session_store=store) as pool:
            assert pool.session_state("a") == {"n": turn}


def test_session_belongs_to_one_process_at_a_time(tmp_path: Path, store: Path) -> None:
    body = "pool.options(session='a').call(add); tell(os.getpid()); sys.stdin.read()"
    process = application(tmp_path, body, store, stdin=-1)
    try:
        pid = int(process.stdout.readline())
        with Pool(size=1, session_store=store) as pool:
            for use in (
                lambda: pool.checkout(session="a"),
                lambda: pool.end_session("a"),
            ):
                with pytest.raises(SessionBusy, match=f"process {pid}") as caught:
                    use()
                assert caught.value.owner_pid == pid
            with pytest.raises(SessionExists):
                pool.create_session("a")
            assert pool.session_state("a") == {"n": 1}  # looking is free
            assert call(pool, "b", add) == 1
            process.stdin.close()  # it closes its pool and ends
            process.wait(20)
            assert call(pool, "a", add) == 2
    finally:
        killed_if_alive(process)


def killed_if_alive(process: Any) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(20)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None and not stream.closed:
            stream.close()


def test_sessions_of_a_dead_owner_are_taken_over_at_once(tmp_path: Path, store: Path) -> None:
    body = "pool.options(session='a').call(add); tell('there'); sys.stdin.read()"
    process = application(tmp_path, body, store, stdin=-1)
    try:
        assert process.stdout.readline() == "there\n"
        with Pool(size=1, session_store=store) as pool:
            with pytest.raises(SessionBusy):
                pool.checkout(session="a")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
            with pool.checkout(session="a") as w:
                assert w.call(add) == 2
    finally:
        killed_if_alive(process)
    with Pool(size=1, session_store=store):
        assert len(rows(store, "owner")) == 1


def test_owner_that_was_taken_for_dead_commits_nothing(store: Path) -> None:
    """One on another host, silent for too long, loses its sessions; it hears that at a commit."""
    with Pool(size=1, session_store=store) as pool:
        call(pool, "a", add)
        db = sqlite3.connect(store)
        db.execute("UPDATE session SET owner='another'")
        db.commit()
        db.close()
        with pool.checkout(session="a") as w:
            with pytest.raises(SessionBusy, match="nothing was committed"):
                w.call(add)
            assert dict(w.state) == {"n": 1}
        assert pool.stats().workers_lost == 0
    assert rows(store, "session")[0][1:3] == (1, "another")


def test_owner_on_another_host_is_believed_while_it_gives_signs(store: Path) -> None:
    with Pool(size=1, session_store=store) as pool:
        call(pool, "a", add)
        db = sqlite3.connect(store)
        db.execute("UPDATE owner SET id='other', host='elsewhere', boot='another'")
        db.execute("UPDATE session SET owner='other'")
        db.commit()
        other = SQLiteStore(str(store))
        with pytest.raises(SessionBusy, match="on elsewhere"):
            other.open("a")
        db.execute("UPDATE owner SET beat=beat-1000")
        db.commit()
        db.close()
        assert other.open("a") is not None
        other.close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(b"not a database at all" * 100), "no SQLite database"),
        (lambda path: path.write_bytes(b"SQLite"), "no SQLite database"),
        (lambda path: other_program(path), "another program's"),
        (lambda path: of_version(path, 3), "schema version 3, not 2; use a newer minipool"),
        (lambda path: truncated(path), "malformed|corrupt"),
        (lambda path: scribbled(path), "malformed|corrupt"),
    ],
    ids=["text", "stub", "other program", "newer", "truncated", "scribbled"],
)
def test_unusable_file_is_refused_and_left_alone(make: Any, says: str, store: Path) -> None:
    make(store)
    before = store.read_bytes()
    pool = Pool(size=1, session_store=store)
    with pytest.raises(SessionError, match=says) as caught:
        pool.open()
    assert str(store) in str(caught.value)
    assert "left as it is" in str(caught.value)
    assert store.read_bytes() == before
    assert [path.name for path in store.parent.iterdir()] == [store.name]
    pool.close()


def other_program(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE session (id TEXT)")
    db.commit()
    db.close()


def of_version(path: Path, version: int) -> None:
    made(path)
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version={version}")
    db.close()


def made(path: Path) -> None:
    store = SQLiteStore(str(path))
    for number in range(20):
        store.open(f"s{number}")
        store.commit(f"s{number}", 1, {"blob": b"x" * 5000})
    store.close()


def truncated(path: Path) -> None:
    made(path)
    os.truncate(path, 40_000)


def scribbled(path: Path) -> None:
    made(path)
    data = bytearray(path.read_bytes())
    data[8192 : len(data) - 4096] = b"\xff" * (len(data) - 12288)
    path.write_bytes(bytes(data))


def test_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="its directory does not exist: make"):
        Pool(size=1, session_store=tmp_path / "nowhere" / "sessions.db").open()


def test_pool_that_cannot_start_leaves_no_store_open(store: Path) -> None:
    with pytest.raises(PoolStartError):
        Pool("troublemakers:NoSuchClass", size=1, session_store=store).open()
    with Pool(size=1, session_store=store) as pool:
        assert call(pool, "a", add) == 1


def test_full_disk_fails_the_call_and_not_the_pool(store: Path) -> None:
    with Pool(size=1, session_store=store) as pool:
        call(pool, "a", put, "n", 1)
        db = connection_of(pool)
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count={pages}")
        pid = pool.workers()[0].pid
        with pool.checkout(session="a") as w:
            with pytest.raises(SessionError, match=r"full.*nothing was changed"):
                w.call(put, "blob", b"x" * 1_000_000)
            with pytest.raises(SessionError, match="full"):
                w.state["blob"] = b"x" * 1_000_000
            assert dict(w.state) == {"n": 1}
            assert w.call(chatters.keys) == ["n"]
            assert w.call(get, "n") == 1
        with pytest.raises(SessionError, match="full"):
            pool.create_session("b", {"blob": b"x" * 1_000_000})
        db.execute("PRAGMA max_page_count=1000000")
        pool.create_session("b", {"blob": b"x"})
        assert call(pool, "a", add) == 2
        assert pool.workers()[0].pid == pid
    with Pool(size=1, session_store=store) as pool:
        assert pool.session_state("a") == {"n": 2}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of that kind")
def test_log_that_may_not_grow_is_written_from_its_beginning(tmp_path: Path) -> None:
    """Where a quota or limit stops the log alone, what is in it goes into the file, which fits."""
    program = """
        import resource, signal, sys
        from minipool.store import SQLiteStore

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = SQLiteStore(sys.argv[1])
        store.open("a")
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        for version in range(1, 21):
            store.commit("a", version, {"blob": bytes([version]) * 50_000})
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        print(store.read("a") == (20, {"blob": bytes([20]) * 50_000}))
        store.close()
    """
    code, out, err = scripts.run(tmp_path, program, str(tmp_path / "store"))
    assert (code, out) == (0, "True\n"), err


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of that kind")
def test_file_size_limit_fails_the_call_and_not_the_pool(tmp_path: Path, store: Path) -> None:
    body = """
            import resource
            from minipool import SessionError
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            chat = pool.options(session="a")
            chat.call(add)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
            try:
                chat.call(put, "blob", b"x" * 1_000_000)
            except SessionError as error:
                tell("refused", sorted(pool.session_state("a")))
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            tell(chat.call(add))
    """.strip()
    code, out, err = scripts.finish(application(tmp_path, body, store))
    assert (code, out.splitlines()) == (0, ["refused ['n']", "2"]), err


def test_read_only_store_fails_the_call_and_not_the_pool(store: Path, caplog: Any) -> None:
    with Pool(size=1, session_store=store, session_ttl=0.3) as pool:
        call(pool, "a", put, "n", 1)
        db = connection_of(pool)
        db.execute("PRAGMA query_only=ON")
        with pool.checkout(session="a") as w:
            with pytest.raises(SessionError, match=r"readonly|read-only"):
                w.call(add)
            assert dict(w.state) == {"n": 1}
        with pytest.raises(SessionError):
            pool.checkout(session="b")
        # What expires cannot be deleted now: it stays, and the manager goes on.
        handle = handle_of(pool)
        wait_until(pool, lambda: any("attempt to write" in m for m in caplog.messages))
        os.kill(handle.pid, signal.SIGKILL)
        wait_until(pool, lambda: pool.stats().workers_lost == 1 and pool.stats().idle == 1)
        db.execute("PRAGMA query_only=OFF")
        assert call(pool, "b", add) == 1


def test_locked_store_does_not_hold_up_the_manager(store: Path) -> None:
    """While another process writes for long, dead workers are replaced all the same."""
    with Pool(size=1, session_store=store) as pool:
        call(pool, "a", add)
        sessions_store(pool)._beaten = 0.0  # a sign of life is due with the next sweep
        other = sqlite3.connect(store, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        try:
            os.kill(handle_of(pool).pid, signal.SIGKILL)
            wait_until(pool, lambda: pool.stats().workers_lost == 1 and pool.stats().idle == 1, 9.0)
            assert pool.call(os.getpid)
        finally:
            other.execute("ROLLBACK")
            other.close()
        assert call(pool, "a", add) == 2


def test_transaction_of_a_struck_thread_is_rolled_back(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception between BEGIN and what is done there leaves nothing open."""
    kept = SQLiteStore(str(store))
    kept.open("a")

    def struck(*args: Any) -> None:
        commit(*args)
        raise KeyboardInterrupt

    commit = rows_of_stores.commit_session
    monkeypatch.setattr(rows_of_stores, "commit_session", struck)
    with pytest.raises(KeyboardInterrupt):
        kept.commit("a", 1, {"n": b"1"})
    monkeypatch.undo()
    kept.commit("a", 1, {"n": b"2"})
    assert kept.read("a") == (1, {"n": b"2"})
    kept.close()


def test_turn_of_a_struck_thread_is_replaced(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception as the turn was handed over: after a while the next in line gets a new one."""
    kept = SQLiteStore(str(store))
    kept.open("a")
    line = kept._database._line
    taken = line.try_take

    def try_take() -> Any:
        taken()
        raise KeyboardInterrupt

    monkeypatch.setattr(line, "try_take", try_take)
    with pytest.raises(KeyboardInterrupt):
        kept.commit("a", 1, {"n": b"1"})
    monkeypatch.undo()
    assert not line.idle
    monkeypatch.setattr("minipool.store.database._ASTRAY_S", 0.05)
    kept.commit("a", 1, {"n": b"2"})
    assert kept.read("a") == (1, {"n": b"2"})
    kept.close()


def test_store_is_no_trap_for_a_signal_handler(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a transaction its thread is told at once that it would wait for itself."""
    kept = SQLiteStore(str(store))
    kept.open("a")

    def interrupted(*args: Any) -> None:
        monkeypatch.undo()
        with pytest.raises(SessionError, match="being written to"):
            kept.commit("a", 1, {"n": b"1"})
        assert kept.read("a") == (0, None)

    monkeypatch.setattr(rows_of_stores, "commit_session", interrupted)
    kept.commit("a", 1, {"n": b"1"})
    kept.commit("a", 1, {"n": b"2"})
    kept.close()


def test_transaction_on_another_file_is_waited_for_by_a_signal_handler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its thread is in the midst of keeps nobody from the other file but another thread."""
    kept, other = (SQLiteStore(str(tmp_path / name)) for name in ("kept", "other"))
    kept.open("a")
    other.open("b")
    at_it, queued = threading.Event(), threading.Event()
    commit_session = rows_of_stores.commit_session

    def slow(*args: Any) -> None:
        monkeypatch.setattr(rows_of_stores, "commit_session", interrupted)
        at_it.set()
        assert queued.wait(20), "nobody waited for the other file"
        commit_session(*args)

    def interrupted(*args: Any) -> None:
        monkeypatch.setattr(rows_of_stores, "commit_session", commit_session)
        other.commit("b", 2, {"n": b"2"})
        commit_session(*args)

    other._database._line._on_queue = lambda waiter: queued.set()
    monkeypatch.setattr(rows_of_stores, "commit_session", slow)
    thread = threading.Thread(target=other.commit, args=("b", 1, {"n": b"1"}))
    thread.start()
    assert at_it.wait(20)
    kept.commit("a", 1, {"n": b"1"})
    thread.join(20)
    assert kept.read("a") == (1, {"n": b"1"})
    assert other.read("b") == (2, {"n": b"2"})
    kept.close()
    other.close()


def sessions_store(pool: Pool[Any]) -> Any:
    return pool._sessions._store


def connection_of(pool: Pool[Any]) -> sqlite3.Connection:
    """Return the one connection that a store has while nobody uses it."""
    (db,) = sessions_store(pool)._database._idle
    found: sqlite3.Connection = db.raw
    return found


class DictStore:
    """A store with the interface and nothing else; fails when told to."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[int, dict[str, bytes]]] = {}
        self.broken = self.closed = False
        self.asked: list[str] = []

    def open(self, key: str) -> tuple[int, dict[str, bytes]] | None:
        self.asked.append(f"open {key}")
        found = self.kept.get(key)
        self.kept.setdefault(key, (0, {}))
        return found

    def create(self, key: str, state: Mapping[str, bytes]) -> bool:
        if key in self.kept:
            return False
        self.kept[key] = (int(bool(state)), dict(state))
        return True

    def has(self, key: str) -> bool:
        return key in self.kept

    def read(self, key: str) -> tuple[int, dict[str, bytes]] | None:
        return self.kept.get(key)

    def commit(self, key: str, version: int, changes: Mapping[str, bytes | None]) -> None:
        if self.broken:
            raise SessionError("the dict is full")
        state = dict(self.kept[key][1])
        for name, data in changes.items():
            if data is None:
                state.pop(name, None)
            else:
                state[name] = data
        self.kept[key] = (version, state)

    def delete(self, key: str) -> None:
        self.kept.pop(key, None)

    def beat(self, used: Mapping[str, float]) -> None:
        self.asked.append("beat")

    def close(self) -> None:
        self.closed = True


def test_any_object_with_the_methods_is_a_store() -> None:
    store = DictStore()
    with Pool(size=1, session_store=store) as pool:
        assert call(pool, "a", add) == 1
        assert store.kept["a"][0] == 1
        store.broken = True
        with pytest.raises(SessionError, match="the dict is full"):
            call(pool, "a", add)
        store.broken = False
        assert call(pool, "a", add) == 2
        wait_until(pool, lambda: "beat" in store.asked)
    assert store.closed
    assert store.kept["a"][0] == 2
    with Pool(size=1, session_store=store) as pool:
        assert call(pool, "a", add) == 3


def test_store_is_closed_with_the_pool(store: Path) -> None:
    """No descriptor is left, and the sessions belong to nobody."""
    with Pool(size=1, session_store=store) as pool:
        call(pool, "a", add)
    assert [row[2] for row in rows(store, "session")] == [None]
    assert rows(store, "owner") == []
    assert [path.name for path in store.parent.iterdir()] == [store.name]


def test_interrupted_commit_is_looked_up(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C in a commit, memory and store agree about whether it was made."""
    with Pool(size=1, session_store=store) as pool:
        call(pool, "a", add)
        kept = sessions_store(pool)
        commit = kept.commit

        def struck(*args: Any) -> None:
            commit(*args)
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(kept, "commit", struck)
        with pytest.raises(KeyboardInterrupt):
            call(pool, "a", add)
        stored = kept.read("a")
        record = pool._sessions._records["a"]
        assert stored == (record.version, record.state)
        assert call(pool, "a", add) == pool.session_state("a")["n"] == 3


def test_interrupted_commit_is_looked_up_later_if_it_cannot_be_now(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes out as itself, and who uses the session next works on what was kept."""
    with Pool(size=1, session_store=store) as pool:
        call(pool, "a", add)
        kept = sessions_store(pool)
        commit = kept.commit

        def struck(*args: Any) -> None:
            commit(*args)
            raise KeyboardInterrupt

        def busy(key: str) -> None:
            raise SessionError("it is being written to; try again")

        monkeypatch.setattr(kept, "commit", struck)
        monkeypatch.setattr(kept, "open", busy)
        monkeypatch.setattr(kept, "read", busy)
        with pool.checkout(session="a") as w:
            with pytest.raises(KeyboardInterrupt):
                w.state["n"] = 10
            with pytest.raises(SessionError, match="try again"):
                w.call(add)
            with pytest.raises(SessionError, match="try again"):
                pool.session_state("a")
            monkeypatch.undo()
            assert w.call(add) == 11
        assert pool.session_state("a") == {"n": 11}


def test_strict_loss_does_not_concern_the_store(store: Path) -> None:
    with Pool(size=1, session_store=store, affinity="strict") as pool:
        call(pool, "a", add)
        handle = handle_of(pool)
        os.kill(handle.pid, signal.SIGKILL)
        wait_until(pool, lambda: bool(handle.ended_ns))
        with pytest.raises(SessionLost):
            pool.checkout(session="a")
        assert call(pool, "a", add) == 2
