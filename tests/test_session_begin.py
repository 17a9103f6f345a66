"""How sessions begin: whole or not at all, and at the cost of no other that need not go."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

import scripts
from chatters import add, get
from ears import Ear
from minipool import (
    CheckoutTimeout,
    Pool,
    Programs,
    SessionBusy,
    SessionError,
    SessionExists,
    SessionNotFound,
    current_session,
    records,
    sessions,
)
from stores import NotingStore, RefusingStore
from strikes import Strike, strike_everywhere, unstruck


def call(pool: Pool[Any], session: str, target: Any, *args: Any) -> Any:
    return pool.options(session=session, timeout=20).call(target, *args)


# -- room ----------------------------------------------------------------------------------------


def full_pool(store: NotingStore, **options: Any) -> Pool[None]:
    """Return a pool with as many sessions as it may have, "old" and "taken" in the store besides."""
    store.kept = {"old": (1, {"x": pickle.dumps(0)}), "taken": (1, {"x": pickle.dumps(0)})}
    store.taken = {"taken"}
    pool = Pool(size=1, session_store=store, max_sessions=2, **options).open()
    pool.create_session("a", {"x": 1})
    pool.create_session("b", {"x": 2})
    return pool


@pytest.mark.parametrize(
    ("use", "error"),
    [
        (lambda pool: pool.end_session("old"), None),
        (lambda pool: pool.end_session("never begun"), None),
        (lambda pool: pool.end_session("taken"), SessionBusy),
        (lambda pool: pool.create_session("old", {"x": 9}), SessionExists),
        (lambda pool: pool.create_session("a", {"x": 9}), SessionExists),
        (lambda pool: pool.create_session("big", {"x": bytes(1 << 17)}), SessionError),
        (lambda pool: pool.checkout(session="taken"), SessionBusy),
        (lambda pool: pool.session_state("old"), None),
    ],
)
def test_what_needs_no_room_costs_no_session(
    use: Callable[[Any], object], error: type[Exception] | None
) -> None:
    store = NotingStore()
    with full_pool(store, max_message=1 << 17) as pool:
        ear = Ear(pool, "session.lost")
        if error is None:
            use(pool)
        else:
            with pytest.raises(error):
                use(pool)
        assert not ear.heard
        assert pool.session_state("a") == {"x": 1}
        assert pool.session_state("b") == {"x": 2}
        assert {info.session_id for info in pool.sessions()} == {"a", "b"}


@pytest.mark.parametrize(
    ("refused", "use"),
    [
        ("create", lambda pool: pool.create_session("new", {"x": 9})),
        ("open", lambda pool: pool.checkout(session="new")),
        ("delete", lambda pool: pool.create_session("new", {"x": 9})),
        ("delete", lambda pool: pool.end_session("old")),
    ],
)
def test_session_that_the_store_refused_costs_no_other(
    refused: str, use: Callable[[Any], object]
) -> None:
    """The last two: it is the old one that cannot be deleted."""
    store = RefusingStore()
    with full_pool(store) as pool:
        store.refused = {refused}
        with pytest.raises(SessionError, match="refused"):
            use(pool)
        assert {info.session_id for info in pool.sessions()} == {"a", "b"}
        assert pool.session_state("a") == {"x": 1} and pool.session_state("b") == {"x": 2}
        store.refused.clear()
        pool.create_session("next")
        left = {info.session_id for info in pool.sessions()}
        assert len(left) == 2 and "next" in left
        pool.end_session("old")
    assert not pool._sessions._owned and set(pool._sessions._line.current) == left


def test_room_is_made_for_a_session_that_stays() -> None:
    store = NotingStore()
    with full_pool(store) as pool:
        assert call(pool, "old", get, "x") == 0
        assert {info.session_id for info in pool.sessions()} == {"b", "old"}
        assert set(store.kept) == {"b", "old", "taken"}


def test_session_without_room_is_not_begun_in_the_store() -> None:
    store = NotingStore()
    with full_pool(store) as pool:
        with pool.checkout(session="a"):
            with pytest.raises(CheckoutTimeout):
                pool.checkout(session="b", timeout=0.01)  # evicts nobody
            pool._sessions._line.claim("b", pool._sessions._records["b"])  # in use as well
            store.asked.clear()
            with pytest.raises(SessionError, match="max_sessions=2"):
                pool.create_session("new")
            with pytest.raises(SessionError, match="max_sessions=2"):
                pool.checkout(session="new")
            assert not {"create", "open"} & {method for method, _ in store.asked}
            pool._sessions.give_back(pool._sessions._records["b"])
        assert "new" not in store.kept


@pytest.mark.parametrize("begun_by", ["create_session", "checkout", "block"])
def test_session_for_which_the_store_makes_no_room_is_not_begun(begun_by: str) -> None:
    """It would be left behind: a store that refuses a deletion refuses the next one as well."""
    store = RefusingStore("delete")

    def begin(pool: Pool[None]) -> None:
        if begun_by == "create_session":
            pool.create_session("new", {"x": 3})
        elif begun_by == "block":
            pool.session("new").__enter__()
        else:
            pool.checkout(session="new").release()

    with full_pool(store) as pool:
        with pytest.raises(SessionError, match="delete is refused"):
            begin(pool)
        assert set(store.kept) == {"a", "b", "old", "taken"}
        assert {info.session_id for info in pool.sessions()} == {"a", "b"}
        store.refused.clear()
        begin(pool)
        assert {"new", "old", "taken"} < set(store.kept) and len(store.kept) == 4


@pytest.mark.parametrize(
    "begin",
    [
        lambda pool: pool.create_session("new"),
        lambda pool: pool.checkout(session="new").release(),
    ],
)
def test_session_that_cannot_be_taken_back_is_deleted_later(
    begin: Callable[[Any], object],
) -> None:
    """The store refuses from the deletion of the old one on, when the new one is there."""
    store = RefusingStore()

    def refuse(method: str, key: str) -> None:
        if method == "delete" and key != "new":
            store.refused.add("delete")
        store._refuse(method, key)

    with full_pool(store) as pool:
        store.before = refuse
        with pytest.raises(SessionError, match="delete is refused"):
            begin(pool)
        assert {info.session_id for info in pool.sessions()} == {"a", "b"}
        assert "new" in store.kept
        with pytest.raises(SessionNotFound):
            pool.session_state("new")
        with pytest.raises(SessionError, match="delete is refused"):
            begin(pool)
        store.before = lambda method, key: None
        assert pool._sessions.has_expired() and not pool._sessions.expire(1.0)  # housekeeping
        assert "new" not in store.kept and store.ours == {"a", "b"}
        begin(pool)
        assert len(pool.sessions()) == 2 and store.ours >= {"new"}


def begin_a_block(pool: Pool[None]) -> None:
    pool.session("old").__enter__()


@pytest.mark.parametrize("refused", [{"delete"}, {"delete", "let_go"}])
@pytest.mark.parametrize(
    "use",
    [
        lambda pool: pool.checkout(session="old").release(),
        lambda pool: pool.end_session("old"),
    ],
)
def test_session_in_the_store_that_came_to_nothing_here_is_let_go(
    use: Callable[[Any], object], refused: set[str]
) -> None:
    """Else no other process could use it while this one lives."""
    store = RefusingStore()
    with full_pool(store) as pool:
        store.refused = set(refused)
        with pytest.raises(SessionError, match="delete is refused"):
            use(pool)
        assert {info.session_id for info in pool.sessions()} == {"a", "b"}
        assert pool.session_state("old") == {"x": 0}
        store.refused.clear()
        pool._sessions.expire(1.0)  # housekeeping
        assert "old" not in store.ours
        assert store.kept["old"] == (1, {"x": pickle.dumps(0)})
        use(pool)
        assert len(pool.sessions()) == 2


def test_what_a_dead_block_has_left_is_over_though_no_room_is_made_for_the_next() -> None:
    store = RefusingStore()
    with full_pool(store) as pool:
        store.kept["old"] = (1, {"x": pickle.dumps(0), sessions._SCOPE: b""})

        def refuse(method: str, key: str) -> None:
            if method == "delete" and key == "a":
                raise SessionError("refused; nothing was changed")

        store.before = refuse
        with pytest.raises(SessionError, match="refused"):
            begin_a_block(pool)
        assert "old" not in store.kept and store.ours == {"a", "b"}
        store.before = lambda method, key: None
        begin_a_block(pool)
        assert pool.session_state("old") == {}


def test_session_that_may_be_ours_is_let_go() -> None:
    """The store has opened it, and refused that afterwards."""
    store = RefusingStore()
    with full_pool(store) as pool:
        store.doubted = {"open"}
        with pytest.raises(SessionError, match="may have been done"):
            pool.checkout(session="old")
        assert store.ours == {"a", "b"} and "old" in store.kept


def test_what_the_store_goes_on_refusing_holds_up_no_other() -> None:
    store = RefusingStore("delete", "let_go")
    with Pool(size=1, session_store=store, session_ttl=600) as pool:
        for key in ("a", "b", "c"):
            pool.create_session(key)
        store.kept["old"] = (1, {"x": pickle.dumps(0)})
        with pytest.raises(SessionError, match="delete is refused"):
            pool.end_session("old")
        for record in pool._sessions.records():
            record.used -= 1000

        def refuse(method: str, key: str) -> None:
            if key == "old":
                raise SessionError("refused for good")

        store.before = refuse
        with pytest.raises(SessionError, match="refused for good"):
            pool._sessions.expire(60.0)
        assert store.ours == {"old"} and not pool.sessions()
        store.before = lambda method, key: None
    assert not store.ours  # given back as the pool ended


class Mourner:
    """Notes the sessions whose end it has seen."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def begin(self) -> None:
        current_session().local["here"] = True

    def session_ended(self, session: Any) -> None:
        self.ended.append(session.id)

    def seen(self) -> list[str]:
        return self.ended


