"""Worker classes that make trouble at their start, at their end, or when they are probed.

A module of its own, without pytest, because every worker that uses one of them imports it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from gates import pass_gate


class StopsAtGateInInit:
    """Becomes ready when the test opens the gate."""

    def __init__(self, gate: str) -> None:
        pass_gate(gate)

    def pid(self) -> int:
        return os.getpid()


class HangsInInit:
    def __init__(self) -> None:
        signal.pause()


class LeavesInInit:
    def __init__(self, code: int) -> None:
        os._exit(code)


class KillsItselfInInit:
    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class CannotStart:
    """Stands in for a launcher: no process can be started."""

    portable = True
    context = baggage = None

    def setup(self, *args: Any) -> Any:
        raise OSError("no more processes")


class FailsWhileFileExists:
    """Starts well unless there is that file."""

    def __init__(self, path: str) -> None:
        if os.path.exists(path):
            raise OSError(f"{path} is in the way")

    def pid(self) -> int:
        return os.getpid()


def fails_so_often(path: str, times: int, how: str) -> int:
    """Note each attempt in a file; fail in one of three ways until there are more than `times`."""
    with open(path, "a") as file:
        file.write("!")
    attempt = os.path.getsize(path)
    if attempt <= times:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hangs":
            signal.pause()
        raise ConnectionError(f"attempt {attempt}")
    return attempt


class LeavesOnceReady:
    """Says that it is ready, and is gone: a thread of its own ends the process."""

    def __init__(self) -> None:
        main = threading.main_thread()

        def leave() -> None:
            # The main thread sends the ready frame, then waits for requests: that is when.
            while "receive" not in _stack_of(main):
                pass
            os._exit(3)

        threading.Thread(target=leave, daemon=True).start()


def _stack_of(thread: threading.Thread) -> list[str]:
    frame, names = sys._current_frames().get(thread.ident or 0), []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


class NotesItsEnd:
    """Appends a line to a file when its `close()` is called."""

    def __init__(self, path: str) -> None:
        self.path = path

    def pid(self) -> int:
        return os.getpid()

    def wait_at(self, gate: str) -> int:
        return pass_gate(gate)

    def close(self) -> None:
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\n")


class HangsInClose:
    def close(self) -> None:
        while True:
            signal.pause()


class RaisesInClose:
    def close(self) -> None:
        raise RuntimeError("cannot let go")


class IgnoresSigterm:
    def __init__(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def wait_at(self, gate: str) -> int:
        return pass_gate(gate)


class SickWhileFileExists:
    """Its `health_check()` is False while there is that file, and it counts how often it ran."""

    def __init__(self, path: str) -> None:
        self.path, self.checks = path, 0

    def health_check(self) -> bool:
        self.checks += 1
        return not os.path.exists(self.path)

    def counted(self) -> int:
        return self.checks

    def pid(self) -> int:
        return os.getpid()


class RaisesInHealthCheck:
    def health_check(self) -> None:
        raise ConnectionError("the database is gone")


class HangsInHealthCheck:
    def health_check(self) -> None:
        signal.pause()

    def pid(self) -> int:
        return os.getpid()


class StopsAtGateInHealthCheck:
    def __init__(self, gate: str) -> None:
        self.gate = gate

    def health_check(self) -> None:
        pass_gate(self.gate)

    def pid(self) -> int:
        return os.getpid()


class ReadsEnvironmentAtImport:
    """Tells what an environment variable was when this module was imported."""

    SEEN = os.environ.get("MINIPOOL_TEST_WORD")

    def seen(self) -> str | None:
        return self.SEEN


def busy_in_python(path: str) -> None:
    """Tell the gate, and compute for ever."""
    _arrive(path)
    while True:
        pass


def busy_in_c(path: str) -> None:
    """Tell the gate, and sleep in a C function that holds the GIL."""
    libc: Any = ctypes.PyDLL(None)  # PyDLL keeps the GIL, CDLL would not
    _arrive(path)
    libc.sleep(600)


def idle_at_gate(path: str) -> None:
    """Tell the gate, and wait in a system call without the GIL."""
    _arrive(path)
    signal.pause()


def _arrive(path: str) -> None:
    with open(path + ".in", "wb", buffering=0) as arrived:
        arrived.write(b"!")


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def environment(name: str) -> str | None:
    return os.environ.get(name)


def imported(name: str) -> bool:
    return name in sys.modules


def fork_and_wait() -> int:
    """Fork in worker code; return the child's exit code."""
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def nested_sum(start_method: str, close: bool) -> int:
    """Open a pool inside a worker and use it; leave it open unless told to close it."""
    from minipool import Pool
    from workers import Counter

    pool = Pool(Counter, args=(40,), size=1, start_method=start_method).open()
    result: int = pool.call("add", 2)
    if close:
        pool.close()
    else:
        _kept.append(pool)
    return result


_kept: list[Any] = []


def ends_of(pid: int) -> set[tuple[str, int]]:
    """Return the ends of pipes and sockets that a process has open, each with its access mode."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            flags = (link.parent.parent / "fdinfo" / link.name).read_text().split()[3]
            found.add((os.readlink(link), int(flags, 8) & os.O_ACCMODE))
    return {end for end in found if end[0].startswith(("pipe:", "socket:"))}


def thread_names() -> list[str]:
    return [thread.name.replace(" ", "-") for thread in threading.enumerate()]


class Hoards:
    """Keeps as much memory as it is told to."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []

    def hoard(self, size: int) -> int:
        self.kept.append(b"\1" * size)
        return len(self.kept)

    def pid(self) -> int:
        return os.getpid()


def hoard_at_gate(path: str, size: int) -> int:
    """Take so much memory, and stop at the gate with it."""
    kept = b"\1" * size
    pass_gate(path)
    return len(kept)


class HoardsInInit(Hoards):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.hoard(size)


def burn() -> None:
    """Compute for ever."""
    while True:
        pass


def open_many(count: int) -> None:
    """Open so many descriptors, and close them again."""
    opened: list[int] = []
    try:
        for _ in range(count):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for fd in opened:
            os.close(fd)


class OneOfThem:
    """Starts well for the first that comes; raises for all others."""

    def __init__(self, path: str) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))

    def pid(self) -> int:
        return os.getpid()


class AllButOne:
    """Raises for the first that comes; the others stop at a gate, and start well."""

    def __init__(self, path: str, gate: str) -> None:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass_gate(gate)
        else:
            raise LookupError("the first one")


class AllButOneAfterGates:
    """Each stops at a gate; the first that comes has one of its own, and raises behind it."""

    def __init__(self, path: str, gate_of_first: str, gate: str) -> None:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass_gate(gate)
        else:
            pass_gate(gate_of_first)
            raise LookupError("the first one")


class RaisesAfterTheGate:
    def __init__(self, gate: str) -> None:
        pass_gate(gate)
        raise LookupError("no weights here")


class FailsSoOften:
    """Cannot be made so many times: it raises, or its process dies."""

    def __init__(self, path: str, times: int, how: str) -> None:
        self.attempt = fails_so_often(path, times, how)

    def attempts(self) -> int:
        return self.attempt


class FailsThenStops:
    """Raises for the first two that come; the others stop at a gate, and start well."""

    def __init__(self, path: str, gate: str) -> None:
        with open(path, "a") as file:
            file.write("!")
        if os.path.getsize(path) <= 2:
            raise LookupError("one of the first two")
        pass_gate(gate)
