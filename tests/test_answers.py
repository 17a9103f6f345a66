"""What a worker answers is never taken for what happened to the worker, whatever its type."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any, Iterator

import pytest

import answers
from ears import Ear
from gates import Gate
from minipool import (
    CircuitBreaker,
    MinipoolError,
    Pool,
    PoolStartError,
    Programs,
    RetryPolicy,
    WorkerDied,
    WorkerError,
)
from workers import Counter, getpid, identity

LAST = 20.0


@pytest.fixture
def pool() -> Iterator[Pool[Any]]:
    with Pool(Counter, size=1) as opened:
        yield opened


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


def assert_unharmed(pool: Pool[Any], pid: int) -> None:
    """The one worker is the one it was, and nothing was counted against it."""
    stats = pool.stats()
    assert pool.call(getpid) == pid
    assert (stats.workers_lost, stats.faults) == (0, 0)


def test_answer_that_looks_like_a_fault_is_an_answer(pool: Pool[Any], calls: Path) -> None:
    """It runs once, says what it said, and its worker goes on; idempotent calls are no other."""
    pid = pool.call(getpid)
    for name, make in answers.ANSWERS.items():
        for caller in (pool, pool.options(idempotent=True, timeout=LAST)):
            with pytest.raises(type(make()), match=r"^mine$"):
                caller.call(answers.answer, str(calls), name)
            assert calls.stat().st_size == 1, name
            calls.unlink()
        with pool.checkout() as lease:
            for _ in range(2):
                with pytest.raises(type(make()), match=r"^mine$"):
                    lease.call(answers.answer, str(calls), name)
            assert lease.call(getpid) == pid
        calls.unlink()
    assert_unharmed(pool, pid)


def test_listeners_make_no_difference(pool: Pool[Any], calls: Path) -> None:
    ear = Ear(pool, "operation.start", "operation.exception")
    pid = pool.call(getpid)
    try:
        with pytest.raises(WorkerDied, match="mine"):
            pool.call(answers.answer, str(calls), "not begun")
    finally:
        for name in ("operation.start", "operation.exception"):
            pool.hooks[name].remove(ear)
    assert calls.stat().st_size == 1
    assert len(ear.of("operation.exception")) == 1
    assert_unharmed(pool, pid)


@pytest.mark.parametrize("affinity", ["prefer", "strict"])
def test_session_undoes_the_call_and_stays(pool: Pool[Any], calls: Path, affinity: str) -> None:
    with pool.session(f"of {affinity}", {"name": "Ada"}) as session:
        pid = session.call(getpid)
        for _ in range(2):  # the second time it has the worker warm
            with session.checkout(affinity=affinity) as lease:
                with pytest.raises(WorkerDied, match="mine"):
                    lease.call(answers.answer_in_session, str(calls), "not begun")
        assert calls.stat().st_size == 2
        assert session.state == {"name": "Ada"}
    assert_unharmed(pool, pid)


def test_worker_with_a_pool_of_its_own_outlives_the_death_in_it(calls: Path) -> None:
    """The inner worker's death arrives with its fields; the call runs once."""
    with Pool(size=1) as pool:
        pid = pool.call(getpid)
        with pytest.raises(WorkerDied) as caught:
            pool.call(answers.has_a_pool, str(calls))
        error = caught.value
        assert (error.signal, error.exitcode, error.started) == ("SIGKILL", -9, True)
        assert (error.tries, len(error.deaths)) == (1, 1)
        assert error.pid not in (None, pid)
        assert calls.stat().st_size == 1
        assert_unharmed(pool, pid)


def test_error_of_another_pool_out_of_a_signal_handler_is_no_fault(calls: Path, gate: Gate) -> None:
    """It says nothing of the worker that is waited for; the lease is left in mid-call."""

    def handler(signum: int, frame: Any) -> None:
        raise answers.ANSWERS["not begun"]()

    main, before = threading.main_thread().ident, signal.signal(signal.SIGUSR1, handler)
    assert main is not None

    def strike() -> None:
        gate.wait_arrived()
        signal.pthread_kill(main, signal.SIGUSR1)

    striker = threading.Thread(target=strike)
    try:
        with Pool(size=1) as pool:
            striker.start()
            with pytest.raises(WorkerDied, match=r"^mine$"):
                pool.options(idempotent=True).call(answers.stop_at, str(calls), gate.path)
            striker.join(20)
            assert pool.call(identity, 1) == 1
            assert pool.stats().faults == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert calls.stat().st_size == 1


# -- whoever else acts on errors -----------------------------------------------------------------


@pytest.mark.parametrize("retry_on", [WorkerError, MinipoolError, (WorkerError, KeyError)])
def test_policy_makes_no_call_again_for_an_answer(calls: Path, retry_on: Any) -> None:
    policy = RetryPolicy(attempts=3, base=0.001, retry_on=retry_on)
    with Pool(size=1, retry=policy) as pool:
        with pytest.raises(WorkerDied, match=r"^mine$"):
            pool.options(idempotent=True).call(answers.answer, str(calls), "not begun")
        assert calls.stat().st_size == 1
        calls.unlink()
        with pytest.raises(WorkerDied, match=r"^mine$"):
            pool.options(idempotent=True).call(answers.poison_once, str(calls))
        assert calls.stat().st_size == 2, "once more for the death, and not for the answer"


def test_policy_may_be_told_to_try_again_whatever_is_raised(calls: Path) -> None:
    with Pool(size=1, retry=RetryPolicy(attempts=3, base=0.001, retry_on=Exception)) as pool:
        with pytest.raises(WorkerDied, match=r"^mine$"):
            pool.options(idempotent=True).call(answers.answer, str(calls), "not begun")
        assert calls.stat().st_size == 3
        assert pool.stats().workers_started == 1


def test_breaker_counts_no_answer(pool: Pool[Any], calls: Path) -> None:
    breaker = CircuitBreaker(failures=1, failing_on=(MinipoolError,))
    for name in answers.ANSWERS:
        with pytest.raises(MinipoolError, match=r"^mine$"):
            breaker.call(pool.call, answers.answer, str(calls), name)
        assert (breaker.state, breaker.failures) == ("closed", 0), name


def test_breaker_counts_faults() -> None:
    breaker = CircuitBreaker(failures=1)
    with Pool(size=1) as pool, pytest.raises(WorkerDied):
        breaker.call(pool.call, answers.dies)
    assert breaker.state == "open"


def test_warm_up_goes_on_after_an_answer(pool: Pool[Any], calls: Path) -> None:
    report = pool.warm_up([(answers.answer, (str(calls), "not begun")), getpid])
    pid = pool.call(getpid)
    assert [len(command.failures) for command in report.commands] == [1, 0]
    assert_unharmed(pool, pid)


def test_program_that_raises_a_death_runs_once(calls: Path) -> None:
    with Pool(size=1) as pool:
        programs = Programs(pool)
        programs.create("mine", answers.Program, str(calls))
        with pytest.raises(WorkerDied, match="mine"):
            programs.execute("mine")
        assert calls.stat().st_size == 1
        assert pool.stats().workers_started == 1


@pytest.mark.parametrize("name", ["not begun", "closed", "start"])
def test_constructor_that_raises_an_error_of_ours_is_a_failed_start(name: str) -> None:
    with pytest.raises(PoolStartError, match="mine") as caught:
        Pool(answers.Raises, args=(name,), size=1).open()
    assert type(caught.value.__cause__) is type(answers.ANSWERS[name]())
