"""Events: each is really emitted, as documented; no listener can harm the pool."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from ears import Ear, Event, wait_until
from minipool import EVENTS, Hooks, Pool, SessionLost, WorkerDied
from minipool.errors import CheckoutTimeout, PoolClosed, PoolError, PoolStartError
from minipool.telemetry import INFO, WARNING, logger, span
from rogues import Stateful, raise_it
from workers import RaisesAtStart, identity

LAST = 20.0


def make(**options: Any) -> Pool[Stateful]:
    """A pool of one, whose manager looks round often."""
    return Pool(Stateful, **{"size": 1, "overflow_idle": 0.1, "close_timeout": LAST, **options})


# -- what is emitted -----------------------------------------------------------------------------


def names(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def check(event: Event, pool: Pool[Any]) -> None:
    """Compare one event with what EVENTS says of it."""
    _, measurements, metadata = EVENTS[event.name]
    assert set(event.measurements) == names(measurements), event
    assert set(event.metadata) == {"pool", *names(metadata)}, event
    assert event.metadata["pool"] == pool.config.name
    assert all(value >= 0 for value in event.measurements.values()), event


def just_open(pool: Pool[Stateful], ear: Ear) -> None:
    pool.open()


def call(pool: Pool[Stateful], ear: Ear) -> None:
    pool.call("add", 1)


def call_that_raises(pool: Pool[Stateful], ear: Ear) -> None:
    with pytest.raises(KeyError):
        pool.call(raise_it, "KeyError", "k")


def resize(pool: Pool[Stateful], ear: Ear) -> None:
    pool.open()
    pool.resize(2)


def probe(pool: Pool[Stateful], ear: Ear) -> None:
    pool.open()
    pool.health_check(probe=True)
    assert ear.of("worker.health_check")


def kill(pool: Pool[Stateful], ear: Ear) -> None:
    pool.open()
    os.kill(pool.workers()[0].pid or 0, signal.SIGKILL)
    ear.wait("recovery")


def queue(pool: Pool[Stateful], ear: Ear) -> None:
    pool.open()
    leases = [pool.checkout(timeout=LAST) for _ in range(pool.stats().size)]
    waiter = threading.Thread(target=lambda: pool.checkout(timeout=LAST).release())
    queued = threading.Event()
    pool.hooks["queue.depth"].append(
        lambda *event: queued.set() if threading.current_thread() is waiter else None
    )
    waiter.start()
    assert queued.wait(LAST)
    for lease in leases:
        lease.release()
    waiter.join(LAST)


def leak(pool: Pool[Stateful], ear: Ear) -> None:
    with pool.checkout():
        ear.wait("lease.leaked")


def talk(pool: Pool[Stateful], ear: Ear) -> None:
    pool.options(session="ada").call("add", 1)


def lose_the_worker(pool: Pool[Stateful], ear: Ear, affinity: str) -> None:
    pool.open()
    deaths = len(ear.of("recovery"))
    with pool.checkout(session="ada", affinity=affinity, timeout=LAST) as w:
        os.kill(w.call(os.getpid), signal.SIGKILL)
    ear.wait("recovery", deaths + 1)


def move(pool: Pool[Stateful], ear: Ear) -> None:
    lose_the_worker(pool, ear, "prefer")
    talk(pool, ear)


def lose(pool: Pool[Stateful], ear: Ear) -> None:
    lose_the_worker(pool, ear, "strict")
    with pytest.raises(SessionLost):
        pool.checkout(session="ada", affinity="strict", timeout=LAST)


def time_a_span(pool: Pool[Stateful], ear: Ear) -> None:
    with span(pool, "answer", {"user": 7}) as facts:
        facts["words"] = 3


def fail_in_a_span(pool: Pool[Stateful], ear: Ear) -> None:
    with pytest.raises(KeyError), span(pool, "answer"):
        raise KeyError("k")


def warm(pool: Pool[Stateful], ear: Ear) -> None:
    pool.warm_up([("add", (1,))], strategy="sequential")


def give_up_starting(pool: Pool[Stateful], ear: Ear) -> None:
    breaker = pool.open().breaker
    assert breaker is not None
    for permit in [breaker.permit() for _ in range(5)]:
        assert permit is not None
        permit.failed(OSError("no memory"))
    breaker.reset()


def close(pool: Pool[Stateful], ear: Ear) -> None:
    pool.open()
    pool.close()


# What makes a pool emit each event, and some of what it says then.
STORIES: dict[str, tuple[Callable[[Pool[Stateful], Ear], None], dict[str, Any]]] = {
    "pool.init": (just_open, {"size": 1}),
    "pool.terminate": (close, {}),
    "pool.resized": (resize, {"size": 2, "previous": 1}),
    "pool.warmup": (warm, {"workers": 1, "succeeded": 1, "strategy": "sequential"}),
    "worker.init": (just_open, {"worker_id": 0, "generation": 1}),
    "worker.checkout": (call, {"worker_id": 0, "generation": 1, "wait": 0.0}),
    "worker.checkin": (call, {"worker_id": 0, "generation": 1}),
    "worker.terminate": (kill, {"worker_id": 0, "generation": 1, "calls": 0, "exitcode": -9}),
    "worker.health_check": (probe, {"worker_id": 0, "healthy": True, "failures": 0}),
    "operation.start": (call, {"worker_id": 0, "target": "add"}),
    "operation.stop": (call, {"worker_id": 0, "target": "add"}),
    "operation.exception": (call_that_raises, {"worker_id": 0, "target": "rogues:raise_it"}),
    "queue.depth": (queue, {"depth": 1}),
    "utilization": (just_open, {"workers": 1}),
    "error": (kill, {"kind": "death", "worker_id": 0}),
    "recovery": (kill, {"worker_id": 0, "generation": 2}),
    "breaker.changed": (give_up_starting, {"state": "open", "failures": 5}),
    "session.bound": (talk, {"session": "ada", "version": 0, "worker_id": 0}),
    "session.moved": (move, {"session": "ada", "version": 0}),
    "session.lost": (lose, {"session": "ada", "version": 0, "reason": "its worker died"}),
    "lease.leaked": (leak, {"worker_id": 0}),
    "span.start": (time_a_span, {"span": "answer", "facts": {"user": 7}}),
    "span.stop": (time_a_span, {"span": "answer", "facts": {"user": 7, "words": 3}}),
    "span.exception": (fail_in_a_span, {"span": "answer", "facts": {}}),
}
MANY = {"utilization"}  # told at every look


def test_every_event_has_a_story() -> None:
    """An event added to the list without a story that emits it fails here."""
    assert set(STORIES) == set(EVENTS)


@pytest.mark.parametrize("name", EVENTS)
def test_event_is_emitted_as_documented(name: str) -> None:
    """A real pool emits it once, with exactly the measurements and metadata that EVENTS tells."""
    story, said = STORIES[name]
    pool = make(leak_warn_after=0.05)
    ear = Ear(pool)

    def fits(event: Event) -> bool:
        told = {**event.measurements, **event.metadata}
        return all(told[key] == value for key, value in said.items())

    with pool:
        story(pool, ear)
        ear.wait(name, fits=fits)

    for heard in ear.heard:
        check(heard, pool)
    if name not in MANY:
        assert sum(fits(event) for event in ear.of(name)) == 1, ear.of(name)


def test_pids_and_errors_are_those_of_the_pool() -> None:
    """Metadata lead to the very process and the very exception."""
    pool = make()
    ear = Ear(pool)

    with pool, pool.checkout() as w:
        pid = w.pid
        with pytest.raises(KeyError) as caught:
            w.call(raise_it, "KeyError", "k")

    for name in ("worker.init", "worker.checkout", "worker.checkin", "worker.terminate"):
        assert [event.metadata["pid"] for event in ear.of(name)] == [pid], name
    assert ear.of("operation.exception")[0].metadata["error"] is caught.value


def test_failed_start_is_an_error_event() -> None:
    """Listeners hear of a worker that cannot start, with the reason."""
    pool = Pool(RaisesAtStart, size=1)
    ear = Ear(pool, "error")

    with pytest.raises(PoolStartError):
        pool.open()

    event = ear.wait("error")
    check(event, pool)
    assert event.metadata["kind"] == "start"
    assert isinstance(event.metadata["error"].__cause__, LookupError)


def test_dropped_lease_is_a_leak_event() -> None:
    """Not only a lease that is late but one that is lost is heard of."""
    pool = make()
    ear = Ear(pool, "lease.leaked")

    with pool:
        with pytest.warns(ResourceWarning, match="dropped"):
            pool.checkout()

    check(ear.wait("lease.leaked"), pool)


def test_call_made_again_elsewhere_tells_who_did_it(tmp_path: Path) -> None:
    """After a recovery operation.stop names the worker that answered, not the dead one."""
    pool = make(size=2)
    ear = Ear(pool, "operation.stop", "worker.checkout")

    with pool:
        pool.options(idempotent=True).call("die_unless_there", str(tmp_path / "there"))

    first, second = (event.metadata["pid"] for event in ear.of("worker.checkout"))
    assert first != second
    by = ear.of("worker.checkout")[1].metadata["worker_id"]
    assert ear.wait("operation.stop").metadata["worker_id"] == by


def test_counts_are_exact_under_32_threads_and_kills() -> None:
    """Nothing is told twice, or not at all: what was heard adds up to what the pool counted."""
    pool = make(size=3, checkout_timeout=LAST)
    ear = Ear(pool)
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        for turn in range(12):
            try:
                with pool.checkout() as w:
                    w.call("add", 1)
                    if number % 8 == 0 and turn % 4 == 1:
                        os.kill(w.pid or 0, signal.SIGKILL)
                        with pytest.raises(WorkerDied):
                            w.call("add", 1)
            except BaseException as error:
                wrong.append(error)

    with pool:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LAST)
        wait_until(pool, lambda: pool.stats().idle == 3)
    stats = pool.stats()

    assert not wrong
    heard = {name: len(ear.of(name)) for name in EVENTS}
    assert heard["operation.stop"] == stats.calls == 32 * 12
    assert heard["operation.exception"] == stats.faults == 4 * 3
    assert heard["operation.start"] == 32 * 12 + 4 * 3
    assert heard["worker.checkout"] == heard["worker.checkin"] == stats.leases
    assert heard["queue.depth"] == stats.queued
    assert heard["worker.init"] == stats.workers_started == heard["worker.terminate"]
    assert heard["error"] == heard["recovery"] == stats.workers_lost == 4 * 3
    assert sum(e.measurements["calls"] for e in ear.of("worker.terminate")) == stats.calls


def test_two_pools_never_mix() -> None:
    """Each pool's listeners hear of that pool, its processes and its sessions, and of no other."""
    pools = make(size=2, name="one"), make(size=2, name="other")
    ears = [Ear(pool) for pool in pools]

    with pools[0], pools[1]:
        threads = [
            threading.Thread(target=lambda p=pool, n=n: p.options(session=f"s{n}").call("add", 1))
            for pool in pools
            for n in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LAST)
        kill(pools[0], ears[0])

    pids = [{e.metadata["pid"] for e in ear.heard if "pid" in e.metadata} for ear in ears]
    assert [{e.metadata["pool"] for e in ear.heard} for ear in ears] == [{"one"}, {"other"}]
    assert len(pids[0]) == 3 and len(pids[1]) == 2 and not pids[0] & pids[1]
    assert [len(ear.of("operation.stop")) for ear in ears] == [16, 16]
    assert [len(ear.of("recovery")) for ear in ears] == [1, 0]


