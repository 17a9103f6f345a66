"""A session store is looked after by a thread of its own; neither manager nor caller waits for it."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import time
import weakref
from typing import Any

import pytest

from chatters import add, get
from ears import Ear, handle_of, wait_until
from minipool import Pool, SessionBusy, SessionNotFound, housekeeping, sessions
from minipool.store import SQLiteStore
from stores import LockedStore, NotingStore, RefusingStore
from test_sessions import InThread, wait_queued


def call(pool: Pool[Any], session: str, target: Any, *args: Any) -> Any:
    return pool.options(session=session, timeout=20).call(target, *args)


def housekeepers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.endswith("-housekeeping")]


def test_there_is_no_housekeeping_without_a_store() -> None:
    with Pool(size=1) as pool:
        call(pool, "a", add)
        assert housekeepers() == []


def test_managers_thread_never_asks_the_store() -> None:
    """Expiry, eviction, a death, the end of the pool: other threads talk to the store."""
    store = NotingStore()
    with Pool(size=1, session_store=store, session_ttl=0.2, max_sessions=2, name="p") as pool:
        ear = Ear(pool, "session.lost")
        for key in "abc":
            call(pool, key, add)
        os.kill(handle_of(pool).pid, signal.SIGKILL)
        ear.wait("session.lost", 3)
        pool.create_session("d")
        pool.end_session("d")
    assert store.closed.is_set() and not store.kept
    by_method: dict[str, set[str]] = {}
    for method, thread in store.asked:
        by_method.setdefault(method, set()).add(thread)
    assert "minipool-p" not in set().union(*by_method.values())
    assert by_method["beat"] == by_method["close"] == {"minipool-p-housekeeping"}
    assert "minipool-p-housekeeping" in by_method["delete"]


def test_sweep_leaves_the_store_alone() -> None:
    """What has expired is not the manager's to end where it is to be deleted from a store."""
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool:
        pool.create_session("a")
        pool._sessions._records["a"].used -= 4000.0
        store.asked.clear()
        for _ in range(3):
            pool._sessions._sweep()
        me = threading.current_thread().name
        assert me not in {thread for _, thread in store.asked}


@pytest.mark.parametrize("expire", [False, True])
def test_locked_store_holds_up_no_death(expire: bool) -> None:
    """While the store answers nobody, dead workers are replaced and calls are served."""
    store = LockedStore()
    ttl = 0.2 if expire else 3600.0
    with Pool(size=1, session_store=store, session_ttl=ttl) as pool:
        if expire:
            call(pool, "a", add)
        else:
            housekeeping_of(pool)._beat_at = 0.0
        store.locked.set()
        housekeeping_of(pool)._gate.release()
        assert store.waited.wait(20)
        for deaths in (1, 2):
            os.kill(handle_of(pool).pid, signal.SIGKILL)
            wait_until(
                pool,
                lambda deaths=deaths: (
                    pool.stats().workers_lost == deaths  # type: ignore[misc]
                    and pool.stats().idle == 1
                ),
            )
            assert pool.call(os.getpid)
        store.unlocked.set()
    assert store.closed.is_set()


def housekeeping_of(pool: Pool[Any]) -> Any:
    assert pool._desk is not None
    (keeper,) = pool._desk.manager.keepers
    return keeper


def test_close_does_not_wait_for_a_locked_store_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """It goes without; the thread closes the store when that lets go."""
    monkeypatch.setattr("minipool.engine.manager._KEEPERS_GRACE", 0.2)
    store = LockedStore()
    pool = Pool(size=1, session_store=store).open()
    call(pool, "a", add)
    store.locked.set()
    pool.close()
    assert pool._desk is not None and pool._desk.manager.done
    assert not store.closed.is_set() and len(housekeepers()) == 1
    assert any("has not let go" in message for message in caplog.messages)
    store.unlocked.set()
    assert store.closed.wait(20)


def test_close_returns_when_the_store_is_closed() -> None:
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool:
        call(pool, "a", add)
        keeper = housekeeping_of(pool)
    assert store.closed.is_set() and keeper.ended and not keeper._thread.is_alive()


def test_store_of_a_dropped_pool_is_closed() -> None:
    store = NotingStore()
    pool = Pool(size=1, session_store=store).open()
    call(pool, "a", add)
    gone, manager = weakref.ref(pool._sessions), handle_of(pool) and pool._desk.manager  # type: ignore[union-attr]
    del pool
    gc.collect()
    assert manager.wait_done(20)
    assert store.closed.wait(20)
    manager.join(5)
    gc.collect()
    assert gone() is None


