"""A call that ends each worker it is sent to ends three, and is told of as what it is."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import answers
from ears import wait_until
from minipool import CallTimeout, CheckoutTimeout, Pool, RetryPolicy, WorkerDied, WorkerError
from minipool.retry import Attempts
from workers import identity

LAST = 60.0


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


def assert_told(error: WorkerDied, count: int) -> None:
    """It tells how many workers died of the call, and of each how."""
    assert (error.tries, len(error.deaths)) == (count, count)
    assert all("by SIGKILL" in death for death in error.deaths)
    assert f"try {count} of {count}" in str(error) and f"{count} of these died" in str(error)
    assert str(error).count("(pid ") >= count
    assert f"(pid {error.pid})" in error.deaths[-1]
    assert len(set(error.deaths)) == count


@pytest.mark.parametrize("timeout", [None, LAST])
def test_three_workers_die_of_it_and_all_are_told(calls: Path, timeout: float | None) -> None:
    """By default, of an idempotent call; others are served all the while."""
    with Pool(size=2, call_timeout=timeout, checkout_timeout=LAST) as pool:
        over, served = threading.Event(), []

        def go_on() -> None:
            while not over.is_set() or not served:
                served.append(pool.call(identity, 1))

        other = threading.Thread(target=go_on)
        other.start()
        try:
            with pytest.raises(WorkerDied) as caught:
                pool.options(idempotent=True).call(answers.poison, str(calls))
        finally:
            over.set()
            other.join(LAST)
        assert_told(caught.value, 3)
        assert calls.stat().st_size == 3
        assert set(served) == {1}


def test_policy_s_last_error_tells_of_all_attempts(calls: Path) -> None:
    with Pool(size=1, retry=RetryPolicy(attempts=4, base=0.001)) as pool:
        with pytest.raises(WorkerDied) as caught:
            pool.options(idempotent=True, timeout=LAST).call(answers.poison, str(calls))
        assert_told(caught.value, 4)
        assert calls.stat().st_size == 4


def test_call_that_may_not_run_twice_tells_of_one_death(calls: Path) -> None:
    with Pool(size=1) as pool:
        with pytest.raises(WorkerDied) as caught:
            pool.call(answers.poison, str(calls))
        assert (caught.value.tries, len(caught.value.deaths)) == (1, 1)
        assert "try" not in str(caught.value).replace("retry", "")
        wait_until(pool, lambda: pool.stats().idle == 1)
        assert pool.stats().workers_lost == 1


@pytest.mark.parametrize("session", [None, "ada"])
def test_caller_that_gets_no_other_worker_is_told_of_the_death(
    calls: Path, session: str | None
) -> None:
    """And not that `size` is too small: the call is what ended the worker."""
    with Pool(size=1, lazy=True) as pool:
        assert pool.options(session=session).call(identity, 1) == 1
        fails = pool._desk and pool._desk.manager.fleet  # nobody is started any more
        assert fails is not None
        fails.not_before = float("inf")
        with pytest.raises(WorkerDied) as caught:
            pool.options(idempotent=True, timeout=1.0, session=session).call(
                answers.poison, str(calls)
            )
        assert (caught.value.started, caught.value.tries) == (True, 1)
        assert isinstance(caught.value.__cause__, CheckoutTimeout)
        assert calls.stat().st_size == 1


# -- what is told --------------------------------------------------------------------------------


def died(number: int) -> WorkerDied:
    return WorkerDied(f"worker {number} died", worker_id=number, deaths=(f"worker {number} died",))


def told(most: int, errors: list[Any]) -> WorkerError:
    attempts = Attempts(most)
    for error in errors:
        attempts.note(error)
    return attempts.told(errors[-1])


def test_one_attempt_is_told_as_it_was() -> None:
    error = told(3, [died(0)])
    assert (str(error), error.tries, error.deaths) == ("worker 0 died", 1, ("worker 0 died",))


def test_timeout_after_deaths_tells_of_them() -> None:
    error = told(3, [died(0), died(1), CallTimeout("late")])
    assert (error.tries, error.deaths) == (3, ("worker 0 died", "worker 1 died"))
    assert "try 3 of 3" in str(error) and "2 of these died (worker 0 died; worker 1" in str(error)


def test_attempts_within_an_attempt_count() -> None:
    """One may have been moved to other workers by itself, as it had not begun."""
    inner = told(3, [died(0), died(1)])
    error = told(2, [inner, died(2)])
    assert (error.tries, error.deaths) == (3, tuple(f"worker {n} died" for n in range(3)))


def test_very_many_attempts_are_told_of_in_few_words() -> None:
    error = told(1000, [died(number) for number in range(1000)])
    assert error.tries == 1000
    assert len(error.deaths) == 100
    assert "1000 of these died" in str(error) and len(str(error)) < 400
