"""Overload: more calls than can be made in time are refused in the line, and cost no worker.

The tests hold workers at a gate and set the clock forward; what calls took so far is written into
the table, as their callers would have done.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Iterator

import pytest

from ears import wait_until
from gates import Gate, pass_gate
from minipool import (
    CheckoutTimeout,
    Pool,
    Programs,
    RetryPolicy,
    WorkerDied,
    deadline,
    lease,
    views,
    warmup,
)
from minipool.engine import table as t
from minipool.engine.pace import MOST, Pace
from rogues import kill_self
from workers import identity

LONG = 100.0  # seconds that checkout and call have together; far longer than any test takes


class Counts:
    """A program."""

    def execute(self) -> int:
        return 1


class Clock:
    """Stands in for the module `time`; can be set forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def time(self) -> float:
        return time.time()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (deadline, lease, views, warmup):
        monkeypatch.setattr(module, "time", made)
    return made


def open_pool(clock: Clock, **options: Any) -> Pool[Any]:
    pool: Pool[Any] = Pool(**{"size": 1, **options}).open()
    manager = pool._desk.manager  # type: ignore[union-attr]
    pool._desk.pace = Pace(manager.fleet.counted_rows, clock.monotonic)  # type: ignore[union-attr]
    return pool


@pytest.fixture
def pool(clock: Clock) -> Iterator[Pool[Any]]:
    with open_pool(clock) as opened:
        yield opened


def calls_took(pool: Pool[Any], seconds: float, calls: int = 100_000) -> None:
    """Have so many calls been made, each of which took so long."""
    handles = pool._desk.manager.fleet.handles  # type: ignore[union-attr]
    handles[0].row[t.CALL_TIMES + t.bucket(int(seconds * 1e9))] += calls


