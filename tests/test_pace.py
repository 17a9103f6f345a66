"""Pace: what the histograms of the table say of the calls of the last minute."""

from __future__ import annotations

from typing import Iterable

import pytest

from minipool.engine import table as t
from minipool.engine.pace import MOST, WINDOW, Pace


class Worker:
    """A row of the table, a clock, and how often the row was read."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.reads = 0
        self.row = memoryview(bytearray(t.ROW_BYTES)).cast("q")
        self.pace = Pace(self.rows, lambda: self.now)

    def rows(self) -> Iterable[memoryview]:
        self.reads += 1
        return [self.row]

    def made(self, calls: int, seconds: float) -> None:
        self.row[t.CALL_TIMES + t.bucket(int(seconds * 1e9))] += calls


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_nothing_is_known_before_the_first_call(worker: Worker) -> None:
    assert worker.pace.needed(1.0) == 0
    assert worker.pace.patience(1.0, (worker.now + 1.0, 1.0)) == 1.0
    assert worker.pace.patience(None, (worker.now + 1.0, 1.0)) is None


def test_first_calls_are_seen_at_once(worker: Worker) -> None:
    assert worker.pace.needed(1.0) == 0
    worker.made(1, 0.1)
    assert 0.1 <= worker.pace.needed(1.0) < 0.12


def test_calls_take_what_they_took(worker: Worker) -> None:
    """Never less: it is the upper edge of a bucket, so a call that has as much left is in time."""
    worker.made(1000, 0.1)
    assert 0.1 <= worker.pace.needed(1.0) < 0.12
    assert 0.1 <= worker.pace.needed(float("inf")) < 0.12


def test_slow_ones_count_up_to_half_of_the_timeout(worker: Worker) -> None:
    worker.made(90, 0.1)
    worker.made(10, 0.8)
    assert worker.pace.needed(1.0) == 0.5
    assert 0.8 <= worker.pace.needed(10.0) < 0.92


def test_one_slow_one_of_very_many_does_not_count(worker: Worker) -> None:
    worker.made(999, 0.1)
    worker.made(1, 0.45)
    assert worker.pace.needed(1.0) < 0.12


def test_median_counts_in_any_case(worker: Worker) -> None:
    worker.made(100, 0.8)
    assert 0.8 <= worker.pace.needed(1.0) <= MOST


def test_calls_that_took_longer_than_this_one_may_are_of_another_kind(worker: Worker) -> None:
    """Beside jobs of five seconds, a short call waits as long as among its like."""
    worker.made(900, 5.0)
    worker.made(100, 0.01)
    assert 0.01 <= worker.pace.needed(1.0) < 0.012
    assert worker.pace.needed(60.0) >= 5.0


def test_where_every_call_takes_longer_nearly_all_of_the_time_must_be_left(worker: Worker) -> None:
    worker.made(10, 5.0)
    assert worker.pace.needed(1.0) == MOST
    assert worker.pace.patience(1.0, (worker.now + 1.0, 1.0)) == pytest.approx(1 - MOST)


def test_line_is_left_while_there_is_time_for_the_call(worker: Worker) -> None:
    worker.made(100, 0.1)
    until = (worker.now + 1.0, 1.0)
    patience = worker.pace.patience(1.0, until)
    assert patience is not None and 0.88 < patience <= 0.9
    assert worker.pace.patience(None, until) == patience
    assert worker.pace.patience(0.2, until) == 0.2, "the shorter one counts"
    worker.now += 5.0
    late = worker.pace.patience(1.0, until)
    assert late is not None and 0 < late < 0.001, "0 asks for another kind of error"


def test_only_the_last_minute_counts(worker: Worker) -> None:
    worker.made(1000, 0.8)
    assert worker.pace.needed(1.0) > 0.5
    for _ in range(8):  # readings are kept every ten seconds
        worker.now += 10.0
        worker.made(10, 0.01)
        worker.pace.needed(1.0)
    worker.now += 10.0
    assert worker.pace.needed(1.0) < 0.012
    worker.now += 2 * WINDOW
    worker.pace.needed(1.0)
    worker.now += WINDOW
    assert worker.pace.needed(1.0) == 0, "there were no calls"


def test_table_is_read_once_a_second_at_most(worker: Worker) -> None:
    worker.made(10, 0.1)
    for _ in range(100):
        worker.pace.needed(1.0)
        worker.now += 0.009
    assert worker.reads == 1
    worker.now += 1.0
    worker.pace.needed(1.0)
    assert worker.reads == 2


def test_readings_do_not_pile_up(worker: Worker) -> None:
    for _ in range(1000):
        worker.made(1, 0.1)
        worker.now += 1.5
        worker.pace.needed(1.0)
    assert len(worker.pace._readings) <= WINDOW / 10 + 2


def test_count_that_falls_is_no_harm(worker: Worker) -> None:
    """A row may be read twice while it is buried, and once after that."""
    worker.made(10, 0.1)
    worker.pace.needed(1.0)
    worker.now += 70.0
    worker.pace.needed(1.0)
    worker.now += 70.0
    worker.made(-5, 0.1)
    worker.made(3, 0.2)
    assert 0.2 <= worker.pace.needed(1.0) < 0.24
