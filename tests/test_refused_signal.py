"""A worker that its parent may not signal: told as it is, cut off, and waited for by nobody."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Iterator

import pytest

import scripts
from ears import Ear, handle_of
from gates import Gate, pass_gate
from minipool import CallTimeout, LeaseRevoked, Pool
from minipool.engine import manager, process
from scripts import wait_gone
from workers import getpid

GIVEN_UP = """
    import os, sys, threading
    from gates import pass_gate
    from minipool import CallTimeout, Pool
    from workers import getpid

    def main(method, gate, how):
        pool = Pool(size=2, start_method=method, close_timeout=0.5).open()
        held = pool.checkout()
        os.setgid(65534)
        os.setuid(65534)
        print(*(info.pid for info in pool.workers()), flush=True)
        try:
            with pool.checkout() as w:
                w.options(timeout=0.3).call(pass_gate, gate)
        except CallTimeout as error:
            print(error, flush=True)
        held.release()
        print(pool.call(abs, -3), flush=True)
        if how == "close":
            pool.close()
            print("closed", flush=True)

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up rights")
@pytest.mark.parametrize("how", ["close", "exit"])
def test_program_that_gives_up_its_rights_ends_all_the_same(
    start_method: str, how: str, gate: Gate, tmp_path: Path
) -> None:
    for end in (".in", ".out"):
        os.chmod(gate.path + end, 0o666)
    process = scripts.start(tmp_path, GIVEN_UP, start_method, gate.path, how)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    code, out, err = scripts.finish(process)
    told, answer, *closed = out.splitlines()
    assert "it could not be killed, and is cut off" in told
    assert "raise the timeout" not in told, "a second remedy, which would not help"
    assert "this process runs as user 65534" in told and "which runs as user 0" in told
    assert (code, answer, closed) == (0, "3", ["closed"] * (how == "close")), err
    assert "cannot be killed, and is cut off" in err
    wait_gone(*pids)


@pytest.fixture
def powerless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process may signal nobody, from when the test says so."""

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(process.signal, "pidfd_send_signal", refuse, raising=False)
    yield


@pytest.mark.parametrize("path", ["", "1"], ids=["fast", "portable"])
def test_lease_of_a_worker_that_cannot_be_killed_is_revoked(
    path: str, gate: Gate, powerless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller is told so, and the pool starts another; the worker leaves after its call."""
    monkeypatch.setenv("MINIPOOL_PORTABLE", path)
    with Pool(size=1, lease_timeout=0.2, call_timeout=None) as pool:
        ear = Ear(pool, "worker.terminate")
        pid = pool.workers()[0].pid
        with pytest.raises(LeaseRevoked):
            pool.call(pass_gate, gate.path)
        keeper = pool._desk.manager  # type: ignore[union-attr]
        keeper._limits = keeper._limits._replace(lease_ns=None)  # on a busy machine more come late
        assert pool.call(getpid) != pid
        gate.open()
        assert ear.wait("worker.terminate").metadata["pid"] == pid


def test_last_worker_that_cannot_be_killed_does_not_hold_up_the_close(
    gate: Gate, powerless: None
) -> None:
    pool = Pool(size=1, close_timeout=0.1, call_timeout=None).open()
    ear = Ear(pool, "worker.terminate")
    pid = pool.workers()[0].pid or 0
    problems: list[BaseException] = []

    def call() -> None:
        try:
            pool.call(pass_gate, gate.path)
        except Exception as problem:
            problems.append(problem)

    caller = threading.Thread(target=call)
    caller.start()
    gate.wait_arrived()
    pool.close()
    assert ear.wait("worker.terminate", timeout=0).metadata["pid"] == pid
    caller.join(20)
    assert [type(problem) for problem in problems] == [LeaseRevoked]
    wait_gone(pid)  # the pool's end is the end of its lifeline


def _kept() -> tuple[set[str], set[threading.Thread]]:
    """Return what this process has open, and its threads."""
    return set(os.listdir("/proc/self/fd")), set(threading.enumerate())


