"""What a worker answers, and what happens to a worker, are not taken for each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import answers
from ears import Ear
from minipool import CircuitBreaker, Pool, Programs, RemoteError, RetryPolicy, WorkerDied
from minipool.engine import traces

LAST = 60.0  # seconds in which a call ends, also on a machine that is very busy


def pids(pool: Pool[Any]) -> list[int | None]:
    return sorted(info.pid or 0 for info in pool.workers())


# -- errors of minipool that a call raises -------------------------------------------------------


@pytest.mark.parametrize("started", [False, True], ids=["not started", "started"])
@pytest.mark.parametrize("idempotent", [False, True], ids=["once", "idempotent"])
@pytest.mark.parametrize("retry", [None, 3])
def test_an_error_of_minipool_that_a_call_raises_is_an_answer(
    started: bool, idempotent: bool, retry: int | None, tmp_path: Path
) -> None:
    """It is about another worker: the call has run once, and its own worker is well."""
    runs = tmp_path / "runs"
    with Pool(size=2, retry=retry, call_timeout=LAST) as pool:
        before = pids(pool)
        view = pool.options(idempotent=idempotent)
        with pytest.raises(WorkerDied, match="of an inner pool") as caught:
            view.call(answers.raise_worker_died, str(runs), started)
        assert caught.value.answered
        assert (caught.value.started, caught.value.exitcode) == (started, 7)
        assert runs.read_text() == "1"
        assert pids(pool) == before and pool.stats().workers_lost == 0


def test_a_bare_worker_died_is_an_answer_too() -> None:
    """It has none of the fields that ours have."""
    with Pool(size=1, call_timeout=LAST) as pool:
        with pytest.raises(WorkerDied, match=r"^bare$"):
            pool.call(answers.raise_bare)
        ear = Ear(pool, "operation.exception")  # from here on calls are observed
        with pool.checkout() as lease:
            with pytest.raises(WorkerDied, match=r"^bare$"):
                lease.call(answers.raise_bare)
            assert lease.call(abs, -1) == 1  # its lease goes on
        assert len(ear.of("operation.exception")) == 1


def test_the_death_of_a_worker_of_an_inner_pool_leaves_the_outer_one_alone() -> None:
    with Pool(size=1, call_timeout=LAST) as pool:
        before = pids(pool)
        with pytest.raises(WorkerDied) as caught:
            pool.options(idempotent=True).call(answers.lose_an_inner_worker)
        assert caught.value.answered and caught.value.exitcode == 7
        assert pids(pool) == before


def test_a_real_death_is_no_answer() -> None:
    with Pool(size=1, call_timeout=LAST) as pool, pytest.raises(WorkerDied) as caught:
        pool.call(os._exit, 3)
    assert not caught.value.answered


def test_a_warm_up_that_raises_an_error_of_minipool_goes_on_with_its_worker() -> None:
    with Pool(size=1, call_timeout=LAST) as pool:
        report = pool.warm_up([answers.raise_bare, (abs, (-1,))])
        assert [each.succeeded for each in report.commands] == [0, 1]
        assert pool.stats().workers_lost == 0


def test_a_breaker_counts_no_answer_as_a_failure() -> None:
    breaker = CircuitBreaker(failures=1)
    with Pool(size=1, call_timeout=LAST) as pool:
        with pytest.raises(WorkerDied):
            breaker.call(pool.call, answers.raise_bare)
        assert breaker.call(pool.call, abs, -1) == 1
        with pytest.raises(WorkerDied):
            breaker.call(pool.call, os._exit, 3)
    assert breaker.state == "open"


def test_a_program_that_raises_an_error_of_minipool_is_not_executed_again(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with Pool(size=2, call_timeout=LAST) as pool:
        programs = Programs(pool, session="s")
        programs.create("p", answers.Raises, str(runs))
        with pytest.raises(WorkerDied, match="of an inner pool"):
            programs.execute("p")
        assert pool.stats().workers_lost == 0
    assert runs.read_text() == "1"


def test_a_policy_makes_calls_again_for_your_own_exceptions(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    policy = RetryPolicy(attempts=3, base=0.01, retry_on=(KeyError, WorkerDied))
    with Pool(size=1, retry=policy, call_timeout=LAST) as pool:
        with pytest.raises(KeyError):
            pool.options(idempotent=True).call(answers.raise_key_error, str(runs))
    assert runs.read_text() == "111"


def test_death_of_all_tries_is_told_of_each() -> None:
    with Pool(size=2, call_timeout=LAST) as pool, pytest.raises(WorkerDied) as caught:
        pool.options(idempotent=True).call(os._exit, 3)
    three = "with exit code 3, with exit code 3, with exit code 3"
    assert caught.value.tries == 3 and three in str(caught.value)


# -- exceptions that are hard to tell ------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "LeavesAsItIsPickled",
        "InterruptsAsItIsPickled",
        "LeavesAsItIsShown",
        "InterruptsAsItIsShown",
        "LeavesAsItIsUnpickled",
    ],
)
def test_an_exception_that_cannot_be_told_costs_no_worker(name: str) -> None:
    with Pool(size=1, call_timeout=LAST) as pool:
        before = pids(pool)
        with pytest.raises(Exception) as caught:
            pool.call(answers.raise_hard, name)
        error = caught.value
        assert isinstance(error, getattr(answers, name)) or name in str(error)
        assert pool.call(abs, -1) == 1
        assert pids(pool) == before


def test_a_result_that_ends_who_unpickles_it_ends_nobody() -> None:
    with Pool(size=1, call_timeout=LAST) as pool:
        with pytest.raises(RemoteError, match="SystemExit"):
            pool.call(answers.result_that_leaves)
        assert pool.call(abs, -1) == 1


def test_a_very_deep_traceback_is_told_in_part() -> None:
    """At most 100 frames of its begin and 100 of its end, so that it is told in time."""
    with Pool(size=1, call_timeout=LAST) as pool:
        with pytest.raises(RuntimeError, match="led to by a deep one") as caught:
            pool.call(answers.go_deep, 100_000)
        assert pool.stats().workers_lost == 0
    text = str(caught.value.__cause__)
    assert text.count("\n  File ") < 250
    assert "more frames" in text and "ValueError: deep" in text
    assert text.rstrip().endswith("RuntimeError: led to by a deep one")


def test_a_traceback_that_is_not_deep_is_told_as_python_prints_it() -> None:
    import traceback

    def fail(depth: int) -> None:
        if depth:
            fail(depth - 1)
        raise ValueError("at the bottom")

    try:
        fail(150)
    except ValueError as error:
        printed = traceback.format_exception(type(error), error, error.__traceback__)
        assert traces.text_of(error) == "".join(printed)


def test_begin_and_end_of_a_deep_traceback_are_shown_in_their_order() -> None:
    def fail(left: int) -> None:
        if not left:
            raise ValueError("at the bottom")
        name = f"level_{left}"
        fail.__code__ = fail.__code__.replace(co_name=name)
        fail(left - 1)

    try:
        fail(300)
    except ValueError as error:
        text = traces.text_of(error)
    assert "in level_290" in text and "in level_10\n" in text and "in level_150" not in text
    assert text.index("in level_290") < text.index("more frames") < text.index("in level_10\n")