# -- signs of life, and what was used ------------------------------------------------------------


def test_use_without_a_commit_is_noted_in_the_store() -> None:
    """Sessions that are only read count as used, in bulk; those that nobody used do not."""
    store = NotingStore()
    store.kept = {key: (1, {"n": pickle.dumps(1, 5)}) for key in ("read", "unused")}
    with Pool(size=1, session_store=store) as pool:
        for key in ("read", "unused"):
            assert call(pool, key, get, "n") == 1
        pool._sessions._records["unused"].used -= 1000.0
        housekeeping_of(pool)._noted -= 100.0
    assert [method for method, _ in store.asked].count("commit") == 0
    last = store.used[-1]
    assert set(last) == {"read"} and 0.0 <= last["read"] < 60.0


def test_leased_session_is_used_now() -> None:
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool, pool.checkout(session="a"):
        pool._sessions._records["a"].used -= 1000.0
        assert pool._sessions.used_since(0.0) == {"a": 0.0}


def test_session_that_has_expired_is_told_of_before_it_is_deleted() -> None:
    """A locked store refuses that within a second; the deletion would wait as a caller does."""
    with Pool(size=1, session_store=NotingStore()) as pool:
        for key in "ab":
            pool.create_session(key)
            pool._sessions._records[key].used -= 4000.0
        (told,) = pool._sessions.used_since(time.monotonic()).items()
        assert told[0] == "a" and told[1] > 3600.0


def test_use_that_the_store_refused_to_note_is_told_again(caplog: Any) -> None:
    store = RefusingStore("beat")
    with Pool(size=1, session_store=store) as pool:
        keeper = housekeeping_of(pool)
        call(pool, "a", add)
        assert not keeper._give_sign() and not keeper._give_sign()
        store.refused.clear()
        assert keeper._give_sign()
        assert "a" in store.used[-1]
    refusals = [message for message in caplog.messages if "beat is refused" in message]
    assert len(refusals) == 1, "the same trouble is told once"


class Tended:
    """The sessions of a pool, as its housekeeping sees them: one was used, one has expired."""

    def __init__(self) -> None:
        self.used = time.monotonic()
        self.expired = False

    def used_since(self, moment: float) -> dict[str, float]:
        return {"a": time.monotonic() - self.used} if self.used >= moment else {}

    def has_expired(self) -> bool:
        return True

    def expire(self, seconds: float) -> bool:
        self.expired = True
        return False


def test_use_while_the_store_is_told_of_others_is_told_the_next_time() -> None:
    """What counts as told is what was looked at, not what has come since."""
    store, tended = NotingStore(), Tended()
    keeper = housekeeping.Housekeeping("p", store, 60.0, tended, lambda: None)

    def use(method: str, key: str) -> None:
        tended.used = time.monotonic()

    store.before = use
    assert keeper._give_sign()
    store.before = lambda method, key: None
    assert keeper._give_sign() and keeper._give_sign()
    assert [set(used) for used in store.used[1:]] == [{"a"}, set()]


def test_store_that_refuses_a_sign_is_asked_for_nothing_else() -> None:
    """A locked one would hold up each deletion for as long as a caller, and the close with it."""
    store, tended = RefusingStore("beat"), Tended()
    keeper = housekeeping.Housekeeping("p", store, 60.0, tended, lambda: None)
    assert keeper._pass() > 0
    assert not tended.expired
    store.asked.clear()
    keeper.end()
    keeper._run()
    assert [method for method, _ in store.asked] == ["close"] and keeper.ended

    store = NotingStore()
    keeper = housekeeping.Housekeeping("p", store, 60.0, tended, lambda: None)
    keeper._pass()
    assert tended.expired


def test_signs_of_life_are_given_while_many_commit(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "_BEAT_S", 0.01)
    beats = threading.Semaphore(0)
    beat = SQLiteStore.beat

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        beat(self, *args, **kwargs)
        beats.release()

    monkeypatch.setattr(SQLiteStore, "beat", counted)
    with Pool(size=1, session_store=tmp_path / "s.db") as pool:
        stop = threading.Event()

        def commit(key: str) -> None:
            with pool.checkout(session=key, timeout=20) as w:
                while not stop.is_set():
                    w.state["n"] = 1

        thread = InThread(commit, "a")
        try:
            for _ in range(10):
                assert beats.acquire(timeout=20), "the committing thread starves the housekeeping"
        finally:
            stop.set()
        thread.result()


