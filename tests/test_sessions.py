"""Sessions: state that outlives its worker, serial use, and the worker that has it warm."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict

import pytest

import chatters
from chatters import CountsPickling, Diary, Keeper, add, append, get, put
from ears import Ear, handle_of, wait_until
from gates import Gate, pass_gate
from minipool import (
    CallMismatch,
    CallTimeout,
    CheckoutTimeout,
    ConfigError,
    LeaseError,
    LeaseReleased,
    Pool,
    PoolClosed,
    PoolConfig,
    PoolForked,
    RemoteError,
    SessionBusy,
    SessionError,
    SessionExists,
    SessionLost,
    SessionNotFound,
    WorkerDied,
    current_session,
)


def sessions_of(pool: Pool[Any]) -> Any:
    """Return the parent's side of a pool's sessions, for tests that look inside."""
    return pool._sessions


def wait_queued(pool: Pool[Any], count: int) -> None:
    """Wait until so many callers queue for sessions."""
    waiters = sessions_of(pool)._line.waiters
    wait_until(pool, lambda: len(waiters) >= count)


def call(pool: Pool[Any], session: str, target: Any, *args: Any, **options: Any) -> Any:
    return pool.options(session=session, **options).call(target, *args)


def kill_and_wait(pool: Pool[Any], worker_id: int = 0) -> None:
    """Kill a worker, and wait until the pool knows."""
    handle = handle_of(pool, worker_id)
    os.kill(handle.pid, signal.SIGKILL)
    wait_until(pool, lambda: handle not in pool._handles().values())


class InThread(threading.Thread):
    """Runs a function; `result()` returns or raises what it did."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self._work = lambda: function(*args, **kwargs)
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error

    def result(self, timeout: float = 20.0) -> Any:
        self.join(timeout)
        assert not self.is_alive(), "the thread does not end"
        if self._error is not None:
            raise self._error
        return self._result


# -- beginning, state, end ---------------------------------------------------------------------


def test_session_keeps_its_state_when_its_worker_dies(start_method: str) -> None:
    """What a successful call changed is there for the next lease, on any worker."""
    with Pool(size=1, start_method=start_method) as pool:
        assert call(pool, "a", append, "log", "one") == 1
        with pool.checkout(session="a") as w:
            assert (w.session, w.affinity) == ("a", "hit")
            assert w.call(append, "log", "two") == 2
            assert dict(w.state) == {"log": ["one", "two"]}
        kill_and_wait(pool)
        with pool.checkout(session="a") as w:
            assert w.affinity == "lost"
            assert w.call(get, "log") == ["one", "two"]


def test_sessions_work_on_the_portable_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPOOL_PORTABLE", "1")
    with Pool(size=2) as pool:
        pool.create_session("a", {"n": 40})
        assert call(pool, "a", add) == 41
        with pool.checkout(session="a") as w:
            with pytest.raises(WorkerDied):
                w.call(chatters.change_and_die, "n", 0)
        assert call(pool, "a", add) == 42
        pool.end_session("a")


def test_sessions_go_with_another_codec() -> None:
    """A codec is for arguments and results; state is always pickled."""
    with Pool(size=1, codec=json) as pool:
        pool.create_session("a", {"pair": (1, 2)})
        assert call(pool, "a", add, "n", 5) == 5
        assert call(pool, "a", add, "n", 5) == 10
        assert call(pool, "a", get, "pair") == [1, 2]
        assert pool.session_state("a") == {"pair": (1, 2), "n": 10}


def test_first_use_begins_a_session() -> None:
    with Pool(size=1) as pool:
        with pytest.raises(SessionNotFound):
            pool.session_state("a")
        with pool.checkout(session="a") as w:
            assert w.affinity == "new"
            assert dict(w.state) == {}
        assert pool.session_state("a") == {}


def test_strict_sessions_are_begun_by_create_session_alone() -> None:
    with Pool(size=1, strict_sessions=True) as pool:
        with pytest.raises(SessionNotFound, match=r"'a'.*create_session\(\)") as caught:
            pool.checkout(session="a")
        assert caught.value.session_id == "a"
        pool.create_session("a")
        assert call(pool, "a", add) == 1
        pool.end_session("a")
        with pytest.raises(SessionNotFound):
            pool.checkout(session="a")


def test_session_that_exists_is_not_begun_again() -> None:
    with Pool(size=1) as pool:
        pool.create_session("a", {"n": 1})
        with pytest.raises(SessionExists, match="end it first"):
            pool.create_session("a", {"n": 2})
        assert pool.session_state("a") == {"n": 1}
        assert call(pool, "a", add) == 2


def test_scope_begins_and_ends_a_session() -> None:
    with Pool(size=1) as pool:
        with pool.session("a", {"n": 1}) as session:
            assert session.call(add) == 2
            with session.checkout() as w:
                assert w.call(add) == 3
            assert session.state == {"n": 3}
        assert pool.sessions() == []


def test_ending_a_session_twice_is_harmless() -> None:
    with Pool(size=1) as pool:
        pool.end_session("never begun")
        call(pool, "a", add)
        pool.end_session("a")
        pool.end_session("a")
        assert call(pool, "a", add) == 1


def test_session_state_is_a_copy() -> None:
    with Pool(size=1) as pool:
        given = {"log": ["one"]}
        pool.create_session("a", given)
        given["log"].append("later")
        pool.session_state("a")["log"].append("later")
        assert pool.session_state("a") == {"log": ["one"]}
        assert call(pool, "a", get, "log") == ["one"]


def test_sessions_tells_of_each(gate: Gate) -> None:
    with Pool(size=2) as pool:
        pool.create_session("cold")
        call(pool, "warm", put, "x", b"x" * 1000)
        with pool.checkout(session="leased") as w:
            w.call(add)
            found = {info.session_id: info for info in pool.sessions()}
            assert set(found) == {"cold", "warm", "leased"}
            assert found["cold"].worker_id is None and found["cold"].size_bytes == 0
            assert found["warm"].size_bytes > 1000 and not found["warm"].leased
            assert found["leased"].leased and found["leased"].idle == 0.0
            assert found["leased"].worker_id == w.worker_id
            assert all(0 <= info.idle <= info.age for info in found.values())
            assert pool.stats().sessions == 3


