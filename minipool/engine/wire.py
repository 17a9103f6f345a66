"""What travels between parent and worker: frames, names of things to call, remote exceptions.

A frame is a 4-byte length and a payload, as `multiprocessing.Connection` writes it, so a pipe end
of either kind (see `channel`) can talk to either kind. Each payload begins with a fixed header;
the body behind it is the codec's business, except for errors, which are always pickled.

    request: length (4), call id (8), kind (1), length of the target's name (2) | name | arguments
    reply:   length (4), call id (8), status (1) | result, or envelope of an error

Bodies are made before the first byte is written, on both sides, so an object that cannot be
pickled costs an error and not a worker.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Callable, NoReturn

from ..errors import CallMismatch, RemoteError, mark_answered
from .descriptors import close_held

if TYPE_CHECKING:
    from .shape import Shape  # imported where it is used, which is never in a worker

MAX_NAME = 0xFFFF  # bytes; what the header can tell
SHORT_FRAME = 0x7FFFFFFF  # beyond it, Connection writes -1 and then an 8-byte length

LENGTH = struct.Struct("!i")
LONG_LENGTH = struct.Struct("!iQ")
REQUEST = struct.Struct("!iqBH")  # length and header in one go
REPLY = struct.Struct("!iqB")

# Kinds of request. The body is the tuple of arguments or, with KEYWORDS, that and a dict, or, with
# ALONE, the one argument: most calls have one, and a tuple costs. That of SHIPPED is target,
# arguments and keywords.
METHOD, FUNCTION, SHIPPED, PROBE, STOP, ASSIGN = range(6)
KEYWORDS = 0x80
ALONE = 0x20
SESSION = 0x40  # the body begins with the head of a session, behind its length in 4 bytes
FLAGS = KEYWORDS | ALONE | SESSION
# Statuses of replies. Only RETURNED has a body in the pool's codec.
RETURNED, RAISED, RAISED_AND_TAINTED, REFUSED, BEGUN, READY, START_FAILED = range(7)
# COMMITTED: before the result, behind their length in 4 bytes, the changes of the session's state.
# NOT_HERE: nothing has run, because the worker lacks the session's state.
COMMITTED, NOT_HERE = range(7, 9)
ERRORS = (RAISED, RAISED_AND_TAINTED, REFUSED)  # what may be told of a call that did not return
LEAVING = 0x40  # flag: the worker was sent SIGTERM, and waits to be told to stop
WITH_WORDS = 0x80  # flag: the worker's words lie between header and body (no shared table)
WORDS = struct.Struct("=9q")


Dumps = Callable[[Any, int], bytes]  # the second argument is pickle's protocol, 5
Loads = Callable[[Any], Any]


def functions_of(codec: Any) -> tuple[Dumps, Loads]:
    """Return how to make bytes of arguments and results, and the way back.

    None is pickle, protocol 5. Others (json, cloudpickle) may make text and may want real bytes.
    """
    if codec is None:
        return pickle.dumps, pickle.loads

    def dumps(value: Any, protocol: int) -> bytes:
        data = codec.dumps(value)
        return data.encode() if isinstance(data, str) else bytes(data)

    return dumps, lambda data: codec.loads(bytes(data))


def pack_codec(codec: Any) -> bytes:
    """Make a codec travel: a module by its name, anything else pickled."""
    return pickle.dumps(("module", codec.__name__) if isinstance(codec, ModuleType) else codec)


def unpack_codec(data: bytes) -> Any:
    """Return the codec that was packed."""
    codec = pickle.loads(data)
    if isinstance(codec, tuple) and codec[:1] == ("module",):
        __import__(codec[1])
        return sys.modules[codec[1]]
    return codec


class Descriptor:
    """A descriptor that reaches the worker under every start method."""

    fd = -1  # closed

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        """Close it. Does nothing the second time."""
        close_held(self, "fd")

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing import reduction

        return _received, (reduction.DupFd(self.fd),)


class Ends:
    """One side's ends of two pipes: one to read from, one to write to. Travels to the worker."""

    def __init__(self, reader: Descriptor, writer: Descriptor) -> None:
        self.reader, self.writer = reader, writer

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


