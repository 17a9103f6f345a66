"""What a session's memory and its store are after an interrupt, or after another process had it."""

from __future__ import annotations

import pickle
import sys
import threading
from typing import Any

import pytest

from chatters import add, get
from ears import Ear
from minipool import (
    Pool,
    SessionBusy,
    SessionError,
    SessionLost,
    SessionNotFound,
    records,
    sessions,
)
from stores import NotingStore
from strikes import strike_everywhere, unstruck
from test_sessions import InThread


def call(pool: Pool[Any], session: str, target: Any, *args: Any) -> Any:
    return pool.options(session=session, timeout=20).call(target, *args)


def kept(store: NotingStore, key: str) -> dict[str, Any]:
    return {name: pickle.loads(data) for name, data in store.kept[key][1].items()}


# -- interrupts ----------------------------------------------------------------------------------


def test_memory_is_what_the_store_has_wherever_a_commit_is_struck() -> None:
    """The store checks that each commit follows the one before: none is lost, none is doubled."""
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool:
        with pool.checkout(session="a") as w:
            w.state.update({"n": 0, "m": 0})
            tries = last = 0

            def commit() -> None:
                nonlocal tries, last
                tries += 1
                try:
                    w.state.update({"n": tries, "m": -tries})
                finally:
                    with unstruck():
                        found = kept(store, "a")
                        assert found["n"] == -found["m"] and found["n"] in (last, tries)
                        last = found["n"]
                        assert dict(w.state) == pool.session_state("a") == found

            assert strike_everywhere(commit, sessions, records, sys.modules["stores"]) > 20
        assert call(pool, "a", add) == tries + 1
        record = pool._sessions._records["a"]
        assert (record.version, record.state) == store.kept["a"]


def test_interrupt_between_store_and_memory_is_settled_by_the_next_use() -> None:
    """Though the store could not be asked at once."""
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool:
        call(pool, "a", add)
        commit = store.commit

        def struck(*args: Any) -> None:
            commit(*args)
            store.before = refuse
            raise KeyboardInterrupt

        def refuse(method: str, key: str) -> None:
            if method in ("open", "read"):
                raise SessionError("locked")

        store.commit = struck  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            call(pool, "a", add)
        with pytest.raises(SessionError, match="locked"):
            pool.session_state("a")
        store.commit = commit  # type: ignore[method-assign]
        store.before = lambda method, key: None
        assert pool.session_state("a") == {"n": 2}
        assert call(pool, "a", add) == 3


def test_refused_commit_leaves_no_doubt() -> None:
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool:
        call(pool, "a", add)

        def refuse(method: str, key: str) -> None:
            if method in ("commit", "open", "read"):
                raise SessionError("the disk is full")

        store.before = refuse
        with pytest.raises(SessionError, match="full"):
            call(pool, "a", add)
        assert pool.session_state("a") == {"n": 1}, "the store was asked, for no reason"
        assert call(pool, "a", get, "n") == 1


def test_looking_at_a_session_during_its_commit_changes_nothing() -> None:
    """Another thread looks while the owner is in the store: it sees the state before or after."""
    store = NotingStore()
    at_it, go_on = threading.Event(), threading.Event()
    with Pool(size=1, session_store=store) as pool:
        call(pool, "a", add)

        def pause(method: str, key: str) -> None:
            if method == "commit":
                at_it.set()
                assert go_on.wait(20)

        store.before = pause
        running = InThread(call, pool, "a", add)
        assert at_it.wait(20)
        asked = len(store.asked)
        assert pool.session_state("a") == {"n": 1}
        assert len(store.asked) == asked or {m for m, _ in store.asked[asked:]} == {"beat"}
        store.before = lambda method, key: None
        go_on.set()
        assert running.result() == 2
        assert call(pool, "a", add) == 3
        assert store.kept["a"][0] == 3


# -- another process had it ----------------------------------------------------------------------


def test_session_that_was_taken_over_and_given_back_can_be_used_again() -> None:
    """The first commit tells; what the other process committed is what goes on."""
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool:
        ear = Ear(pool, "session.lost")
        assert call(pool, "a", add) == 1
        store.taken = {"a"}
        store.kept["a"] = (7, {"n": pickle.dumps(70, 5)})
        with pool.checkout(session="a") as w:
            with pytest.raises(SessionBusy):
                w.call(add)
            assert dict(w.state) == {"n": 1}
            with pytest.raises(SessionLost, match="check out again"):
                w.state["n"] = 2
        (event,) = ear.heard
        assert event.metadata["reason"] == "taken over by another process"
        assert pool.session_state("a") == {"n": 70}, "a stale read"
        with pytest.raises(SessionBusy):
            pool.checkout(session="a")
        store.taken.clear()
        assert call(pool, "a", add) == 71
        assert store.kept["a"][0] == 8
        assert pool.stats().workers_lost == 0


def test_session_that_is_being_begun_is_not_forgotten_with_the_one_before() -> None:
    """Who still holds the record of a session that ended gives back that, and nothing else."""
    with Pool(size=1) as pool:
        pool.create_session("a")
        held = pool._sessions
        old = held._records["a"]
        pool.end_session("a")
        new = records.Record(held, "a")
        held._line.admit("a", new)
        held._put_back(old)
        assert held._line.current["a"] is new


def test_who_waits_for_a_session_that_was_taken_over_hears_it() -> None:
    store = NotingStore()
    with Pool(size=2, session_store=store) as pool:
        assert call(pool, "a", add) == 1
        with pool.checkout(session="a") as w:
            waiting = InThread(call, pool, "a", add)
            store.taken = {"a"}
            with pytest.raises(SessionBusy):
                w.call(add)
            with pytest.raises(SessionBusy):
                waiting.result()
        store.taken.clear()
        assert call(pool, "a", add) == 2
        assert not pool._sessions._owned
        line = pool._sessions._line
        assert set(line.idle) == set(line.current) == {"a"}


def test_doubt_about_a_session_that_was_taken_over_ends() -> None:
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool:
        call(pool, "a", add)
        commit = store.commit

        def struck(*args: Any) -> None:
            store.taken = {"a"}
            raise KeyboardInterrupt

        store.commit = struck  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            call(pool, "a", add)
        store.commit = commit  # type: ignore[method-assign]
        with pytest.raises(SessionBusy):
            call(pool, "a", add)
        store.taken.clear()
        assert call(pool, "a", add) == 2


def test_doubt_about_a_session_that_is_gone_ends() -> None:
    """Another process took it over and ended it: that is told, and the next use begins anew."""
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool:
        with pool.checkout(session="a") as w:
            w.state.update({"n": 5, "m": 5})
            commit = store.commit

            def struck(*args: Any) -> None:
                store.before = refuse
                raise KeyboardInterrupt

            def refuse(method: str, key: str) -> None:
                raise SessionError("locked")

            store.commit = struck  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                w.state["n"] = 6
            store.commit = commit  # type: ignore[method-assign]
            store.before = lambda method, key: None
            del store.kept["a"]
            with pytest.raises(SessionNotFound):
                pool.session_state("a")
            with pytest.raises(SessionBusy, match="not in the store any more"):
                dict(w.state)
            with pytest.raises(SessionBusy, match="not in the store any more"):
                w.call(add)
        assert not store.ours - {"a"} and not store.kept
        assert call(pool, "a", add) == 1
        assert kept(store, "a") == {"n": 1}
        pool.end_session("a")
        with pytest.raises(SessionNotFound):
            pool.session_state("a")
