"""What keeps threads apart and wakes them, struck wherever an exception can come.

None may stay locked in or out, whatever the version of CPython makes of `with lock`, and none of
the exceptions may be lost.
"""

from __future__ import annotations

import ast
import contextlib
import os
import random
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Iterator

import pytest

import minipool
from minipool import CircuitBreaker, Pool, _sync
from minipool._sync import Guard, Latch, Notice
from minipool.engine.blackbox import BlackBox
from minipool.engine.oom import OomKills
from minipool.engine.transcript import Transcript
from minipool.engine.voice import Forwarder
from strikes import Strike, strike_everywhere

INTERRUPTS = 3000
PATIENCE = 20.0  # seconds


def elsewhere(action: Callable[[], Any]) -> Any:
    """Return what an action returns in another thread; it must end."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(action()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert results, "it waits for ever"
    return results[0]


def is_free(guard: Guard) -> bool:
    """Tell whether another thread can come in."""
    return bool(elsewhere(lambda: guard.run_within(0.0, lambda: True)))


class Interrupts:
    """Raises `Strike` out of a signal handler, at a moment that nobody chose."""

    def __init__(self) -> None:
        self.raised = self.caught = 0
        self._random = random.Random(4711)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self.raised += 1
        raise Strike

    def strike(self, action: Callable[[], Any], count: int) -> None:
        """Do `action` again and again, until it was struck so often."""
        for raised in range(self.raised, self.raised + count):
            try:
                signal.setitimer(signal.ITIMER_REAL, self._random.uniform(2e-5, 2e-4))
                self._go_on(action, raised)
            except Strike:
                self.caught += 1

    def _go_on(self, action: Callable[[], Any], raised: int) -> None:
        # Not in the `try` itself: CPython 3.13.0 leaves it where a loop begins anew, see
        # https://github.com/python/cpython/issues/130279
        while self.raised == raised:
            action()


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    interrupts = Interrupts()
    before = signal.signal(signal.SIGALRM, interrupts.handle)
    yield interrupts
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert interrupts.raised == interrupts.caught, "an interrupt was lost"


# -- the guard -----------------------------------------------------------------------------------


def test_guard_is_left_wherever_an_exception_strikes() -> None:
    guard = Guard()
    ran: list[int] = []

    def act() -> None:
        assert is_free(guard)
        guard.run(ran.append, 1)

    with contextlib.suppress(Strike):
        assert strike_everywhere(lambda: guard.run(ran.append, 1), _sync) >= 5
    assert is_free(guard)
    for _ in range(2):
        act()
    assert strike_everywhere(lambda: guard.run_within(1.0, ran.append, 1), _sync) >= 5
    assert is_free(guard)


def test_guard_is_left_after_each_of_thousands_of_interrupts(interrupts: Interrupts) -> None:
    guard = Guard()
    inside: list[int] = []

    def work() -> None:
        inside.append(1)
        inside.pop()

    def act() -> None:
        if guard._lock._is_owned():
            stuck.append(interrupts.raised)
        guard.run(work)

    stuck: list[int] = []
    interrupts.strike(act, INTERRUPTS)
    assert not stuck
    assert is_free(guard)


def test_coming_in_again_leaves_the_outer_hold() -> None:
    """A handler or finaliser comes in again, struck or not; the thread it interrupts stays in."""
    guard = Guard()

    def fail() -> None:
        raise Strike

    def work() -> str:
        assert guard.run(lambda: 1) == 1
        with pytest.raises(Strike):
            guard.run(fail)
        assert strike_everywhere(lambda: guard.run(int), _sync) >= 1
        assert not is_free(guard)
        return "done"

    assert guard.run(work) == "done"
    assert is_free(guard)


def test_handler_that_comes_in_again_leaves_the_outer_hold(interrupts: Interrupts) -> None:
    """Wherever in the guard's own steps a handler comes, it takes nothing away, and ends."""
    guard, handled = Guard(), [0]

    def handle(signum: int, frame: FrameType | None) -> None:
        handled[0] += guard.run(int, 1)

    def work() -> None:
        assert guard._lock._is_owned()

    signal.signal(signal.SIGALRM, handle)
    for _ in range(INTERRUPTS):
        before = handled[0]
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-5, 2e-4))
        while handled[0] == before:
            guard.run(work)
    assert is_free(guard)


def test_one_thread_at_a_time() -> None:
    guard, counted = Guard(), [0]

    def add() -> None:
        for _ in range(2000):
            guard.run(step)

    def step() -> None:
        count = counted[0]
        repr(guard)  # where threads change places
        counted[0] = count + 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert counted == [8000]


def test_what_is_not_free_in_time_is_left_undone() -> None:
    guard, entered, leave = Guard(), threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        leave.wait(PATIENCE)

    holder = threading.Thread(target=lambda: guard.run(hold))
    holder.start()
    assert entered.wait(PATIENCE)
    assert guard.run_within(0.001, lambda: True) is None
    leave.set()
    holder.join(PATIENCE)
    assert guard.run_within(0.001, lambda: True)


# -- the notice ----------------------------------------------------------------------------------