@pytest.mark.parametrize("how", ["struck before", "struck after", "in doubt"])
def test_session_whose_end_was_interrupted_is_over(how: str) -> None:
    """Whether the store has deleted it or not: if not, that is done later."""
    store = NotingStore()
    with Pool(Mourner, size=1, session_store=store) as pool:
        pool.create_session("a", {"n": 1})
        pool.options(session="a").call("begin")
        delete = store.delete

        def struck(key: str) -> None:
            if how != "struck before":
                delete(key)
            raise Strike

        if how == "in doubt":
            store.doubted = {"delete"}
            with pytest.raises(SessionError, match="may have been done"):
                pool.end_session("a")
            store.doubted.clear()
        else:
            store.delete = struck  # type: ignore[method-assign]
            with pytest.raises(Strike):
                pool.end_session("a")
            store.delete = delete  # type: ignore[method-assign]
        with pytest.raises(SessionNotFound):
            pool.session_state("a")
        pool._sessions.expire(60.0)  # housekeeping
        assert not store.kept and not store.ours and not pool._sessions._owed
        assert pool._desk is not None
        pool._desk.manager.command(lambda: None)  # its worker is told by an order before that
        assert pool.call("seen") == ["a"]
        pool.create_session("a")
        assert pool.session_state("a") == {}


