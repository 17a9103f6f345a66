"""The order of a session's owners, in every schedule of threads with few switches.

What runs is `minipool/sessions.py` itself, on the turnstile itself, in real threads of which one
moves at a time. Each look at what they share is a step; between two steps the schedule may go over
to another thread. All schedules with at most `SWITCHES` such switches are tried, one after the
other (besides the ones that come of themselves, when a thread waits or ends); most races show with
two. A wait without a limit ends when its lock is free; if nobody can move, a wake-up was lost.
"""

from __future__ import annotations

import threading
import types
from typing import Any, Callable, Iterator

import pytest

from minipool import CheckoutTimeout, PoolConfig, SessionBusy
from minipool.engine import turnstile as turnstile_module
from minipool.engine.turnstile import Turnstile, Waiter
from minipool.records import Record, Stake
from minipool.sessions import Sessions
from minipool.telemetry import Hooks

SWITCHES = 2
_FOR_EVER = 0.9  # seconds; shorter waits are those that a test chose


class Violation(AssertionError):
    """A promise was broken in this schedule."""


class Ended(BaseException):
    """The run is over; the thread shall end."""


class Schedule:
    """Runs some threads, one at a time, along one row of choices; notes where others were."""

    def __init__(self, choices: list[int], bodies: list[Callable[[], None]]) -> None:
        self.choices = choices
        self.taken: list[tuple[int, int]] = []  # (choice, how many there were)
        self.problem: BaseException | None = None
        self.over = threading.Event()
        self._bodies = bodies
        self._gates = [threading.Semaphore(0) for _ in bodies]
        self._waits: list[tuple[Any, bool] | None] = [None] * len(bodies)  # lock; may time out
        self._timed_out = [False] * len(bodies)
        self._alive = [True] * len(bodies)
        self._now = -1
        self._switches = 0

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._run, args=(index,), daemon=True)
            for index in range(len(self._bodies))
        ]
        for thread in threads:
            thread.start()
        self._go_on(self._pick())
        assert self.over.wait(20), "the schedule does not end"
        for gate in self._gates:
            gate.release()
        for thread in threads:
            thread.join(20)
        if self.problem is not None:
            raise self.problem

    def _run(self, index: int) -> None:
        self._gates[index].acquire()
        try:
            if not self.over.is_set():
                self._bodies[index]()
        except Ended:
            return
        except BaseException as problem:
            self.fail(problem)
            return
        self._alive[index] = False
        self._next()

    def fail(self, problem: BaseException) -> None:
        self.problem = self.problem or problem
        self.over.set()

    def step(self) -> None:
        """Stand before a step: the schedule may go over to another thread here."""
        if self._now < 0 or self.over.is_set():
            return
        me = self._now
        following = self._pick()
        if following != me:
            self._go_on(following)
            self._stand(me)

    def wait(self, lock: Any, may_time_out: bool) -> bool:
        """Wait for a lock; False if the time ran out."""
        self.step()
        me = self._now
        if lock.acquire(False):
            return True
        self._waits[me] = (lock, may_time_out)
        self._next()
        self._stand(me)
        self._waits[me] = None
        timed_out, self._timed_out[me] = self._timed_out[me], False
        return not timed_out

    def _stand(self, me: int) -> None:
        self._gates[me].acquire()
        if self.over.is_set():
            raise Ended

    def _next(self) -> None:
        """Let another thread go on, because this one waits or has ended."""
        following = self._pick()
        if following >= 0:
            self._go_on(following)

    def _go_on(self, index: int) -> None:
        self._now = index
        waits = self._waits[index]
        if waits is not None:
            self._timed_out[index] = not waits[0].acquire(False)
        self._gates[index].release()

    def _can_move(self, index: int) -> bool:
        waits = self._waits[index]
        return self._alive[index] and (waits is None or waits[1] or not waits[0].locked())

    def _pick(self) -> int:
        """Choose who moves next; -1 if the run is over."""
        able = [index for index in range(len(self._bodies)) if self._can_move(index)]
        if not able:
            if any(self._alive):
                self.fail(Violation("nobody can move: a wake-up was lost"))
            self.over.set()
            return -1
        me = self._now
        of_itself = me not in able
        if not of_itself:
            if self._switches >= SWITCHES:
                return me
            able.remove(me)
            able.insert(0, me)
        place = len(self.taken)
        choice = self.choices[place] if place < len(self.choices) else 0
        self.taken.append((choice, len(able)))
        if choice and not of_itself:
            self._switches += 1
        return able[choice]


