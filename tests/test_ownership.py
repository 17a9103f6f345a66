"""Ownership: a worker is lost only if nobody living has it, and what was decided about one lease is
not done to the next.

Everything is looked at by the manager's own thread at the moments that a test chooses.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from ears import Ear
from gates import Gate, pass_gate
from minipool import Pool, SessionLost
from minipool.engine import desk as desk_module
from minipool.engine import health, passage
from minipool.engine import table as t
from minipool.engine.turnstile import Waiter
from minipool.lease import Lease
from test_sweep import Sweeper
from workers import Counter


@pytest.fixture
def pool() -> Iterator[Pool[Counter]]:
    with Pool(Counter, size=1, health_check_interval=None) as pool:
        yield pool


class Watcher(Sweeper):
    """Sweeps as often as it is told, each time a tick after the last."""

    def sweep(self, times: int = 10) -> bool:
        """Sweep, and tell whether the first worker is still well."""
        (handle,) = self.manager.fleet.handles.values()

        def sweeps() -> bool:
            for _ in range(times):
                self.look(sweep=True)
            return handle.tainted is None

        return self.run(sweeps)


class Halted:
    """Stands in for a function: halts the first call of it, in the thread that makes it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.arrived, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *args: Any) -> Any:
        if not self.arrived.is_set():
            self.arrived.set()
            assert self.go_on.wait(20)
        return self.function(*args)


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def test_worker_that_was_handed_to_a_waiter_which_has_not_run_yet_is_not_lost(
    pool: Pool[Counter],
) -> None:
    """Where many threads compute, a waiter that was woken may run seconds later."""
    watcher = Watcher(pool)
    turnstile = watcher.manager.turnstile
    with pool.checkout() as w:
        assert w.call("add") == 1
        waiter: Waiter | None = turnstile.enqueue()
    assert waiter is not None and waiter.token is not None

    assert watcher.sweep()
    turnstile.leave(waiter)
    assert pool.call("add") == 2
    assert pool.stats().workers_lost == 0


def test_worker_that_was_handed_to_a_waiter_which_is_gone_is_lost(pool: Pool[Counter]) -> None:
    watcher = Watcher(pool)
    with pool.checkout():
        waiter: Waiter | None = watcher.manager.turnstile.enqueue()
    assert waiter is not None and waiter.token is not None
    assert watcher.sweep(1)

    del waiter
    assert not watcher.sweep(2)
    assert pool.call("add") == 1  # another worker's


