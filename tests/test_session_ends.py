"""The end of a session is heard, once, by each worker that knew it; `local` lives until then."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import pytest

from chatters import add
from ears import Ear, handle_of, wait_until
from gates import Gate, pass_gate
from minipool import CallMismatch, Pool, current_session
from minipool.engine import conversation, handle
from minipool.engine.conversation import MAX_WARM
from test_sessions import InThread

LIMIT = 1 << 17


class Diary:
    """Writes down which sessions began and ended here, with what `local` was."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def session_started(self, session: Any) -> None:
        session.local["of"] = f"{session.id} in {os.getpid()}"
        self._write(f"started {session.id} {os.getpid()}")

    def session_ended(self, session: Any) -> None:
        self._write(f"ended {session.local['of'].replace(' in', '')}")

    def touch(self) -> int:
        assert current_session().local["of"] == f"{current_session().id} in {os.getpid()}"
        return os.getpid()

    def mark(self, word: str) -> None:
        current_session().local["mark"] = word

    def marked(self) -> Any:
        return current_session().local.get("mark")

    def fill(self, size: int) -> None:
        current_session()["blob"] = bytes(size)

    def take(self, data: bytes) -> int:
        return len(data)

    def wait(self, path: str) -> int:
        return pass_gate(path)

    def local_count(self) -> int:
        import gc

        return sum(isinstance(each, conversation.Session) for each in gc.get_objects())

    def _write(self, line: str) -> None:
        os.write(self.fd, f"{line}\n".encode())


def lines_of(path: Path, word: str) -> collections.Counter[str]:
    lines = path.read_text().splitlines()
    return collections.Counter(line.split(" ", 1)[1] for line in lines if line.startswith(word))


def call(pool: Pool[Any], session: str, target: Any, *args: Any) -> Any:
    return pool.options(session=session, timeout=20).call(target, *args)


def wait_told(pool: Pool[Any]) -> None:
    """Wait until each worker has heard of every end."""
    handles = list(pool._handles().values())
    wait_until(pool, lambda: not any(each.sessions_over for each in handles))


def end(pool: Pool[Any], session: str) -> None:
    """End an idle session without waiting for its worker to hear of it."""
    sessions = pool._sessions
    token = sessions._line.try_take_this(session)
    assert token is not None
    sessions._over(token[1])


def move(pool: Pool[Any], session: str) -> int:
    """Have a session's next call in another worker than its own; return that one's pid."""
    (info,) = [info for info in pool.sessions() if info.session_id == session]
    own = handle_of(pool, info.worker_id or 0)
    assert pool._desk is not None
    held = pool._desk.acquire_this(own, 20, None)
    assert held is own
    try:
        with pool.checkout(session=session, timeout=20) as w:
            assert w.affinity == "moved"
            return int(w.call("touch"))
    finally:
        pool._desk.give_back(own)


@pytest.mark.parametrize("how", ["ended", "expired", "evicted"])
def test_sessions_that_were_evicted_from_the_warm_hear_of_their_end(
    how: str, tmp_path: Path
) -> None:
    """A worker keeps the state of a thousand sessions; it knows of others all the same."""
    count, diary = MAX_WARM + 200, tmp_path / "diary"
    options: Any = {"ended": {}, "expired": {}, "evicted": {"max_sessions": count}}[how]
    with Pool(Diary, args=(str(diary),), size=1, **options) as pool:
        for number in range(count):
            call(pool, f"s{number}", "touch")
        if how == "ended":
            for number in range(count):
                end(pool, f"s{number}")
        elif how == "evicted":
            for number in range(count):
                pool.create_session(f"new {number}")
        else:
            assert pool._desk is not None
            pool._desk.manager.order(lambda: expire_all(pool))
            wait_until(pool, lambda: not pool.sessions())
        wait_told(pool)
        assert pool.call("local_count") <= 3, "`local` leaks"
        assert lines_of(diary, "ended") == lines_of(diary, "started")
        assert len(lines_of(diary, "ended")) == count
        assert pool.stats().workers_lost == 0
    assert set(lines_of(diary, "ended").values()) == {1}


def expire_all(pool: Pool[Any]) -> None:
    for record in pool._sessions.records():
        record.used -= 4000.0
    pool._sessions._expire_in_pieces()


def test_local_stays_when_the_state_was_evicted(tmp_path: Path) -> None:
    """The session has not moved: `session_started` is not called again."""
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=1) as pool:
        call(pool, "first", "mark", "kept")
        call(pool, "first", add)
        for number in range(MAX_WARM + 1):
            call(pool, f"s{number}", "touch")
        assert call(pool, "first", "marked") == "kept"
        assert call(pool, "first", add) == 2
        assert lines_of(diary, "started")[f"first {handle_of(pool).pid}"] == 1


def test_worker_without_hook_and_local_forgets_what_it_evicts() -> None:
    with Pool(size=1) as pool:
        for number in range(MAX_WARM + 200):
            call(pool, f"s{number}", add)
        assert call(pool, "s0", add) == 2
        assert pool.call(sessions_here) <= MAX_WARM + 3


def sessions_here() -> int:
    import gc

    return sum(isinstance(each, conversation.Session) for each in gc.get_objects())


