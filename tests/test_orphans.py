"""The parent is killed with SIGKILL: a second later none of its workers is left."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Callable, Iterator

import pytest

import scripts
from gates import Gate
from minipool import Pool
from troublemakers import ends_of

ONE_SECOND = 1.0  # what is promised; the kernel needs a few milliseconds

PARENT = """
    import os, signal, sys, threading
    from ears import wait_until
    from minipool import Pool
    from troublemakers import StopsAtGateInInit, busy_in_c, busy_in_python, thread_names
    from vandals import start_children

    def main(method, state, gate):
        worker = StopsAtGateInInit if state in ("booting", "in init") else None
        args = (gate,) if worker else ()
        pool = Pool(worker, args=args, size=2, start_method=method, call_timeout=None)
        pool.open(wait=worker is None)
        globals()["pool"] = pool
        if state in ("python", "c"):
            for _ in range(2):
                call = (busy_in_python if state == "python" else busy_in_c), gate
                threading.Thread(target=pool.call, args=call, daemon=True).start()
        wait_until(pool, lambda: sum(bool(info.pid) for info in pool.workers()) == 2)
        print(*(info.pid for info in pool.workers()), flush=True)
        if state == "forked":
            child = os.fork()
            if child == 0:
                os.close(1), os.close(2)
                signal.pause()
            print(child, flush=True)
        if state == "children":
            print(*pool.call(start_children), flush=True)
        if state == "idle":
            print(*pool.call(thread_names), flush=True)
        signal.pause()

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""

NO_SETSIG = """
    import sys

    def refuse(event, args):
        if event == "fcntl.fcntl" and args[1] == 10:
            raise OSError(22, "F_SETSIG is not known here")

    sys.addaudithook(refuse)
"""


@contextlib.contextmanager
def _killed(process: subprocess.Popen[str], pids: list[int]) -> Iterator[float]:
    """Watch the processes `pids`, kill their parent, and tell when."""
    watched = {os.pidfd_open(pid): pid for pid in pids}
    try:
        process.kill()
        killed = time.monotonic()
        yield killed
        left = dict(watched)
        while left and time.monotonic() < killed + ONE_SECOND:
            ended = select.select(list(left), [], [], killed + ONE_SECOND - time.monotonic())[0]
            for fd in ended:
                del left[fd]
        assert not left, f"outlived their parent by {ONE_SECOND} s: {sorted(left.values())}"
    finally:
        for fd in watched:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)  # after the verdict
            os.close(fd)


@pytest.fixture
def parent(tmp_path: Path, gate: Gate) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a program that has a pool; whatever is left of it at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(method: str, state: str, **env: str) -> subprocess.Popen[str]:
        environment = scripts.environment(**env)
        process = scripts.start(tmp_path, PARENT, method, state, gate.path, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _line(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    line = process.stdout.readline().split()
    assert line, "the parent did not come so far"
    return line


@pytest.mark.parametrize("state", ["idle", "python", "c", "booting", "in init"])
def test_killed_parent_leaves_no_worker(
    start_method: str, state: str, gate: Gate, parent: Callable[..., subprocess.Popen[str]]
) -> None:
    """Idle, computing, holding the GIL in C, or not even ready: each ends with its parent."""
    process = parent(start_method, state)
    pids = [int(word) for word in _line(process)]
    assert len(pids) == 2
    if state in ("python", "c", "in init"):
        gate.wait_arrived(2)
    with _killed(process, pids):
        pass


@pytest.mark.parametrize("setsig", [True, False], ids=["kernel", "thread"])
def test_killed_parent_leaves_nothing_that_a_worker_started(
    start_method: str, setsig: bool, tmp_path: Path, parent: Callable[..., subprocess.Popen[str]]
) -> None:
    """A program it runs, a process it forked, and that one's child."""
    if not setsig:
        (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(NO_SETSIG))
    process = parent(start_method, "children", first_path=str(tmp_path))
    workers, children = ([int(word) for word in _line(process)] for _ in range(2))
    assert (len(workers), len(children)) == (2, 3)
    with _killed(process, workers + children):
        pass


@pytest.mark.parametrize("state", ["idle", "python"])
def test_killed_parent_leaves_no_worker_where_the_kernel_cannot_signal(
    start_method: str,
    state: str,
    gate: Gate,
    tmp_path: Path,
    parent: Callable[..., subprocess.Popen[str]],
) -> None:
    """Without F_SETSIG a thread in the worker waits for the parent's end."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(NO_SETSIG))
    process = parent(start_method, state, first_path=str(tmp_path))
    pids = [int(word) for word in _line(process)]
    if state == "python":
        gate.wait_arrived(2)
    else:
        assert "minipool-lifeline" in _line(process), "the thread is what this test is about"
    with _killed(process, pids):
        pass


def test_worker_has_no_thread_where_the_kernel_can_signal(
    start_method: str, parent: Callable[..., subprocess.Popen[str]]
) -> None:
    """The lifeline costs a worker no thread, so the other tests here try the kernel's way."""
    process = parent(start_method, "idle")
    pids = [int(word) for word in _line(process)]
    assert len(_line(process)) == 1, "the worker has its main thread, and no other"
    with _killed(process, pids):
        pass


def test_forked_child_of_the_parent_keeps_no_worker_alive(
    start_method: str, parent: Callable[..., subprocess.Popen[str]]
) -> None:
    """A child that the program forked has copies of its pipes, and yet the workers end."""
    process = parent(start_method, "forked")
    pids = [int(word) for word in _line(process)]
    (child,) = (int(word) for word in _line(process))
    watch = os.pidfd_open(child)
    try:
        with _killed(process, pids):
            assert not select.select([watch], [], [], 0)[0], "the child itself lives on"
    finally:
        signal.pidfd_send_signal(watch, signal.SIGKILL)
        select.select([watch], [], [], 20)
        os.close(watch)


def test_siblings_hold_none_of_each_others_pipes(start_method: str) -> None:
    """Each worker has its own ends of its own pipes, and no other end of any pipe of the pool."""
    before = ends_of(os.getpid())
    with Pool(size=3, start_method=start_method) as pool:
        assert pool._desk is not None
        handles = pool._desk.manager.fleet.handles.values()
        sources = [handle.channel.fd for handle in handles]
        fds = [fd if isinstance(fd, int) else fd.fileno() for fd in sources]
        fds += [handle.channel._out for handle in handles if hasattr(handle.channel, "_out")]
        pipes = {os.readlink(f"/proc/self/fd/{fd}") for fd in fds}
        ours = {end for end in ends_of(os.getpid()) - before if end[0] in pipes}
        assert len(pipes) == len(ours) == len(fds)
        theirs = [
            {e for e in ends_of(handle.pid or 0) - before if e[0] in pipes or "socket" in e[0]}
            for handle in handles
        ]
        for index, ends in enumerate(theirs):
            assert ends and not ends & ours, "a copy of the parent's end"
            for other in theirs[index + 1 :]:
                assert not ends & other, "a copy of a sibling's end"
