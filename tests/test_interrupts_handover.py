"""Exceptions raised as a worker, or a session, goes from one thread to another that waits for it.

Whoever is struck, the releaser or the waiter, the others in the line are served, and in the end
each worker is idle or replaced.
"""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest

from minipool import Pool
from minipool.engine.turnstile import Waiter
from strikes import strike_everywhere, unstruck
from test_interrupts import modules_of
from workers import identity

PATIENCE = 20.0  # seconds


class Queuer(threading.Thread):
    """Waits in the line, and makes a call with what it gets."""

    def __init__(self, pool: Pool[None], session: str | None) -> None:
        super().__init__(daemon=True)
        self._pool, self._session = pool, session
        self._answer: Any = None
        self.start()

    def run(self) -> None:
        try:
            with self._pool.checkout(session=self._session, timeout=PATIENCE) as w:
                self._answer = w.call(identity, "served")
        except BaseException as error:
            self._answer = error

    def outcome(self) -> Any:
        self.join(2 * PATIENCE)
        assert not self.is_alive(), "it waits for ever"
        return self._answer


class Line:
    """The line of a pool's one worker or of one session: tells when somebody has joined it."""

    def __init__(self, pool: Pool[None], session: str | None, patch: pytest.MonkeyPatch) -> None:
        assert pool._desk is not None
        turnstile = pool._desk.manager.turnstile if session is None else pool._sessions._line
        self._joined = threading.Semaphore(0)
        self._on_queue = turnstile._on_queue
        patch.setattr(turnstile, "_on_queue", self._queued)

    def _queued(self, waiter: Waiter) -> None:
        self._on_queue(waiter)
        self._joined.release()

    def wait_joined(self) -> None:
        assert self._joined.acquire(timeout=PATIENCE), "nobody has joined the line"

    def pretend(self) -> None:
        """Let whoever waits for that go on, though nobody may have joined."""
        self._joined.release()

    def forget(self) -> None:
        while self._joined.acquire(blocking=False):
            pass


def whole(pool: Pool[None]) -> bool:
    stats = pool.stats()
    return stats.idle == 1 and stats.waiting == 0


@pytest.mark.filterwarnings("ignore:a lease of:ResourceWarning")
@pytest.mark.parametrize("session", [None, "a"], ids=["worker", "session"])
def test_waiters_are_served_wherever_the_releaser_is_struck(
    session: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pool(size=1, start_method="fork", health_check_timeout=0.1) as pool:
        assert pool._desk is not None
        manager, queuers = pool._desk.manager, list[Queuer]()

        def settle() -> None:
            gc.collect()  # a lease whose release never began is given back by the collector
            assert [queuer.outcome() for queuer in queuers] == ["served"] * len(queuers)
            queuers.clear()
            assert manager.wait_for(lambda: whole(pool), PATIENCE), repr(pool)

        def act() -> None:
            with unstruck():
                settle()
                line.forget()
                lease = pool.checkout(session=session, timeout=PATIENCE)
                for _ in range(2):
                    queuers.append(Queuer(pool, session))
                    line.wait_joined()
            lease.release()

        with pool.checkout(session=session):
            line = Line(pool, session, monkeypatch)
        assert strike_everywhere(act, *modules_of("minipool")) > 5
        settle()
        assert pool.stats().start_failures == 0


@pytest.mark.filterwarnings("ignore:a lease of:ResourceWarning")
@pytest.mark.parametrize("session", [None, "a"], ids=["worker", "session"])
def test_nothing_is_lost_wherever_a_waiter_is_struck_as_it_is_served(
    session: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waiter may be struck before it has joined, while it waits, and as it takes what came."""
    with Pool(size=1, start_method="fork", health_check_timeout=0.1) as pool:
        assert pool._desk is not None
        manager, others = pool._desk.manager, list[Queuer]()

        def release_when_queued(held: list[Any]) -> None:
            line.wait_joined()
            others.append(Queuer(pool, session))  # behind the one that is struck
            held.pop().release()

        def settle() -> None:
            gc.collect()
            assert [queuer.outcome() for queuer in others] == ["served"] * len(others)
            others.clear()
            assert manager.wait_for(lambda: whole(pool), PATIENCE), repr(pool)

        def act() -> None:
            with unstruck():
                settle()
                line.forget()
                held = [pool.checkout(session=session, timeout=PATIENCE)]
                releaser = threading.Thread(target=release_when_queued, args=(held,))
                releaser.start()
            try:
                with pool.checkout(session=session, timeout=PATIENCE) as w:
                    assert w.call(identity, 1) == 1
            finally:
                with unstruck():
                    line.pretend()
                    releaser.join(PATIENCE)

        with pool.checkout(session=session):
            line = Line(pool, session, monkeypatch)
        assert strike_everywhere(act, *modules_of("minipool")) > 20
        settle()
        assert pool.stats().start_failures == 0
