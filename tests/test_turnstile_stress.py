"""The turnstile under threads that switch every microsecond, time out, are struck, and lose workers.

What a strike is: an exception that the interpreter raises in a thread between any two of its
bytecodes, as a signal does in the main thread. It may fall where a slot has left the idle set and
is not yet anybody's; then the manager's second look finds it lost, and replaces it.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import random
import signal
import sys
import threading
import time
import weakref
from typing import Any, Callable, Dict, Iterator

import pytest

from minipool import Pool, errors
from minipool.engine.turnstile import Turnstile, Waiter
from minipool.lease import Lease
from workers import Counter, identity

THREADS, SLOTS = 24, 4
PATIENCE = 40.0  # seconds until a test gives up; it never takes that long


class Strike(BaseException):
    """Raised in a thread, anywhere."""


@pytest.fixture(autouse=True)
def switches_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Crew:
    """Threads that do `turn(me, n)` so often, and until there was `enough`, struck or not."""

    def __init__(
        self,
        turn: Callable[[int, int], None],
        turns: int,
        enough: Callable[[], bool] = lambda: True,
        threads: int = THREADS,
    ) -> None:
        self._turn, self._turns, self._enough = turn, turns, enough
        self.done = [0] * threads
        self.strikes = self.noticed = 0
        self.broken: list[BaseException] = []
        self._at_work: set[int] = set()
        self._go, self._let_go = threading.Event(), threading.Event()
        self._ended = threading.Semaphore(0)
        self._random = random.Random(1)
        self.threads = [
            threading.Thread(target=self._work, args=(me,), daemon=True) for me in range(threads)
        ]

    def _work(self, me: int) -> None:
        self._go.wait()
        self._at_work.add(me)
        while True:
            try:  # twice: a strike may fall between the handler of one and the next `try`
                return self._work_on(me)
            except Strike:
                self.noticed += 1

    def _work_on(self, me: int) -> None:
        while True:
            try:
                while not self.broken and (self.done[me] < self._turns or not self._enough()):
                    self._turn(me, self.done[me])
                    self.done[me] += 1
                if me in self._at_work:
                    self._at_work.discard(me)
                    self._ended.release()
                self._let_go.wait()  # a last strike may still be on its way
                return
            except Strike:
                self.noticed += 1
            except BaseException as error:
                self.broken.append(error)

    def strike(self) -> None:
        """Strike one thread that is at work."""
        me = self._random.randrange(len(self.threads))
        if me in self._at_work:
            ident = ctypes.c_ulong(self.threads[me].ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Strike))
            self.strikes += 1

    def run(self, pause: float, *between: Callable[[], object]) -> None:
        """Start the threads; do what is to be done in between, until each has ended its turns."""
        for thread in self.threads:
            thread.start()
        self._go.set()
        deadline = time.monotonic() + PATIENCE
        ended = 0
        while ended < len(self.threads):
            ended += self._ended.acquire(timeout=pause)
            for action in between:
                action()
            assert not self.broken, self.broken
            assert time.monotonic() < deadline, f"threads stand still: {self.done}"
        self._let_go.set()
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


class Overseer:
    """Does for a bare turnstile what the manager does: sees who owns what, and sweeps."""

    def __init__(self, slots: int) -> None:
        self.turnstile = Turnstile()
        self.owners: dict[tuple[int, int], tuple[int, object]] = {}
        self.replaced = 0
        self._generations = slots
        self._seat: object = None
        self._missing: set[tuple[int, int]] = set()
        for slot in range(slots):
            self.turnstile.admit(slot, slot)
            self.turnstile.publish(slot, slot)

    def sweep(self) -> None:
        """Free a forgotten seat, and replace every slot found nowhere at two looks running."""
        turnstile = self.turnstile
        self._seat = turnstile.sweep(self._seat)
        nowhere = {
            token
            for token in turnstile.current.copy().items()
            if token not in self.owners and turnstile.idle.get(token[0]) != token[1]
        }
        for slot, _ in nowhere & self._missing:
            self._generations += 1
            turnstile.fence(slot)
            turnstile.admit(slot, self._generations)
            turnstile.publish(slot, self._generations)
            self.replaced += 1
        self._missing = nowhere

    def forget(self, me: int) -> None:
        """Drop the marks of a thread that was struck before it could: what it owned is nowhere."""
        for token, mark in self.owners.copy().items():
            if mark[0] == me:
                self.owners.pop(token, None)

    @contextlib.contextmanager
    def owning(self, token: tuple[int, int], me: int) -> Iterator[None]:
        mark = (me, object())
        try:
            assert self.owners.setdefault(token, mark) is mark, f"{token} has two owners"
            yield
        finally:
            if self.owners.get(token) is mark:
                del self.owners[token]


def test_struck_threads_own_alone_and_lose_nothing() -> None:
    """24 threads on 4 slots with timeouts and strikes: one owner each, and all slots in the end."""
    overseer = Overseer(SLOTS)
    turnstile = overseer.turnstile
    dice = [random.Random(me) for me in range(THREADS)]
    taken = collections.Counter()  # type: ignore[var-annotated]

    def turn(me: int, n: int) -> None:
        overseer.forget(me)
        token = turnstile.take(dice[me].choice([None, 0.0, 0.0005, 0.01, 1.0]))
        if token is not None:
            with overseer.owning(token, me):
                taken[me] += 1
                time.sleep(0)  # no wait: let others run while the slot is held
            turnstile.publish(*token)

    crew = Crew(turn, 300, lambda: crew.noticed >= 50)
    crew.run(0.0002, crew.strike, overseer.sweep)

    overseer.owners.clear()  # nobody is at work any more
    for _ in range(3):
        overseer.sweep()
    assert not turnstile.waiters or not turnstile.idle
    assert sorted(turnstile.idle) == list(range(SLOTS)), "a slot is lost"
    assert min(taken[me] for me in range(THREADS)) > 20, f"somebody starved: {taken}"


@pytest.mark.parametrize("slots", [1, 2])
def test_close_among_timeouts_returns_every_slot(slots: int) -> None:
    """Threads that time out while slots come back, then close: each slot is returned once."""
    for _ in range(30):
        refused: list[tuple[int, Any]] = []
        turnstile = _open_turnstile(slots, refused)
        ends: list[str] = []
        threads = [
            threading.Thread(target=_take_until_closed, args=(turnstile, ends)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        returned = turnstile.close()
        for thread in threads:
            thread.join(PATIENCE)

        assert ends == ["Closed"] * 8
        assert sorted(returned + refused) == [(slot, 1) for slot in range(slots)]
        assert not turnstile.waiters and not turnstile.idle


def _open_turnstile(slots: int, refused: list[tuple[int, Any]]) -> Turnstile:
    turnstile = Turnstile(on_refused=lambda *token: refused.append(token))
    for slot in range(slots):
        turnstile.admit(slot, 1)
        turnstile.publish(slot, 1)
    return turnstile


def _take_until_closed(turnstile: Turnstile, ends: list[str]) -> None:
    try:
        while True:
            token = turnstile.take(0.0002)
            if token is not None:
                turnstile.publish(*token)
    except Exception as error:
        ends.append(type(error).__name__)


class Line(Dict[int, Waiter]):
    """The line, as a turnstile has it; notes who joined when, and who was served when.

    The unit of time is one slot given to anybody.
    """

    def __init__(self) -> None:
        super().__init__()
        self.served: list[int | None] = []  # tickets; None: who did not queue
        self.joined: dict[int, tuple[int, int]] = {}  # ticket -> thread, time

    def __setitem__(self, ticket: int, waiter: Waiter) -> None:
        wake = waiter.wake

        def served() -> None:
            self.served.append(ticket)
            wake()

        waiter.wake = served
        super().__setitem__(ticket, waiter)
        self.joined[ticket] = threading.get_ident(), len(self.served)

    def waits(self) -> dict[int, list[int]]:
        """Return, for each thread, how many were served before it in each of its waits."""
        found: dict[int, list[int]] = collections.defaultdict(list)
        for time_served, ticket in enumerate(self.served):
            if ticket is not None:
                thread, time_joined = self.joined[ticket]
                found[thread].append(time_served - time_joined)
        return found


def test_turns_are_fair_without_think_time() -> None:
    """16 threads get equally many turns for their time in the line; nobody is passed twice.

    Turns are set against time in the line, because how soon a thread runs on, and is back in the
    line, is the system's affair: on a busy machine that alone makes some a third slower.
    """
    threads, laps = 16, 1500
    queued = threading.Semaphore(0)
    turnstile = Turnstile(on_queue=lambda waiter: queued.release())
    line = turnstile.general = Line()  # what is served in order
    turns = [0] * threads
    stop = threading.Event()
    try_take = turnstile.try_take

    def take_at_once() -> Any:
        token = try_take()
        if token is not None:
            line.served.append(None)
        return token

    turnstile.try_take = take_at_once  # type: ignore[method-assign]

    def work(me: int) -> None:
        while not stop.is_set():
            token = turnstile.take(PATIENCE)
            assert token is not None
            turns[me] += 1
            if turns[me] >= laps:
                stop.set()
            turnstile.publish(*token)

    crew = [threading.Thread(target=work, args=(me,)) for me in range(threads)]
    for thread in crew:
        thread.start()
    for _ in crew:
        assert queued.acquire(timeout=PATIENCE)
    for slot in range(SLOTS):  # now that everybody is in the line
        turnstile.admit(slot, 1)
        turnstile.publish(slot, 1)
    for thread in crew:
        thread.join(PATIENCE)

    waits = line.waits()
    rates = [len(each) / sum(each) for each in waits.values()]
    assert max(turns) == laps and len(rates) == threads
    assert max(map(max, waits.values())) < threads, "somebody was passed twice"
    assert max(rates) - min(rates) <= 0.1 * max(rates), (rates, turns)


class OwnerWords:
    """Who holds which worker now, and leases that were released already."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], weakref.ref[Lease[Any]]] = {}
        self.old: list[Lease[Any]] = []

    @contextlib.contextmanager
    def holding(self, lease: Lease[Any]) -> Iterator[None]:
        key, mine = (lease.worker_id, lease.generation), weakref.ref(lease)
        before = self._held.get(key)
        other = None if before is None else before()
        assert other is None or not other._held, f"worker {key} is leased twice"
        self._held[key] = mine
        yield
        assert self._held[key] is mine, f"worker {key} was leased to another meanwhile"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a lease of worker:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_pool_survives_kills_timeouts_strikes_and_second_releases() -> None:
    """24 threads on 4 workers that die: right answers or typed errors, and 4 workers in the end."""
    words = OwnerWords()
    failures: collections.Counter[str] = collections.Counter()
    dice = [random.Random(me) for me in range(THREADS + 1)]
    answers = [0] * THREADS

    def turn(me: int, n: int) -> None:
        try:
            lease = pool.checkout(timeout=dice[me].choice([0.0, 0.001, 5.0, 20.0]))
            with lease:
                with words.holding(lease):
                    assert lease.call(identity, (me, n)) == (me, n)
                    answers[me] += 1
            words.old.append(lease)
            lease.release()
            dice[me].choice(words.old[-20:]).release()
        except (errors.CheckoutTimeout, errors.WorkerDied) as error:
            failures[type(error).__name__] += 1

    crew = Crew(turn, 200, lambda: crew.noticed >= 60 and kills[0] >= 30)
    kills = [0]

    def kill() -> None:
        """Kill a worker that has answered already: one that never did would delay the next."""
        infos = [info for info in pool.workers() if info.state in ("idle", "leased")]
        proved = [info.pid for info in infos if info.calls > 3]
        if proved and kills[0] < 40:
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice[-1].choice(proved) or 0, signal.SIGKILL)
                kills[0] += 1

    with Pool(Counter, size=SLOTS, health_check_interval=0.4, health_check_timeout=20) as pool:
        crew.run(0.02, crew.strike, kill)
        manager = pool._desk.manager  # type: ignore[union-attr]
        assert manager.wait_for(lambda: len(manager.turnstile.idle) == SLOTS, PATIENCE), pool
        assert not manager.turnstile.waiters
        leases = [pool.checkout(timeout=20) for _ in range(SLOTS)]
        assert [lease.call(identity, n) for n, lease in enumerate(leases)] == list(range(SLOTS))
        stats = pool.stats()
        assert (stats.workers, stats.leased, stats.waiting) == (SLOTS, SLOTS, 0)
        gauges = (stats.idle, stats.leased, stats.starting, stats.probing, stats.stopping)
        assert sum(gauges) + stats.lost == SLOTS
        for lease in leases:
            lease.release()
        assert pool.stats().idle == SLOTS

    assert stats.workers_lost + stats.discarded >= 30
    assert min(answers) > 0, f"somebody starved: {answers}, {failures}"
    assert stats.calls >= sum(answers)


def test_second_release_gives_nothing_to_anybody() -> None:
    """Leases released again and again, by several threads at once, are returned once each."""
    words = OwnerWords()

    def turn(me: int, n: int) -> None:
        lease = pool.checkout(timeout=20)
        with words.holding(lease):
            assert lease.call(identity, me) == me
        words.old.append(lease)  # from now on anybody may release it
        for old in words.old[-6:]:
            old.release()

    with Pool(Counter, size=SLOTS) as pool:
        crew = Crew(turn, 25)
        crew.run(0.05)
        stats = pool.stats()
        assert (stats.idle, stats.leased) == (SLOTS, 0)
        assert stats.leases == THREADS * 25
        assert len(pool._desk.manager.turnstile.idle) == SLOTS  # type: ignore[union-attr]
