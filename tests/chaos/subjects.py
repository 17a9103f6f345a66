"""What the storm's workers are, and the trouble that calls make in them.

A module of its own, without pytest, because every worker imports it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import minipool

MODULUS = (1 << 61) - 1


class Subject:
    """A worker's object. Its start is slow, or fails, while there is a file that says so."""

    def __init__(self, folder: str) -> None:
        if Path(folder, "slow").exists():
            threading.Event().wait(0.15)
        if Path(folder, "failing").exists():
            raise OSError("starting fails for a while")
        self.token: int | None = None

    def begin(self, token: int) -> None:
        self.token = token

    def goes_on(self, token: int) -> bool:
        """Tell whether nobody else has begun anything here since `begin(token)`."""
        return self.token == token

    def square(self, number: int) -> int:
        return number * number

    def add(self, token: int) -> tuple[int, int]:
        """Commit one more token; return how many there are, and what they come to in order."""
        session = minipool.current_session()
        session["entry"] = entry = next_entry(session.get("entry", (0, 0)), token)
        return entry


def next_entry(entry: tuple[int, int], token: int) -> tuple[int, int]:
    """Return count and digest of a session once `token` is committed on top of `entry`."""
    count, digest = entry
    return count + 1, (digest * 1_000_003 + token + 1) % MODULUS


# -- trouble -------------------------------------------------------------------------------------


def leave(code: int) -> None:
    os._exit(code)


def crash(signum: int) -> None:
    os.kill(os.getpid(), signum)


def hang() -> None:
    while True:
        signal.pause()


def spin() -> None:
    while True:
        pass


def hang_up() -> None:
    """Close every descriptor, the worker's pipe among them."""
    os.closerange(3, 1024)


def fail(text: str) -> None:
    raise ArithmeticError(text)


def quit_python() -> None:
    sys.exit(3)


def return_a_lock() -> Any:
    return threading.Lock()
