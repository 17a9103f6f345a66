"""Worker code that treats its own process badly, or leaves others behind.

A module of its own, without pytest, because every worker that uses one of these imports it.
"""

from __future__ import annotations

import locale
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from gates import pass_gate


def start_children(apart: bool = False) -> list[int]:
    """Start a program and fork twice; return the pids of all three. `apart`: out of our group."""
    read, write = os.pipe()
    program = subprocess.Popen(["sleep", "600"], start_new_session=apart, close_fds=False)
    child = os.fork()
    if child == 0:
        if apart:
            os.setsid()
        grandchild = os.fork()
        if grandchild:
            os.write(write, b"%d\n" % grandchild)
        while True:
            signal.pause()
    with open(read) as pipe:
        os.close(write)
        grandchild = int(pipe.readline())
    return [program.pid, child, grandchild]


class LeavesChildren:
    """Has started others by the time it is ready, and ends in various ways."""

    def __init__(self) -> None:
        self.pids = start_children()

    def children(self) -> list[int]:
        return self.pids

    def pid(self) -> int:
        return os.getpid()

    def leave(self) -> None:
        os._exit(0)

    def raise_exit(self) -> None:
        sys.exit(0)

    def hang(self) -> None:
        while True:
            signal.pause()


class IgnoresEverything:
    """Blocks and ignores whatever signal it may."""

    def __init__(self) -> None:
        for signum in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))

    def hang(self, gate: str) -> None:
        pass_gate(gate)
        while True:
            signal.sigwait({signal.SIGUSR1})

    def close(self) -> None:
        while True:
            signal.sigwait({signal.SIGUSR1})


# -- what code does to its own process ---------------------------------------------------------


def close_standard_descriptors() -> None:
    for fd in range(3):
        os.close(fd)


def close_standard_files() -> None:
    for file in (sys.stdin, sys.stdout, sys.stderr):
        file.close()


def change_directory() -> None:
    os.chdir("/")


def lose_directory(path: str) -> None:
    os.mkdir(path)
    os.chdir(path)
    os.rmdir(path)


def change_umask() -> None:
    os.umask(0o777)


def block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))


def reset_signals() -> None:
    for signum in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(signum, signal.SIG_DFL)


def change_locale() -> None:
    locale.setlocale(locale.LC_ALL, "C")
    os.environ.clear()


def start_threads() -> None:
    for _ in range(20):
        threading.Thread(target=threading.Event().wait, daemon=True).start()


def start_process() -> None:
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=os.getpid)
    process.start()
    process.join()


def change_pickle() -> None:
    """Break the modules that everybody shares, but for what the worker's loop has bound."""
    time.monotonic = None  # type: ignore[assignment]


def fork_and_return() -> bool:
    """Fork, and let both processes go on as if they were the worker."""
    return os.fork() > 0


def signal_mask() -> set[int]:
    return {int(signum) for signum in signal.pthread_sigmask(signal.SIG_BLOCK, [])}


def group() -> tuple[int, int]:
    return os.getpid(), os.getpgrp()


def misbehave(name: str, *args: Any) -> Any:
    return globals()[name](*args)


class NeedsMemory:
    """Takes a lot of memory to start with."""

    def __init__(self) -> None:
        self.value = len(bytearray(256 << 20))

    def add(self, amount: int) -> int:
        return self.value + amount

    def pid(self) -> int:
        return os.getpid()
