"""Functions and worker classes that get stuck or crash at a line that can be told.

A module of its own, without pytest, because every worker that uses one of them imports it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import tempfile
import threading
from typing import Any

from gates import pass_gate

RT = range(getattr(signal, "SIGRTMIN", 1), getattr(signal, "SIGRTMAX", 0) + 1)


def stand(gate: str) -> int:
    return pass_gate(gate)


def stand_in_c(gate: str) -> int:
    """Stand at a gate in a C function that holds the GIL."""
    arrived, leave = os.open(gate + ".in", os.O_WRONLY), os.open(gate + ".out", os.O_RDONLY)
    buffer = ctypes.create_string_buffer(1)
    os.write(arrived, b"!")
    ctypes.PyDLL(None).read(leave, buffer, 1)
    os.close(arrived)
    os.close(leave)
    return os.getpid()


def block_all_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) | set(RT))


def stand_with_a_thread(gate: str) -> int:
    there = threading.Event()

    def second_thread() -> None:
        there.set()
        threading.Event().wait()

    threading.Thread(target=second_thread, daemon=True).start()
    there.wait()
    return pass_gate(gate)


def crash_by_sigsegv() -> None:
    ctypes.string_at(0)


def crash_by_sigabrt() -> None:
    os.abort()


def crash_by_sigbus() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(mmap.PAGESIZE)
        memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        os.ftruncate(file.fileno(), 0)
        memory[0]


def crash_by_sigfpe() -> None:
    ctypes.CDLL(None).div(1, 0)
    signal.raise_signal(signal.SIGFPE)  # not every processor minds


def crash_in_a_child() -> int:
    """Have a process of our own crash; return how it ended."""
    pid = os.fork()
    if pid == 0:
        crash_by_sigsegv()
    return os.waitpid(pid, 0)[1]


class HangsInInit:
    def __init__(self) -> None:
        signal.pause()


class CrashesInInit:
    def __init__(self) -> None:
        crash_by_sigsegv()


class HangsWhenProbed:
    def health_check(self) -> None:
        signal.pause()

    def answer(self, value: Any) -> Any:
        return value


def hoard(size: int) -> int:
    """Take so much memory, and write to all of it."""
    return len(bytearray(size))