def schedules(run: Callable[[list[int]], Schedule]) -> int:
    """Try every row of choices, depth first; return how many there were."""
    choices: list[int] = []
    count = 0
    while True:
        schedule = run(choices)
        count += 1
        taken = schedule.taken
        while taken and taken[-1][0] + 1 >= taken[-1][1]:
            taken.pop()
        if not taken:
            return count
        choices = [choice for choice, _ in taken[:-1]] + [taken[-1][0] + 1]


class Watched(dict):  # type: ignore[type-arg]
    """A dict that threads share: each look at it is a step."""

    schedule: Schedule | None = None

    def _step(self) -> None:
        if Watched.schedule is not None:
            Watched.schedule.step()

    def __getitem__(self, key: Any) -> Any:
        self._step()
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._step()
        super().__setitem__(key, value)

    def __contains__(self, key: object) -> bool:
        self._step()
        return super().__contains__(key)

    def __bool__(self) -> bool:
        self._step()
        return len(self) > 0

    def __iter__(self) -> Iterator[Any]:
        self._step()
        return super().__iter__()

    def get(self, key: Any, default: Any = None) -> Any:
        self._step()
        return super().get(key, default)

    def pop(self, *args: Any) -> Any:
        self._step()
        return super().pop(*args)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        self._step()
        return super().setdefault(key, default)

    def copy(self) -> dict[Any, Any]:
        self._step()
        return self.now()

    def now(self) -> dict[Any, Any]:
        """Return what is in it, without a step; `dict.copy` would ask for each key."""
        return dict(list(self.items()))


class SteppedWaiter(Waiter):
    """A place in the line whose wait is a step of the schedule."""

    __slots__ = ()

    def wait(self, timeout: float | None) -> bool:
        assert Watched.schedule is not None
        limited = timeout is not None and timeout < _FOR_EVER
        return Watched.schedule.wait(self._gate, limited)


class Limit:
    """How long a caller waits. When that is over is the schedule's choice, and the last word."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self._rest = seconds, seconds

    def left(self) -> float | None:
        left, self._rest = self._rest, None if self.seconds is None else 0.0
        return left

    first_wait = next_wait = left


class Stage:
    """Sessions without a pool, and what the threads of one run do with session "a"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, begun: bool = True, **options: Any) -> None:
        manager = types.SimpleNamespace(
            sweepers=[], lines=[], closers=[], here=False, closing=False,
            fleet=types.SimpleNamespace(handles={}, live=list), order=lambda action: None,
            wait_for=lambda condition, timeout: True, target=1,
            staff=types.SimpleNamespace(target=1), care=types.SimpleNamespace(),
        )  # fmt: skip
        desk: Any = types.SimpleNamespace(
            manager=manager, config=PoolConfig(size=1, **options), hooks=Hooks("stage"),
            check_open=lambda: None, check_process=lambda: None, count=lambda name: None,
            limit=Limit,
        )  # fmt: skip
        self.sessions: Any = Sessions(desk)
        line: Turnstile = self.sessions._line
        for name in ("idle", "waiters", "current", "_seat"):
            setattr(line, name, Watched())
        line._offer = line.idle.setdefault
        self.sessions._records = Watched()
        self.owner: int | None = None
        self.served: list[int] = []
        self.ends = 0
        if begun:
            self.sessions.create("a")

    def use(self, me: int, timeout: float | None = None, served: bool = True) -> Callable[[], None]:
        """Return a caller of the session."""

        def body() -> None:
            stake = Stake()
            try:
                record = self.sessions._take("a", timeout, stake)
            except (CheckoutTimeout, SessionBusy):
                assert not served, "a caller with all the time in the world was not served"
                return
            self._own(me, record)
            self._step()
            record.version += 1
            self._step()
            self._disown(me)
            self.sessions.give_back(record)

        return body

    def end(self, me: int) -> Callable[[], None]:
        """Return one who ends the session."""

        def body() -> None:
            self.sessions.end("a", None)
            self.ends += 1

        return body

    def expire(self, me: int) -> Callable[[], None]:
        """Return the manager, to whom each idle session has expired."""

        def body() -> None:
            for info in self.sessions._records.now().values():
                info.used = float("-inf")
            while self.sessions.expire(1.0):
                pass

        return body

    def _own(self, me: int, record: Record) -> None:
        if self.owner is not None:
            raise Violation(f"{me} and {self.owner} both have the session")
        self.owner = me
        if dict.get(self.sessions._records, "a") is not record:
            raise Violation(f"{me} was given a session that has ended")
        self.served.append(me)

    def _disown(self, me: int) -> None:
        assert self.owner == me
        self.owner = None

    @staticmethod
    def _step() -> None:
        assert Watched.schedule is not None
        Watched.schedule.step()

    def check_end(self) -> None:
        """Check that at the end everything is where it belongs."""
        Watched.schedule = None
        line = self.sessions._line
        records = self.sessions._records.now()
        if line.idle.now() != records or line.current.now() != records:
            raise Violation(f"idle {line.idle.now()}, records {records}")
        if line.waiters or self.sessions._owned:
            raise Violation(f"left: {line.waiters.now()}, {self.sessions._owned}")