def _received(dup: Any) -> Descriptor:
    return Descriptor(dup.detach())


class RemoteTraceback(Exception):
    """The traceback of an exception as it was in the worker; shown as its cause."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0]) if self.args else ""


# -- names of things to call ---------------------------------------------------------------------


def name_of(target: Any) -> str | None:
    """Return "module:qualified.name" if that leads to `target`, else None."""
    module = getattr(target, "__module__", None)
    name = getattr(target, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or "<" in name:
        return None
    try:
        found = _walk(sys.modules[module], name)
    except (KeyError, AttributeError):
        return None
    return f"{module}:{name}" if found is target else None


def find(name: str) -> Any:
    """Import what `name_of` named.

    Raises:
        ImportError, AttributeError: there is no such thing in this process; perhaps one of nearly
            that name, which is told then.
    """
    module, _, path = name.partition(":")
    __import__(module)
    try:
        return _walk(sys.modules[module], path)
    except AttributeError as error:
        from .absence import half_imported  # seldom needed

        half = half_imported(module)
        hint = f"; {half}" if half else _hint(sys.modules[module], path)
        if not hint:
            raise
        # Not the same error: Python would add what it takes for near, too, to its traceback.
        raise AttributeError(f"{error}{hint}").with_traceback(error.__traceback__) from None


def find_for(owner: Any, name: str) -> Any:
    """Import what `name_of` named; a method of a class that `owner` is one of comes bound to it.

    The parent sends a method by its bare name if it knows the class. It does not if the worker
    is made by a factory, or if `target` is the method of a base class.

    Raises:
        ImportError, AttributeError: there is no such thing in this process.
    """
    found = find(name)
    holder, _, method = name.rpartition(".")
    if ":" in holder and isinstance(found, FunctionType):
        kind = find(holder)
        if isinstance(kind, type) and isinstance(owner, kind):
            return getattr(owner, method)
    return found


def _walk(start: Any, path: str) -> Any:
    for part in path.split("."):
        start = getattr(start, part)
    return start


def _hint(start: Any, path: str) -> str:
    """Say which names are near the first one of a path that is not there; "" if none is."""
    for part in path.split("."):
        try:
            start = getattr(start, part)
        except AttributeError:
            near = _near(part, start)
            return f"; did you mean {near}?" if near else ""
    return ""


def _near(name: str, owner: Any) -> str:
    """Return the names that an object has and that are near another, in words."""
    import difflib

    known = [each for each in dir(owner) if not each.startswith("_")]
    return " or ".join(map(repr, difflib.get_close_matches(name, known, 3)))


def why_unreachable(target: Any, starts_by_fork: bool) -> str | None:
    """Say why a worker could not import `target` and what to do, or None if nothing is known.

    A function is sent by name, so the worker must be able to find it under that name.
    """
    name = getattr(target, "__qualname__", None) or repr(target)
    module = getattr(target, "__module__", None)
    if name.endswith("<lambda>"):
        return "a lambda has no name to import it by; write it as a `def` at the top of a module"
    if "<locals>" in name:
        return f"{name} is defined inside a function; move it to the top of a module"
    if module == "__main__" and not starts_by_fork:
        return why_main_unreachable(target)
    return None


def why_main_unreachable(target: Any = None) -> str | None:
    """Say why worker processes cannot import this program's main module, or None if they can.

    With a `target`, also why they would not find that in it.
    """
    from . import mainmodule, whereabouts  # neither is of use in a worker

    remedy = "put it into a module of its own and import it from there"
    why = whereabouts.why_not_in_main(target)
    if why is not None:
        return f"{why}; {remedy}"
    words = mainmodule.how_to_import()
    spec_name = words.get(mainmodule.BY_NAME)
    if spec_name is not None:
        if spec_name == "__main__" or spec_name.endswith(".__main__"):
            return f"workers do not import a package's or zip file's __main__; {remedy}"
        return None
    path = words.get(mainmodule.BY_PATH)
    if path is None:
        return f"it is defined in an interactive session, `-c` or standard input; {remedy}"
    return None if os.path.exists(path) else f"workers cannot import {path!r}; {remedy}"


class Targets(dict[Any, "Target"]):
    """How each thing to call is named on the wire, and what it takes; `targets[f]` finds it once.

    A method goes by its name, a function by module and qualified name. What has no such name
    (a partial, a bound method, with a fitting codec a lambda) is `SHIPPED` among the arguments.
    """

    def __init__(self, worker: Any, starts_by_fork: bool, own_codec: bool) -> None:
        super().__init__()
        self._class = worker if isinstance(worker, type) else None
        self._has_object = worker is not None
        self._starts_by_fork = starts_by_fork
        self._own_codec = own_codec  # it may be able to ship what pickle cannot

    def __missing__(self, target: Any) -> Target:
        found = self.resolve(target)
        if found[0] != SHIPPED:
            if len(self) >= 4096:
                self.clear()
            self[target] = found
        return found

    def resolve(self, target: Any) -> Target:
        """Return kind and name of a target, which arguments it takes, and its name as text.

        Raises:
            CallMismatch: no worker could find it, or it cannot be called at all.
        """
        kind, name = self._named(target)
        text = name.decode(errors="replace")
        shape = self._shape(target, kind, text)
        counts = frozenset() if kind == SHIPPED else shape.counts  # those need a second look
        return kind, name, counts, shape, text

    def _shape(self, target: Any, kind: int, name: str) -> Shape:
        from . import shape

        if kind == METHOD:
            return shape.ANYTHING if self._class is None else shape.of_method(self._class, name)
        if not isinstance(target, FunctionType):
            return shape.ANYTHING if kind == SHIPPED else shape.of_function(target)
        holder, _, method = name.rpartition(".")
        if kind == FUNCTION and ":" in holder and self._has_object:
            owner = find(holder)  # see `find_for`, which may bind it to the worker's object
            if isinstance(owner, type):
                if self._class is None or not shape.makes_its_own(self._class):
                    return shape.ANYTHING
                if issubclass(self._class, owner):
                    return shape.of_method(self._class, method)
        return shape.of_function(target)

    def _named(self, target: Any) -> tuple[int, bytes]:
        if isinstance(target, str):
            if not self._has_object:
                raise CallMismatch(
                    f"cannot call method {target!r}: this pool has no worker class; "
                    f"give Pool a class, or give call() a function"
                )
            return METHOD, _encoded(target)
        if not callable(target):
            raise CallMismatch(f"{target!r} is neither a method's name nor callable; give one")
        name = getattr(target, "__name__", None)
        if isinstance(name, str) and getattr(self._class, name, None) is target:
            return METHOD, name.encode()
        path = name_of(target)
        why = why_unreachable(target, self._starts_by_fork)
        if why is not None and not self._own_codec:
            raise CallMismatch(f"a worker cannot find {target!r}: {why}")
        if path is None or why is not None:
            return SHIPPED, str(getattr(target, "__qualname__", target)).encode()[:200] or b"?"
        return FUNCTION, _encoded(path)


# Kind, name, how many arguments fit where there are no keywords, what else is known of them, and
# the name as text.
Target = tuple[int, bytes, frozenset[int], "Shape", str]


def _encoded(name: str) -> bytes:
    """Return a name as bytes, if it fits into a request."""
    if not name:
        raise CallMismatch("'' is the name of nothing; give a method's name")
    try:
        data = name.encode()
    except UnicodeEncodeError as problem:
        raise CallMismatch(f"{name!r} cannot be the name of anything: {problem}") from None
    if len(data) > MAX_NAME:
        raise CallMismatch(f"{name[:40]!r}... ({len(data)} bytes) is too long for a name")
    return data


def explain_unpicklable(
    problem: Exception, dumps: Dumps, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CallMismatch:
    """Build the error for arguments that cannot be sent, naming the guilty one."""
    named = [(f"argument {index}", value) for index, value in enumerate(args)]
    named += [(f"argument {key!r}", value) for key, value in kwargs.items()]
    for label, value in [("the target", target), *named]:
        try:
            dumps(value, 5)
        except Exception as own:
            return CallMismatch(
                f"{label} of the call to {target!r}, a {type(value).__name__}, cannot be sent to "
                f"a worker: {_message(own)}; nothing was sent; pass plain data, or make it in the "
                f"worker"
            )
    return CallMismatch(
        f"the arguments of {target!r} cannot be sent to a worker: {_message(problem)}"
    )


# -- exceptions ----------------------------------------------------------------------------------

_CAUSE: Any = vars(BaseException)["__cause__"]


def pack_error(error: BaseException) -> bytes:
    """Pickle an exception, with its text beside it in case it does not survive the other side.

    Raises nothing, whatever the exception's own code does when it is asked.
    """
    envelope: dict[str, Any] = {
        "type_name": _type_name(error),
        "message": _message(error),
        "traceback": text_of(error) if error.__traceback__ or error.__cause__ else "",
        "pickled": None,
        "why": "",
        "exits": isinstance(error, (SystemExit, KeyboardInterrupt, GeneratorExit)),
    }
    if not envelope["exits"]:
        envelope["pickled"], envelope["why"] = _tested_pickle(error)
    return pickle.dumps(envelope, 5)


def unpack_error(body: bytes | memoryview) -> BaseException:
    """Return the exception a worker packed, or the `RemoteError` that stands in for it."""
    envelope = pickle.loads(body)
    pickled, exits = envelope.pop("pickled"), envelope.pop("exits")
    why = envelope.pop("why", "")
    if pickled is not None:
        try:
            error = pickle.loads(pickled)
            if isinstance(error, BaseException):
                if envelope["traceback"]:
                    # Not by `error.__cause__ = `, which a `__setattr__` of its class would take.
                    _CAUSE.__set__(error, RemoteTraceback(envelope["traceback"]))
                mark_answered(error)
                if isinstance(error, ModuleNotFoundError):
                    from .whereabouts import add_whereabouts

                    add_whereabouts(error)
                if isinstance(error, CallMismatch) and "lacks" in error.__dict__:
                    from .absence import with_remedy

                    with_remedy(error)
                return error
        except (Exception, SystemExit) as problem:
            if isinstance(problem, SystemExit) and not _exits_again(pickle.loads, pickled):
                raise
            return _stand_in(envelope, f"does not unpickle here: {named(problem)}")
    if exits:
        return _stand_in(envelope, "is not passed on, because it would end the caller")
    return _stand_in(envelope, why or "cannot be pickled")


def error_in_words(body: bytes | memoryview, why: str) -> RemoteError:
    """Return the stand-in for the exception a worker packed; no code of anybody's is run.

    `why` it is not unpickled goes on from "raised in the worker".

    Raises:
        Exception: no exception was packed there.
    """
    envelope = _Plain(io.BytesIO(body)).load()
    return _stand_in({key: envelope[key] for key in ("type_name", "message", "traceback")}, why)


class _Plain(pickle.Unpickler):
    """Unpickles plain data only."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")