def test_holder_reads_and_sets_the_state() -> None:
    """Setting a key in `w.state` commits at once, and the next call sees it."""
    with Pool(size=2) as pool, pool.checkout(session="a") as w:
        w.state["n"] = 41
        assert w.call(add) == 42
        assert w.state["n"] == 42
        w.state["log"] = ["one"]
        w.state["log"].append("lost: it was a copy")
        assert w.call(get, "log") == ["one"]
        del w.state["log"]
        assert w.call(chatters.keys) == ["n"]
        with pytest.raises(KeyError):
            del w.state["log"]
        with pytest.raises(TypeError, match="text"):
            w.state[1] = 1  # type: ignore[index]
        with pytest.raises(CallMismatch, match="'lock'"):
            w.state["lock"] = threading.Lock()
        assert dict(w.state) == {"n": 42}
        assert len(w.state) == 1


def test_state_keys_are_plain_text_whatever_class_they_are_given_in() -> None:
    """The other side may be unable to import that class."""

    class Name(str):
        pass

    with Pool(size=1) as pool:
        pool.create_session("a", {Name("old"): 1, Name("n"): 41, Name("log"): []})
        with pool.checkout(session="a") as w:
            assert w.call(add) == 42
            assert w.call(chatters.put_and_drop_by_a_name_of_its_own) == [True] * 3
            w.state[Name("set")] = 2
            assert w.call(chatters.keys) == ["log", "n", "own", "set"]
            assert dict(w.state) == {"n": 42, "log": [1], "own": 1, "set": 2}
            assert {type(key) for key in w.state} == {str}
        assert not pool.deaths()


def test_state_of_a_released_lease_cannot_be_changed() -> None:
    with Pool(size=1) as pool:
        with pool.checkout(session="a") as w:
            state = w.state
        with pool.checkout(session="a"), pytest.raises(LeaseReleased, match="new lease"):
            state["n"] = 1
        assert pool.session_state("a") == {}


def test_state_cannot_be_changed_while_a_call_runs(gate: Gate) -> None:
    with Pool(size=1) as pool, pool.checkout(session="a") as w:
        thread = InThread(w.call, chatters.change_and_wait, "n", 1, gate.path)
        gate.wait_arrived()
        with pytest.raises(LeaseError, match="under way"):
            w.state["n"] = 2
        gate.open()
        thread.result()
        assert dict(w.state) == {"n": 1}


def test_lease_without_a_session_has_no_state() -> None:
    with Pool(size=1) as pool, pool.checkout() as w:
        assert w.session is None and w.affinity is None
        with pytest.raises(SessionError, match="checkout"):
            w.state  # noqa: B018


def test_current_session_is_for_calls_of_a_session() -> None:
    with pytest.raises(LookupError, match="checkout"):
        current_session()
    with Pool(size=1) as pool:
        call(pool, "a", add)
        with pytest.raises(LookupError, match="checkout"):
            pool.call(add)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"session": 1}, TypeError, "session=1"),
        ({"session": ""}, ValueError, "session=''"),
        ({"session": "a\0b"}, ValueError, "NUL"),
        ({"session": "\ud800"}, ValueError, "half"),
        ({"session": "a", "affinity": "never"}, ValueError, "'prefer', 'strict', 'any'"),
        ({"affinity": "strict"}, ValueError, "session="),
        ({"session": "a", "hint": "b"}, ValueError, "session= or hint="),
        ({"hint": 1}, TypeError, "hint=1"),
        ({"hint": ""}, ValueError, "hint=''"),
    ],
)
def test_wrong_checkout_options_are_refused(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with Pool(size=1) as pool:
        with pytest.raises(error, match=says):
            pool.checkout(**options)
        assert pool.sessions() == []
        assert pool.stats().idle == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("session_ttl", 0),
        ("session_ttl", None),
        ("max_sessions", 0),
        ("affinity", "sticky"),
        ("affinity_wait", -1),
        ("strict_sessions", "yes"),
        ("session_store", ""),
        ("session_store", b"path"),
        ("session_store", 1),
        ("session_store", object()),
    ],
)
def test_wrong_session_option_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolConfig(**{option: value})
    assert caught.value.option == option


def test_session_options_come_from_the_environment() -> None:
    config = PoolConfig.from_env(
        {
            "MINIPOOL_AFFINITY": "strict",
            "MINIPOOL_AFFINITY_WAIT": "0.5",
            "MINIPOOL_SESSION_TTL": "60",
            "MINIPOOL_MAX_SESSIONS": "7",
            "MINIPOOL_STRICT_SESSIONS": "yes",
            "MINIPOOL_SESSION_STORE": "/tmp/Sessions.db",
        }
    )
    assert (config.affinity, config.affinity_wait, config.session_ttl) == ("strict", 0.5, 60.0)
    assert (config.max_sessions, config.strict_sessions) == (7, True)
    assert config.session_store == "/tmp/Sessions.db"
    assert PoolConfig.from_env({"MINIPOOL_SESSION_STORE": "none"}).session_store is None


# -- expiry and eviction -----------------------------------------------------------------------


def test_unused_session_expires() -> None:
    with Pool(size=1, session_ttl=0.2) as pool:
        ear = Ear(pool, "session.lost")
        call(pool, "a", add)
        event = ear.wait("session.lost")
        assert event.metadata["session"] == "a"
        assert event.metadata["reason"] == "expired"
        assert call(pool, "a", add) == 1


def test_use_puts_expiry_off() -> None:
    """Of two sessions the one in use outlives the other, however often that one expires."""
    with Pool(size=1, session_ttl=0.5) as pool:
        ear = Ear(pool, "session.lost")
        done = threading.Event()
        pool.hooks["session.lost"].append(lambda *_: done.set())
        uses = 0
        for round_ in range(3):
            done.clear()
            pool.create_session(f"idle {round_}")
            while not done.wait(0.02):
                uses += 1
                assert call(pool, "used", add) == uses
        assert "used" not in {event.metadata["session"] for event in ear.heard}