@pytest.mark.parametrize("name", ["worker.checkout", "operation.start", "operation.stop",
                                  "worker.checkin", "utilization"])  # fmt: skip
def test_listener_that_blocks_holds_up_its_own_thread_only(name: str) -> None:
    """One caller, or the manager, is stuck in a listener: every other caller is served."""
    pool = make(size=2)
    entered, leave = threading.Event(), threading.Event()

    def block_once(*event: Any) -> None:
        if not entered.is_set():
            entered.set()
            leave.wait(LAST)

    with pool:
        pool.hooks[name].append(block_once)
        stuck = threading.Thread(target=lambda: pool.call("add", 1))
        stuck.start()
        assert entered.wait(LAST)
        try:
            for _ in range(20):
                assert pool.call(identity, 1) == 1
        finally:
            leave.set()
        stuck.join(LAST)
    assert pool.hooks[name] == [block_once]


# -- the lists -----------------------------------------------------------------------------------


def test_unknown_name_is_a_key_error_that_lists_all() -> None:
    """A misspelt event fails where it is written, instead of never being heard."""
    hooks = Hooks("p")

    with pytest.raises(KeyError, match=r"there are: pool\.init"):
        hooks["worker.innit"].append(print)
    with pytest.raises(KeyError):
        hooks.emit("worker.innit")