def _stand_in(envelope: dict[str, str], why: str) -> RemoteError:
    name, message = envelope["type_name"], envelope["message"]
    error = RemoteError(f"{name} raised in the worker {why}; it said: {message!r}", **envelope)
    error.__cause__ = RemoteTraceback(envelope["traceback"])
    return error


def unpicklable_result(problem: BaseException, type_name: str) -> RemoteError:
    """Build the error for a result that the codec of its worker cannot take."""
    if type_name == "coroutine":
        return RemoteError(
            "the call returned a coroutine, of which nothing has run: coroutine functions are not "
            "supported by `call`; give it a plain function, which may use `asyncio.run()`",
            type_name=type_name,
            message=_message(problem),
            traceback="",
        )
    return RemoteError(
        f"the call returned a {type_name}, which cannot be sent back: {_message(problem)}; "
        f"return plain data, or keep the object in the worker and return what you need of it",
        type_name=type_name,
        message=_message(problem),
        traceback=text_of(problem),
    )


def too_long_result(size: int, limit: int) -> RemoteError:
    """Build the error for a reply that is longer than `max_message`."""
    message = f"it takes {size} bytes, more than max_message={limit}"
    return RemoteError(
        f"the call's result or exception cannot be sent back: {message}; return less, or raise "
        f"`max_message`",
        type_name="bytes",
        message=message,
        traceback="",
    )


