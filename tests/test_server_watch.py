"""Waiting for the fork server: bounded, heard of a close, and without a thread where it can poll."""

from __future__ import annotations

import multiprocessing
import os
import select
import threading
from typing import Any, Iterator

import pytest

from minipool import Pool
from minipool.engine.bell import Bell, Closing

pytestmark = pytest.mark.skipif(
    not hasattr(os, "pidfd_open") or "forkserver" not in multiprocessing.get_all_start_methods(),
    reason="needs a fork server and pidfds",
)
LAST = 20.0


class Waiting:
    """A thread that waits for a word of a server, which is this process and is never killed."""

    def __init__(self) -> None:
        self.closing = Closing()
        self.closing.bell = self.bell = Bell()
        self.read, self._write = os.pipe()
        self.heard = threading.Event()
        self.killed: list[str] = []
        silence = self.bell.silence

        def note() -> None:
            silence()
            self.heard.set()

        self.bell.silence = note  # type: ignore[method-assign]

    def kill(self, pid: int, why: str) -> None:
        assert pid == os.getpid()
        self.killed.append(why)
        self.speak()

    def speak(self) -> None:
        os.write(self._write, b"!")

    def begin(self) -> None:
        from minipool.engine.fork_server import Watch

        self._thread = threading.Thread(target=Watch(self.closing).await_word, args=(self.read,))
        self._thread.start()

    def has_ended(self) -> bool:
        self._thread.join(LAST)
        return not self._thread.is_alive()

    def rung(self) -> bool:
        return bool(select.select([self.bell.reader], [], [], 0)[0])

    def close(self) -> None:
        self.bell.close()
        os.close(self.read)
        os.close(self._write)


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiting]:
    from multiprocessing import forkserver

    from minipool.engine import fork_server

    waiting = Waiting()
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    monkeypatch.setattr(server, "_forkserver_pid", os.getpid())
    monkeypatch.setattr(fork_server._Known, "answered", os.getpid())
    monkeypatch.setattr(fork_server._Known, "patience", None)
    monkeypatch.setattr(fork_server, "_MOMENT", 0.0)
    monkeypatch.setattr(fork_server, "_kill", waiting.kill)
    yield waiting
    waiting.close()


def test_ring_that_is_no_close_is_left_to_the_manager(waiting: Waiting) -> None:
    waiting.begin()
    waiting.bell.ring()
    assert waiting.heard.wait(LAST)
    waiting.speak()
    assert waiting.has_ended()
    assert waiting.rung() and not waiting.killed


def test_close_is_heard_of_while_the_server_is_silent(waiting: Waiting) -> None:
    waiting.begin()
    waiting.closing.set()
    waiting.bell.ring()
    assert waiting.has_ended()
    assert waiting.killed == ["left"] and waiting.rung()


def test_server_that_is_silent_for_too_long_has_a_moment_more(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been stopped together with this process."""
    from minipool.engine import fork_server

    monkeypatch.setattr(fork_server, "_STUCK", 0.0)
    watch = fork_server.Watch(waiting.closing)
    assert watch.seconds() == 0.0 and not waiting.killed
    assert watch.seconds() is None and waiting.killed == ["stuck"]


def test_server_that_takes_too_long_for_its_first_answer_has_none(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minipool.engine import fork_server

    monkeypatch.setattr(fork_server._Known, "answered", None)
    monkeypatch.setattr(fork_server._Known, "patience", 0.0)
    assert fork_server.Watch(waiting.closing).seconds() is None
    assert waiting.killed == ["silent"]


@pytest.mark.skipif(bool(os.environ.get("MINIPOOL_PORTABLE")), reason="cannot poll")
def test_start_needs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    start = threading.Thread.start

    def note(thread: threading.Thread) -> None:
        names.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note)
    with Pool(size=2, start_method="forkserver") as pool:
        pool.call(os.getpid)
    assert names and "minipool-server-watch" not in names