@pytest.mark.parametrize(
    "step", ["_get_ident", "_monotonic_ns"], ids=["being taken", "being given back"]
)
def test_worker_that_a_thread_has_on_its_way_is_not_lost(
    step: str, pool: Pool[Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that stands between the idle set and a lease for any time keeps its worker."""
    watcher = Watcher(pool)
    assert pool.call("add") == 1
    halted = Halted(getattr(desk_module, step))
    answers: list[int] = []
    lease = pool.checkout() if step == "_monotonic_ns" else None
    monkeypatch.setattr(desk_module, step, halted)

    def use() -> None:
        if lease is not None:
            lease.release()
        answers.append(pool.call("add"))

    thread = in_thread(use)
    assert halted.arrived.wait(20)
    well = watcher.sweep()
    halted.go_on.set()
    thread.join(20)

    assert well
    assert answers == [2]


@pytest.mark.parametrize("way", ["call", "options", "hint", "session", "warm_up"])
def test_worker_that_was_taken_and_has_no_lease_yet_is_not_lost(
    way: str, pool: Pool[Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever asked for a worker: its thread may stand still where the lease is about to be."""
    ways: dict[str, Callable[[], object]] = {
        "call": lambda: pool.call("add"),
        "options": lambda: pool.options(timeout=60).call("add"),
        "hint": lambda: pool.checkout(hint="a").release(),
        "session": lambda: pool.checkout(session="a").release(),
        "warm_up": lambda: pool.warm_up(["add"], timeout=60),
    }
    watcher = Watcher(pool)
    pid = pool.workers()[0].pid
    halted = Halted(lambda handle: handle)

    def halting(take: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: halted(take(*args))

    for name in ("acquire", "acquire_this"):
        monkeypatch.setattr(desk_module.Desk, name, halting(getattr(desk_module.Desk, name)))

    thread = in_thread(ways[way])
    assert halted.arrived.wait(20)
    well = watcher.sweep()
    halted.go_on.set()
    thread.join(20)

    assert well
    assert pool.workers()[0].pid == pid


def test_worker_is_not_lost_while_a_signal_handler_waits_in_the_middle_of_the_way(
    pool: Pool[Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that waits in line holds nothing by that; what it interrupted may."""
    watcher = Watcher(pool)
    turnstile = watcher.manager.turnstile
    get_ident, handled, answers = desk_module._get_ident, [False], []

    def handler() -> int:
        if not handled[0]:
            handled[0] = True
            assert turnstile.take(20) is None  # the turnstile is woken below
        return get_ident()

    def use() -> None:
        answers.append(pool.call("add"))

    monkeypatch.setattr(desk_module, "_get_ident", handler)
    thread = in_thread(use)
    assert watcher.manager.wait_for(lambda: bool(turnstile.waiters), 20)
    well = watcher.sweep()
    (waiter,) = turnstile.waiters.values()
    waiter.settle("left")
    waiter.wake()
    thread.join(20)

    assert well
    assert answers == [1]


def test_threads_that_wait_in_line_do_not_hide_a_loss(pool: Pool[Counter]) -> None:
    watcher = Watcher(pool)
    assert watcher.manager.turnstile.try_take() is not None  # and nobody has it
    answers: list[int] = []
    threads = [in_thread(lambda: answers.append(pool.call("add"))) for _ in range(5)]
    assert watcher.manager.wait_for(lambda: len(watcher.manager.turnstile.waiters) == 5, 20)

    assert not watcher.sweep(2)
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == [1, 2, 3, 4, 5]


def test_slot_is_given_more_time_while_others_are_on_their_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever had it may have given it back, and another one may have taken it, between sweeps."""
    suspects, seen = passage.Suspects(), [frozenset({1})]
    monkeypatch.setattr(passage, "passers", lambda: seen[0])
    lost = []
    for sweep in range(6):
        seen[0] = frozenset({sweep, sweep + 1})  # always somebody, nobody for long
        lost.append(suspects.lost("slot", "mark"))
        suspects.end({"slot": "mark"})
    assert lost == [False] * 5 + [True]
    assert not suspects.lost("slot", "another mark")
    seen[0] = frozenset()
    suspects.end({"slot": "another mark"})
    assert suspects.lost("slot", "another mark")


def test_slot_is_never_lost_while_one_thread_stands_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where others compute it may stand there for any time, and others come and go meanwhile."""
    suspects, seen = passage.Suspects(), [frozenset({1})]
    monkeypatch.setattr(passage, "passers", lambda: seen[0])
    for sweep in range(50):
        seen[0] = frozenset({1, 100 + sweep})
        assert not suspects.lost("slot", "mark")
        suspects.end({"slot": "mark"})
    seen[0] = frozenset()
    assert suspects.lost("slot", "mark")


def test_who_looks_at_the_passers_is_none_of_them() -> None:
    @passage.passage
    def look() -> frozenset[int]:
        return passage.passers()

    assert threading.get_ident() not in look()


def changed_between_look_and_act(
    sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]
) -> None:
    """Have something happen after the next plan that plans anything, before it is carried out."""
    plan, changed = health.plan, threading.Event()

    def planned(*args: Any) -> list[health.Action]:
        actions = plan(*args)
        if actions and not changed.is_set():
            changed.set()
            change()
        return actions

    monkeypatch.setattr(health, "plan", planned)
    assert sweeper.run(lambda: bool(sweeper.look(sweep=True) or True))
    assert changed.is_set(), "nothing was planned"


@pytest.mark.parametrize("option", ["lease_timeout", "leak_warn_after"])
def test_lease_that_began_after_the_look_is_not_acted_on(
    option: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker changes hands between look and act: the new lease is young."""
    options: Any = {option: 60.0}
    with Pool(Counter, size=1, health_check_interval=None, **options) as pool:
        sweeper = Sweeper(pool)
        old, new = pool.checkout(), []
        (handle,) = sweeper.manager.fleet.handles.values()
        handle.row[t.LEASED_SINCE_NS] -= int(61e9)

        def change() -> None:
            old.release()
            new.append(pool.checkout())

        changed_between_look_and_act(sweeper, monkeypatch, change)
        assert "has been leased" not in caplog.text
        assert new[0].call("add") == 1
        new[0].release()
        assert pool.stats().workers_lost == 0


def test_overdue_lease_that_ends_between_look_and_act_costs_no_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Pool(Counter, size=1, health_check_interval=None, lease_timeout=60.0) as pool:
        sweeper = Sweeper(pool)
        lease = pool.checkout()
        (handle,) = sweeper.manager.fleet.handles.values()
        handle.row[t.LEASED_SINCE_NS] -= int(61e9)

        changed_between_look_and_act(sweeper, monkeypatch, lease.release)
        assert handle.tainted is None
        assert pool.call("add") == 1
        assert pool.stats().workers_lost == 0


def test_lost_worker_that_turns_up_between_look_and_act_is_left_alone(
    pool: Pool[Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeper = Sweeper(pool)
    turnstile = sweeper.manager.turnstile
    token = turnstile.try_take()
    assert token is not None
    assert sweeper.run(lambda: bool(sweeper.look(sweep=True) or True))

    changed_between_look_and_act(sweeper, monkeypatch, lambda: turnstile.publish(*token))
    assert pool.call("add") == 1
    assert pool.stats().workers_lost == 0


class ClosesSlowly(Counter):
    def __init__(self, gate: str) -> None:
        super().__init__()
        self.gate = gate

    def close(self) -> None:
        pass_gate(self.gate)


def test_strict_waiter_hears_that_its_worker_goes_before_that_has_closed(
    gate: Gate, tmp_path: Path
) -> None:
    """A worker that is told to stop may take long for it; nobody who wants just that one waits."""
    options: Any = {"size": 1, "affinity": "strict", "health_check_interval": None}
    with Pool(ClosesSlowly, args=(gate.path,), **options) as pool:
        lease = pool.checkout(session="a")
        lease.call("add")
        lease.release()
        holder = pool.checkout()
        ear = Ear(pool, "session.lost")
        ends: list[BaseException] = []

        def use() -> None:
            try:
                pool.options(session="a", timeout=20).call("add")
            except BaseException as error:
                ends.append(error)

        thread = in_thread(use)
        assert pool._desk is not None
        manager = pool._desk.manager
        assert manager.wait_for(lambda: bool(manager.turnstile.waiters), 20)
        holder.discard("to be replaced")
        gate.wait_arrived()
        ear.wait("session.lost", timeout=10)
        thread.join(20)
        still_closing = bool(manager.fleet.handles)
        gate.open(2)

        assert still_closing
        assert [type(end) for end in ends] == [SessionLost]


def test_waiting_threads_sleep_until_there_is_a_cause(
    pool: Pool[Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that waits for a worker or a session waits in one piece: it never looks around."""
    waits: list[float | None] = []
    wait = Waiter.wait

    def noted(waiter: Waiter, timeout: float | None) -> bool:
        waits.append(timeout)
        return wait(waiter, timeout)

    monkeypatch.setattr(Waiter, "wait", noted)
    assert pool._desk is not None
    manager = pool._desk.manager
    lines = [manager.turnstile, pool._sessions._line]

    def use(session: str | None, timeout: float | None) -> None:
        with pool.checkout(session=session, timeout=timeout):
            pass

    with pool.checkout(session="hot"):
        threads = [
            in_thread(lambda session=session, timeout=timeout: use(session, timeout))
            for session in (None, "hot")
            for timeout in (None, 60.0)
        ]
        assert manager.wait_for(lambda: all(len(line.waiters) == 2 for line in lines), 20)
        assert manager.wait_for(lambda: len(waits) == 4, 20)
    for thread in threads:
        thread.join(20)

    long = [timeout for timeout in waits if timeout is not None]
    assert waits.count(None) >= 2 and min(long) > 30


def test_waiter_of_a_session_that_was_forgotten_is_woken_by_the_manager(
    pool: Pool[Counter],
) -> None:
    """A thread that an exception struck in mid-match had settled it, and not woken it."""
    sweeper = Sweeper(pool)
    line = pool._sessions._line
    answers: list[int] = []
    lease: Lease[Counter] = pool.checkout(session="hot")
    thread = in_thread(lambda: answers.append(pool.options(session="hot").call("add")))
    assert sweeper.manager.wait_for(lambda: bool(line.waiters), 20)
    (waiter,) = line.waiters.values()
    wake, waiter.wake = waiter.wake, lambda: None  # the strike
    lease.release()
    line.waiters[waiter.ticket] = waiter
    waiter.wake = wake
    assert sweeper.run(lambda: bool(sweeper.look(sweep=True) or True))
    thread.join(20)

    assert answers == [1]
    assert not line.waiters


def test_session_that_was_handed_to_a_waiter_which_has_not_run_yet_is_not_taken_away(
    pool: Pool[Counter],
) -> None:
    sweeper, sessions = Sweeper(pool), pool._sessions
    with pool.checkout(session="a"):
        record = sessions._records["a"]
        waiter: Waiter | None = sessions._line.enqueue("a")
    assert waiter is not None and waiter.token is not None

    def renewed() -> bool:
        for _ in range(3):
            sessions._sweep_astray()
        return sessions._records["a"] is not record

    assert not sweeper.run(renewed)
    del waiter
    assert sweeper.run(renewed)
    assert pool.options(session="a").call("add") == 1


def test_ended_session_leaves_nothing_in_its_line(pool: Pool[Counter]) -> None:
    line = pool._sessions._line
    with pool.checkout(session="hot"):
        thread = in_thread(lambda: pool.options(session="hot").call("add"))
        assert pool._desk is not None
        assert pool._desk.manager.wait_for(lambda: bool(line.waiters), 20)
    thread.join(20)
    pool.end_session("hot")

    assert not (line.lines or line.handed or line.waiters or line.general or line.current)


def test_many_waiters_for_one_session_are_not_looked_at_for_another(
    pool: Pool[Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkout of a free session takes the straight way, whoever waits for another one."""
    line = pool._sessions._line
    pool.create_session("free")
    pool.create_session("hot")
    taken = line.try_take_this("hot")
    assert taken is not None
    waiters = [line.enqueue("hot") for _ in range(100)]

    def matched(*args: Any) -> None:
        raise AssertionError("the waiters were looked at")

    monkeypatch.setattr(line, "pump", matched)
    monkeypatch.setattr(line, "take", matched)
    with pool.checkout(session="free") as w:
        assert w.call("add") == 1
    monkeypatch.undo()
    for waiter in waiters:
        line.leave(waiter)
    line.publish(*taken)
    assert pool.options(session="hot", timeout=20).call("add") == 2


def test_cold_worker_is_found_without_a_look_at_every_idle_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A caller without a session leaves what is warm to the sessions, where that costs little."""
    with Pool(Counter, size=6, health_check_interval=None) as pool:
        leases = [pool.checkout(session=str(n)) for n in range(5)]
        cold = pool.checkout()
        leases += [cold]
        cold_pid = cold.pid
        for lease in leases:
            lease.call("add")
        for lease in [*leases[:4], cold, leases[4]]:
            lease.release()
        compared: list[Any] = []
        warmth = desk_module._warmth

        def noted(handle: Any) -> Any:
            compared.append(handle)
            return warmth(handle)

        monkeypatch.setattr(desk_module, "_warmth", noted)
        monkeypatch.setattr(desk_module, "_COMPARED", 1)
        with pool.checkout() as w:
            assert w.pid == cold_pid
        assert 2 <= len(compared) <= 4