def test_leased_session_does_not_expire() -> None:
    with Pool(size=2, session_ttl=0.1) as pool:
        ear = Ear(pool, "session.lost")
        with pool.checkout(session="a") as w:
            w.call(add)
            for other in ("b", "c", "d"):
                pool.create_session(other)
                ear.wait("session.lost", fits=lambda e, o=other: e.metadata["session"] == o)  # type: ignore[misc]
            assert w.call(add) == 2


def test_too_many_sessions_cost_the_longest_unused() -> None:
    with Pool(size=1, max_sessions=3) as pool:
        ear = Ear(pool, "session.lost")
        for key in "abc":
            call(pool, key, put, "id", key)
        call(pool, "a", get, "id")
        call(pool, "d", put, "id", "d")
        assert {info.session_id for info in pool.sessions()} == {"a", "c", "d"}
        (event,) = ear.heard
        assert (event.metadata["session"], event.metadata["reason"]) == ("b", "evicted")


def test_eviction_spares_what_is_leased() -> None:
    with Pool(size=2, max_sessions=1) as pool:
        with pool.checkout(session="a") as w:
            w.call(add)
            with pytest.raises(SessionError, match="max_sessions=1"):
                pool.checkout(session="b")
            with pytest.raises(SessionError, match="max_sessions=1"):
                pool.create_session("b")
            assert w.call(add) == 2
        assert call(pool, "b", add) == 1
        assert [info.session_id for info in pool.sessions()] == ["b"]


def test_eviction_under_load_keeps_the_limit_and_its_count() -> None:
    """Eight threads go through 60 sessions where 20 fit: each call works, none is one too many."""
    with Pool(size=2, max_sessions=20) as pool:
        ear = Ear(pool, "session.lost")

        def work(number: int) -> int:
            for turn in range(60):
                call(pool, f"s{(turn * 7 + number) % 60}", add)
            return number

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(work, range(8))) == list(range(8))
        left = pool.sessions()
        assert len(left) <= 20
        created = pool.stats().sessions + len(ear.heard)
        assert created >= 60
        assert {event.metadata["reason"] for event in ear.heard} == {"evicted"}
        line = sessions_of(pool)._line
        assert set(line.idle) == set(line.current) == {info.session_id for info in left}


# -- serial use --------------------------------------------------------------------------------


def test_leases_of_one_session_come_in_order() -> None:
    with Pool(size=4) as pool:
        served: list[int] = []

        def use(number: int) -> None:
            with pool.checkout(session="a", timeout=20) as w:
                served.append(number)
                w.call(append, "log", number)

        threads = []
        with pool.checkout(session="a"):
            for number in range(5):
                threads.append(InThread(use, number))
                wait_queued(pool, number + 1)
        for thread in threads:
            thread.result()
        assert served == list(range(5))
        assert pool.session_state("a") == {"log": list(range(5))}


def test_busy_session_with_no_time_is_session_busy() -> None:
    with Pool(size=2) as pool, pool.checkout(session="a"):
        with pytest.raises(SessionBusy, match="'a' is in use") as caught:
            pool.checkout(session="a", timeout=0)
        assert caught.value.session_id == "a"
        with pool.checkout(session="b", timeout=0) as w:
            assert w.call(add) == 1


def test_waiting_for_a_session_times_out() -> None:
    with Pool(size=2) as pool:
        with pool.checkout(session="a"):
            with pytest.raises(CheckoutTimeout, match="'a' was in use"):
                pool.checkout(session="a", timeout=0.05)
            with pytest.raises(CheckoutTimeout):
                pool.end_session("a", timeout=0.05)
            assert pool.stats().idle == 1
        assert call(pool, "a", add) == 1


def test_session_is_free_again_when_no_worker_came() -> None:
    with Pool(size=1) as pool:
        with pool.checkout(), pytest.raises(CheckoutTimeout):
            pool.checkout(session="a", timeout=0.05)
        assert call(pool, "a", add) == 1


def test_of_two_who_create_one_wins() -> None:
    with Pool(size=1) as pool:
        for round_ in range(50):
            barrier = threading.Barrier(4)

            def create(number: int, key: str = f"s{round_}", barrier: Any = barrier) -> bool:
                barrier.wait(20)
                try:
                    pool.create_session(key, {"by": number})
                    return True
                except SessionExists:
                    return False

            threads = [InThread(create, number) for number in range(4)]
            won = [number for number, thread in enumerate(threads) if thread.result()]
            assert len(won) == 1
            assert pool.session_state(f"s{round_}") == {"by": won[0]}


def test_two_first_uses_are_one_session() -> None:
    with Pool(size=4) as pool:
        for round_ in range(30):
            barrier = threading.Barrier(4)

            def use(key: str = f"s{round_}", barrier: Any = barrier) -> int:
                barrier.wait(20)
                return int(call(pool, key, add, timeout=20))

            threads = [InThread(use) for _ in range(4)]
            assert sorted(thread.result() for thread in threads) == [1, 2, 3, 4]


@pytest.mark.parametrize("strict", [False, True])
def test_end_wakes_who_waits_for_the_session(strict: bool) -> None:
    """A checkout that waited behind the end gets a fresh session, or hears that there is none."""
    with Pool(size=2, strict_sessions=strict) as pool:
        pool.create_session("a", {"n": 10})
        with pool.checkout(session="a") as w:
            w.call(add)
            ending = InThread(pool.end_session, "a", timeout=20)
            wait_queued(pool, 1)
            waiting = InThread(call, pool, "a", add, timeout=20)
            wait_queued(pool, 2)
        ending.result()
        if strict:
            with pytest.raises(SessionNotFound):
                waiting.result()
        else:
            assert waiting.result() == 1


