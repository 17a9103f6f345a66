"""The parent's end of one worker: what it learns of a death while others are at work on it."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import connection
from typing import Any, Iterator

import pytest

from minipool import Pool, WorkerDied
from workers import identity


@pytest.fixture
def pool(start_method: str) -> Iterator[Pool[None]]:
    with Pool(size=1, start_method=start_method) as opened:
        yield opened


def test_reaping_does_not_hold_up_who_waits_for_the_exit_code(
    pool: Pool[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager may bury a worker, and reuse its descriptors, while a caller waits for its end."""
    caller, real_wait = threading.current_thread(), connection.wait
    held, go_on = threading.Event(), threading.Event()  # the manager, until the caller waits
    found: list[Any] = []
    pipes: list[tuple[int, int]] = []
    with pool.checkout() as w:
        assert w.call(identity, 1) == 1
        manager, dead = w._desk.manager, w._handle

        def wait_after_burial(sources: Any, timeout: float | None = None) -> Any:
            if threading.current_thread() is not caller or not timeout or found:
                return real_wait(sources, timeout)
            go_on.set()
            assert manager.wait_for(lambda: dead not in manager.fleet.handles.values(), 20)
            pipes.extend(os.pipe() for _ in range(8))  # takes the numbers that came free
            found.append(real_wait(sources, timeout))
            return found[0]

        manager.order(lambda: (held.set(), go_on.wait(20)))
        assert held.wait(20)
        monkeypatch.setattr(connection, "wait", wait_after_burial)
        os.kill(w.pid or 0, signal.SIGKILL)
        with pytest.raises(WorkerDied) as caught:
            w.call(identity, 2)
        monkeypatch.undo()
    for fd in [fd for ends in pipes for fd in ends]:
        os.close(fd)
    assert found and found[0], "the caller waited in vain"
    assert caught.value.signal == "SIGKILL"


def test_death_is_told_with_its_signal_every_time(pool: Pool[None]) -> None:
    """A pipe ends a moment before its process does; the exit code is waited for all the same."""
    for _ in range(30):
        with pool.checkout(timeout=20) as w:
            w.call(identity, 1)
            os.kill(w.pid or 0, signal.SIGKILL)
            with pytest.raises(WorkerDied) as caught:
                w.call(identity, 2)
            assert (caught.value.signal, caught.value.exitcode) == ("SIGKILL", -signal.SIGKILL)
