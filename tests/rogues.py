"""Worker classes, functions, results and exceptions that go wrong in one way each.

A module of its own, without pytest, because every worker that uses one of them imports it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import threading
from typing import Any

from gates import pass_gate


class Stateful:
    """Keeps what it is told, and does what a worker's object may do."""

    kind = "stateful"

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def add(self, amount: int = 1) -> int:
        self.value += amount
        return self.value

    def get(self) -> int:
        return self.value

    def pid(self) -> int:
        return os.getpid()

    def show(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    def wait_at(self, gate: str) -> int:
        """Stand at a gate; return this process's pid, and count that it was passed."""
        pid = pass_gate(gate)
        self.value += 1
        return pid

    def return_it(self, name: str) -> Any:
        return globals()[name]()

    def raise_it(self, name: str, *args: Any) -> None:
        self.value += 1
        raise globals()[name](*args)

    def die_unless_there(self, path: str) -> int:
        """Die the first time, leaving a file; live on where the file is."""
        with open(path, "a") as file:
            file.write("x")
        if os.path.getsize(path) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    @staticmethod
    def twice(value: int) -> int:
        return 2 * value

    @classmethod
    def name(cls) -> str:
        return cls.kind

    def __call__(self, value: Any) -> Any:
        return value


class SaysItIsIll:
    """Its health check fails in the given way."""

    def __init__(self, how: str) -> None:
        self.how = how

    def health_check(self) -> bool:
        if self.how == "raises":
            raise RuntimeError("ill")
        return False

    def pid(self) -> int:
        return os.getpid()


# -- functions -----------------------------------------------------------------------------------


def double(value: Any) -> Any:
    return value * 2


def describe(first: Any, second: Any = None, *, third: Any = None) -> tuple[Any, Any, Any]:
    return first, second, third


def awkward(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def size_of(data: bytes) -> int:
    return len(data)


def make_bytes(size: int) -> bytes:
    return b"x" * size


def raise_it(name: str, *args: Any) -> None:
    """Raise one of the exceptions of this module or of the builtins."""
    import builtins

    kind = globals().get(name) or getattr(builtins, name)
    raise kind(*args)


def raise_with_cause() -> None:
    try:
        raise KeyError("the deeper one")
    except KeyError as error:
        raise ValueError("the outer one") from error


def recurse() -> int:
    return recurse() + 1


def exit_quietly(code: Any = None) -> None:
    sys.exit(code)


def leave(code: int) -> None:
    os._exit(code)


def kill_self(signum: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), signum)


def segfault() -> None:
    ctypes.string_at(0)


def stand_and_return(gate: str, value: Any) -> Any:
    """Return a value once the gate is open."""
    pass_gate(gate)
    return value


def _end() -> Any:
    """Return the worker's end of its pipe: the loop that calls us, in the main thread, has it."""
    frame: Any = sys._current_frames()[threading.main_thread().ident or 0]
    while not hasattr(frame.f_locals.get("self"), "_end"):
        frame = frame.f_back
    return frame.f_locals["self"]._end


def take_request() -> None:
    """Take the next request off the pipe, and forget it."""
    _end().receive()


def close_pipe() -> str:
    end = _end()
    for fd in [end._fd, end._out] if hasattr(end, "_out") else [end._conn.fileno()]:
        os.close(fd)
    return "closed"


def write_to_pipe(data: bytes = b"\0\0\0\x09 not a frame ") -> str:
    """Write what is no reply before the reply."""
    end = _end()
    os.write(end._out if hasattr(end, "_out") else end._conn.fileno(), data)
    return "written"


def write_to_pipe_later(gate: str) -> None:
    """Write to the pipe from a thread of its own, when the call is over and the gate open."""

    def later() -> None:
        pass_gate(gate)
        write_to_pipe()
        pass_gate(gate)

    threading.Thread(target=later, daemon=True).start()


def make_set() -> set[int]:
    return {1}


def where() -> Any:
    """Tell who runs this."""
    import minipool

    here = minipool.current_worker()
    return here and (here.pool, here.worker_id, here.generation, here.pid)


def make_local() -> Any:
    def local() -> None:
        pass

    return local


class NotAFunction:
    """Callable, picklable, and without a name of its own."""

    def __init__(self, base: int) -> None:
        self.base = base

    def __call__(self, value: int) -> int:
        return self.base + value

    def plus(self, value: int) -> int:
        return self.base + value


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, value: Any) -> Any:
        return value


half = functools.partial(double, 0.5)


# -- results and exceptions ----------------------------------------------------------------------


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("this one stays here")


class UnpicklableWithEvilText:
    def __reduce__(self) -> Any:
        raise EvilText


class UnpicklesOnlyIn:
    """Becomes an object again only in the process that it names."""

    def __init__(self, pid: int = 0) -> None:
        self.pid = pid or os.getpid()
        if os.getpid() != self.pid:
            raise LookupError("wrong process")

    def __reduce__(self) -> Any:
        return UnpicklesOnlyIn, (self.pid,)


class ExitsWhenUnpickled:
    def __reduce__(self) -> Any:
        return exit_if_not, (os.getpid(),)


def exit_if_not(pid: int) -> Any:
    if os.getpid() != pid:
        raise ValueError("made elsewhere")
    return ExitsWhenUnpickled()


class PlainError(Exception):
    """Survives pickle, with its arguments and attributes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.note = "kept"


class TwoArguments(Exception):
    """Its `__init__` wants two, its `args` have one: it does not survive pickle."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class HoldsLock(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class EvilText(Exception):
    def __str__(self) -> str:
        raise ValueError("no text for you")

    __repr__ = __str__


class OnlyInWorker(Exception):
    """Unpickles where it was made, and fails elsewhere."""

    def __init__(self, text: str, pid: int = 0) -> None:
        super().__init__(text)
        self.pid = pid or os.getpid()
        if self.pid != os.getpid():
            raise LookupError("wrong process")

    def __reduce__(self) -> Any:
        return OnlyInWorker, (str(self), self.pid)


class OwnBase(BaseException):
    """A user's own kind that no `except Exception` catches."""


class OwnExit(SystemExit):
    pass


class ReducesToText(Exception):
    """Claims to be a text when it is pickled."""

    def __reduce__(self) -> Any:
        return str, ("a text",)


# -- codecs --------------------------------------------------------------------------------------


class ShipsFunctions:
    """A codec as cloudpickle is one: it can send code that has no importable name."""

    def dumps(self, value: Any) -> bytes:
        import io
        import marshal
        import pickle
        import types

        class Pickler(pickle.Pickler):
            def reducer_override(self, obj: Any) -> Any:
                if isinstance(obj, types.FunctionType) and "<" in obj.__qualname__:
                    return rebuild, (marshal.dumps(obj.__code__),)
                return NotImplemented

        buffer = io.BytesIO()
        Pickler(buffer, 5).dump(value)
        return buffer.getvalue()

    def loads(self, data: bytes) -> Any:
        import pickle

        assert type(data) is bytes
        return pickle.loads(data)


def rebuild(code: bytes) -> Any:
    import marshal
    import types

    return types.FunctionType(marshal.loads(code), {"__builtins__": __builtins__})
