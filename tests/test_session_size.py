"""A session's state never outgrows what can be sent, and much of it is changed in one step."""

from __future__ import annotations

import os
import pickle
import sys
import types
from typing import Any

import pytest

import chatters
from chatters import add, get, put
from ears import handle_of, wait_until
from minipool import CallMismatch, Pool, Programs, SessionError, current_session
from minipool.engine.conversation import Session
from minipool.records import Record, apply, weight_of
from stores import NotingStore

LIMIT = 1 << 17


def call(pool: Pool[Any], session: str, target: Any, *args: Any) -> Any:
    return pool.options(session=session, timeout=20).call(target, *args)


# -- as much as can be sent ----------------------------------------------------------------------


def test_commit_that_would_outgrow_a_message_is_refused() -> None:
    """The state that is there can always be sent: to the next worker, after a death."""
    with Pool(size=1, max_message=LIMIT) as pool:
        kept = 0
        with pytest.raises(SessionError, match=r"session 'a'.*max_message=131072") as caught:
            for kept in range(100):
                call(pool, "a", put, f"k{kept}", b"x" * 10_000)
        assert caught.value.session_id == "a"
        assert kept == 12, "what fits was refused"
        assert call(pool, "a", chatters.keys) == sorted(f"k{n}" for n in range(kept))
        os.kill(handle_of(pool).pid, 9)
        assert call(pool, "a", get, "k0") == b"x" * 10_000
        call(pool, "a", chatters.drop, "k0")
        call(pool, "a", put, "k0", b"y" * 10_000)
        assert pool.stats().workers_lost == 1


def test_holder_of_a_lease_cannot_outgrow_it_either() -> None:
    with Pool(size=1, max_message=LIMIT) as pool, pool.checkout(session="a") as w:
        w.state["big"] = b"x" * 100_000
        for change in ({"more": b"x" * 40_000}, {"big": b"x" * 200_000}):
            with pytest.raises(SessionError, match="session 'a'"):
                w.state.update(change)
        assert w.call(chatters.keys) == ["big"]
        w.state.update({"big": 1, "more": b"x" * 100_000})
        assert w.call(chatters.keys) == ["big", "more"]


def test_session_that_is_too_large_is_not_begun() -> None:
    store = NotingStore()
    with Pool(size=1, max_message=LIMIT, session_store=store) as pool:
        with pytest.raises(SessionError, match="session 'a'"):
            pool.create_session("a", {"big": b"x" * LIMIT})
        assert pool.sessions() == [] and not store.kept


def test_state_that_was_too_large_before_can_be_made_smaller() -> None:
    """It is of a pool with a larger `max_message`. The error names the session."""
    store = NotingStore()
    store.kept = {
        "a": (1, {"big": pickle.dumps(b"x" * LIMIT, 5), "more": pickle.dumps(b"x" * LIMIT, 5)})
    }
    with Pool(size=1, max_message=LIMIT, session_store=store) as pool:
        with pool.checkout(session="a") as w:
            with pytest.raises(CallMismatch, match="with the state of session 'a'"):
                w.call(add)
            del w.state["more"]
            with pytest.raises(SessionError):
                w.state["other"] = 1
            del w.state["big"]
            assert w.call(add) == 1


def test_weight_is_no_less_than_what_is_sent() -> None:
    states: list[dict[str, bytes]] = [
        {},
        {"": b""},
        {f"k{n}": bytes(n % 300) for n in range(3000)},
        {"\u1234" * 50: bytes(1 << 20), "x" * 300: bytes(70_000)},
        {f"\U0001f600{n}": bytes(255 + n) for n in range(3)},
    ]
    for state in states:
        data = pickle.dumps(("", 1, 1, state, 1), 5)
        assert len(data) <= weight_of(state) + 200
    for before in states:
        for after in states:
            changes = {**dict.fromkeys(before), **after}
            state = dict(before)
            assert apply(changes, state, weight_of(before)) == weight_of(after)
            assert state == after


def test_weight_is_kept_up_to_date() -> None:
    with Pool(size=1) as pool:
        for size in (10, 10_000, 3):
            call(pool, "a", put, "blob", b"x" * size)
            call(pool, "a", put, f"k{size}", size)
        call(pool, "a", chatters.drop, "k10")
        record: Record = pool._sessions._records["a"]
        assert record.weight == weight_of(record.state or {}) > 0


# -- many keys -----------------------------------------------------------------------------------


def fill(count: int) -> None:
    current_session().update((f"k{n}", n) for n in range(count))


def clear() -> int:
    current_session().clear()
    return len(current_session())


def pop_all() -> list[str]:
    session, popped = current_session(), []
    while session:
        popped.append(session.popitem()[0])
    return popped


def clear_and_set(key: str) -> list[str]:
    session = current_session()
    session.clear()
    session[key] = 1
    return list(session)


def clear_and_raise() -> None:
    current_session().clear()
    current_session()["new"] = 1
    raise ValueError


