"""RetryPolicy: which calls are made again, when, and for how long."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

from ears import Ear, wait_until
from minipool import CallTimeout, Pool, RetryPolicy, WorkerDied
from rogues import Stateful
from troublemakers import fails_so_often
from workers import identity

LAST = 20.0
QUICK = RetryPolicy(attempts=3, base=0.01)


@pytest.fixture
def pool() -> Iterator[Pool[None]]:
    with Pool(size=2, retry=QUICK) as opened:
        yield opened


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "attempts"


# -- the policy ----------------------------------------------------------------------------------


def test_there_is_a_pause_before_each_attempt_but_the_first() -> None:
    policy = RetryPolicy(attempts=5, jitter=0)
    assert list(policy.pauses()) == [0.1, 0.2, 0.4, 0.8]
    assert list(policy.pauses()) == [0.1, 0.2, 0.4, 0.8], "each call begins anew"
    assert list(RetryPolicy(attempts=1).pauses()) == []


def test_jitter_carries_over_from_pause_to_pause() -> None:
    luck = iter([1.0, 0.5])
    policy = RetryPolicy(attempts=3, random=lambda: next(luck))
    assert list(policy.pauses()) == pytest.approx([0.125, 0.25])


def test_other_attempts_change_nothing_else() -> None:
    policy = RetryPolicy(2, 1.0, 5.0, 3.0, 0, KeyError, attempt_timeout=7.0).with_attempts(4)
    assert list(policy.pauses()) == [1.0, 3.0, 5.0]
    assert (policy.retry_on, policy.attempt_timeout) == ((KeyError,), 7.0)


@pytest.mark.parametrize(
    "arguments, kind",
    [({"attempts": 0}, ValueError), ({"attempts": 2.0}, ValueError), ({"base": -1}, ValueError),
     ({"jitter": 2}, ValueError), ({"attempt_timeout": -1}, ValueError),
     ({"retry_on": "KeyError"}, TypeError), ({"retry_on": (KeyError, 5)}, TypeError),
     ({"retry_on": KeyboardInterrupt}, TypeError)],
)  # fmt: skip
def test_wrong_arguments_are_refused(arguments: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match="give"):
        RetryPolicy(**arguments)


# -- calls ---------------------------------------------------------------------------------------


def test_idempotent_call_outlives_its_workers(start_method: str, notes: Path) -> None:
    with Pool(size=2, retry=QUICK, start_method=start_method) as pool:
        call = pool.options(idempotent=True).call
        assert call(fails_so_often, str(notes), 2, "dies") == 3


def test_last_attempt_s_error_comes_out(pool: Pool[None], notes: Path) -> None:
    with pytest.raises(WorkerDied):
        pool.options(idempotent=True).call(fails_so_often, str(notes), 9, "dies")
    assert notes.stat().st_size == 3


def test_call_that_may_not_run_twice_does_not(pool: Pool[None], notes: Path) -> None:
    with pytest.raises(WorkerDied):
        pool.call(fails_so_often, str(notes), 1, "dies")
    assert notes.stat().st_size == 1
    with pytest.raises(ValueError, match="idempotent=True"):
        pool.options(retries=2)


@pytest.mark.parametrize("retries, attempts", [(0, 1), (1, 2), (4, 5)])
def test_retries_of_a_call_replace_the_pool_s(
    pool: Pool[None], notes: Path, retries: int, attempts: int
) -> None:
    with pytest.raises(WorkerDied):
        pool.options(idempotent=True, retries=retries).call(fails_so_often, str(notes), 9, "dies")
    assert notes.stat().st_size == attempts


def test_option_may_be_the_number_of_attempts(notes: Path) -> None:
    with Pool(size=1, retry=2) as pool:
        assert pool.options(idempotent=True).call(fails_so_often, str(notes), 1, "dies") == 2


def test_your_own_exceptions_are_retried_if_the_policy_says_so(
    pool: Pool[None], notes: Path
) -> None:
    with pytest.raises(ConnectionError, match="attempt 1"):
        pool.options(idempotent=True).call(fails_so_often, str(notes), 2, "raises")
    notes.unlink()
    policy = RetryPolicy(attempts=3, base=0.01, retry_on=ConnectionError)
    with Pool(size=1, retry=policy) as other:
        assert other.options(idempotent=True).call(fails_so_often, str(notes), 2, "raises") == 3
        assert other.stats().workers_started == 1, "its worker was well all the time"


def test_attempt_that_hangs_leaves_time_for_another(notes: Path) -> None:
    policy = RetryPolicy(attempts=3, base=0.01, attempt_timeout=0.3)
    with Pool(size=1, retry=policy) as pool:
        call = pool.options(idempotent=True, timeout=LAST).call
        assert call(fails_so_often, str(notes), 1, "hangs") == 2


def test_one_deadline_bounds_all_attempts_and_pauses(notes: Path) -> None:
    """No pause is begun that would end after it, and no attempt outlives it."""
    policy = RetryPolicy(attempts=100, base=0.05, multiplier=1, jitter=0, attempt_timeout=0.1)
    with Pool(size=1, retry=policy) as pool:
        pool.call(identity, 1)
        start = time.monotonic()
        with pytest.raises((CallTimeout, TimeoutError)):
            pool.options(idempotent=True, timeout=2.0).call(fails_so_often, str(notes), 99, "hangs")
        assert time.monotonic() - start < 2.0 + 3.0, "a hundred attempts would take fifteen"
        assert 2 <= notes.stat().st_size <= 14

    with Pool(size=1, retry=RetryPolicy(attempts=2, base=LAST)) as pool:
        start = time.monotonic()
        with pytest.raises(WorkerDied):
            pool.options(idempotent=True, timeout=5.0).call(fails_so_often, str(notes), 99, "dies")
        assert time.monotonic() - start < 4.5, "the pause would not fit"


def test_close_ends_the_pause(notes: Path) -> None:
    pool = Pool(size=1, retry=RetryPolicy(attempts=2, base=30.0), call_timeout=None).open()
    ear, told = Ear(pool, "worker.terminate"), []

    def call() -> None:
        with pytest.raises(WorkerDied) as caught:
            pool.options(idempotent=True).call(fails_so_often, str(notes), 1, "dies")
        told.append(caught.value)

    caller = threading.Thread(target=call)
    caller.start()
    ear.wait("worker.terminate")
    pool.close()
    caller.join(LAST)
    assert len(told) == 1 and told[0].started


def test_session_goes_along_with_each_attempt(notes: Path) -> None:
    with Pool(Stateful, size=2, retry=QUICK) as pool:
        pool.create_session("ada", {"name": "Ada"})
        call = pool.options(idempotent=True, session="ada").call
        assert call(fails_so_often, str(notes), 2, "dies") == 3
        assert pool.session_state("ada") == {"name": "Ada"}
        assert not pool.sessions()[0].leased


@pytest.mark.slow
def test_idempotent_calls_all_succeed_while_workers_are_killed_at_random(
    seconds: float = 3,
) -> None:
    """Each of eight workers is killed twice a second on average, under sixteen threads."""
    import random

    chance, over = random.Random(8), threading.Event()
    counts: list[int] = []
    policy = RetryPolicy(attempts=50, base=0.01, cap=0.1)
    with Pool(size=8, retry=policy, checkout_timeout=LAST) as pool:
        call = pool.options(idempotent=True, timeout=LAST).call

        def work() -> None:
            done = 0
            while not over.is_set():
                assert call(identity, done) == done
                done += 1
            counts.append(done)

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        desk = pool._desk
        assert desk is not None
        manager, killed = desk.manager, []

        def kill_one() -> None:
            handle = chance.choice([*manager.fleet.handles.values(), None])
            if handle is not None:
                killed.append(handle.slot)
                handle.kill()

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            over.wait(chance.expovariate(16.0))
            manager.order(kill_one)
        over.set()
        for thread in threads:
            thread.join(LAST)
        assert len(counts) == 16, "every thread's every call succeeded"
        assert len(killed) > 8 * seconds and sum(counts) > 100
        wait_until(pool, lambda: pool.stats().idle == 8)
        assert pool.stats().breaker_opened == 0