@pytest.mark.parametrize("problem", [Strike, MemoryError, ConnectionError])
def test_session_whose_eviction_failed_goes_on(problem: type[BaseException]) -> None:
    """It was there, and nobody wanted its end."""
    store = NotingStore()
    with full_pool(store) as pool:

        def fail(method: str, key: str) -> None:
            if method == "delete":
                store.before = lambda method, key: None
                raise problem("no more")

        store.before = fail
        with pytest.raises(problem):
            pool.create_session("new")
        pool._sessions.expire(60.0)
        assert store.ours == {"a", "b"} and "new" not in store.kept
        assert call(pool, "a", get, "x") == 1 and call(pool, "b", get, "x") == 2


def test_end_of_an_evicted_session_is_told_where_it_was_done_after_all() -> None:
    store = RefusingStore()
    with full_pool(store) as pool:

        def doubt(method: str, key: str) -> None:
            store.doubted = {"delete"} if key == "a" else set()

        store.before = doubt
        with pytest.raises(SessionError, match="may have been done"):
            pool.create_session("new")
        pool._sessions.expire(60.0)
        assert store.ours == {"b"} == set(store.kept) - {"old", "taken"}
        with pytest.raises(SessionNotFound):
            pool.session_state("a")
        with pytest.raises(SessionBusy, match="not in the store any more"):
            call(pool, "a", get, "x")
        assert pool.session_state("b") == {"x": 2}