def test_workers_that_a_session_has_left_hear_of_its_end(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=3) as pool:
        pids = {call(pool, "a", "touch")}
        for _ in range(4):
            pids.add(move(pool, "a"))
        assert len(pids) > 1
        pool.end_session("a")
        wait_told(pool)
        assert lines_of(diary, "ended") == lines_of(diary, "started")
        assert {int(line.split()[1]) for line in lines_of(diary, "ended")} == pids


def test_local_of_an_earlier_stay_is_ended_as_the_session_returns(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=2) as pool:
        pid = call(pool, "a", "touch")
        call(pool, "a", "mark", "old")
        move(pool, "a")
        assert move(pool, "a") == pid
        assert call(pool, "a", "marked") is None
        key = f"a {pid}"
        assert (lines_of(diary, "started")[key], lines_of(diary, "ended")[key]) == (2, 1)


def test_call_that_is_too_long_moves_nothing(tmp_path: Path) -> None:
    """It was not sent: `local` is what it was, in the worker that has the session."""
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=2, max_message=LIMIT) as pool:
        pid = call(pool, "a", "touch")
        call(pool, "a", "mark", "kept")
        call(pool, "a", "fill", 100_000)
        own = handle_of(pool, pool.sessions()[0].worker_id or 0)
        assert own.pid == pid and pool._desk is not None
        held = pool._desk.acquire_this(own, 20, None)
        with pool.checkout(session="a", timeout=20) as w:
            assert w.pid != pid
            with pytest.raises(CallMismatch, match="with the state of session 'a', which has 100"):
                w.call("take", bytes(50_000))
        pool._desk.give_back(held)
        with pool.checkout(session="a", timeout=20) as w:
            assert (w.pid, w.affinity) == (pid, "hit")
            assert w.call("marked") == "kept"
            with pytest.raises(CallMismatch, match=r"takes \d+ bytes, more"):
                w.call("take", bytes(LIMIT))
            assert w.call("marked") == "kept"
        assert sum(lines_of(diary, "started").values()) == 1


def test_long_call_after_a_move_finds_no_old_local(tmp_path: Path) -> None:
    """The session was here, went away, and could not come back with a call that was too long."""
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=2, max_message=LIMIT) as pool:
        pid = call(pool, "a", "touch")
        call(pool, "a", "mark", "old")
        move(pool, "a")
        own = handle_of(pool, pool.sessions()[0].worker_id or 0)
        assert own.pid != pid and pool._desk is not None
        held = pool._desk.acquire_this(own, 20, None)
        with pool.checkout(session="a", timeout=20) as w:
            assert w.pid == pid
            with pytest.raises(CallMismatch):
                w.call("take", bytes(LIMIT))
            assert w.call("marked") is None
        pool._desk.give_back(held)


# -- telling goes in pieces ----------------------------------------------------------------------


def test_many_ends_are_told_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of them the worker serves whoever waits for it."""
    monkeypatch.setattr(handle, "_MOST_TOLD", 10)
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=1) as pool:
        ear = Ear(pool, "worker.health_check")
        for number in range(100):
            call(pool, f"s{number}", "touch")
        own = handle_of(pool)
        with pool.checkout() as w:
            for number in range(100):
                end(pool, f"s{number}")
            assert len(own.sessions_over) == 100
            waiting = InThread(pool.options(timeout=20).call, "local_count")
            wait_until(pool, lambda: bool(pool._desk and pool._desk.manager.turnstile.waiters))
            w.call("local_count")
        assert waiting.result() > 50, "it waited until all was told"
        wait_told(pool)
        assert len(ear.heard) >= 10
        assert len(lines_of(diary, "ended")) == 100


def test_idle_worker_hears_of_all_ends_at_once_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not left to the sweeps, one piece each: there would be fifty of them."""
    monkeypatch.setattr(handle, "_MOST_TOLD", 2)
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=1) as pool:
        assert pool._desk is not None
        manager = pool._desk.manager
        for number in range(100):
            call(pool, f"s{number}", "touch")
        swept = 0

        def count() -> None:
            nonlocal swept
            swept += 1

        sweep = manager._sweep
        monkeypatch.setattr(manager, "_sweep", lambda *args: (count(), sweep(*args)))
        for number in range(100):
            end(pool, f"s{number}")
        wait_told(pool)
        assert len(lines_of(diary, "ended")) == 100
        assert swept < 25


def test_busy_workers_hear_of_the_end_when_their_lease_is_over(tmp_path: Path, gate: Gate) -> None:
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=2) as pool:
        call(pool, "a", "touch")
        move(pool, "a")
        running = [InThread(pool.call, "wait", gate.path) for _ in range(2)]
        gate.wait_arrived(2)
        pool.end_session("a")
        assert not lines_of(diary, "ended")
        gate.open(2)
        for thread in running:
            thread.result()
        wait_told(pool)
        assert sum(lines_of(diary, "ended").values()) == 2


def test_session_taken_over_by_another_process_ends_here(tmp_path: Path) -> None:
    from stores import NotingStore

    diary, store = tmp_path / "diary", NotingStore()
    with Pool(Diary, args=(str(diary),), size=1, session_store=store) as pool:
        call(pool, "a", "touch")
        store.taken = {"a"}
        with pytest.raises(Exception, match="another's"):
            call(pool, "a", "fill", 1)
        store.taken.clear()
        wait_told(pool)
        assert lines_of(diary, "ended") == lines_of(diary, "started")
        assert len(pool.sessions()) == 0
