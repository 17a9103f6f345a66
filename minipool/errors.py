"""Every exception minipool raises, split by whose fault it is.

Each carries what it knows as attributes, for code to branch on, and says in its text what
happened, the value seen and what to do. All of them survive pickling, so they can cross a pipe.
"""

from __future__ import annotations

import pickle
from types import MappingProxyType
from typing import Any, Mapping, Sequence


class MinipoolError(Exception):
    """Base of everything raised by minipool. Keyword arguments become attributes."""

    _answered = False  # a worker's answer: see `answered`

    def __init__(self, message: str, /, **fields: Any) -> None:
        super().__init__(message)
        self.__dict__.update(fields)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions unpickle as cls(*args), which would lose the keyword-only fields on the pipe.
        fields = {name: value for name, value in self.__dict__.items() if name != "_answered"}
        return _rebuild, (type(self), self.args, _portable(fields))


def _rebuild(
    cls: type[MinipoolError], args: tuple[Any, ...], fields: dict[str, Any]
) -> MinipoolError:
    """Make an error again without its `__init__`: that of a subclass may want other arguments."""
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(fields)
    return error


def _portable(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields that can be pickled; of a value that cannot, its text goes."""
    try:
        pickle.dumps(fields)
        return fields
    except RecursionError:  # fields that hold the error itself: each level would try them again
        raise
    except Exception:
        return {name: _portable_value(value) for name, value in fields.items()}


def _portable_value(value: Any) -> Any:
    try:
        pickle.dumps(value)
        return value
    except Exception:
        return repr(value)


def answered(error: BaseException) -> bool:
    """Tell whether an error of a pool is a worker's answer, raised by the code that was called.

    A worker may have a pool of its own. What that raises says nothing of this process's pools, so
    whatever acts on an error of a pool (a retry, a breaker) asks this before it asks the type.
    """
    return isinstance(error, MinipoolError) and error._answered


def mark_answered(error: BaseException) -> None:
    """Note that an error came as a worker's answer. The mark stays in this process."""
    if isinstance(error, (PoolError, LeaseError, SessionError, WorkerError)):
        error.__dict__["_answered"] = True


class ConfigError(MinipoolError, ValueError):
    """An option is unknown, wrong or contradicts another. Nothing was started."""

    option: str
    value: Any


class CallMismatch(MinipoolError, TypeError):
    """The call does not fit what the worker offers. Nothing of it has run; the worker is well.

    `target` and `signature` tell what did not fit, where that is known. For the inputs of a
    program `missing` and `unknown` name them, and `wrong` tells of each what it is and should be.
    """

    target: str = ""
    signature: str = ""
    missing: Sequence[str] = ()
    unknown: Sequence[str] = ()
    wrong: Mapping[str, str] = MappingProxyType({})


class PoolError(MinipoolError):
    """The pool as a whole could not do what was asked."""


class CheckoutTimeout(PoolError, TimeoutError):
    """No worker came free in time. Nothing was taken, so there is nothing to give back.

    `needed` is not 0 if the call was not sent, or not waited for any longer, because less of its
    time was left than such calls took lately: so many seconds.
    """

    timeout: float
    waited: float
    needed: float = 0.0
    size: int
    leased: int
    waiting: int
    held_by_this_thread: int


class TooManyWaiters(PoolError):
    """`max_waiting` callers were queued already; this one was turned away at once."""

    waiting: int
    max_waiting: int


class PoolClosed(PoolError):
    """The pool is closed, or closing. If it could not start, the cause says why."""


class PoolForked(PoolError):
    """This process was forked from the one that owns the pool. Open a pool of your own here."""

    owner_pid: int


class PoolStartError(PoolError):
    """The pool could not start its workers; the cause says why.

    After `open()` or `with` it is closed. A pool that could not be opened for its first use is not:
    the next use tries again.
    """


class CircuitOpen(PoolError):
    """So much has failed in a row that nothing is tried for now; the cause is the last failure."""

    failures: int  # in a row
    retry_in: float  # seconds until the next trial is due


class LeaseError(MinipoolError):
    """The lease no longer gives access to a worker."""


class LeaseReleased(LeaseError):
    """The lease was given back already. Take a new one."""


class LeaseRevoked(LeaseError):
    """The pool took the worker away (`lease_timeout`, `close()`); it is gone with its state."""

    reason: str


class SessionError(MinipoolError):
    """Something is wrong with a session; its committed state is as it was.

    `in_doubt`: unless it is what it was to become. The store refused only afterwards, as its file
    was deleted or replaced, or the path led elsewhere. The next use asks what is there then.
    """

    session_id: str
    in_doubt: bool = False


class SessionNotFound(SessionError):
    """There is no session of that id."""


class SessionExists(SessionError):
    """There is a session of that id already."""


class SessionLost(SessionError):
    """The worker that had the session under strict affinity is gone, with what cannot travel."""


class SessionBusy(SessionError):
    """Another lease, or another process (`owner_pid`), has the session."""

    owner_pid: int | None


class ProgramError(MinipoolError):
    """Something is wrong with a program of a session."""

    program_id: str
    session_id: str


class ProgramExists(ProgramError):
    """There is a program of that id in the session already; it is as it was."""


class ProgramNotFound(ProgramError):
    """There is no program of that id in the session."""


class ProgramMismatch(ProgramError):
    """A program's outputs are not what its signature says. What it did was not committed.

    `missing` and `unknown` name outputs, `wrong` tells of each what it is and should be.
    """

    missing: Sequence[str]
    unknown: Sequence[str]
    wrong: Mapping[str, str]


class WorkerError(MinipoolError):
    """One worker failed. The pool replaces it by itself; a new lease gets another.

    `tries` is on how many workers the call was tried; this is the failure of the last one.
    `deaths` tells which of them died and how, the first one first: up to 100.
    """

    worker_id: int
    pid: int | None
    sent_ns: int  # monotonic; when the failed call was sent
    tries: int = 1
    deaths: Sequence[str] = ()


class WorkerDied(WorkerError):
    """The worker's process ended while it was leased.

    `started` tells whether your call had begun when it ended: if not, it may safely be made again.
    `exitcode` is the process's (negative: minus the signal; None: not known, and the message says
    why), `signal` its signal's name.
    `out_of_memory`: the kernel killed it for want of memory, by the kernel's own counters.
    `call_age` is how many seconds the call had been running (None: it had not begun), `rss_bytes`
    the memory as the worker said last. `stack` shows the Python stacks of a worker that crashed.
    `output` is the last it said, with `capture_output` or `forward_logs`: up to 20 lines.
    """

    exitcode: int | None
    signal: str | None
    started: bool
    target: str
    out_of_memory: bool = False
    call_age: float | None = None
    rss_bytes: int = 0
    stack: str = ""
    output: Sequence[str] = ()


class WorkerStartError(WorkerError):
    """A worker did not become ready. The cause, if any, is what its constructor raised.

    `stack` shows the Python stacks of one that crashed, or that was not ready in time.
    """

    exitcode: int | None
    signal: str | None
    stack: str = ""
    output: Sequence[str] = ()


class CallTimeout(WorkerError, TimeoutError):
    """The call did not end in time. Its worker was killed; others are untouched.

    `started` tells whether the call had begun when the worker ended, and is True if that did not
    come within a second; `stack` where it was when it was killed, most recent call first: one
    stack for each thread, empty if it could not be told.
    `output` as for `WorkerDied`.
    """

    timeout: float
    started: bool
    target: str
    stack: str = ""
    output: Sequence[str] = ()


class ProtocolError(WorkerError):
    """The worker sent something that is no reply to the call. It was killed."""


class RemoteError(MinipoolError):
    """Something a worker wanted to send could not travel; the worker is well unless it says so.

    Stands in for a result or an exception that cannot be pickled, or for a `SystemExit` or
    `KeyboardInterrupt` that must not end the caller. `type_name` and `message` are those of the
    original, `traceback` is its text in the worker.
    """

    type_name: str
    message: str
    traceback: str
