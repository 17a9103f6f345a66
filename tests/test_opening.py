"""An opening that fails: it is known at once, everybody is told, and the next use tries again."""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest

from ears import Ear, handle_of, wait_until
from gates import Gate
from minipool import (
    CheckoutTimeout,
    CircuitBreaker,
    CircuitOpen,
    Pool,
    PoolClosed,
    PoolStartError,
    WorkerStartError,
)
from minipool.engine.desk import could_not_start
from minipool.engine.fleet import Fleet
from minipool.engine.launch import Launcher
from minipool.engine.verdict import Verdict, by_chance
from minipool.engine.wire import RemoteTraceback
from minipool.store import SQLiteStore
from troublemakers import (
    AllButOne,
    FailsSoOften,
    FailsWhileFileExists,
    KillsItselfInInit,
    OneOfThem,
    RaisesAfterTheGate,
)
from workers import Counter, RaisesAtStart
from wrecks import CrashesInInit

LAST = 20.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def managers() -> list[threading.Thread]:
    """Return the threads that manage a pool."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("minipool-pool")]


@pytest.fixture
def obstacle(tmp_path: Path) -> Path:
    """A file while which is there, FailsWhileFileExists cannot start."""
    path = tmp_path / "obstacle"
    path.touch()
    return path


# -- what a failed start says --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "exitcode", "chance"),
    [
        ({}, -signal.SIGSEGV, True),
        ({}, None, True),
        ({}, 3, False),
        ({}, 0, False),
        ({"ready_ns": 1}, 3, True),
        ({"killed_for": "not ready within 2 s"}, -signal.SIGKILL, False),
        ({"start_error": ValueError()}, -signal.SIGKILL, False),
    ],
)
def test_end_of_a_worker_that_may_have_been_bad_luck(
    words: Any, exitcode: int | None, chance: bool
) -> None:
    handle: Any = SimpleNamespace(
        **{"start_error": None, "killed_for": None, "ready_ns": 0, **words}
    )
    assert by_chance(handle, exitcode, None) is chance


@pytest.mark.parametrize(
    ("cause", "chance"),
    [
        (OSError(errno.EAGAIN, "no more processes"), True),
        (OSError(errno.ENOMEM, "no memory"), True),
        (OSError(errno.EMFILE, "no descriptors"), True),
        (OSError(errno.ENFILE, "no descriptors at all"), True),
        (OSError(errno.EACCES, "not allowed"), False),
        (EOFError(), False),
        (None, False),
    ],
)
def test_start_that_the_system_had_no_room_for(cause: BaseException | None, chance: bool) -> None:
    assert by_chance(None, None, cause) is chance


# -- what is known is told at once ---------------------------------------------------------------


def test_opening_fails_as_soon_as_one_of_its_workers_is_known_to_fail(tmp_path: Path) -> None:
    """The other one serves, no time limits it, and yet nobody waits."""
    pool = Pool(OneOfThem, args=(str(tmp_path / "first"),), size=2, init_timeout=None)
    with pytest.raises(PoolStartError, match="FileExistsError") as caught:
        pool.open()
    assert isinstance(caught.value.__cause__, FileExistsError)
    assert pool.closed and managers() == []


def test_opening_with_fewer_goes_on_with_what_serves(tmp_path: Path) -> None:
    pool = Pool(OneOfThem, args=(str(tmp_path / "first"),), size=2, init_timeout=None)
    ear = Ear(pool, "error")
    with pool.open(workers=1):
        ear.wait("error")
        assert pool.call("pid") == pool.call("pid")
        report = pool.health_check()
        assert report.status == "degraded" and "1 of 2 workers are in service" in report.reasons


def test_opening_with_fewer_waits_while_enough_may_still_come(tmp_path: Path, gate: Gate) -> None:
    """One has raised; the other is still in its constructor."""
    pool = Pool(AllButOne, args=(str(tmp_path / "first"), gate.path), size=2, init_timeout=None)
    ear = Ear(pool, "error")
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(pool.open, workers=1)
        ear.wait("error")
        gate.wait_arrived(2)  # the one that was tried again, too
        assert not opening.done()
        gate.open(2)
        opening.result(LAST).wait_ready(timeout=LAST)
    assert pool.stats().idle == 2
    pool.close()


def test_opening_with_fewer_counts_on_those_that_have_not_been_started(
    tmp_path: Path, gate: Gate
) -> None:
    """One of the first batch has raised; the batch is smaller than what is waited for."""
    args = (str(tmp_path / "first"), gate.path)
    pool = Pool(AllButOne, args=args, size=4, startup_batch=1, init_timeout=None)
    gate.open(4)
    pool.open(workers=3)
    assert pool.stats().start_failures == 1 and pool.stats().idle >= 3
    pool.close()


@pytest.mark.parametrize("size", [1, 2])
def test_deaths_by_signal_are_tried_again_while_opening(tmp_path: Path, size: int) -> None:
    with Pool(FailsSoOften, args=(str(tmp_path / "tries"), 2, "dies"), size=size) as pool:
        assert pool.stats().idle == size
        assert pool.stats().start_failures == 2
        assert pool.call("attempts") > 2


def test_death_by_signal_that_repeats_is_no_chance(tmp_path: Path) -> None:
    pool = Pool(KillsItselfInInit, size=1, init_timeout=None, breaker=False)
    ear = Ear(pool, "error")
    with pytest.raises(PoolStartError, match="by SIGKILL"):
        pool.open()
    assert len(ear.of("error")) == 5


def test_opening_fails_when_the_breaker_opens() -> None:
    pool = Pool(CrashesInInit, size=1, init_timeout=None, breaker=CircuitBreaker(failures=2))
    ear = Ear(pool, "error")
    with pytest.raises(PoolStartError, match="SIGSEGV") as caught:
        pool.open()
    assert isinstance(caught.value.__cause__, WorkerStartError)
    assert len(ear.of("error")) == 2


@pytest.mark.parametrize("workers", [0, 3, -1, True, 1.0])
def test_opening_refuses_what_is_no_number_of_its_workers(workers: Any) -> None:
    pool = Pool(Counter, size=2)
    with pytest.raises(ValueError, match=f"workers={workers!r}: give a number from 1 to 2"):
        pool.open(workers=workers)
    assert not pool.closed and "not open yet" in repr(pool)


def test_lazy_pool_opens_with_as_many_as_are_asked_for() -> None:
    with Pool(Counter, size=3, lazy=True).open(workers=2) as pool:
        assert (pool.stats().idle, pool.stats().size) == (2, 2)


def test_opening_again_does_nothing_to_a_pool_that_lacks_a_worker(obstacle: Path) -> None:
    obstacle.unlink()
    with Pool(FailsWhileFileExists, args=(str(obstacle),), size=2) as pool:
        ear = Ear(pool, "error")
        obstacle.touch()
        handle_of(pool, 1).kill()
        ear.wait("error", fits=lambda event: event.metadata["kind"] == "start")
        assert pool.open() is pool
        assert pool.call("pid") and not pool.closed


def test_opening_all_of_a_pool_that_serves_with_one_leaves_it_as_it_is(tmp_path: Path) -> None:
    pool = Pool(OneOfThem, args=(str(tmp_path / "first"),), size=2, init_timeout=None)
    pid = pool.call("pid")
    with pytest.raises(PoolStartError, match="goes on with 1 workers"):
        pool.open()
    assert pool.call("pid") == pid
    pool.close()


# -- an explicit opening whose workers fail closes -----------------------------------------------


@pytest.mark.parametrize("opened", [Pool.open, Pool.__enter__], ids=["open", "with"])
def test_closed_pool_that_could_not_start_says_why(opened: Callable[[Any], Any]) -> None:
    pool = Pool(RaisesAtStart, size=1)
    ear = Ear(pool, "pool.init", "pool.terminate")
    advice = r"no weights here; correct the worker's code that raised it \(.*\); open a new pool"
    with pytest.raises(PoolStartError, match=advice):
        opened(pool)
    assert pool.closed and managers() == []
    for use in (pool.open, lambda: pool.call("x"), pool.checkout, pool.wait_ready, pool.drain):
        with pytest.raises(PoolClosed, match=r"could not start: .*no weights here") as caught:
            use()
        assert isinstance(caught.value.__cause__, LookupError)
    report = pool.health_check()
    assert report.status == "unhealthy" and "no weights here" in report.reasons[1]
    assert "closed, could not start" in repr(pool) and "no weights here" in repr(pool)
    assert [event.name for event in ear.heard] == ["pool.init", "pool.terminate"]


def test_pool_that_may_have_no_thread_says_so_and_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is a PoolStartError, like all that keeps a pool down; no descriptor is left of it."""

    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = Pool(Counter, size=1, session_store=str(tmp_path / "store"))
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        with pytest.raises(PoolStartError, match=r"ulimit -u.*the next use tries again") as caught:
            pool.call("add")
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert len(os.listdir("/proc/self/fd")) == before
    with pool:
        assert pool.call("add") == 1


