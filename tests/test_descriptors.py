"""Descriptors: how few a worker takes of its parent's, and that nothing is missed without more."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import scripts
from ears import wait_until
from minipool import Pool, WorkerDied
from minipool.engine import blackbox, process
from minipool.engine.bell import Closing
from minipool.engine.blackbox import BlackBox
from minipool.engine.fork_server import Watch
from minipool.engine.process import WorkerProcess
from strikes import strike_everywhere, unstruck

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfds")
LAST = 20.0


WITHOUT_STREAMS = """
    import contextlib, os, threading
    from minipool.engine import descriptors
    from minipool.engine.lifeline import Lifeline
    from minipool.engine.bell import Bell
    from minipool.engine.table import Table
    from strikes import strike_everywhere

    def all_open():
        found = set()
        for fd in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                os.fstat(fd)
                found.add(fd)
        return found

    def have():
        lifeline, bell, table = Lifeline(), Bell(), Table("struck")
        assert not all_open() & {0, 1, 2}
        lifeline.close(), bell.close(), table.close()

    def lend_a_number():
        here, there = threading.Event(), threading.Event()
        def redirect():
            here.wait(20)
            os.dup2(told, 1)  # as a program does that turns into a daemon
            there.set()
        thread = threading.Thread(target=redirect)
        thread.start()
        def action():
            here.set()
            assert there.wait(20)
            os.close(2)
            return all_open()
        during = descriptors.beyond_streams(action)
        assert {0, 1} <= during
        thread.join()
        os.write(1, b"lent ")
        assert not all_open() & {0, 2}
        os.close(1)

    told = os.open("told", os.O_WRONLY | os.O_CREAT, 0o600)
    for fd in range(3):
        os.close(fd)
    lend_a_number()
    have()
    before = all_open()
    struck = strike_everywhere(have, descriptors)
    assert all_open() == before, all_open()
    os.write(told, b"%d" % (struck > 20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_program_without_streams_loses_no_descriptor_by_an_interrupt(tmp_path: Path) -> None:
    """While ours go to other numbers, nor one that it makes a stream of in that moment."""
    code, _, _ = scripts.run(tmp_path, WITHOUT_STREAMS)
    assert (code, (tmp_path / "told").read_text()) == (0, "lent 1")


def taken() -> int:
    return len(os.listdir("/proc/self/fd"))


def knows_its_parent() -> tuple[int | None, bool]:
    parent = multiprocessing.parent_process()
    assert parent is not None
    return parent.pid, parent.is_alive()


def say_more_than_a_pipe_takes_and_abort() -> None:
    for _ in range(3000):
        os.kill(os.getpid(), blackbox.SHOW)
    os.abort()


@pytest.mark.parametrize(("options", "most"), [({}, 4), ({"output": True}, 7)])
def test_worker_takes_few_descriptors(
    options: dict[str, Any], most: int, start_method: str
) -> None:
    """Two pipes, a black box and a pidfd; log records and two streams where they are forwarded."""
    if options:
        options = {"forward_logs": True, "capture_output": True}
    with Pool(size=1, start_method=start_method, **options) as pool:
        before = taken()
        pool.resize(4)
        pool.wait_ready(4)
        assert taken() - before <= 3 * most


def test_worker_knows_whether_its_parent_lives(start_method: str) -> None:
    """Though multiprocessing's own means for it is closed."""
    with Pool(size=1, start_method=start_method) as pool:
        assert pool.call(knows_its_parent) == (os.getpid(), True)


def test_exit_code_comes_through_a_black_box_that_was_full(start_method: str) -> None:
    with Pool(size=2, start_method=start_method) as pool:
        for _ in range(2):
            with pytest.raises(WorkerDied) as caught:
                pool.call(say_more_than_a_pipe_takes_and_abort)
            assert caught.value.signal == "SIGABRT"
        wait_until(pool, lambda: pool.stats().idle == 2)
        assert {death.signal for death in pool.deaths()} == {"SIGABRT"}


@pytest.fixture
def full_box() -> Iterator[BlackBox]:
    """A black box that takes no more."""
    box = BlackBox()
    assert box.theirs is not None
    with pytest.raises(BlockingIOError):
        while True:
            os.write(box.theirs.fd, b"line\n" * 100)
    while True:
        try:
            os.write(box.theirs.fd, b"\n")
        except BlockingIOError:
            break
    yield box
    box.abandon()


def told(box: BlackBox) -> int:
    """Return the pid that the server of this process says of a worker."""
    Watch(Closing()).await_word(box.fd)
    return box.pid_from_server()


@pytest.fixture
def as_server(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Have a process be taken for this one's fork server."""

    def take(pid: int | None) -> None:
        monkeypatch.setattr(forkserver._forkserver, "_forkserver_pid", pid)  # type: ignore[attr-defined]

    take(os.getpid())
    return take


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.usefixtures("as_server")
def test_server_that_waits_to_tell_of_an_end_is_let_go_on(full_box: BlackBox) -> None:
    """1. The box of a dead worker is full. 2. The server waits to write its exit code into it.
    3. The manager waits for the server's word on the next start."""
    pids = BlackBox()
    ends = full_box.lend_to_server(), pids.lend_to_server()
    full_box.heard_server = True  # the pid of the dead worker

    def serve() -> None:
        os.write(ends[0], blackbox._SAID_BY_SERVER.pack(-6))
        os.write(ends[1], blackbox._SAID_BY_SERVER.pack(1234))

    server = threading.Thread(target=serve)
    server.start()
    try:
        assert told(pids) == 1234
        assert full_box.exitcode() == -6
        assert full_box.ended
    finally:
        full_box.listen()
        server.join(LAST)
        for fd in ends:
            os.close(fd)
        pids.abandon()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.usefixtures("as_server")
def test_first_word_of_the_server_is_left_to_those_who_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another start that waits for longer reads what is in other boxes; not a pid, which would be
    missing where it is waited for."""
    boxes = slow, other, dead = BlackBox(), BlackBox(), BlackBox()
    ends = [box.lend_to_server() for box in boxes]
    dead.heard_server = True
    read, listen = threading.Event(), dead.listen

    def note() -> None:
        listen()
        read.set()

    monkeypatch.setattr(dead, "listen", note)
    os.write(ends[1], blackbox._SAID_BY_SERVER.pack(1234))
    waiter = threading.Thread(target=Watch(Closing()).await_word, args=(slow.fd,))
    waiter.start()
    try:
        os.write(ends[2], b"Fatal Python error\n")
        assert read.wait(LAST)
        os.write(ends[0], b"!")
        waiter.join(LAST)
        assert not waiter.is_alive()
        assert other._pieces == [] and told(other) == 1234
    finally:
        for fd in ends:
            os.close(fd)
        for box in boxes:
            box.abandon()


def test_exit_code_in_a_black_box_survives_an_interrupt_anywhere() -> None:
    """What was read is kept, at whichever instruction the reader is struck."""
    context = multiprocessing.get_context("forkserver")
    workers: list[tuple[WorkerProcess, BlackBox]] = []

    def ask() -> None:
        with unstruck():
            box = BlackBox()
            worker = WorkerProcess(context, "worker", os._exit, (3,), box=box)
            workers.append((worker, box))
            worker.start()
            lent = box.lend()
            assert lent is not None
            lent.close()
        assert worker.exitcode(LAST) == 3

    modules = [
        process,
        blackbox,
        sys.modules["multiprocessing.connection"],
        sys.modules["selectors"],
    ]
    assert strike_everywhere(ask, *modules) > 10
    for worker, box in workers:
        assert worker.exitcode(LAST) == 3
        worker.close()
        box.close()


@pytest.mark.parametrize("code", [0, 1, 3, 10, 65, 255])
def test_exit_code_is_told_from_what_was_said_before(code: int) -> None:
    """Whatever its lowest byte looks like."""
    box = BlackBox()
    box.heard_server = True
    end = box.lend_to_server()
    os.write(end, b"Current thread 0x0001:\n  File\n")
    os.write(end, blackbox._SAID_BY_SERVER.pack(code))
    os.close(end)
    assert box.exitcode() == code
    assert box._stacks.endswith("File\n")
    box.close()
    box.abandon()


def test_server_that_ends_without_a_word_is_not_waited_for(
    as_server: Callable[[int | None], None],
) -> None:
    """Though others hold the pipe open."""
    box = BlackBox()
    end = box.lend_to_server()
    server = multiprocessing.get_context("fork").Process(target=os._exit, args=(1,))
    server.start()
    as_server(server.pid)
    try:
        with pytest.raises(EOFError, match="fork server"):
            told(box)
    finally:
        server.join(LAST)
        os.close(end)
        box.abandon()
