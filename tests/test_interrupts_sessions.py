"""Exceptions raised as a session is begun or committed: whole or not at all, also in the store."""

from __future__ import annotations

import gc
import pickle
import signal
import time
from pathlib import Path
from typing import Any, Callable

import pytest

from chatters import add, get
from ears import wait_until
from minipool import (
    CallTimeout,
    Pool,
    SessionBusy,
    SessionExists,
    SessionNotFound,
    current_session,
)
from minipool.engine import desk
from strikes import strike_everywhere, unstruck
from test_interrupts import modules_of

pytestmark = [
    pytest.mark.logs_errors,  # while a store's connection is astray
    pytest.mark.usefixtures("impatient"),
    pytest.mark.filterwarnings("ignore:a lease of:ResourceWarning"),
    # Of a generator that was left where it was, when what it is for was struck.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

STATE = {"text": "whole", "list": [1, 2, 3], "number": 4}


def keeping() -> set[Any]:
    """Return the modules that keep sessions: to strike in all others is done elsewhere."""
    rooms = ("minipool.sessions", "minipool.records", "minipool.store", "minipool.pool",
             "minipool.nearness", "minipool.housekeeping")  # fmt: skip
    return {module for module in modules_of("minipool") if module.__name__.startswith(rooms)}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    make_impatient(monkeypatch)


def make_impatient(patch: pytest.MonkeyPatch) -> None:
    """Have a store find sooner that somebody was struck who was using it."""
    from minipool.store import SQLiteStore

    assert SQLiteStore  # it is imported by those who use it
    for module in modules_of("minipool"):
        if module.__name__.startswith("minipool.store"):
            patch.setattr(module, "_ASTRAY_S", 0.1, raising=False)


def opened(path: Path | None, size: int = 1) -> Pool[None]:
    return Pool(size=size, start_method="fork", health_check_timeout=0.1, session_store=path).open()


def heal(pool: Pool[None], condition: Callable[[], bool]) -> None:
    """Let the manager sweep until it is so. Unlike `wait_until`, the condition may wait itself."""
    assert pool._desk is not None
    manager, deadline = pool._desk.manager, time.monotonic() + 20.0

    def sweep() -> None:
        manager._last_look = 0.0  # it is due
        manager._look()

    while not condition():
        assert time.monotonic() < deadline, f"never so: {pool!r}"
        manager.command(sweep)


def state_of(pool: Pool[None], key: str) -> dict[str, Any] | None:
    try:
        return pool.session_state(key)
    except SessionNotFound:
        return None


def begins(pool: Pool[None], key: str) -> bool:
    """Begin a session; False while there is something in its place that is none."""
    try:
        pool.create_session(key, STATE)
        return True
    except SessionExists:
        return state_of(pool, key) == STATE
    except SessionBusy:
        return False  # its end was struck, and is done soon


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
def test_session_is_begun_whole_or_not_at_all_after_an_interrupt_anywhere(
    stored: bool, tmp_path: Path
) -> None:
    """Whoever was struck may try again; what it finds, and what is there after a restart, is a
    whole session."""
    path = tmp_path / "sessions.db" if stored else None
    begun: list[str] = []
    found: dict[str, dict[str, Any] | None] = {}

    def settle() -> None:
        if not begun:
            return
        key = begun[-1]
        heal(pool, lambda: state_of(pool, key) in (None, STATE))
        if len(begun) % 2:
            heal(pool, lambda: begins(pool, key))
        found[key] = state_of(pool, key)

    def act() -> None:
        with unstruck():
            gc.collect()
            settle()
            begun.append(f"s{len(begun)}")
        pool.create_session(begun[-1], STATE)

    with opened(path) as pool:
        assert strike_everywhere(act, *keeping()) > 10
        assert state_of(pool, begun[-1]) == STATE  # the one that was not struck
        settle()
        heal(pool, lambda: {key: state_of(pool, key) for key in begun} == found)
    if stored:
        with opened(path) as pool:
            assert {key: state_of(pool, key) for key in begun} == found
            for key in begun:
                if found[key] is None:
                    pool.create_session(key, STATE)


@pytest.mark.parametrize("used", [False, True], ids=["of the store", "in use"])
def test_session_that_is_there_is_untouched_by_an_interrupt_in_its_second_beginning(
    used: bool, tmp_path: Path
) -> None:
    """Its state is what it was, in memory and in the store, and it goes on from there."""
    path = tmp_path / "sessions.db"
    with opened(path) as pool:
        pool.create_session("old", STATE)

    def act() -> None:
        with unstruck():
            gc.collect()
            heal(pool, lambda: state_of(pool, "old") == STATE)
        with pytest.raises(SessionExists):
            pool.create_session("old", {"another": 1})

    with opened(path) as pool:
        if used:
            pool.checkout(session="old").release()
        assert strike_everywhere(act, *keeping()) > 3
    with opened(path) as pool:
        assert pool.session_state("old") == STATE
        assert pool.options(session="old").call(add, "number") == 5


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
def test_session_is_ended_or_goes_on_after_an_interrupted_end(stored: bool, tmp_path: Path) -> None:
    """What is left of it is the whole session, or nothing: then it can be begun again."""
    path = tmp_path / "sessions.db" if stored else None

    def act() -> None:
        with unstruck():
            gc.collect()
            heal(pool, lambda: state_of(pool, "a") in (None, STATE))
            heal(pool, lambda: begins(pool, "a"))
            assert pool.options(session="a", timeout=20).call(get, "text") == "whole"
        pool.end_session("a")

    with opened(path) as pool:
        assert strike_everywhere(act, *keeping()) > 10
        assert state_of(pool, "a") is None
        pool.create_session("a", STATE)
    if stored:
        with opened(path) as pool:
            assert state_of(pool, "a") == STATE


def add_to_both() -> None:
    session = current_session()
    session["left"] = session.get("left", 0) + 1
    session["right"] = session.get("right", 0) + 1


def by_call(pool: Pool[None]) -> None:
    pool.options(session="a", timeout=20).call(add_to_both)


def by_state(pool: Pool[None]) -> None:
    with pool.checkout(session="a", timeout=20) as w:
        w.state["alone"] = w.state.get("alone", 0) + 1


@pytest.mark.parametrize("commit", [by_call, by_state])
def test_file_and_memory_agree_after_an_interrupted_commit(
    commit: Callable[[Pool[None]], None], tmp_path: Path
) -> None:
    """After each strike both have all of the commit or nothing, and the same version of it."""
    path = tmp_path / "sessions.db"

    def agreed() -> dict[str, Any]:
        memory = pool.session_state("a")
        loaded = pool._sessions._store.read("a")
        record = pool._sessions.record_of("a")
        packed = {} if loaded is None else loaded[1] or {}
        assert {key: pickle.loads(data) for key, data in packed.items()} == memory
        assert record is None or loaded is None or record.version == loaded[0]
        assert memory.get("left") == memory.get("right")
        return memory

    def act() -> None:
        with unstruck():
            gc.collect()
            wait_until(pool, lambda: pool.stats().idle == 1)
            agreed()
        commit(pool)

    with opened(path) as pool:
        by_call(pool)
        by_state(pool)
        assert strike_everywhere(act, *keeping()) > 10
        last = agreed()
    with opened(path) as pool:
        assert pool.session_state("a") == last
        by_call(pool)
        by_state(pool)
        more = {key: number + 1 for key, number in last.items()}
        assert pool.session_state("a") == more


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
def test_session_goes_on_after_an_interrupt_at_the_end_of_a_lease_that_broke(
    stored: bool, tmp_path: Path
) -> None:
    """Its worker is killed in mid-call, and the session is taken away from the lease: whatever
    strikes then, the next one gets it, as it was committed."""
    path = tmp_path / "sessions.db" if stored else None
    count = 0

    def act() -> None:
        nonlocal count
        with unstruck():
            gc.collect()
            count += 1
            assert pool.options(session="a", timeout=20).call(add) == count
            lease = pool.checkout(session="a", timeout=20)
            with pytest.raises(CallTimeout):
                lease.options(timeout=0.0).call(signal.pause)
        lease.release()

    with opened(path) as pool:
        assert strike_everywhere(act, *(keeping() | {desk})) > 10
        assert pool.options(session="a", timeout=20).call(add) == count + 1