@pytest.mark.logs_errors
def test_listener_that_raises_is_logged_once_and_removed(caplog: Any) -> None:
    """The others still hear; the pool goes on; the broken one is not called again."""
    hooks = Hooks("p")
    heard = []

    def broken(*event: Any) -> None:
        heard.append("broken")
        raise ZeroDivisionError("gauge")

    hooks["pool.init"] += [broken, lambda *event: heard.append("well")]
    with caplog.at_level(logging.ERROR, "minipool"):
        hooks.emit("pool.init", {"size": 1})
        hooks.emit("pool.init", {"size": 1})

    assert heard == ["broken", "well", "well"]
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "broken" in errors[0].getMessage()
    assert errors[0].exc_info[0] is ZeroDivisionError


def test_listener_may_remove_itself() -> None:
    """Who wants to hear once says so by leaving; nobody is skipped for it."""
    hooks = Hooks("p")
    heard = []

    def once(*event: Any) -> None:
        heard.append("once")
        hooks["pool.init"].remove(once)

    hooks["pool.init"] += [once, lambda *event: heard.append("always")]
    hooks.emit("pool.init")
    hooks.emit("pool.init")

    assert heard == ["once", "always", "always"]


@pytest.mark.logs_errors
def test_listeners_that_all_raise_harm_no_call(caplog: Any) -> None:
    """Every event's listener broken: the pool opens, serves, replaces and closes as ever."""
    pool = make(leak_warn_after=0.05)
    ear = Ear(pool)  # hears first, then the broken one raises

    def broken(*event: Any) -> None:
        raise ZeroDivisionError

    for listeners in pool.hooks.values():
        listeners.append(broken)
    with pool:
        assert pool.call("add", 1) == 1
        kill(pool, ear)
        leak(pool, ear)
        assert pool.call("add", 2) == 2

    caplog.clear()  # its records hold tracebacks, and those the workers
    still = [name for name in pool.hooks if broken in pool.hooks[name]]
    assert set(still) == set(EVENTS) - {event.name for event in ear.heard}
    assert not {"worker.init", "worker.checkout", "operation.stop", "error"} & set(still)


