"""Worker code that talks: log records, prints, lines of C and of other programs."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import threading
from contextvars import ContextVar
from typing import Any

import minipool
from gates import pass_gate

log = logging.getLogger("talkers.worker")
trace_id: ContextVar[str] = ContextVar("trace_id")


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("not this one")

    def __repr__(self) -> str:
        return "<unpicklable>"


class Unreadable:
    def __reduce__(self) -> Any:
        return int, ("x",)


def say(level: int, text: str, *args: Any, **extra: Any) -> int:
    log.log(level, text, *args, extra=extra)
    return os.getpid()


def say_in_session(text: str) -> None:
    minipool.current_session()["said"] = text
    log.warning(text)


def say_many(count: int) -> None:
    for number in range(count):
        log.warning("%d", number)


def say_unpicklable() -> None:
    log.warning("%s and %r", Unpicklable(), threading.Lock(), extra={"thing": Unpicklable()})


def say_unreadable() -> None:
    log.warning("unreadable", extra={"thing": Unreadable(), "other": 3})


def say_exception() -> None:
    try:
        {}["missing"]
    except KeyError:
        log.exception("it failed")


def say_wrongly() -> None:
    log.warning("%d", "not a number")


def say_and_die(count: int, signum: int) -> None:
    say_many(count)
    os.kill(os.getpid(), signum)


def say_in_child(text: str) -> int:
    """Log in a forked child of the worker, with pieces of two processes in the pipe at once."""
    pid = os.fork()
    if pid == 0:
        log.warning(text)
        os._exit(0)
    log.warning(text)
    os.waitpid(pid, 0)
    return pid


def say_in_thread() -> None:
    thread = threading.Thread(target=log.warning, args=("from a thread",))
    thread.start()
    thread.join()


def say_after(path: str, text: str) -> None:
    pass_gate(path)
    log.warning(text)


def write_everywhere() -> None:
    print("print")
    sys.stdout.flush()
    sys.stderr.write("error\n")
    os.write(1, b"raw\n")
    subprocess.run(["echo", "program"], check=True)
    c = ctypes.CDLL(None)
    c.puts(b"C")
    print("umlaut: ä \udc80")
    os.write(1, b"no utf-8: \xff\n")


def write(text: str) -> None:
    print(text)


def write_many(count: int) -> None:
    for number in range(count):
        print(number)


def write_part(text: str) -> None:
    os.write(1, text.encode())


def write_and_abort(count: int) -> None:
    for number in range(count):
        print("line", number)
    os.write(2, b"fatal: no line end")
    os.abort()


def close_output() -> str:
    os.close(1)
    os.close(2)
    return "closed"


def redo_logging() -> None:
    logging.basicConfig(level=logging.DEBUG)
    logging.getLogger("talkers.other").addHandler(logging.StreamHandler())


def write_to_log_pipe() -> None:
    """Write garbage to the descriptor of the log records."""
    (handler,) = logging.getLogger().handlers
    os.write(handler._fd, b"garbage, and enough of it")  # type: ignore[attr-defined]


def modules() -> list[str]:
    return sorted(sys.modules)


class DiesAtStart:
    def __init__(self) -> None:
        print("about to fail")
        os.abort()


class SaysAtStart:
    def __init__(self) -> None:
        log.warning("made")
        print("made")

    def close(self) -> None:
        log.warning("closed")
        print("closed")


def kill_now() -> None:
    os.kill(os.getpid(), 9)


def write_and_wait(text: str, path: str) -> None:
    print(text)
    pass_gate(path)