class Caller:
    """A thread that makes one call, and what came of it."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call, args), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[..., Any], args: Any) -> None:
        try:
            self.result = call(*args)
        except BaseException as error:
            self.error = error

    def join(self) -> Caller:
        self._thread.join(20)
        assert not self._thread.is_alive(), "it waits still"
        return self


def wait_queued(pool: Pool[Any], count: int) -> None:
    waiters = pool._desk.manager.turnstile.waiters  # type: ignore[union-attr]
    wait_until(pool, lambda: len(waiters) >= count)


def unharmed(pool: Pool[Any]) -> None:
    stats = pool.stats()
    assert (stats.workers_lost, stats.faults, stats.discarded) == (0, 0, 0)


# -- the line ------------------------------------------------------------------------------------


def test_overloaded_pool_serves_as_much_as_it_can_and_kills_nobody(
    clock: Clock, gate: Gate
) -> None:
    """Two workers, calls of ten seconds, forty callers with a hundred seconds each.

    At 0, 10, ... 80 seconds two calls begin. One that would begin at 90 cannot end in time.
    """
    with open_pool(clock, size=2) as pool:
        call = pool.options(timeout=LONG).call
        callers = [Caller(call, pass_gate, gate.path) for _ in range(40)]
        wait_queued(pool, 38)
        for _ in range(9):
            gate.wait_arrived(2)
            clock.ahead += 10.0
            calls_took(pool, 10.0)
            gate.open(2)
        for caller in callers:
            caller.join()
        refused = [caller.error for caller in callers if caller.error is not None]
        assert len(callers) - len(refused) == 18
        for error in refused:
            assert isinstance(error, CheckoutTimeout)
            assert error.needed >= 10.0
            assert error.timeout == LONG
        unharmed(pool)
        assert pool.stats().checkout_timeouts == 22


@pytest.mark.parametrize("session", [None, "ada"])
def test_worker_that_comes_too_late_is_given_back(
    clock: Clock, pool: Pool[Any], session: str | None
) -> None:
    lease = pool.checkout(session=session)
    late = Caller(pool.options(timeout=LONG, session=session).call, identity, 1)
    line = pool._sessions._line if session else pool._desk.manager.turnstile  # type: ignore[union-attr]
    wait_until(pool, lambda: bool(line.waiters))
    calls_took(pool, 10.0)  # of which nothing was known when the line was joined
    clock.ahead = 95.0
    lease.release()
    error = late.join().error
    assert isinstance(error, CheckoutTimeout)
    assert 10.0 <= error.needed < 12.0
    for words in ("not sent", "100.0 s", f"{error.needed:.3g} s lately", "raise `size`"):
        assert words in str(error)
    unharmed(pool)
    assert pool.options(timeout=LONG, session=session).call(identity, 2) == 2


@pytest.mark.parametrize("session", [None, "ada"])
def test_line_is_left_when_the_rest_is_too_little(pool: Pool[Any], session: str | None) -> None:
    calls_took(pool, 99.0)
    with pool.checkout(session=session):
        with pytest.raises(CheckoutTimeout, match="would have come too late") as caught:
            pool.options(timeout=0.2, session=session).call(identity, 1)
        assert caught.value.needed == pytest.approx(MOST * 0.2)
        assert caught.value.timeout == 0.2
    unharmed(pool)


def test_line_is_not_left_sooner_without_a_timeout_for_both(pool: Pool[Any]) -> None:
    """`checkout_timeout` and `call_timeout` are each for one of the two."""
    calls_took(pool, 99.0)
    with pool.checkout() as w:
        with pytest.raises(CheckoutTimeout) as caught:
            pool.checkout(timeout=0.05)
        assert caught.value.needed == 0
        assert w.options(timeout=20.0).call(identity, 1) == 1


def test_call_that_did_not_wait_is_sent_with_all_of_its_time(pool: Pool[Any]) -> None:
    calls_took(pool, 99.0)
    assert pool.options(timeout=20.0).call(identity, 1) == 1
    assert pool.options(timeout=20.0, session="ada").call(identity, 2) == 2


def test_first_calls_are_sent_whatever_is_left(clock: Clock, pool: Pool[Any]) -> None:
    """Nothing is known of them, and nothing would ever be."""
    lease = pool.checkout()
    caller = Caller(pool.options(timeout=LONG).call, identity, 1)
    wait_queued(pool, 1)
    clock.ahead = 70.0
    lease.release()
    assert caller.join().result == 1


def test_call_without_any_time_left_is_never_sent(clock: Clock, pool: Pool[Any]) -> None:
    lease = pool.checkout()
    caller = Caller(pool.options(timeout=LONG).call, identity, 1)
    wait_queued(pool, 1)
    clock.ahead = 101.0
    lease.release()
    assert isinstance(caller.join().error, CheckoutTimeout)
    unharmed(pool)


def test_time_that_opening_the_pool_took_ends_no_worker(clock: Clock) -> None:
    """The first use opens the pool, which takes as long as it takes."""
    pool: Pool[Any] = Pool(size=1)
    pool.hooks["worker.init"].append(lambda *_: setattr(clock, "ahead", 101.0))
    with pytest.raises(CheckoutTimeout, match=r"0 s of the 100\.0 s"):
        pool.options(timeout=LONG).call(identity, 1)
    unharmed(pool)
    pool.close()


# -- what is made again --------------------------------------------------------------------------


def die_idle(pool: Pool[Any], slot: int) -> None:
    """Kill a worker that is leased and does nothing, and wait for its end."""
    handle = pool._desk.manager.fleet.handles[slot]  # type: ignore[union-attr]
    handle.kill()
    assert handle.process.exitcode(20) is not None


def test_call_that_had_not_begun_is_not_made_again_when_it_is_too_late(clock: Clock) -> None:
    with open_pool(clock, size=2) as pool:
        calls_took(pool, 99.0)
        with pool.checkout() as w:
            die_idle(pool, w.worker_id)
            pid, clock.ahead = w.pid, 15.0
            with pytest.raises(WorkerDied) as caught:
                w.options(timeout=LONG).call(identity, 1)
            assert (caught.value.started, caught.value.tries) == (False, 1)
            assert w.pid == pid, "and no other worker was taken for it"
        assert pool.stats().workers_lost <= 1


def test_call_that_is_too_late_is_not_tried_again(clock: Clock, gate: Gate) -> None:
    policy = RetryPolicy(attempts=3, base=0.0, retry_on=(WorkerDied,))
    with open_pool(clock, size=1, retry=policy) as pool:
        calls_took(pool, 10.0)
        caller = Caller(pool.options(idempotent=True, timeout=LONG).call, pass_gate, gate.path)
        gate.wait_arrived()
        clock.ahead = 95.0
        die_idle(pool, 0)
        assert isinstance(caller.join().error, WorkerDied)
        wait_until(pool, lambda: pool.stats().idle == 1)
        assert pool.stats().workers_started == 2, "no attempt was made on the second one"


def test_program_that_waited_too_long_is_not_run(clock: Clock) -> None:
    with open_pool(clock) as pool:
        programs = Programs(pool)
        programs.create("count", Counts)
        calls_took(pool, 10.0)
        lease = pool.checkout(session=programs.session)
        late = Caller(lambda: programs.execute("count", timeout=LONG))
        wait_until(pool, lambda: bool(pool._sessions._line.waiters))
        clock.ahead = 95.0
        lease.release()
        error = late.join().error
        assert isinstance(error, CheckoutTimeout) and error.needed >= 10.0
        unharmed(pool)


def test_warm_up_whose_time_is_over_harms_no_worker(clock: Clock, pool: Pool[Any]) -> None:
    lease = pool.checkout()
    report = Caller(lambda: pool.warm_up([(identity, (1,))], timeout=LONG))
    wait_queued(pool, 1)
    calls_took(pool, 10.0)
    clock.ahead = 95.0
    lease.release()
    result = report.join().result
    assert (result.complete, result.succeeded) == (False, 0)
    unharmed(pool)


# -- how often -----------------------------------------------------------------------------------


class Slaughter:
    """Kills every worker as it is taken, so that no call ever begins."""

    def __init__(self, pool: Pool[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.killed = 0
        desk_type = type(pool._desk)
        acquire = desk_type.acquire

        def acquire_and_kill(desk: Any, *args: Any) -> Any:
            handle = acquire(desk, *args)
            handle.kill()
            assert handle.process.exitcode(20) is not None
            self.killed += 1
            return handle

        monkeypatch.setattr(desk_type, "acquire", acquire_and_kill)


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("session", [None, "ada"])
def test_call_that_never_begins_is_made_three_times_in_all(
    monkeypatch: pytest.MonkeyPatch, timeout: float | None, session: str | None
) -> None:
    with Pool(size=3, call_timeout=timeout, checkout_timeout=20.0) as pool:
        pool.wait_ready()
        slaughter = Slaughter(pool, monkeypatch)
        with pytest.raises(WorkerDied, match="try 3 of 3") as caught:
            with pool.checkout(session=session) as w:
                w.call(identity, 1)
        assert (caught.value.started, caught.value.tries, slaughter.killed) == (False, 3, 3)
        monkeypatch.undo()
        assert pool.options(timeout=20.0, session=session).call(identity, 1) == 1


def test_idempotent_call_that_kills_its_workers_kills_three() -> None:
    with Pool(size=3, call_timeout=None, checkout_timeout=20.0) as pool:
        with pytest.raises(WorkerDied) as caught:
            pool.options(idempotent=True).call(kill_self)
        assert (caught.value.started, caught.value.tries) == (True, 3)
        wait_until(pool, lambda: pool.stats().idle == 3)
        assert pool.stats().workers_lost == 3