def test_session_that_was_evicted_after_all_can_be_begun_again() -> None:
    store = RefusingStore()
    with full_pool(store) as pool:
        delete = store.delete

        def struck(key: str) -> None:
            delete(key)
            if key == "a":
                raise Strike

        store.delete = struck  # type: ignore[method-assign]
        with pytest.raises(Strike):
            pool.create_session("new")
        store.delete = delete  # type: ignore[method-assign]
        pool.create_session("a", {"x": 5})
        with pytest.raises(SessionExists):
            pool.create_session("a")
        assert pool.session_state("a") == {"x": 5}


# -- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda pool, key: pool.checkout(session=key),
        lambda pool, key: pool.options(session=key).call(add),
        lambda pool, key: pool.create_session(key),
        lambda pool, key: pool.end_session(key),
        lambda pool, key: pool.session_state(key),
        lambda pool, key: pool.session(key),
        lambda pool, key: pool.checkout(hint=key),
        lambda pool, key: Programs(pool, session=key),
        lambda pool, key: Programs(pool).list(session=key),
        lambda pool, key: Programs(pool).info("p", session=key),
        lambda pool, key: Programs(pool).delete("p", session=key),
        lambda pool, key: Programs(pool).execute("p", session=key),
        lambda pool, key: Programs(pool).create("p", "builtins:dict", session=key),
    ],
)
def test_ids_are_text_at_every_door(use: Callable[[Any, Any], object]) -> None:
    store = NotingStore()
    with Pool(size=2, session_store=store) as pool:
        with pool.checkout(session="5") as w:
            w.state["n"] = 1
            for key in (5, b"5", ["5"]):
                with pytest.raises(TypeError, match=r"(session|hint)=.*give a text"):
                    use(pool, key)
            for key in ("", "a\0b", "\ud800"):
                with pytest.raises(ValueError, match="give a text"):
                    use(pool, key)
            assert w.state["n"] == 1
        assert set(store.kept) == {"5"}


def test_id_of_a_class_derived_from_text_is_its_text() -> None:
    """A worker need not know the class, nor the store."""

    class Name(str):
        def __str__(self) -> str:
            return "something else"

        def __reduce__(self) -> Any:
            raise AssertionError("it travels")

    with Pool(size=1) as pool:
        assert call(pool, Name("a"), add) == 1
        assert call(pool, "a", add) == 2
        assert [type(info.session_id) for info in pool.sessions()] == [str]


# -- one transaction -----------------------------------------------------------------------------


def test_session_begins_with_its_state_in_one_step() -> None:
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool:
        store.asked.clear()
        pool.create_session("a", {"n": 1})
        changed = [m for m, _ in store.asked if m in ("create", "open", "commit", "delete")]
        assert changed == ["create"]
        assert call(pool, "a", add) == 2
        assert store.kept["a"][0] == 2


def test_refused_creation_deletes_nothing() -> None:
    store = NotingStore()
    store.kept = {"a": (3, {"n": pickle.dumps(3)})}
    with Pool(size=1, session_store=store) as pool:
        with pytest.raises(SessionExists):
            pool.create_session("a", {"n": 1})
        assert "delete" not in {method for method, _ in store.asked}
        assert pool.session_state("a") == {"n": 3}


@pytest.mark.parametrize("stored", [False, True])
def test_interrupted_creation_leaves_what_was_there(stored: bool) -> None:
    """Wherever it is struck: there is no session, or the whole of it; never one that was there."""
    store = NotingStore() if stored else None
    with Pool(size=1, session_store=store, health_check_timeout=0.1) as pool:
        pool.create_session("there", {"n": 1})
        whole = {"n": 1, "m": 2}
        seen: list[Any] = []

        def create() -> None:
            with unstruck():
                pool.end_session("a")
            try:
                pool.create_session("a", whole)
            finally:
                with unstruck():
                    seen.append(state_of(pool, "a"))
                    with pytest.raises(SessionExists):
                        pool.create_session("there", {"n": 2})
                    assert pool.session_state("there") == {"n": 1}

        struck = strike_everywhere(create, sessions, records, sys.modules["stores"])
        assert struck > 20
        assert len(seen) == struck + 1 and all(state in (None, whole) for state in seen)
        assert seen.count(None) > struck / 2 and seen[-1] == whole
        for _ in range(3):
            pool._sessions._sweep()  # finds whatever was struck at the very end
        pool.end_session("a")
        if store is not None:
            assert set(store.kept) == {"there"} == store.ours | {"there"}