def test_step_that_fails_as_nothing_could_be_started_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first thing to be given back is refused; memory and descriptors are given back."""

    def fails(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    pool = Pool(Counter, size=1)
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        patch.setattr(Fleet, "_forget_frames", fails)
        with pytest.raises(PoolStartError):
            pool.open()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (EOFError("unexpected EOF"), "the fork server has ended"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (LookupError("no weights here"), "; correct what raised that; "),
        (PoolStartError("put it under the guard"), "did not start; x"),
        (WorkerStartError("it was killed; see why"), "did not start; x"),
    ],
    ids=["process", "server", "descriptor", "class", "refusal", "death"],
)
def test_remedy_fits_what_kept_a_worker_from_starting(cause: Exception, remedy: str) -> None:
    failure = WorkerStartError("worker 0 did not start")
    failure.__cause__ = cause
    assert remedy in str(could_not_start("p", failure, "x"))
    cause.__cause__ = RemoteTraceback("its traceback in the worker")
    assert "did not start; correct the worker's code that raised it (" in str(
        could_not_start("p", failure, "x")
    )


def test_remedy_for_a_name_that_a_worker_lacks_is_about_the_name() -> None:
    with pytest.raises(PoolStartError, match=r"correct that name, or the worker's code that"):
        Pool("workers:NoSuchClass", size=1).open()


def test_pool_closed_in_good_order_has_no_reason() -> None:
    with Pool(Counter, size=1) as pool:
        pass
    with pytest.raises(PoolClosed) as caught:
        pool.call("add")
    assert "could not start" not in str(caught.value) + repr(pool)
    assert len(pool.health_check().reasons) == 1


# -- a first use that fails does not -------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda pool: pool.call("pid"),
        lambda pool: pool.options(timeout=LAST).call("pid"),
        lambda pool: pool.checkout().release(),
        lambda pool: pool.create_session("ada"),
    ],
    ids=["call", "options", "checkout", "create_session"],
)
def test_first_use_that_fails_leaves_the_pool_unopened(
    obstacle: Path, use: Callable[[Any], Any]
) -> None:
    """Nothing of it is left; and when the obstacle is gone the next use succeeds."""
    pool = Pool(FailsWhileFileExists, args=(str(obstacle),), size=2)
    ear = Ear(pool, "pool.init", "pool.terminate")
    for _ in range(2):
        with pytest.raises(PoolStartError, match=r"is in the way.*; the next use tries again"):
            use(pool)
        assert not pool.closed and pool.workers() == [] and managers() == []
        assert "not open yet, could not start" in repr(pool) and "in the way" in repr(pool)
        assert "is in the way" in pool.health_check().reasons[1]
    obstacle.unlink()
    use(pool)
    assert pool.call("pid")
    pool.wait_ready(timeout=LAST)
    assert pool.health_check()[:2] == ("healthy", ())
    assert "could not start" not in repr(pool)
    pool.close()
    assert [event.name for event in ear.heard] == ["pool.init", "pool.terminate"]


def test_whoever_waits_for_an_opening_that_fails_gets_the_reason(gate: Gate) -> None:
    pool = Pool(RaisesAfterTheGate, args=(gate.path,), size=1, checkout_timeout=LAST)
    ear = Ear(pool, "queue.depth")
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(pool.call, "x")
        gate.wait_arrived()
        others = [threads.submit(pool.call, "x") for _ in range(5)]
        others += [threads.submit(pool.checkout, session="ada")]
        ear.wait("queue.depth", 6)
        gate.open()
        for waiter in (first, *others):
            error = waiter.exception(LAST)
            assert isinstance(error, PoolStartError) and "no weights here" in str(error)
            assert isinstance(error.__cause__, LookupError)
        errors = {id(waiter.exception()) for waiter in (first, *others)}
        assert len(errors) == 7, "one for each: its traceback is its own"
    assert not pool.closed


def test_opening_is_tried_again_behind_the_breaker(obstacle: Path) -> None:
    clock = Clock()
    breaker = CircuitBreaker(failures=2, clock=clock)
    pool = Pool(FailsWhileFileExists, args=(str(obstacle),), size=1, breaker=breaker)
    ear = Ear(pool, "error", "breaker.changed")
    for _ in range(2):
        with pytest.raises(PoolStartError):
            pool.call("pid")
    for _ in range(3):
        with pytest.raises(CircuitOpen, match="was not opened") as caught:
            pool.call("pid")
        assert "is in the way" in str(caught.value.__cause__)
    assert len(ear.of("error")) == 2 and managers() == []
    assert pool.breaker is breaker, "to ask for it opens nothing"
    clock.now = 30.0
    with pytest.raises(PoolStartError):
        pool.call("pid")  # the trial
    with pytest.raises(CircuitOpen):
        pool.call("pid")
    obstacle.unlink()
    breaker.reset()
    assert pool.call("pid")
    pool.close()


def test_breaker_of_the_pool_itself_outlives_an_opening(obstacle: Path) -> None:
    pool = Pool(FailsWhileFileExists, args=(str(obstacle),), size=1)
    for _ in range(5):
        with pytest.raises(PoolStartError):
            pool.call("pid")
    with pytest.raises(CircuitOpen):
        pool.call("pid")
    assert not pool.closed and pool.breaker is not None
    with pytest.raises(CircuitOpen):
        pool.open()
    assert not pool.closed, "nothing was tried, so nothing has failed"
    pool.breaker.reset()
    obstacle.unlink()
    with pool:
        assert pool.call("pid")


def test_store_of_the_users_own_outlives_an_opening_that_failed(
    obstacle: Path, tmp_path: Path
) -> None:
    store = SQLiteStore(str(tmp_path / "store.sqlite"))
    pool = Pool(FailsWhileFileExists, args=(str(obstacle),), size=1, session_store=store)
    with pytest.raises(PoolStartError):
        pool.checkout(session="ada")
    obstacle.unlink()
    with pool:
        pool.create_session("ada", {"a": 1})
        assert pool.session_state("ada") == {"a": 1}


@pytest.mark.parametrize("lacking", ["descriptors", "thread", "manager's thread"])
def test_store_of_the_users_own_outlives_an_opening_that_did_not_begin(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system lacks at the first use may be there at the next."""
    pool = Pool(Counter, size=1, session_store=SQLiteStore(str(tmp_path / "store.sqlite")))
    start, failed = threading.Thread.start, []

    def no_thread(thread: threading.Thread) -> None:
        if thread.name.endswith("housekeeping") == (lacking == "thread"):
            failed.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    def no_descriptors(launcher: object) -> None:
        failed.append(launcher)
        raise OSError("too many open files")

    with monkeypatch.context() as patch:
        if lacking == "descriptors":
            patch.setattr(Launcher, "open", no_descriptors)
        else:
            patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(PoolStartError):
            pool.checkout(session="ada")
    assert failed
    with pool:
        pool.create_session("ada", {"a": 1})
        assert pool.session_state("ada") == {"a": 1}