def test_use_and_expiry_at_once_lose_nothing() -> None:
    """Whether a use comes before or after the expiry, it finds a session that works."""
    with Pool(size=2, session_ttl=0.02, health_check_timeout=0.05) as pool:
        ear = Ear(pool, "session.lost")
        last = {}

        def use(key: str) -> None:
            for _ in range(150):
                n = call(pool, key, add, timeout=20)
                assert n in (1, last.get(key, 0) + 1)
                last[key] = n

        threads = [InThread(use, key) for key in "abcd"]
        for thread in threads:
            thread.result(30)
        ear.wait("session.lost", 4)
        wait_until(pool, lambda: not pool.sessions())
        line = sessions_of(pool)._line
        assert not line.idle and not line.current and not line.waiters


def test_close_wakes_who_waits_for_a_session() -> None:
    with Pool(size=1) as pool:
        with pool.checkout(session="a"):
            waiting = InThread(pool.checkout, session="a", timeout=None)
            wait_queued(pool, 1)
            closing = InThread(pool.close, 10)
            with pytest.raises(PoolClosed):
                waiting.result()
        closing.result()
        for use in (
            lambda: pool.checkout(session="a"),
            lambda: pool.create_session("b"),
            lambda: pool.end_session("a"),
            lambda: pool.session_state("a"),
        ):
            with pytest.raises(PoolClosed):
                use()


# -- affinity ----------------------------------------------------------------------------------


def test_session_returns_to_its_worker() -> None:
    with Pool(size=3) as pool:
        with pool.checkout(session="a") as w:
            home, pid = w.worker_id, w.call(chatters.pid)
        for _ in range(5):
            with pool.checkout(session="a") as w:
                assert (w.affinity, w.worker_id, w.pid) == ("hit", home, pid)
                w.call(add)
        stats = pool.stats()
        assert (stats.session_hits, stats.sessions_new, stats.sessions_moved) == (5, 1, 0)
        assert stats.session_hit_rate == 1.0


def test_state_moves_when_the_worker_is_busy() -> None:
    with Pool(size=2) as pool:
        ear = Ear(pool, "session.bound", "session.moved")
        with pool.checkout(session="a") as w:
            home = w.worker_id
            w.call(append, "log", 1)
        with pool.checkout(session="b"), pool.checkout(session="c"):
            pass  # each takes one
        plain = pool.checkout()
        if plain.worker_id != home:
            plain.release()
            plain, other = pool.checkout(), plain
            other = pool.checkout() if plain.worker_id != home else None  # type: ignore[assignment]
            if other is not None:
                plain.release()
                plain = other
        assert plain.worker_id == home
        with plain, pool.checkout(session="a") as w:
            assert w.affinity == "moved"
            assert w.worker_id != home
            assert w.call(append, "log", 2) == 2
            away = w.worker_id
        with pool.checkout(session="a") as w:
            assert (w.affinity, w.worker_id) == ("hit", away)
            assert w.call(get, "log") == [1, 2]
        assert [event.name for event in ear.heard] == ["session.bound", "session.moved"]
        assert pool.stats().sessions_moved == 1
        assert pool.stats().session_hit_rate == 0.5


def test_move_and_return_finds_the_newest_state() -> None:
    """A worker that had the session before it moved does not answer from its old copy."""
    with Pool(size=2) as pool:
        leases = [pool.checkout(), pool.checkout()]
        for turn in range(1, 7):
            leases[turn % 2].release()
            with pool.checkout(session="a") as w:
                assert w.affinity == ("new" if turn == 1 else "moved")
                assert w.call(chatters.local, "mark") is None
                w.call(chatters.set_local, "mark", turn)
                assert w.call(append, "log", turn) == turn
                leases[turn % 2] = None  # type: ignore[call-overload]
            leases[turn % 2] = pool.checkout()
        for lease in leases:
            lease.release()


def test_move_without_a_commit_drops_local_too() -> None:
    """What is local is gone after a move there and back, though no state has changed."""
    with Pool(size=2) as pool:
        one, two = pool.checkout(), pool.checkout()
        one.release()
        with pool.checkout(session="a") as w:
            w.call(add)
            w.call(chatters.set_local, "mark", "first")
            w.call(chatters.local, "mark")
            w.call(chatters.local, "mark")
        one = pool.checkout()
        two.release()
        with pool.checkout(session="a") as w:
            assert w.affinity == "moved"
            w.call(get, "n")
        two = pool.checkout()
        one.release()
        with pool.checkout(session="a") as w:
            assert w.affinity == "moved"
            for _ in range(3):
                assert w.call(chatters.local, "mark") is None
        two.release()


def test_any_affinity_takes_what_comes() -> None:
    with Pool(size=2, strategy="fifo", affinity="any") as pool:
        found = []
        for _ in range(4):
            with pool.checkout(session="a") as w:
                w.call(add)
                found.append(w.affinity)
        assert found[0] == "new"
        assert "moved" in found
        assert pool.session_state("a") == {"n": 4}


def test_strict_session_waits_for_its_worker_alone() -> None:
    with Pool(size=2, affinity="strict") as pool:
        with pool.checkout(session="a") as w:
            home = w.worker_id
            w.call(add)
        held = [pool.checkout(), pool.checkout()]
        mine, other = sorted(held, key=lambda lease: lease.worker_id != home)
        waiting = InThread(pool.checkout, session="a", timeout=20)
        wait_until(pool, lambda: pool.stats().waiting == 1)
        other.release()
        with pool.checkout(timeout=20) as w:  # who waits for the one is not in the others' way
            assert w.worker_id != home
        mine.release()
        with waiting.result() as w:
            assert (w.worker_id, w.affinity) == (home, "hit")


