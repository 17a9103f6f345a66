"""A worker's process: what it may do to itself, and what is left when it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import subprocess
import sys
from multiprocessing import connection
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from ears import Ear, handle_of, wait_until
from gates import Gate
from minipool import CallTimeout, Pool, WorkerDied
from minipool.engine import process as process_room
from minipool.engine.process import WorkerProcess
from rogues import Stateful
from scripts import wait_gone
from vandals import IgnoresEverything, LeavesChildren, group, misbehave, start_children


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            return not select.select([fd], [], [], 0)[0]
        finally:
            os.close(fd)
    return False


# -- what a worker has started -----------------------------------------------------------------


def _killed(pool: Pool[Any]) -> None:
    os.kill(pool.call("pid"), signal.SIGKILL)


def _timed_out(pool: Pool[Any]) -> None:
    with pytest.raises(CallTimeout):
        pool.options(timeout=0.2).call("hang")


def _left(pool: Pool[Any]) -> None:
    with pytest.raises(WorkerDied):
        pool.call("leave")


def _exited(pool: Pool[Any]) -> None:
    with pytest.raises(Exception, match="SystemExit"):
        pool.call("raise_exit")


def _discarded(pool: Pool[Any]) -> None:
    pool.checkout().discard("enough of it")


ENDS: list[Callable[[Pool[Any]], object]] = [
    _killed, _timed_out, _left, _exited, _discarded, Pool.close, Pool.terminate,
]  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_what_a_worker_started_ends_with_it(end: Callable[[Pool[Any]], object]) -> None:
    """Its children and theirs, however it ends: killed, by itself, or in good order."""
    with Pool(LeavesChildren, size=1) as pool:
        pids = pool.call("children")
        assert all(map(_alive, pids))
        end(pool)
        wait_gone(*pids)


def test_what_a_worker_started_ends_with_it_under_each_start_method(start_method: str) -> None:
    with Pool(LeavesChildren, size=2, start_method=start_method) as pool:
        with pool.checkout() as w:
            pids = w.call("children")
            with pytest.raises(WorkerDied):
                w.call("leave")
            wait_gone(*pids)
        with pool.checkout() as other:
            assert all(map(_alive, other.call("children"))), "a neighbour's were killed as well"


@pytest.mark.parametrize("lacks", ["signals to groups by pidfd", "pidfds"])
def test_what_a_worker_started_ends_with_it_on_older_systems(
    lacks: str, start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks == "pidfds":
        monkeypatch.setattr(process_room, "_pidfd", lambda pid: None)
    else:
        monkeypatch.setattr(process_room, "_TO_GROUP", 1 << 20)  # no kernel knows this one
    with Pool(LeavesChildren, size=1, start_method=start_method) as pool:
        for end in (_timed_out, _left):
            pids = pool.call("children")
            end(pool)
            wait_gone(*pids)


def test_without_kill_group_it_lives_on() -> None:
    with Pool(size=1, kill_group=False) as pool:
        pids = pool.call(start_children)
    try:
        assert all(map(_alive, pids))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    wait_gone(*pids)


def test_who_has_left_the_group_lives_on() -> None:
    """A daemon that worker code starts on purpose is none of the pool's business."""
    with Pool(size=1) as pool:
        pids = pool.call(start_children, True)
    try:
        assert all(map(_alive, pids))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    wait_gone(*pids)


@pytest.fixture
def stranger() -> Iterator[int]:
    """The pid of a process that leads a group and is no child of ours."""
    start = (
        "import subprocess as s;"
        "print(s.Popen(['sleep', '600'], start_new_session=True, stdout=s.DEVNULL).pid)"
    )
    pid = int(subprocess.check_output([sys.executable, "-c", start]))
    fd = os.pidfd_open(pid)
    yield pid
    unharmed = not select.select([fd], [], [], 0)[0]
    signal.pidfd_send_signal(fd, signal.SIGKILL)
    os.close(fd)
    assert unharmed, "the stranger was killed"


def ended_worker(method: str) -> WorkerProcess:
    """Return a worker that has ended, of which nothing was asked yet."""
    context = multiprocessing.get_context(method)
    worker = WorkerProcess(context, "worker", signal.pause, (), kill_group=True)
    worker.start()
    os.kill(worker.pid or 0, signal.SIGKILL)
    assert connection.wait([worker.exitcode_fd], 20)
    return worker