def test_close_from_a_listener_while_an_opening_is_given_up(tmp_path: Path, gate: Gate) -> None:
    """It comes from the manager's thread, while the caller waits for that thread to end."""
    pool = Pool(
        AllButOne, args=(str(tmp_path / "first"), gate.path), size=2,
        breaker=CircuitBreaker(failures=1),
    )  # fmt: skip
    ear = Ear(pool, "worker.terminate")
    pool.hooks["worker.terminate"].append(lambda *_: pool._failure is not None and pool.close())
    with pytest.raises(PoolStartError, match="the first one"):
        pool.call("pid")
    assert len(ear.heard) == 2 and pool.closed and managers() == []
    with pytest.raises(PoolClosed, match="the first one"):
        pool.call("pid")


def test_opening_without_waiting_goes_on_trying(obstacle: Path) -> None:
    with Pool(FailsWhileFileExists, args=(str(obstacle),), size=1).open(wait=False) as pool:
        ear = Ear(pool, "error")
        ear.wait("error")
        with pytest.raises(CheckoutTimeout) as caught:
            pool.checkout(timeout=0.05)
        assert "is in the way" in str(caught.value.__cause__)
        obstacle.unlink()
        wait_until(pool, lambda: pool.stats().idle == 1)


@pytest.mark.parametrize(
    ("left", "tried", "hope"),
    [
        ((), math.inf, 0),
        ((2,), 2, 1),  # started with the one that failed
        ((3,), 3, 0),  # in its place
        ((0, 7), 7, 1),  # one serves already
        ((), 1, 1),  # the other has not been started yet
    ],
)
def test_worker_that_boots_in_the_place_of_one_that_failed_is_no_hope(
    left: tuple[int, ...], tried: float, hope: int
) -> None:
    """Else a first use would go on as long as one of two is booting, which may be for ever."""
    assert Verdict(0.0, WorkerStartError("it raised"), left, tried).hope(2) == hope