def test_strict_loss_is_told_once_to_everyone_who_waited() -> None:
    with Pool(size=2, affinity="strict") as pool:
        ear = Ear(pool, "session.lost")
        pool.create_session("a", {"n": 5})
        holder = pool.checkout(session="a")
        holder.call(add)
        waiting = [InThread(pool.checkout, session="a", timeout=20) for _ in range(3)]
        wait_queued(pool, 3)
        kill_and_wait(pool, holder.worker_id)
        holder.release()
        for thread in waiting:
            with pytest.raises(SessionLost, match="check out again") as caught:
                thread.result()
            assert caught.value.session_id == "a"
        with pool.checkout(session="a") as w:
            assert w.affinity == "new"
            assert w.call(get, "n") == 6
        with pool.checkout(session="a") as w:
            assert w.affinity == "hit"
        (event,) = ear.heard
        assert event.metadata["reason"] == "its worker died"
        assert pool.stats().sessions_lost == 1


def test_strict_loss_is_told_to_who_waits_for_the_worker() -> None:
    with Pool(size=2, affinity="strict") as pool:
        call(pool, "a", add)
        home = pool.sessions()[0].worker_id
        held = [pool.checkout(), pool.checkout()]
        waiting = InThread(pool.checkout, session="a", timeout=20)
        wait_until(pool, lambda: pool.stats().waiting == 1)
        kill_and_wait(pool, home or 0)
        with pytest.raises(SessionLost):
            waiting.result()
        for lease in held:
            lease.release()
        assert call(pool, "a", add) == 2


def test_strict_call_does_not_go_on_elsewhere() -> None:
    """A call that had not begun is not made again on another worker: local things are gone."""
    with Pool(size=2, affinity="strict") as pool:
        call(pool, "a", add)
        with pool.checkout(session="a") as w:
            os.kill(w.pid or 0, signal.SIGKILL)
            handle = handle_of(pool, w.worker_id)
            wait_until(pool, lambda: bool(handle.ended_ns))
            with pytest.raises(WorkerDied) as caught:
                w.call(add)
            assert not caught.value.started
        with pytest.raises(SessionLost):
            pool.checkout(session="a")
        assert call(pool, "a", add) == 2


def test_lease_tells_that_its_session_was_moved_within() -> None:
    """A worker that dies before the first call is replaced, and `affinity` says so."""
    with Pool(size=2) as pool:
        call(pool, "a", add)
        with pool.checkout(session="a") as w:
            before, handle = w.pid, handle_of(pool, w.worker_id)
            assert w.affinity == "hit"
            os.kill(before or 0, signal.SIGKILL)
            wait_until(pool, lambda: bool(handle.ended_ns))
            assert w.call(add) == 2
            assert w.affinity == "lost"
            assert (w.session, w.pid != before) == ("a", True)
            assert w.call(add) == 3
        assert pool.session_state("a") == {"n": 3}
        assert pool.stats().sessions_lost == 1


def test_preferring_waiter_gets_its_worker_when_it_comes_in_time() -> None:
    with Pool(size=2, affinity_wait=20.0) as pool:
        with pool.checkout(session="a") as w:
            home = w.worker_id
            w.call(add)
        held = [pool.checkout(), pool.checkout()]
        mine, other = sorted(held, key=lambda lease: lease.worker_id != home)
        waiting = InThread(pool.checkout, session="a", timeout=30)
        wait_until(pool, lambda: pool.stats().waiting == 1)
        other.release()
        assert pool.stats().waiting == 1
        mine.release()
        with waiting.result() as w:
            assert (w.worker_id, w.affinity) == (home, "hit")


def test_preferring_waiter_widens_and_keeps_its_place() -> None:
    """After `affinity_wait` any worker will do, and it comes before those who queued later."""
    with Pool(size=2, affinity_wait=0.1) as pool:
        with pool.checkout(session="a") as w:
            home = w.worker_id
            w.call(add)
        held = [pool.checkout(), pool.checkout()]
        mine, other = sorted(held, key=lambda lease: lease.worker_id != home)
        served: list[str] = []

        def session_user() -> str:
            with pool.checkout(session="a", timeout=20) as w:
                served.append("session")
                return str(w.affinity)

        def plain_user() -> None:
            with pool.checkout(timeout=20):
                served.append("plain")

        first = InThread(session_user)
        wait_until(pool, lambda: pool.stats().waiting == 1)
        (waiter,) = handle_waiters(pool)
        second = InThread(plain_user)
        wait_until(pool, lambda: pool.stats().waiting == 2 and waiter.wants is None)
        other.release()
        assert first.result() == "moved"
        second.result()
        assert served == ["session", "plain"]
        mine.release()


def handle_waiters(pool: Pool[Any]) -> list[Any]:
    desk = pool._desk
    assert desk is not None
    return list(desk.manager.turnstile.waiters.values())


def test_callers_without_a_session_leave_warm_workers_alone() -> None:
    with Pool(size=3) as pool:
        with pool.checkout(session="a") as w:
            home = w.worker_id
            w.call(add)
        for _ in range(10):
            with pool.checkout() as w:
                assert w.worker_id != home
        with pool.checkout() as one, pool.checkout() as two:
            assert home not in (one.worker_id, two.worker_id)
            with pool.checkout(session="a", timeout=0) as w:
                assert w.affinity == "hit"


def test_callers_without_a_session_take_the_longest_unused_of_the_warm() -> None:
    with Pool(size=2) as pool:
        with pool.checkout(session="old") as old, pool.checkout(session="new") as new:
            old.call(add)
            new.call(add)
            oldest = old.worker_id
        with pool.checkout(session="old"):
            pass
        with pool.checkout(session="new"):
            pass
        with pool.checkout() as w:
            assert w.worker_id == oldest


def test_ended_sessions_keep_no_worker_warm() -> None:
    with Pool(size=1) as pool:
        for number in range(20):
            with pool.session(f"s{number}") as session:
                session.call(add)
        handle = handle_of(pool)
        wait_until(pool, lambda: not handle.sessions_over)
        assert not handle.sessions


def test_hint_returns_to_the_worker_that_served_it() -> None:
    with Pool(size=3, strategy="fifo") as pool:
        with pool.checkout(hint="model-a") as w:
            home = w.worker_id
            assert w.session is None
        for _ in range(5):
            with pool.checkout(hint="model-b"):
                pass
            with pool.checkout(hint="model-a") as w:
                assert w.worker_id == home