def state_of(pool: Pool[Any], key: str) -> Any:
    try:
        return pool.session_state(key)
    except SessionNotFound:
        return None


def test_interrupted_creation_of_one_that_is_there_leaves_it() -> None:
    store = NotingStore()
    store.kept = {"a": (1, {"n": pickle.dumps(1)})}
    with Pool(size=1, session_store=store, health_check_timeout=0.1) as pool:

        def create() -> None:
            try:
                pool.create_session("a", {"n": 2})
            except SessionExists:
                pass
            finally:
                assert store.kept["a"][0] == 1

        assert strike_everywhere(create, sessions, records, sys.modules["stores"]) > 5
        for _ in range(3):
            pool._sessions._sweep()
        assert call(pool, "a", add) == 2


def test_interrupt_in_the_store_as_it_creates_is_undone() -> None:
    store = NotingStore()

    class Struck(NotingStore):
        def create(self, key: str, state: Any) -> bool:
            super().create(key, state)
            raise Strike

    struck = Struck()
    with Pool(size=1, session_store=struck) as pool:
        with pytest.raises(Strike):
            pool.create_session("a", {"n": 1})
        assert struck.kept == store.kept == {}
        with pytest.raises(SessionNotFound):
            pool.session_state("a")


# -- a block's session ---------------------------------------------------------------------------


def leave_in_block(path: str) -> None:
    """Be an application that dies in the block of a session."""
    import os

    pool = Pool(size=1, session_store=path).open()
    pool.create_session("kept", {"n": 1})
    scope = pool.session("a", {"n": 1})
    scope.__enter__()
    scope.call(add)
    with scope.checkout() as w:
        w.state["more"] = 1
    os._exit(7)


LEAVING = """
    import sys
    from test_session_begin import leave_in_block

    if __name__ == "__main__":
        leave_in_block(sys.argv[1])
"""


def test_block_takes_over_what_it_left_when_its_process_died(tmp_path: Path) -> None:
    """It begins anew, as its state says; a session that no block began is not touched."""
    path = tmp_path / "sessions.db"
    process = scripts.start(tmp_path, LEAVING, str(path))
    assert scripts.finish(process)[0] == 7
    with Pool(size=1, session_store=path) as pool:
        assert pool.session_state("a") == {"n": 2, "more": 1}, "the mark is nobody's business"
        with pytest.raises(SessionExists):
            pool.create_session("a")
        with pytest.raises(SessionExists), pool.session("kept", {"n": 9}):
            pass
        assert pool.session_state("kept") == {"n": 1}
        with pool.session("a", {"n": 10}) as scope:
            assert scope.state == {"n": 10}
            with pytest.raises(SessionExists), pool.session("a"):
                pass
            assert scope.call(add) == 11
        with pytest.raises(SessionNotFound):
            pool.session_state("a")
    with Pool(size=1, session_store=path) as pool:
        with pool.session("a") as scope:
            assert scope.state == {}
            assert scope.call(add) == 1


def test_block_of_a_living_process_is_left_alone() -> None:
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool, pool.session("a", {"n": 1}):
        before = dict(store.kept)
        store.taken = {"a"}
        with Pool(size=1, session_store=Shared(store)) as other:
            with pytest.raises(SessionBusy), other.session("a", {"n": 2}):
                pass
        assert store.kept == before
        store.taken.clear()


class Shared(NotingStore):
    """Another process's view of a store."""

    def __init__(self, store: NotingStore) -> None:
        super().__init__()
        self.kept, self.taken = store.kept, store.taken


def test_what_a_block_left_goes_on_as_any_session(tmp_path: Path) -> None:
    """Worker code and caller see its state without the mark, and no later block may end it."""
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool:
        pool.session("a", {"n": 1}).__enter__()
    with Pool(size=1, session_store=store) as pool:
        with pool.checkout(session="a") as w:
            assert w.call(keys) == ["n"] and list(w.state) == ["n"]
            w.state.clear()
            w.state["n"] = 5
            assert w.call(add) == 6
    with Pool(size=1, session_store=store) as pool:
        with pytest.raises(SessionExists), pool.session("a", {"n": 1}):
            pass
        assert pool.session_state("a") == {"n": 6}


def keys() -> list[str]:
    from minipool import current_session

    return list(current_session())