# -- expiry --------------------------------------------------------------------------------------


def test_expiry_goes_in_pieces_between_which_the_manager_does_other_things(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thousands that expire together do not hold up what is to be done meanwhile."""
    monkeypatch.setattr(sessions, "_BATCH_S", 0.0)
    with Pool(size=1, session_ttl=3600.0) as pool:
        desk = pool._desk
        assert desk is not None
        manager = desk.manager
        for number in range(200):
            pool.create_session(f"s{number}")
        looks, look = [0], manager._look
        monkeypatch.setattr(manager, "_look", lambda *whole: (looks.append(1), look(*whole)))
        lost_at: set[int] = set()
        pool.hooks["session.lost"].append(lambda *event: lost_at.add(len(looks)))
        manager.order(lambda: expire_all(pool))
        wait_until(pool, lambda: not pool.sessions())
    assert len(lost_at) > 100, "it was all done in one go"


def expire_all(pool: Pool[Any]) -> None:
    for record in pool._sessions.records():
        record.used -= 4000.0
    pool._sessions._expire_in_pieces()


def test_session_begun_anew_while_it_expires_is_not_deleted() -> None:
    """A caller that comes in the midst of the deletion begins the session after it."""
    store = NotingStore()
    at_it, go_on = threading.Event(), threading.Event()

    def pause(method: str, key: str) -> None:
        if (method, key) == ("delete", "a"):
            at_it.set()
            assert go_on.wait(20)

    with Pool(size=1, session_store=store, session_ttl=0.2) as pool:
        call(pool, "a", add)
        store.before = pause
        assert at_it.wait(20)
        with pytest.raises(SessionBusy):
            pool.checkout(session="a", timeout=0)
        later = InThread(call, pool, "a", add)
        wait_queued(pool, 1)
        store.before = lambda method, key: None
        go_on.set()
        assert later.result() == 1
        assert store.kept["a"][0] == 1
        assert pickle.loads(store.kept["a"][1]["n"]) == 1


def test_session_that_cannot_be_deleted_stays() -> None:
    """As it expires: memory and store agree, and it goes when the store lets it."""
    store = RefusingStore("delete")
    with Pool(size=1, session_store=store, session_ttl=0.2) as pool:
        ear = Ear(pool, "session.lost")
        pool.create_session("a", {"n": 1})
        refused = threading.Event()
        before = store.before

        def note(method: str, key: str) -> None:
            if method == "delete":
                refused.set()
            before(method, key)

        store.before = note
        assert refused.wait(20)
        assert pool.session_state("a") == {"n": 1} and not ear.heard
        store.refused.clear()
        ear.wait("session.lost")
        with pytest.raises(SessionNotFound):
            pool.session_state("a")


def test_housekeeping_survives_a_listener_that_wants_to_exit(caplog: Any) -> None:
    store = NotingStore()
    with Pool(size=1, session_store=store, session_ttl=0.1) as pool:
        lost = threading.Semaphore(0)

        def leave(*event: Any) -> None:
            lost.release()
            raise SystemExit

        pool.hooks["session.lost"].append(leave)
        housekeeping_of(pool)
        for key in "ab":
            pool.create_session(key)
            housekeeping_of(pool)._gate.release()
            assert lost.acquire(timeout=20)
        beats = len(store.used)
        call(pool, "c", add)
    assert len(store.used) > beats and store.closed.is_set()


def test_listener_in_the_housekeeping_waits_for_nobody() -> None:
    """Else a lease that is held would keep the signs of life from being given."""
    store = NotingStore()
    with Pool(size=1, session_store=store, session_ttl=0.2) as pool:
        found: list[Any] = []
        heard = threading.Event()

        def listen(*event: Any) -> None:
            try:
                pool.checkout(session="a", timeout=None)
            except BaseException as error:
                found.append(error)
            pool.close()  # begins to, and comes back
            heard.set()

        pool.hooks["session.lost"].append(listen)
        with pool.checkout(session="a"):
            pool.create_session("b")
            assert heard.wait(20)
        assert isinstance(found[0], SessionBusy)
    assert store.closed.is_set()