@pytest.mark.parametrize("path", ["", "1"], ids=["fast", "portable"])
@pytest.mark.parametrize("how", ["refused", "in vain"])
def test_worker_that_outlives_sigkill_is_given_up_and_nothing_of_it_is_kept(
    start_method: str,
    how: str,
    path: str,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As one that waits for a disk or a network share in the kernel; a refusal is told at once."""

    def send(fd: int, signum: int, *more: Any) -> None:
        if how == "refused":
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setenv("MINIPOOL_PORTABLE", path)
    monkeypatch.setattr(manager, "_GIVE_UP_NS", 1 << 62 if how == "refused" else 200_000_000)
    problems: list[type] = []

    def call() -> None:
        try:
            pool.call(pass_gate, gate.path)
        except Exception as problem:
            problems.append(type(problem))

    before = _kept()
    pool: Pool[Any] = Pool(size=2, start_method=start_method, close_timeout=0.1, call_timeout=None)
    ear = Ear(pool.open(), "worker.terminate")
    caller = threading.Thread(target=call)
    caller.start()
    gate.wait_arrived()
    (pid,) = (info.pid or 0 for info in pool.workers() if info.state == "leased")
    with monkeypatch.context() as patch:
        patch.setattr(process.signal, "pidfd_send_signal", send)
        pool.close()
    ended = {event.metadata["pid"] for event in ear.of("worker.terminate")}
    assert pid in ended and len(ended) == 2, "it has not ended in its time"
    caller.join(20)
    del caller
    assert problems == [LeaseRevoked]
    wait_gone(pid)  # the pool's end is the end of its lifeline
    gc.collect()  # what an error's traceback has held
    assert _kept() == before
    told = {"refused": "cannot be killed, and is cut off", "in vain": "it is given up"}[how]
    assert [record.getMessage() for record in caplog.records if f"(pid {pid})" in record.getMessage()
            and told in record.getMessage()], caplog.text  # fmt: skip


def cling(path: str) -> None:
    """Stand at the gate, and do not end with the parent."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # of the listing itself
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ASYNC:
                os.close(fd)  # the lifeline
    pass_gate(path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the lifeline is a thread")
@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_caller_of_a_worker_that_is_given_up_waits_no_longer(
    start_method: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the close, though the worker lives on; it is reaped once it ends."""
    monkeypatch.setattr(manager, "_GIVE_UP_NS", 200_000_000)
    monkeypatch.setattr(process.signal, "pidfd_send_signal", lambda *_: None)
    pool = Pool(size=1, start_method=start_method, close_timeout=0.1, call_timeout=None).open()
    pid, given_up = pool.workers()[0].pid or 0, handle_of(pool).process
    problems: list[type] = []

    def call() -> None:
        try:
            pool.call(cling, gate.path)
        except Exception as problem:
            problems.append(type(problem))

    caller = threading.Thread(target=call)
    caller.start()
    gate.wait_arrived()
    try:
        pool.close()
        caller.join(20)
        assert problems == [LeaseRevoked]
        os.kill(pid, 0)  # it is there
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_gone(pid)
    assert given_up.exitcode(20) is None, "its pid may be another's by now"
    assert given_up.unknown == "it could not be killed"
    with Pool(size=1, start_method=start_method):
        pass  # whose start, and whose close, reaps what has ended


def test_process_that_was_not_killed_is_not_told_as_killed(gate: Gate, powerless: None) -> None:
    with Pool(size=1, close_timeout=0.1) as pool:
        handle = handle_of(pool)
        with pytest.raises(CallTimeout, match="could not be killed"):
            with pool.checkout() as w:
                w.options(timeout=0.1).call(pass_gate, gate.path)
        assert handle.process.refused and not handle.process.killed
        assert not handle.process.kill(signal.SIGKILL)
        gate.open()
        wait_gone(handle.pid)