def test_stranger_with_the_number_of_a_worker_that_was_reaped_is_not_killed(
    stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pid is all there is, and something else in the program has reaped the worker."""
    monkeypatch.setattr(process_room, "_pidfd", lambda pid: None)
    worker = ended_worker("fork")
    os.waitpid(worker.pid or 0, 0)
    worker._process._popen.pid = stranger
    assert not worker.kill()
    worker.close()


@pytest.mark.parametrize("when", ["late", "at once"])
def test_stranger_with_the_number_of_a_worker_that_the_fork_server_reaped_is_not_killed(
    when: str, stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server reaps at once, maybe before there is a pidfd, and tells of it later."""

    def vanished(pid: int | None) -> int | None:
        raise ProcessLookupError

    monkeypatch.setattr(process_room, "_TO_GROUP", 1 << 20)  # the kernel is older than Linux 6.9
    if when == "at once":
        monkeypatch.setattr(process_room, "_pidfd", vanished)
    worker = ended_worker("forkserver")
    silent, writer = os.pipe()
    worker._process._sentinel = worker._process._popen.sentinel = silent
    worker._process._popen.pid = stranger
    assert not worker.kill()
    worker.close()
    os.close(silent)
    os.close(writer)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_that_somebody_else_reaps_leave_nothing(method: str) -> None:
    """A program that ignores SIGCHLD, or waits for all its children, costs us their exit codes.

    The error says so, and nothing is left of them.
    """
    former = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Pool(size=1, start_method=method) as pool:
            before = len(os.listdir("/proc/self/fd"))
            for lost in (1, 2, 3):
                with pytest.raises(WorkerDied, match="not known: something else in this program"):
                    pool.call(os._exit, 3)
                wait_until(pool, lambda lost=lost: pool.stats().workers_lost == lost)
                pool.wait_ready()
            assert len(os.listdir("/proc/self/fd")) == before
    finally:
        signal.signal(signal.SIGCHLD, former)


def test_each_worker_leads_a_group_of_its_own(start_method: str) -> None:
    """So the keys of a terminal reach neither it nor what it starts."""
    with Pool(size=2, start_method=start_method) as pool:
        for info in pool.workers():
            assert os.getpgid(info.pid or 0) == info.pid != os.getpgrp()
        assert len(set(pool.call(group))) == 1


# -- what worker code does to its process ------------------------------------------------------


@pytest.fixture(params=["fast", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "portable":
        monkeypatch.setenv("MINIPOOL_PORTABLE", "1")
    yield request.param


HARMLESS = [
    "close_standard_descriptors", "close_standard_files", "change_directory", "change_umask",
    "block_signals", "reset_signals", "change_locale", "start_threads", "start_process",
    "fork_and_return",
]  # fmt: skip


@pytest.mark.parametrize("what", HARMLESS)
def test_worker_survives_what_code_does_to_its_process(what: str, path: str) -> None:
    """The same worker, with its state, answers afterwards; is probed; and ends in good order."""
    with Pool(Stateful, size=1, close_timeout=10) as pool:
        before = pool.call("pid")
        pool.call("add", 5)
        pool.call(misbehave, what)
        assert (pool.call("get"), pool.call("pid")) == (5, before)
        assert pool.health_check(probe=True).status == "healthy"
        assert pool.call("get") == 5
        pid = before
    wait_gone(pid)
    assert (pool.stats().workers_lost, pool.stats().workers_retired) == (0, 1)


def test_directory_that_is_gone_does_no_harm(tmp_path: Path) -> None:
    with Pool(Stateful, size=1) as pool:
        before = pool.call("pid")
        pool.call(misbehave, "lose_directory", str(tmp_path / "gone"))
        assert pool.call("pid") == before


def test_child_that_returns_from_a_call_is_no_second_worker(start_method: str, path: str) -> None:
    """Both processes return from `os.fork()`: one reply comes, and nothing comes after it."""
    with Pool(Stateful, size=1, start_method=start_method) as pool:
        ear = Ear(pool, "error")
        with pool.checkout() as w:
            for number in range(1, 20):
                assert w.call(misbehave, "fork_and_return") is True
                assert w.call("add") == number
        assert not handle_of(pool).channel.disturbed()
        assert not ear.heard


@pytest.mark.parametrize("end", [Pool.close, Pool.terminate, Pool.drain])
def test_worker_that_ignores_every_signal_is_ended(
    end: Callable[[Pool[Any]], None], gate: Gate
) -> None:
    with Pool(IgnoresEverything, size=2, close_timeout=0.3, call_timeout=0.5) as pool:
        (first, second) = [info.pid or 0 for info in pool.workers()]
        gate.open()
        with pytest.raises(CallTimeout):
            pool.call("hang", gate.path)
        end(pool)
        wait_gone(first, second)