def test_hint_excludes_nobody() -> None:
    """While the worker of a hint is busy, any other one does, at once."""
    with Pool(size=2) as pool:
        with pool.checkout(hint="m") as one, pool.checkout(hint="m", timeout=0) as two:
            assert one.worker_id != two.worker_id
        with pool.checkout(hint="m", timeout=0):
            pass


def test_hint_outlives_its_worker() -> None:
    with Pool(size=1) as pool:
        with pool.checkout(hint="m"):
            pass
        kill_and_wait(pool)
        with pool.checkout(hint="m", timeout=20) as w:
            assert w.call(os.getpid) == w.pid


# -- commit and rollback -----------------------------------------------------------------------


def test_call_that_raises_commits_nothing() -> None:
    with Pool(size=1) as pool, pool.checkout(session="a") as w:
        w.call(put, "n", 1)
        w.call(append, "log", "kept")
        with pytest.raises(ValueError):
            w.call(chatters.change_and_raise, "n", 2)
        assert dict(w.state) == {"n": 1, "log": ["kept"]}
        assert w.call(get, "n") == 1
        assert w.call(get, "log") == ["kept"]


def test_first_call_that_raises_commits_nothing() -> None:
    with Pool(size=1) as pool, pool.checkout(session="a") as w:
        with pytest.raises(ValueError):
            w.call(chatters.change_and_raise, "n", 2)
        assert dict(w.state) == {}
        assert w.call(chatters.keys) == []


def test_call_that_times_out_commits_nothing(gate: Gate) -> None:
    with Pool(size=1) as pool:
        call(pool, "a", put, "n", 1)
        with pool.checkout(session="a") as w:
            with pytest.raises(CallTimeout):
                w.options(timeout=0.1).call(chatters.change_and_wait, "n", 2, gate.path)
        assert pool.session_state("a") == {"n": 1}
        assert call(pool, "a", get, "n", timeout=20) == 1


def test_call_whose_worker_dies_commits_nothing() -> None:
    with Pool(size=1) as pool:
        call(pool, "a", put, "n", 1)
        with pool.checkout(session="a") as w:
            with pytest.raises(WorkerDied):
                w.call(chatters.change_and_die, "n", 2)
            assert dict(w.state) == {"n": 1}
            w.state["n"] = 3  # the lease has no worker any more, but still the session
        assert call(pool, "a", get, "n", timeout=20) == 3


def test_result_that_cannot_travel_commits_nothing() -> None:
    with Pool(size=1) as pool, pool.checkout(session="a") as w:
        with pytest.raises(RemoteError):
            w.call(chatters.change_and_return_unpicklable, "n")
        assert w.call(chatters.keys) == []
        with pytest.raises(RemoteError):
            w.call(chatters.take_unreadable)
        assert dict(w.state) == {}
        assert w.call(chatters.keys) == []
        assert w.call(add) == 1


def test_value_that_cannot_be_pickled_fails_its_call_alone() -> None:
    with Pool(size=1) as pool, pool.checkout(session="a") as w:
        w.call(add)
        with pytest.raises(CallMismatch, match=r"'a'.*'bad', a lock.*`local`"):
            w.call(chatters.keep_unpicklable, "bad")
        assert dict(w.state) == {"n": 1}
        assert w.call(chatters.keys) == ["n"]
        assert w.call(add) == 2


def test_created_state_that_cannot_be_pickled_begins_nothing() -> None:
    with Pool(size=1) as pool:
        with pytest.raises(CallMismatch, match="'lock'"):
            pool.create_session("a", {"lock": threading.Lock()})
        with pytest.raises(TypeError, match="text"):
            pool.create_session("a", {1: 1})  # type: ignore[dict-item]
        assert pool.sessions() == []


def test_change_deep_inside_a_value_is_committed() -> None:
    with Pool(size=1) as pool:
        pool.create_session("a", {"tree": {"left": [[1]]}})

        with pool.checkout(session="a") as w:
            w.call(change_deep)
        assert pool.session_state("a") == {"tree": {"left": [[1, 2]]}}
        kill_and_wait(pool)
        assert call(pool, "a", get, "tree", timeout=20) == {"left": [[1, 2]]}


def change_deep() -> None:
    current_session()["tree"]["left"][0].append(2)


def test_deleted_key_is_gone_everywhere() -> None:
    with Pool(size=1) as pool:
        pool.create_session("a", {"n": 1, "m": 2})
        call(pool, "a", chatters.drop, "n")
        assert pool.session_state("a") == {"m": 2}
        assert call(pool, "a", chatters.keys) == ["m"]
        with pytest.raises(KeyError):
            call(pool, "a", chatters.drop, "n")
        call(pool, "a", put, "n", 3)
        assert call(pool, "a", chatters.keys) == ["m", "n"]


def test_untouched_values_are_never_pickled_again() -> None:
    with Pool(size=1) as pool:
        pool.create_session("a", {"heavy": CountsPickling()})
        with pool.checkout(session="a") as w:
            for _ in range(5):
                w.call(add)
            assert w.call(chatters.pickled) == 0
            w.call(touch, "heavy")
            assert w.call(chatters.pickled) == 1


def touch(key: str) -> None:
    current_session()[key]


def test_unchanged_value_is_not_committed() -> None:
    with Pool(size=1) as pool:
        pool.create_session("a", {"log": [1, 2, 3]})
        record = sessions_of(pool)._records["a"]
        call(pool, "a", get, "log")
        before = record.version
        call(pool, "a", get, "log")
        assert record.version == before


def test_warm_worker_is_sent_no_state() -> None:
    with Pool(size=1) as pool:
        pool.create_session("a", {"blob": b"x" * 1_000_000})
        with pool.checkout(session="a") as w:
            handle, record = handle_of(pool), sessions_of(pool)._records["a"]
            w.call(add)
            assert len(record.head(handle)) < 200