def unreadable(problem: BaseException, loads: Loads, reply: Any) -> BaseException:
    """Build the error for a result that came, but cannot be made an object again here."""
    if isinstance(problem, SystemExit) and not _exits_again(loads, reply):
        return problem
    error = RemoteError(
        f"the call returned, but its result cannot be unpickled here: {named(problem)}; return "
        f"plain data; the worker is well",
        type_name=type(problem).__name__,
        message=_message(problem),
        traceback=text_of(problem),
    )
    error.__cause__ = problem
    return error


def _exits_again(loads: Loads, data: Any) -> bool:
    """Tell whether to load `data` raises SystemExit by itself.

    If a signal handler or another thread raised it, to end the caller, it does not come twice.
    """
    try:
        loads(data)
    except SystemExit:
        return True
    except Exception:
        return False
    return False


def _tested_pickle(error: BaseException) -> tuple[bytes | None, str]:
    """Pickle an exception if it survives it: same type, no error on the way back; else say why not.

    Its code may raise SystemExit as well.
    """
    try:
        data = pickle.dumps(error, 5)
    except BaseException as problem:
        return None, (
            f"cannot be pickled ({named(problem)[:200]}; define its class at the top of a module, "
            f"and let it hold plain data)"
        )
    try:
        kind = type(pickle.loads(data))
        problem_text = f"it becomes a {kind.__name__}"
    except BaseException as problem:
        kind, problem_text = None, named(problem)[:200]
    if kind is type(error):
        return data, ""
    return None, (
        f"cannot be made again from its pickle ({problem_text}; pass all arguments of its "
        f"`__init__` to `super().__init__()`, or define `__reduce__`)"
    )