def test_no_post_is_missed() -> None:
    """Two threads take turns, each waiting without a limit for the other's post."""
    notice, turn = Notice(), [0]

    def play(me: int) -> None:
        for _ in range(2000):
            assert notice.wait_for(lambda: turn[0] % 2 == me)
            turn[0] += 1
            notice.post()

    other = threading.Thread(target=play, args=(1,), daemon=True)
    other.start()
    elsewhere(lambda: play(0))
    other.join(PATIENCE)
    assert turn == [4000]


def test_wait_that_nothing_ends_ends_in_time() -> None:
    notice = Notice()
    assert not notice.wait_for(lambda: False, 0.001)
    assert not notice.wait_for(lambda: False, 0.0)
    assert notice.wait_for(lambda: True, 0.0)
    with pytest.raises(ZeroDivisionError):
        notice.wait_for(lambda: 1 / 0, 1.0)


def test_struck_wait_keeps_nobody_who_posts_and_leaves_nothing(interrupts: Interrupts) -> None:
    notice = Notice()
    interrupts.strike(lambda: notice.wait_for(lambda: False, 1.0), INTERRUPTS)
    elsewhere(lambda: notice.post() or True)
    assert not notice._gates, "what struck threads left behind is not cleared away"


def test_struck_post_wakes_who_waits_when_it_is_posted_again() -> None:
    notice, latch = Notice(), Latch()
    waiter = threading.Thread(target=lambda: notice.wait_for(lambda: latch.happened), daemon=True)
    waiter.start()
    strike_everywhere(notice.post, _sync)
    assert strike_everywhere(latch.set, _sync) >= 2
    assert latch.wait(0.0)
    notice.post()
    waiter.join(PATIENCE)
    assert not waiter.is_alive()


# -- where they are used -------------------------------------------------------------------------


def permit_and_land(breaker: CircuitBreaker) -> None:
    permit = breaker.permit()
    if permit is not None:
        kept.append(permit)  # what strikes a finaliser is lost, in CPython
        permit.failed()
    breaker.reset()


kept: list[object] = []


def ask_and_read(box: BlackBox) -> None:
    box.ask(lambda signum: True, 1)
    box.stacks()


def make_forwarder() -> Forwarder:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.close(reader)
    return Forwarder(writer, memoryview(bytearray(8)), lambda: None, None)


def tell_dropped(forwarder: Forwarder) -> None:
    forwarder._dropped = 1
    forwarder.tell_dropped()


USES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "breaker": (CircuitBreaker, permit_and_land),
    "black box": (BlackBox, ask_and_read),
    "oom": (lambda: OomKills("/proc/vmstat"), OomKills.explain),
    "voice": (make_forwarder, tell_dropped),
    "transcript": (lambda: Transcript(0, 1, [1], None), Transcript.last_lines),
}


@pytest.mark.parametrize("name", USES)
def test_struck_use_keeps_nobody_else_out(name: str, interrupts: Interrupts) -> None:
    make, use = USES[name]
    thing = make()
    interrupts.strike(lambda: use(thing), 500)
    elsewhere(lambda: (use(thing), True))
    kept.clear()
    if name == "transcript":
        thing.voice.close()
    if name in ("black box", "transcript"):
        thing.abandon()
    if name == "voice":
        os.close(thing._fd)
        thing.close()


def test_manager_goes_on_whatever_strikes_those_who_wait_for_it(interrupts: Interrupts) -> None:
    """Callers are struck as they wait, count, and look after processes; nothing stands still."""
    with Pool(size=1, start_method="fork", health_check_timeout=0.1) as pool:
        assert pool._desk is not None
        desk, manager = pool._desk, pool._desk.manager
        process = manager.fleet.handles[0].process
        uses: list[Callable[[], object]] = [
            lambda: manager.wait_for(lambda: False, 0.01),
            lambda: desk.count("timeouts"),
            lambda: process.exitcode(0),
            lambda: process.has_ended(),
            lambda: process.starved,
        ]
        for use in uses:
            interrupts.strike(use, 400)
            elsewhere(lambda use=use: (use(), True))
        done: list[bool] = []
        manager.order(lambda: done.append(True))
        assert manager.wait_for(lambda: bool(done), PATIENCE), "the manager stands still"
        assert pool.call(abs, -1) == 1


# What a thread waits at, and nobody is kept out by: never held from one step to the next.
GATES = {"engine/turnstile.py", "housekeeping.py"}
FOREIGN = {"engine/forked_locks.py"}  # makes those that are the standard library's
LOCKS = {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier"}


def test_nothing_else_in_the_package_is_a_lock() -> None:
    package = Path(minipool.__file__).parent
    found = [
        f"{path.relative_to(package).as_posix()}:{node.lineno}: {node.attr}"
        for path in sorted(package.rglob("*.py"))
        if path.name != "_sync.py" and path.relative_to(package).as_posix() not in GATES | FOREIGN
        and path.parent.name != "tools"  # programs of their own, which an interrupt ends
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in LOCKS
        and isinstance(node.value, ast.Name) and node.value.id in ("threading", "_thread")
    ]  # fmt: skip
    assert not found, "take a Guard, a Notice or a Latch, which no exception can leave locked"