def test_clear_in_a_worker_reads_nothing_and_is_undone() -> None:
    with Pool(size=1) as pool:
        call(pool, "a", fill, 5)
        call(pool, "a", chatters.take_unpickling_note)
        with pytest.raises(ValueError):
            call(pool, "a", clear_and_raise)
        assert len(call(pool, "a", chatters.keys)) == 6
        assert call(pool, "a", clear_and_set, "k1") == ["k1"]
        assert call(pool, "a", chatters.unpickled_notes) == 0
        assert pool.session_state("a") == {"k1": 1}
        assert call(pool, "a", clear) == 0
        assert pool.session_state("a") == {}


class Counted(dict):  # type: ignore[type-arg]
    """Counts how often its keys are gone through."""

    rounds = 0

    def __iter__(self) -> Any:
        Counted.rounds += 1
        return super().__iter__()


@pytest.mark.parametrize("empty", ["clear", "popitem"])
def test_emptying_a_session_is_linear(empty: str) -> None:
    """It goes through the keys no more often the more there are."""
    rounds = []
    for count in (10, 1000):
        session = Session("a")
        session.take_over(1, {f"k{n}": pickle.dumps(n, 5) for n in range(count)})
        session._committed = Counted(session._committed)
        session._keys = Counted(session._keys)
        Counted.rounds = 0
        if empty == "clear":
            session.clear()
        else:
            while session:
                session.popitem()
        rounds.append(Counted.rounds)
        assert not list(session) and len(session.changes()) == count
    assert rounds[0] == rounds[1]


def test_session_behaves_as_a_dict() -> None:
    import random

    chance = random.Random(4)
    session, model = Session("a"), {"a": 1, "b": 2, "c": 3}
    session.take_over(1, {key: pickle.dumps(value, 5) for key, value in model.items()})
    committed = dict(model)
    for step in range(3000):
        key = chance.choice("abcdefg")
        what = chance.randrange(9)
        if what < 3:
            session[key] = model[key] = step
        elif what < 5:
            assert session.pop(key, None) == model.pop(key, None)
        elif what == 5 and model:
            assert session.popitem() == model.popitem()
        elif what == 6 and chance.random() < 0.1:
            session.clear()
            model.clear()
        elif what == 7:
            session.undo()
            model = dict(committed)
        elif what == 8:
            session.commit(session.changes())
            committed = dict(model)
        assert list(session) == list(session._keys) and len(session) == len(model)
        assert dict(session) == model and (key in session) == (key in model)
        model = {key: model[key] for key in session}  # the order after an undo is that of commits


def test_holder_clears_and_updates_in_one_commit_each() -> None:
    store = NotingStore()
    with Pool(size=1, session_store=store) as pool, pool.checkout(session="a") as w:
        w.state.update({"a": 1}, b=2)
        w.state.update([("c", 3)])
        w.state.update()
        assert dict(w.state) == {"a": 1, "b": 2, "c": 3}
        w.state.clear()
        w.state.clear()
        assert dict(w.state) == {} == pool.session_state("a")
        assert [method for method, _ in store.asked].count("commit") == 3
        with pytest.raises(TypeError, match="text"):
            w.state.update({"d": 1, 2: 3})
        assert w.call(chatters.keys) == []


# -- only what is asked for ----------------------------------------------------------------------


def keep_foreign() -> None:
    """Keep a value of a class that only this worker can import."""
    module: Any = types.ModuleType("of_the_worker_alone")
    sys.modules["of_the_worker_alone"] = module
    exec("class Foreign: pass", module.__dict__)
    current_session()["foreign"] = module.Foreign()


def test_values_that_the_caller_cannot_read_are_in_nobodys_way() -> None:
    """Programs beside them are listed, described, run and deleted."""
    with Pool(size=1) as pool:
        programs = Programs(pool, session="a")
        programs.create("p", "operator:attrgetter", "real")
        call(pool, "a", keep_foreign)
        with pytest.raises(ModuleNotFoundError):
            pool.session_state("a")
        assert programs.list() == ["p"]
        assert programs.info("p").factory == "operator:attrgetter"
        with pool.checkout(session="a") as w:
            assert "foreign" in w.state and len(w.state) == 3
            with pytest.raises(ModuleNotFoundError):
                w.state["foreign"]
        assert programs.delete("p") and not programs.delete("p")
        assert programs.list() == []


def test_worker_unpickles_a_value_when_it_is_read() -> None:
    with Pool(size=2) as pool:
        call(pool, "a", chatters.take_unpickling_note)
        call(pool, "a", put, "n", 1)
        handle = handle_of(pool, pool.sessions()[0].worker_id or 0)
        handle.kill()
        wait_until(pool, lambda: bool(handle.ended_ns))
        assert call(pool, "a", get, "n") == 1
        assert call(pool, "a", chatters.unpickled_notes) == 0
        call(pool, "a", get, "note")
        assert call(pool, "a", chatters.unpickled_notes) > 0