def test_values_kept_by_worker_code_cannot_change_the_state_later() -> None:
    """A list that the worker's object shares with a session is committed when a call says so."""
    with Pool(Keeper, size=1) as pool:
        call(pool, "a", "share")
        pool.call("spoil")
        assert call(pool, "a", "seen") == []
        assert pool.session_state("a") == {"shared": []}


def test_worker_asks_for_what_it_has_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker keeps a thousand sessions; one that it dropped is sent to it again."""
    with Pool(size=1) as pool:
        call(pool, "first", put, "n", 1)
        with ThreadPoolExecutor(1) as thread:
            for number in range(1001):
                thread.submit(call, pool, f"s{number}", chatters.session_id).result(20)
        calls = pool.stats().calls
        with pool.checkout(session="first") as w:
            assert w.affinity == "hit"
            assert w.call(add) == 2
        assert pool.stats().calls == calls + 1


# -- local, session_started, session_ended -----------------------------------------------------


def test_hooks_of_the_worker_see_sessions_begin_and_end(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=1) as pool:
        call(pool, "a", "mark", "seen")
        assert call(pool, "a", "compiled") == f"by {pool.workers()[0].pid}"
        pool.end_session("a")
        assert diary.read_text().splitlines() == ["started a", "ended a seen"]


def test_local_is_rebuilt_after_a_move(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=1) as pool:
        before = call(pool, "a", "compiled")
        kill_and_wait(pool)
        after = call(pool, "a", "compiled", timeout=20)
        assert before != after == f"by {pool.workers()[0].pid}"


def test_first_call_that_raises_starts_the_session_anew(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=1) as pool:
        with pytest.raises(ValueError):
            call(pool, "a", "raise_first")
        call(pool, "a", "compiled")
        assert diary.read_text().splitlines() == ["started a", "ended a None", "started a"]


def test_end_of_a_session_is_not_taken_for_that_of_its_successor(tmp_path: Path) -> None:
    """A session begun anew under the same id, before its worker heard of the end, stays."""
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=1) as pool:
        handle = handle_of(pool)
        for round_ in range(20):
            call(pool, "a", "mark", round_)
            ending = InThread(pool.end_session, "a")
            call(pool, "a", "mark", f"{round_} or after", timeout=20)
            ending.result()
            pool.end_session("a")
        wait_until(pool, lambda: not handle.sessions_over)
        lines = diary.read_text().splitlines()
    started = [line for line in lines if line.startswith("started")]
    ended = [line for line in lines if line.startswith("ended")]
    assert len(started) == len(ended)
    assert lines[::2] == started and lines[1::2] == ended


def test_busy_worker_hears_of_ended_sessions(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=1) as pool:
        call(pool, "a", "mark", "x")
        with pool.checkout() as w:
            pool.end_session("a")
            assert diary.read_text().splitlines() == ["started a"]
            w.call(os.getpid)
        handle = handle_of(pool)
        wait_until(pool, lambda: not handle.sessions_over)
        assert diary.read_text().splitlines() == ["started a", "ended a x"]


def test_expired_sessions_end_in_their_worker(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=1, session_ttl=0.1) as pool:
        ear = Ear(pool, "session.lost")
        call(pool, "a", "mark", "x")
        ear.wait("session.lost")
        handle = handle_of(pool)
        wait_until(pool, lambda: not handle.sessions_over)
        assert "ended a x" in diary.read_text()


def test_close_ends_the_sessions_of_each_worker(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with Pool(Diary, args=(str(diary),), size=2) as pool:
        for key in "abc":
            call(pool, key, "mark", "x")
    ended = [line for line in diary.read_text().splitlines() if line.startswith("ended")]
    assert sorted(ended) == ["ended a x", "ended b x", "ended c x"]


def test_session_that_cannot_start_fails_its_call() -> None:
    with Pool(chatters.RaisesAtSessionStart, size=1) as pool:
        for _ in range(2):
            with pytest.raises(LookupError, match="no such customer"):
                call(pool, "a", add)
        assert pool.call(os.getpid)
        assert pool.stats().workers_lost == 0


def test_session_end_that_raises_costs_no_worker(capfd: Any) -> None:
    with Pool(chatters.RaisesAtSessionEnd, size=1, start_method="spawn") as pool:
        pid = call(pool, "a", chatters.pid)
        pool.end_session("a")
        assert call(pool, "b", chatters.pid) == pid
        pool.end_session("b")
    assert "no such customer" in capfd.readouterr().err


# -- trouble -----------------------------------------------------------------------------------


def test_session_whose_owner_was_struck_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception between taking a session and its lease is repaired by the sweep."""
    with Pool(size=2, health_check_timeout=0.1) as pool:
        call(pool, "a", add)
        sessions = sessions_of(pool)
        take = sessions._line.try_take_this

        def struck(wants: Any) -> Any:
            token = take(wants)
            if token is not None and wants == "a":
                monkeypatch.undo()
                raise KeyboardInterrupt
            return token

        monkeypatch.setattr(sessions._line, "try_take_this", struck)
        with pytest.raises(KeyboardInterrupt):
            pool.checkout(session="a")
        assert call(pool, "a", add, timeout=20) == 2


class StrikesAtPop(Dict[str, Any]):
    """Raises KeyboardInterrupt the first time that something is taken out of it."""

    struck = False

    def pop(self, *args: Any) -> Any:
        if not self.struck:
            self.struck = True
            raise KeyboardInterrupt
        return super().pop(*args)


def test_session_whose_owner_was_struck_as_he_got_his_worker_is_free_again() -> None:
    """He is noted as owner without a worker, and is gone: nobody else would take the note away."""
    with Pool(size=2, health_check_timeout=0.1) as pool:
        sessions = sessions_of(pool)
        sessions._owned = StrikesAtPop()
        with pytest.raises(KeyboardInterrupt):
            pool.checkout(session="a")
        assert call(pool, "a", add, timeout=20) == 1
        wait_until(pool, lambda: not sessions._owned)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in callbacks
