"""Worker classes and functions for tests, named for what they do or how they fail."""

from __future__ import annotations

import os
import signal
from typing import Any

from minipool import Pool


class Counter:
    """Keeps a number; well in every way."""

    def __init__(self, start: int = 0) -> None:
        self.value = start

    def add(self, amount: int = 1) -> int:
        self.value += amount
        return self.value

    def pid(self) -> int:
        return os.getpid()


class Echo:
    def echo(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs


class RaisesAtStart:
    def __init__(self) -> None:
        raise LookupError("no weights here")


class DiesOnCall:
    def die(self, signum: int = signal.SIGKILL) -> None:
        os.kill(os.getpid(), signum)

    def leave(self, code: int) -> None:
        os._exit(code)

    def well(self) -> str:
        return "well"


def identity(value: Any) -> Any:
    return value


def getpid() -> int:
    return os.getpid()


def fail(kind: type[BaseException], *args: Any) -> None:
    raise kind(*args)


def kill_self(signum: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), signum)


def own_memory() -> int:
    """Return how much memory of its own this process has, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * os.sysconf("SC_PAGESIZE")


def memory_at_start(start_method: str | None = None) -> int:
    """Return how much memory of its own a worker begins with, in bytes."""
    options = {} if start_method is None else {"start_method": start_method}
    with Pool(size=1, **options) as pool:
        return pool.call(own_memory)
