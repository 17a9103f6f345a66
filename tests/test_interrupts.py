"""Exceptions that a signal or another thread raises in the library, wherever they can come.

After each the pool is to be as it was: each worker idle, or replaced by another soon. What a test
may not leave behind (processes, threads, descriptors) is looked at for every test.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable

import pytest

from chatters import add
from minipool import CallTimeout, Metrics, Pool, WorkerDied
from minipool.engine.bell import Bell, ready
from strikes import strike_everywhere, unstruck
from workers import identity


def modules_of(*packages: str) -> set[Any]:
    """Return every module of these that was imported."""
    return {
        module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in packages and hasattr(module, "__file__")
    }


# The library, and what it stands on; but `multiprocessing.Connection`, on which the portable path
# does, loses its descriptor when it is struck as it closes.
PORTABLE = os.environ.get("MINIPOOL_PORTABLE") == "1"
ALL = ("minipool",) if PORTABLE else ("minipool", "multiprocessing", "selectors")


def checkout_and_call(pool: Pool[None]) -> None:
    with pool.checkout(timeout=20) as w:
        assert w.call(identity, 1) == 1


def long_call(pool: Pool[None]) -> None:
    assert len(pool.call(identity, bytes(300_000))) == 300_000


def death(pool: Pool[None]) -> None:
    with pool.checkout(timeout=20) as w, pytest.raises(WorkerDied):
        w.call(os._exit, 3)


def timeout(pool: Pool[None]) -> None:
    with pool.checkout(timeout=20) as w, pytest.raises(CallTimeout):
        w.options(timeout=0.001).call(time.sleep, 60)


@pytest.mark.filterwarnings("ignore:a lease of:ResourceWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # struck as it is closed
@pytest.mark.parametrize(
    "action",
    [
        checkout_and_call,
        long_call,
        death,
        pytest.param(timeout, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_pool_is_whole_after_an_interrupt_anywhere(
    action: Callable[[Pool[None]], None], method: str
) -> None:
    with Pool(size=2, start_method=method, health_check_timeout=0.1) as pool:
        assert pool._desk is not None
        manager = pool._desk.manager

        def act() -> None:
            with unstruck():
                gc.collect()
                assert manager.wait_for(lambda: pool.stats().idle == 2, 20), repr(pool)
            action(pool)

        action(pool)  # what is imported late is there now
        assert strike_everywhere(act, *modules_of(*ALL)) > 20
        assert manager.wait_for(lambda: pool.stats().idle == 2, 20), repr(pool)
        assert pool.stats().start_failures == 0, repr(manager.fleet.last_failure)


@pytest.mark.filterwarnings("ignore:a lease of:ResourceWarning")
@pytest.mark.parametrize("session", [None, "a"])
def test_hand_over_that_is_interrupted_anywhere_reaches_whoever_waits(session: str | None) -> None:
    """A thread is struck as it gives back what another waits for: that gets it, or the next one."""
    options: Any = {"size": 1, "start_method": "fork", "health_check_timeout": 0.1}
    with Pool(**options) as pool:
        assert pool._desk is not None
        manager = pool._desk.manager
        line = manager.turnstile if session is None else pool._sessions._line
        waiting: list[threading.Thread] = []
        answers: list[int] = []

        def use() -> None:
            with pool.checkout(session=session, timeout=20) as w:
                answers.append(w.call(identity, len(answers)))

        def act() -> None:
            with unstruck():
                while waiting:
                    gc.collect()  # the traceback of the strike may keep the lease
                    waiting.pop().join(20)
                acted.append(len(answers))
                lease = pool.checkout(session=session, timeout=20)
                waiting.append(threading.Thread(target=use))
                waiting[0].start()
                assert manager.wait_for(lambda: bool(line.waiters), 20), repr(pool)
            lease.release()

        acted: list[int] = []
        assert strike_everywhere(act, *modules_of("minipool")) > 20
        waiting.pop().join(20)
        assert answers == list(range(len(acted))), "somebody waited in vain"
        assert acted == answers


@pytest.mark.logs_errors  # while the store's turn is astray
@pytest.mark.filterwarnings("ignore:a lease of:ResourceWarning")
@pytest.mark.parametrize("stored", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_session_keeps_what_was_committed_after_an_interrupt_anywhere(
    stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call in a session commits or it does not; memory and store agree about it."""
    monkeypatch.setattr("minipool.store.database._ASTRAY_S", 0.2)
    path = tmp_path / "sessions.db" if stored else None
    options: Any = {"health_check_timeout": 0.1, "session_store": path}
    with Pool(size=1, start_method="fork", **options) as pool:
        counted = [pool.options(session="a").call(add)]
        assert pool._desk is not None
        manager = pool._desk.manager

        def act() -> None:
            with unstruck():
                gc.collect()
                assert manager.wait_for(lambda: pool.stats().idle == 1, 20), repr(pool)
                counted.append(pool.session_state("a")["n"])
                assert counted[-1] - counted[-2] in (0, 1)
            pool.options(session="a", timeout=20).call(add)

        act()
        assert strike_everywhere(act, *modules_of(*ALL)) > 50
        last = pool.session_state("a")
        assert last["n"] == counted[-1] + 1
    if stored:
        with Pool(size=1, start_method="fork", **options) as pool:
            assert pool.session_state("a") == last


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a callback
def test_interrupted_open_or_close_leaves_nothing() -> None:
    """A pool that was interrupted as it opened or closed can be closed, and nothing is left of it."""
    pools: list[Pool[None]] = []

    def use() -> None:
        with unstruck():
            while pools:
                pools.pop().close(5)
        pools.append(Pool(size=1, start_method="fork", health_check_timeout=0.1))
        pools[0].open()
        metrics = Metrics(pools[0])
        metrics.close()
        pools[0].close()

    use()
    assert strike_everywhere(use, *modules_of("minipool")) > 200
    pools.pop().close(5)


def test_interrupted_ring_does_not_mute_the_bell() -> None:
    bell = Bell()

    def ring() -> None:
        bell.ring()
        assert ready([bell.reader], 0) == {bell.reader}
        bell.silence()
        assert not ready([bell.reader], 0)

    assert strike_everywhere(ring, sys.modules[Bell.__module__]) > 5
    bell.close()


def test_bell_takes_any_number_of_rings_and_waits_for_none() -> None:
    """A manager that is kept busy keeps nobody who rings."""
    bell = Bell()
    for _ in range(100_000):
        bell.ring()
    assert ready([bell.reader], 0) == {bell.reader}
    bell.silence()
    assert not ready([bell.reader], 0)
    bell.close()
    bell.ring()