Make = Callable[[Stage], "list[Callable[[], None]]"]

SCENARIOS: dict[str, tuple[bool, Make]] = {
    "two use it": (True, lambda s: [s.use(0), s.use(1)]),
    "three use it": (True, lambda s: [s.use(0), s.use(1), s.use(2)]),
    "two begin it": (False, lambda s: [s.use(0), s.use(1)]),
    "one may time out": (True, lambda s: [s.use(0), s.use(1, 0.5, served=False), s.use(2)]),
    "one does not wait": (True, lambda s: [s.use(0), s.use(1, 0, served=False)]),
    "ended while one uses it": (True, lambda s: [s.use(0), s.end(1)]),
    "ended while two use it": (True, lambda s: [s.use(0), s.use(1), s.end(2)]),
    "ended twice while one uses it": (True, lambda s: [s.use(0), s.end(1), s.end(2)]),
    "expires while one uses it": (True, lambda s: [s.use(0), s.expire(1)]),
    "expires while two use it": (True, lambda s: [s.use(0), s.use(1), s.expire(2)]),
    "expires while it is ended": (True, lambda s: [s.end(0), s.expire(1), s.use(2)]),
}


LARGE = [pytest.mark.slow, pytest.mark.exhaustive]
SMALL = {
    "two use it", "two begin it", "one does not wait", "ended while one uses it",
    "expires while one uses it",
}  # fmt: skip


def explore(monkeypatch: pytest.MonkeyPatch, begun: bool, make: Make) -> int:
    monkeypatch.setattr(turnstile_module, "Waiter", SteppedWaiter)

    def run(choices: list[int]) -> Schedule:
        Watched.schedule = None
        stage = Stage(monkeypatch, begun)
        schedule = Schedule(choices, make(stage))
        Watched.schedule = schedule
        try:
            schedule.run()
            stage.check_end()
        except AssertionError as problem:
            raise Violation(f"{problem}; served {stage.served}; schedule {choices}") from problem
        finally:
            Watched.schedule = None
        return schedule

    return schedules(run)


@pytest.mark.parametrize(
    "name",
    [name if name in SMALL else pytest.param(name, marks=LARGE) for name in SCENARIOS],
)
def test_session_has_one_owner_and_forgets_nobody(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, make = SCENARIOS[name]
    assert explore(monkeypatch, begun, make) > 50


MUTANTS: dict[str, tuple[str, Any]] = {
    "who queues for what has ended is not told": (
        "ended while two use it",
        lambda patch: patch.setattr(Turnstile, "dismiss", lambda self, wants: None),
    ),
    "who comes when it has just ended does not look": (
        "ended while one uses it",
        lambda patch: patch.setattr(Turnstile, "_join", blind_join),
    ),
    "who claims an old one drops the new one": (
        "expires while it is ended",
        lambda patch: patch.setattr(Turnstile, "claim", careless_claim),
    ),
    "who gives back does not look at the line": (
        "two use it",
        lambda patch: patch.setattr(Turnstile, "publish", careless_publish),
    ),
}


def blind_join(self: Turnstile, waiter: Waiter, widens: bool) -> None:
    self.waiters[waiter.ticket] = waiter
    self._join_line(waiter)
    if self.closed:
        self._settle_closed(waiter)
    elif self.idle:
        self.pump(waiter.key)


def careless_publish(self: Turnstile, slot: Any, generation: Any) -> bool:
    return (
        self.current.get(slot) is generation and self.idle.setdefault(slot, generation) is not None
    )


def careless_claim(self: Turnstile, slot: Any, generation: Any) -> bool:
    found = self.idle.pop(slot, None)
    return found == generation and self.current.get(slot) == generation


@pytest.mark.parametrize("name", MUTANTS)
def test_model_finds_what_is_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these lines is needed: without it some schedule breaks a promise."""
    scenario, mutate = MUTANTS[name]
    mutate(monkeypatch)
    begun, make = SCENARIOS[scenario]
    with pytest.raises((Violation, KeyError)):
        explore(monkeypatch, begun, make)