# -- calling back --------------------------------------------------------------------------------


class CallsBack:
    """Uses the pool from every one of its events, but not from within itself."""

    def __init__(self, pool: Pool[Any]) -> None:
        self.pool = pool
        self.within = threading.local()
        self.done: set[str] = set()
        self.served = 0
        self.wrong: list[BaseException] = []

    def __call__(self, name: str, measurements: Any, metadata: Any) -> None:
        if getattr(self.within, "it", False):
            return
        self.within.it = True
        try:
            self._use()
            self.done.add(name)
        except BaseException as error:
            self.wrong.append(error)
        finally:
            self.within.it = False

    def _use(self) -> None:
        pool = self.pool
        assert pool.stats().name == pool.config.name
        assert isinstance(repr(pool), str)
        pool.workers(), pool.health_check()
        try:
            with pool.checkout(timeout=0) as w:
                w.call(identity, 1)
                self.served += 1
        except (CheckoutTimeout, PoolClosed):
            pass


@pytest.mark.parametrize("name", EVENTS)
def test_listener_that_uses_the_pool_harms_nothing(name: str) -> None:
    """In the caller's thread and in the manager's: checkout, call, stats, repr, health_check."""
    pool = make(size=2, leak_warn_after=0.05)
    back = CallsBack(pool)
    pool.hooks[name].append(back)
    ear = Ear(pool)  # after `back`, so that what was heard has been dealt with

    with pool:
        STORIES[name][0](pool, ear)
        if name != "pool.terminate":
            ear.wait(name)
            wait_until(pool, lambda: pool.stats().idle == pool.stats().size)
            assert pool.call("show") == ((), {})

    ear.wait(name)
    assert not back.wrong
    assert back.done == {name}
    assert back in pool.hooks[name], "it raised and was removed"
    assert pool.stats().workers == 0


