"""The parent's end of one worker: what it learns of a death while others are at work on it."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import connection
from typing import Any, Callable, Iterator

import pytest

from minipool import Pool, WorkerDied
from minipool._sync import Guard
from minipool.engine import blackbox, channel, wire
from minipool.engine import process as process_room
from strikes import strike_everywhere
from workers import identity


class Wanted(Guard):
    """A guard that tells when somebody comes to it who will not wait for ever."""

    def __init__(self, wanted: threading.Event) -> None:
        super().__init__()
        self._wanted = wanted

    def run_within(self, timeout: float, work: Callable[..., Any], /, *args: Any) -> Any:
        self._wanted.set()
        return super().run_within(timeout, work, *args)


@pytest.fixture
def pool(start_method: str) -> Iterator[Pool[None]]:
    with Pool(size=1, start_method=start_method) as opened:
        yield opened


def test_burial_waits_until_a_caller_has_heard_of_the_end(
    pool: Pool[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager buries no worker whose descriptors a caller is waiting on: they would be reused.

    The caller is held where he is about to wait, the manager goes on, and the pool is as it was.
    """
    caller, real_wait = threading.current_thread(), connection.wait
    held, go_on, burying = threading.Event(), threading.Event(), threading.Event()
    found: list[Any] = []
    with pool.checkout() as w:
        assert w.call(identity, 1) == 1
        manager, dead = w._desk.manager, w._handle
        dead.process._waiting = Wanted(burying)

        def wait_while_it_is_buried(sources: Any, timeout: float | None = None) -> Any:
            ends = threading.current_thread() is caller and isinstance(sources[0], int)
            if not ends or not timeout or found:  # it is no wait for the end of a process
                return real_wait(sources, timeout)
            go_on.set()
            assert burying.wait(20)
            assert dead in manager.fleet.handles.values()
            found.append(real_wait(sources, timeout))
            return found[0]

        manager.order(lambda: (held.set(), go_on.wait(20)))
        assert held.wait(20)
        monkeypatch.setattr(connection, "wait", wait_while_it_is_buried)
        os.kill(w.pid or 0, signal.SIGKILL)
        with pytest.raises(WorkerDied) as caught:
            w.call(identity, 2)
        monkeypatch.undo()
    assert found and found[0], "the caller waited in vain"
    assert caught.value.signal == "SIGKILL"
    assert manager.wait_for(lambda: dead not in manager.fleet.handles.values(), 20)


def test_interrupted_wait_for_an_end_loses_no_descriptor(pool: Pool[None]) -> None:
    """Whatever is raised in a thread that waits for an exit code, at whichever instruction."""
    with pool.checkout() as w:
        process = w._handle.process
        before = os.listdir("/proc/self/fd")
        assert strike_everywhere(lambda: process.exitcode(0.001), process_room) > 5
        assert os.listdir("/proc/self/fd") == before
        assert w.call(identity, 1) == 1


def test_interrupted_dump_loses_no_descriptor(pool: Pool[None]) -> None:
    """The same for who asks workers where they are; the next to ask gets his answer."""
    pool.wait_ready()
    before = os.listdir("/proc/self/fd")
    assert strike_everywhere(pool.dump, blackbox) > 20
    assert os.listdir("/proc/self/fd") == before
    assert "Current thread" in pool.dump()[0]


def test_interrupted_close_of_pipes_loses_none() -> None:
    """What was not closed by then is closed when the pipes are collected."""
    before = os.listdir("/proc/self/fd")
    made, pipes = [], []
    for _ in range(20):
        ours, theirs = channel.pair(None, portable=False)
        theirs.close()
        made.append(ours)

    def close_one() -> None:
        pipes.append(made.pop())
        pipes[-1].close()

    assert 1 <= strike_everywhere(close_one, channel, wire) < 20
    made.clear()
    pipes.clear()
    del ours
    assert os.listdir("/proc/self/fd") == before


def test_death_is_told_with_its_signal_every_time(pool: Pool[None]) -> None:
    """A pipe ends a moment before its process does; the exit code is waited for all the same."""
    for _ in range(30):
        with pool.checkout(timeout=20) as w:
            w.call(identity, 1)
            os.kill(w.pid or 0, signal.SIGKILL)
            with pytest.raises(WorkerDied) as caught:
                w.call(identity, 2)
            assert (caught.value.signal, caught.value.exitcode) == ("SIGKILL", -signal.SIGKILL)
