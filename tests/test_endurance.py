"""Nothing grows: descriptors, threads and memory are flat over many calls and many deaths.

`pytest tests/test_endurance.py --endurance 100` makes a million calls and 20,000 deaths.
"""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

import rogues
from ears import wait_until
from minipool import Pool, WorkerDied
from rogues import Stateful

GROWTH = 2_500_000  # bytes that the allocator's own ways may cost: a byte a call would be seen


class Held(NamedTuple):
    """What this process holds at one moment."""

    descriptors: int
    threads: int
    rss_bytes: int


def _held() -> Held:
    gc.collect()
    words = Path("/proc/self/statm").read_text().split()
    rss = int(words[1]) * os.sysconf("SC_PAGESIZE")
    return Held(len(os.listdir("/proc/self/fd")), threading.active_count(), rss)


def _flat(pool: Pool[Any], step: Callable[[], object], count: int) -> None:
    """Make `count` steps; nothing may be held after them that was not after the first tenth."""

    def at_rest() -> Held:
        size = pool.config.size
        wait_until(pool, lambda: pool.stats().idle == size == len(pool.workers()))
        return _held()

    for _ in range(count // 10):
        step()
    before = at_rest()
    for _ in range(count - count // 10):
        step()
    after = at_rest()
    print(f"{count} steps: {before} -> {after}")
    assert after[:2] == before[:2]
    assert after.rss_bytes - before.rss_bytes < GROWTH


def _calls(path: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "portable":
        monkeypatch.setenv("MINIPOOL_PORTABLE", "1")
    with Pool(Stateful, size=2) as pool:
        rounds = iter(range(count))

        def step() -> None:
            number = next(rounds)
            if number % 3 == 0:
                pool.call("add", 1)
            elif number % 3 == 1:
                with pool.checkout(session=f"s{number % 100}") as w:
                    w.call("show", number)
            else:
                with pytest.raises(ValueError):
                    pool.call(rogues.raise_it, "ValueError", number)

        _flat(pool, step, count)
        assert pool.stats().calls >= count
        assert pool.stats().workers_started == 2


def _deaths(start_method: str, count: int) -> None:
    with Pool(Stateful, size=2, start_method=start_method, breaker=False) as pool:

        def step() -> None:
            with pool.checkout(timeout=20) as w:
                with pytest.raises(WorkerDied):
                    w.call(rogues.leave, 3)

        _flat(pool, step, count)
        assert pool.stats().workers_lost == count


@pytest.mark.slow
@pytest.mark.timeout(0)  # how long it takes is an option
@pytest.mark.parametrize("path", ["fast", "portable"])
def test_many_calls_leave_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    _calls(path, 10_000 * request.config.getoption("--endurance"), monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("method", "count"), [("forkserver", 200), ("fork", 200), ("spawn", 30)])
def test_many_deaths_leave_nothing(method: str, count: int, request: pytest.FixtureRequest) -> None:
    _deaths(method, count * request.config.getoption("--endurance"))