@pytest.mark.parametrize(
    "name",
    ["operation.start", "operation.stop", "worker.checkout", "worker.checkin",
     "worker.init", "worker.health_check", "pool.init", "pool.terminate"],
)  # fmt: skip
def test_listener_may_close_the_pool(name: str) -> None:
    """close() from a listener ends the pool, whichever thread it runs in, and blocks nobody."""
    pool = make(close_timeout=0.2)
    pool.hooks[name].append(lambda *event: pool.close())
    ended = Ear(pool, "pool.terminate")

    try:
        pool.open()
        pool.call("add", 1)
        pool.health_check(probe=True)
        pool.close()
    except (PoolError, PoolStartError):
        pass
    except Exception as error:  # the lease that was open when its listener closed the pool
        assert type(error).__name__ == "LeaseRevoked"

    ended.wait("pool.terminate")
    assert pool.closed
    assert pool.stats().workers == 0
    with pytest.raises(PoolClosed):
        pool.call("add", 1)


@pytest.mark.parametrize("name", ["worker.checkout", "worker.checkin"])
def test_slow_listener_does_not_make_its_worker_look_lost(name: str) -> None:
    """The manager looks round several times while a lease's listener is busy, and keeps it."""
    pool = make(lease_timeout=60.0)
    looks = Ear(pool, "utilization")
    pool.hooks[name].append(lambda *event: looks.wait("utilization", len(looks.heard) + 5))

    with pool:
        with pool.checkout() as w:
            pid = w.pid
            w.call("add", 1)
        with pool.checkout() as w:
            assert (w.pid, w.call("get")) == (pid, 1)
        assert pool.hooks[name]
        assert pool.stats().workers_lost == 0


# -- locks ---------------------------------------------------------------------------------------


class NeedsEveryLock:
    """From each event, lets *another* thread do what takes each lock of the pool."""

    def __init__(self, pool: Pool[Any]) -> None:
        self.pool = pool
        self.stuck: list[str] = []
        self.seen: set[str] = set()

    def __call__(self, name: str, measurements: Any, metadata: Any) -> None:
        if threading.current_thread().name == "needs-locks":
            return
        self.seen.add(name)
        other = threading.Thread(target=self._take_all, name="needs-locks", daemon=True)
        other.start()
        other.join(10)
        if other.is_alive():
            self.stuck.append(name)

    def _take_all(self) -> None:
        pool = self.pool
        try:
            pool.open(wait=False)
        except PoolError:
            pass
        desk = pool._desk
        assert desk is not None
        desk.manager.wait_for(lambda: True, 5)
        for handle in tuple(desk.manager.fleet.handles.values()):
            if handle.process is not None:
                handle.process.exitcode(0)
        try:
            pool.checkout(timeout=0).release()
        except (CheckoutTimeout, PoolClosed):
            pass


@pytest.fixture
def watched() -> Iterator[tuple[Pool[Stateful], Ear, NeedsEveryLock]]:
    pool = make(leak_warn_after=0.05)
    watch = NeedsEveryLock(pool)
    for listeners in pool.hooks.values():
        listeners.append(watch)
    yield pool, Ear(pool), watch
    pool.terminate()


def test_no_listener_runs_under_a_lock(
    watched: tuple[Pool[Stateful], Ear, NeedsEveryLock],
) -> None:
    """While a listener runs, any other thread can use all of the pool."""
    pool, ear, watch = watched

    stories = dict.fromkeys(story for story, _ in STORIES.values() if story is not close)
    with pool:
        for story in sorted(stories, key=lambda story: story is resize):
            story(pool, ear)
        ear.wait("utilization")
    ear.wait("pool.terminate")

    assert watch.seen == set(EVENTS)
    assert not watch.stuck


def test_what_cannot_be_logged_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where `logging` cannot be imported: what would be shown, and nothing else."""
    monkeypatch.setitem(sys.modules, "logging", None)
    log = logger()
    log.log(INFO, "%s is not shown", "this")
    log.log(WARNING, "%s is", "that")
    log.warning("so is %d", 1)
    try:
        raise ValueError("of this kind")
    except ValueError:
        log.exception("and an error")
    written = capsys.readouterr().err
    assert written.startswith("that is\nso is 1\nand an error\nTraceback")
    assert written.endswith("ValueError: of this kind\n")
