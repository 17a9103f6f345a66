"""What workers answer that looks like something else: like a worker's death, or like an exit.

A module of its own, without pytest, because every worker that uses it imports it.
"""

from __future__ import annotations

import logging
import os
import signal
from multiprocessing import Pipe
from typing import Any

import minipool
from gates import pass_gate
from minipool import Pool
from minipool import errors as e

#: Errors as code might make them that has a pool of its own, or only uses the classes.
ANSWERS = {
    "not begun": lambda: e.WorkerDied(
        "mine", worker_id=0, pid=1, exitcode=-9, signal="SIGKILL", started=False, target="f",
        sent_ns=1,
    ),
    "bare death": lambda: e.WorkerDied("mine"),
    "timeout": lambda: e.CallTimeout("mine", timeout=1.0, started=False),
    "bare error": lambda: e.WorkerError("mine"),
    "protocol": lambda: e.ProtocolError("mine"),
    "start": lambda: e.WorkerStartError("mine", exitcode=1, signal=None),
    "checkout": lambda: e.CheckoutTimeout("mine", timeout=1.0, waited=1.0),
    "closed": lambda: e.PoolClosed("mine"),
    "revoked": lambda: e.LeaseRevoked("mine", reason="mine"),
    "lost": lambda: e.SessionLost("mine", session_id="s"),
}  # fmt: skip


def note(path: str) -> None:
    """Count a call, in a file."""
    with open(path, "a") as file:
        file.write("!")


def answer(path: str, name: str) -> None:
    """Raise one of `ANSWERS`."""
    note(path)
    raise ANSWERS[name]()


def answer_in_session(path: str, name: str) -> None:
    minipool.current_session()["touched"] = True
    answer(path, name)


def stop_at(path: str, gate: str) -> int:
    note(path)
    return pass_gate(gate)


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def has_a_pool(path: str) -> None:
    """Run a call in a pool of this worker's own, whose worker dies of it."""
    note(path)
    with Pool(size=1) as pool:
        pool.call(dies)


def poison(path: str) -> None:
    """End every worker it is sent to."""
    note(path)
    dies()


def poison_once(path: str) -> int:
    """End the first worker it is sent to; then answer so that a policy may try once more."""
    note(path)
    if os.path.getsize(path) == 1:
        dies()
    raise ANSWERS["bare death"]()


class Raises:
    """Cannot be made: its pool has failed, it says."""

    def __init__(self, name: str) -> None:
        raise ANSWERS[name]()


class Program:
    """Raises what looks like the death of its worker."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> None:
        answer(self.path, "not begun")


# -- exceptions with code of their own -----------------------------------------------------------


class ExitsWhenPickled(Exception):
    def __reduce__(self) -> Any:
        raise SystemExit(3)


class ExitsWhenUnpickled(Exception):
    def __reduce__(self) -> Any:
        return _leave, ()


class ExitsInTheParent(Exception):
    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        if os.getpid() != pid:
            raise SystemExit(3)


class ExitsWhenRead(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class InterruptsWhenPickled(Exception):
    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


class TakesNoCause(Exception):
    """Refuses every attribute."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise SystemExit(3)


class Nameless(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in ("__module__", "__qualname__", "__name__"):
            raise SystemExit(3)
        return super().__getattribute__(name)


class HasNoName(Exception, metaclass=Nameless):
    pass


class Text(str):
    def __reduce__(self) -> Any:
        raise SystemExit(3)


class SaysItInAText(Exception):
    def __str__(self) -> str:
        return Text("said")


def _leave() -> None:
    raise SystemExit(3)


def raise_one(name: str) -> None:
    kind = globals()[name]
    raise kind(os.getpid()) if kind is ExitsInTheParent else kind("here")


class ResultExitsWhenPickled:
    def __reduce__(self) -> Any:
        raise SystemExit(3)


class ResultExitsWhenUnpickled:
    def __reduce__(self) -> Any:
        return _leave, ()


def return_one_in_session(name: str) -> Any:
    minipool.current_session()["touched"] = True
    return return_one(name)


def return_one(name: str) -> Any:
    return globals()[name]()


def raise_from_deep(frames: int, cause: bool) -> None:
    """Raise an exception with a traceback of so many frames, or one that has it as its cause."""
    error: BaseException = ValueError("from the deep")
    for _ in range(frames):  # what unwinding a recursion does, without its stack
        try:
            raise error
        except ValueError:
            pass
    if cause:
        raise KeyError("on top") from error
    raise error


def log_from_deep(frames: int) -> None:
    try:
        raise_from_deep(frames, cause=False)
    except ValueError:
        logging.getLogger("answers").exception("it failed")


def raise_long_chain(length: int) -> None:
    error: BaseException = ValueError("the first of all")
    for number in range(length):
        following = ValueError(number)
        following.__cause__ = error
        error = following
    raise error


# -- signal handlers -----------------------------------------------------------------------------


def leave_a_handler(how: str, gate: str) -> int:
    """Return at once; soon, when the worker waits, a handler raises what its pipe might."""
    told = os.open(gate + ".in", os.O_WRONLY)

    def handler(signum: int, frame: Any) -> None:
        if frame.f_code.co_name != "receive":
            return  # the timer comes again
        os.write(told, b"!")
        if how == "reads a closed pipe":
            ours, theirs = Pipe()
            theirs.close()
            ours.recv()
        raise ConnectionResetError(104, "of the handler's own")

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.05)
    return os.getpid()
