"""Worker code that leaves something behind in its process: a timer, a child that returns.

A module of its own, without pytest, because every worker that uses one of these imports it.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from gates import pass_gate


def leave_a_timer(path: str, kind: type[BaseException], *args: Any) -> int:
    """Return at once; soon, and then again and again, `kind` is raised wherever the worker is.

    Each time the gate hears of it.
    """
    told = os.open(path + ".in", os.O_WRONLY)

    def strike(signum: int, frame: Any) -> None:
        os.write(told, b"!")
        raise kind(*args)

    signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.05)
    return os.getpid()


def fork_and_stop(path: str, how: str) -> int:
    """Fork; the child returns or raises, and when it has ended, we stop at the gate."""
    child = os.fork()
    if child == 0:
        if how == "raise":
            raise ValueError("in the child")
        return 0
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    pass_gate(path)
    return status


class ForksAtStart:
    """Both processes return from its constructor."""

    def __init__(self) -> None:
        self.child = os.fork()
        if self.child:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])

    def how_it_ended(self) -> int:
        return self.status