def _type_name(error: BaseException) -> str:
    kind = type(error)
    try:
        name = f"{kind.__module__}.{kind.__qualname__}".replace("builtins.", "", 1)
        return str.__str__(name).replace("__mp_main__.", "__main__.", 1)
    except BaseException:  # of a metaclass
        return "<an exception without a name>"


def _message(error: BaseException) -> str:
    try:
        return str.__str__(str(error))  # a plain one: another class of text pickles as it likes
    except BaseException as problem:
        return f"<str() of it failed with {type(problem).__name__}>"


def named(error: BaseException) -> str:
    """Return type and text of an exception in one line. Raises nothing."""
    name, message = type.__getattribute__(type(error), "__name__"), _message(error)
    return f"{name}: {message}" if message else str(name)


def text_of(error: BaseException) -> str:
    """Return the traceback of an exception as text, of bounded length. Raises nothing."""
    from . import traces  # here, because a worker that is well never needs it

    try:
        return traces.text_of(error)
    except BaseException as problem:
        return f"<its traceback cannot be shown: {type(problem).__name__}>"


def no_such_method(owner: Any, name: str) -> CallMismatch:
    """Build the error for a method the worker's object does not have, with the likeliest ones."""
    near = _near(name, owner)
    known = [each for each in dir(owner) if not each.startswith("_")]
    hint = f"did you mean {near}?" if near else f"it has {known[:12]}"
    kind = "the module" if isinstance(owner, ModuleType) else type(owner).__name__
    return CallMismatch(f"{kind} has no method {name!r}; {hint}")