def test_interrupts_lose_no_session() -> None:
    """Exceptions thrown into threads at random leave every session usable, and no worker lost."""

    class Strike(Exception):
        pass

    with Pool(size=2, health_check_timeout=0.1) as pool:
        stop = threading.Event()

        def work(key: str) -> None:
            while not stop.is_set():
                try:
                    while not stop.is_set():
                        call(pool, key, add, timeout=20)
                except Strike:
                    pass

        threads = [InThread(work, key) for key in "aabb"]
        strike = ctypes.pythonapi.PyThreadState_SetAsyncExc
        pacer = threading.Event()
        for round_ in range(60):
            pacer.wait(0.01)
            thread = threads[round_ % 4]
            strike(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Strike))
        stop.set()
        for thread in threads:
            try:
                thread.result()
            except Strike:
                pass
        for key in "ab":
            n = pool.session_state(key)["n"]
            assert call(pool, key, add, timeout=20) == n + 1


def test_revoked_lease_loses_its_session_as_well() -> None:
    """Who held a lease too long cannot commit any more; the next one goes on from the last."""
    with Pool(size=1, lease_timeout=0.2) as pool:
        call(pool, "a", add)
        w = pool.checkout(session="a")
        assert call(pool, "a", add, timeout=20) == 2
        with pytest.raises(SessionError, match="taken away"):
            w.state["n"] = 100
        w.release()
        assert call(pool, "a", add, timeout=20) == 3


def test_dropped_lease_frees_its_session() -> None:
    with Pool(size=1) as pool:
        w = pool.checkout(session="a")
        w.call(add)
        with pytest.warns(ResourceWarning):
            del w
            gc.collect()
        assert call(pool, "a", add, timeout=20) == 2


def test_release_in_mid_call_commits_nothing_afterwards(gate: Gate) -> None:
    with Pool(size=2) as pool:
        call(pool, "a", add)
        w = pool.checkout(session="a")
        running = InThread(w.call, chatters.change_and_wait, "n", 100, gate.path)
        gate.wait_arrived()
        w.release()
        with pytest.raises((WorkerDied, LeaseError, SessionError)):
            running.result()
        assert call(pool, "a", add, timeout=20) == 2


def test_pool_with_sessions_is_collected_when_dropped() -> None:
    pool = Pool(size=1).open()
    pool.create_session("a", {"n": 1})
    call(pool, "a", add)
    desk = pool._desk
    assert desk is not None
    manager, gone = desk.manager, weakref.ref(desk)
    del pool, desk
    gc.collect()
    assert gone() is None
    assert manager.wait_done(20)
    manager.join(5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_cannot_use_sessions() -> None:
    with Pool(size=1) as pool:
        call(pool, "a", add)
        lease = pool.checkout(session="a")
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            found: list[Any] = []
            for use in (
                lambda: pool.checkout(session="a"),
                lambda: pool.checkout(session="b"),
                lambda: pool.create_session("b"),
                lambda: pool.end_session("a"),
                lambda: pool.session_state("a"),
                lambda: pool.sessions(),
                lambda: lease.state.__setitem__("n", 2),
                lambda: lease.call(add),
            ):
                try:
                    use()
                    found.append(None)
                except BaseException as error:
                    found.append(type(error))
            os.write(writer, pickle.dumps(found))
            os._exit(0)
        os.close(writer)
        found = pickle.loads(os.read(reader, 65536))
        os.close(reader)
        os.waitpid(pid, 0)
        assert found == [PoolForked] * 8
        assert lease.call(add) == 2
        lease.release()


def test_hooks_hear_of_a_session_and_may_use_it() -> None:
    """A listener in the caller's thread uses the pool itself, and nothing hangs."""
    with Pool(size=2) as pool:
        seen: list[tuple[str, Any]] = []

        def listen(name: str, numbers: Any, facts: Any) -> None:
            seen.append((name, facts["session"]))
            pool.session_state(facts["session"])
            pool.sessions()
            pool.create_session(f"{facts['session']} heard")

        pool.hooks["session.bound"].append(listen)
        call(pool, "a", add)
        assert seen == [("session.bound", "a")]
        assert {info.session_id for info in pool.sessions()} == {"a", "a heard"}


def test_sessions_in_a_hook_of_the_manager_do_not_wait() -> None:
    with Pool(size=1, session_ttl=0.1) as pool:
        heard = threading.Event()
        found: list[Any] = []

        def listen(name: str, numbers: Any, facts: Any) -> None:
            if facts["session"] != "b" or heard.is_set():
                return
            try:
                pool.checkout(session="a", timeout=None)
            except SessionError as error:
                found.append(error)
            heard.set()

        pool.hooks["session.lost"].append(listen)
        with pool.checkout(session="a"):
            pool.create_session("b")
            assert heard.wait(20)
        assert isinstance(found[0], SessionBusy)


def test_options_of_the_pool_take_a_session() -> None:
    with Pool(size=2) as pool:
        chat = pool.options(session="a", affinity="strict", timeout=20)
        assert [chat.call(add) for _ in range(3)] == [1, 2, 3]
        with pytest.raises(ValueError, match="session="):
            pool.options(affinity="any")
        with pytest.raises(ValueError, match="one of"):
            pool.options(session="a", affinity="sticky")


def test_stats_count_how_sessions_found_their_workers() -> None:
    with Pool(size=1) as pool:
        assert pool.stats().session_hit_rate is None
        call(pool, "a", add)
        call(pool, "a", add)
        kill_and_wait(pool)
        call(pool, "a", add, timeout=20)
        stats = pool.stats()
        assert (stats.sessions, stats.session_hits, stats.sessions_new) == (1, 1, 1)
        assert (stats.sessions_moved, stats.sessions_lost) == (0, 1)
        assert stats.session_hit_rate == 0.5


def test_pass_gate_in_a_session_blocks_only_that_session(gate: Gate) -> None:
    with Pool(size=2) as pool:
        running = InThread(call, pool, "a", pass_gate, gate.path)
        gate.wait_arrived()
        assert call(pool, "b", add, timeout=20) == 1
        gate.open()
        running.result()
