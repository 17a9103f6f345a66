"""The inquest: how a worker ended, put together from what it left behind.

Runs in the parent, in the thread of the caller whose call failed, and in the manager's when it
buries the worker; each may be first. What is left behind: the exit code, the row of the table,
the black box, the kernel's counters.
"""

# The types are no text here, as `typing` would compile that of every field at every import.
import time
from typing import Any, NamedTuple, Optional, Tuple

from ..errors import CallTimeout, WorkerDied
from . import table as t
from .blackbox import brief
from .process import describe_exit, signal_name


class Death(NamedTuple):
    """One worker that ended though nobody had told it to; see `Pool.deaths()`. Frozen."""

    worker_id: int
    generation: int
    pid: Optional[int]
    time: float  #: seconds since the epoch
    exitcode: Optional[int]  #: negative: minus the signal; None: not known, `reason` says why
    signal: Optional[str]  #: its name
    out_of_memory: bool  #: killed by the kernel's out-of-memory killer, by the kernel's counters
    reason: str  #: why minipool killed it; else how it ended
    call: Optional[str]  #: the target of the call under way; None: there was none
    started: bool  #: whether that call had begun
    call_age: Optional[float]  #: seconds from its begin to the end; None: it had not begun
    calls: int  #: that it had begun in its life
    uptime: float  #: seconds since it was ready
    rss_bytes: int  #: as it said last, about once a second between calls
    stack: str  #: its Python stacks, most recent call first; empty if it could not write them
    output: Tuple[str, ...]  #: its last lines, with `capture_output` or `forward_logs`


def hold(handle: Any, started: Optional[bool] = None) -> Death:
    """Return what is known of the end of a worker; `started` if whoever made the call knows."""
    words = _words(handle)
    call = handle.in_call.decode(errors="replace") if isinstance(handle.in_call, bytes) else None
    if started is None and handle.death is not None:
        started = handle.death.started
    elif started is None:
        started = call is not None and (handle.has_begun or handle.unheard)
    code, ended_ns = handle.process.exitcode(0), handle.ended_ns or time.monotonic_ns()
    age = (ended_ns - _word(words, t.CALL_STARTED_NS)) / 1e9
    return Death(
        worker_id=handle.slot,
        generation=handle.generation,
        pid=handle.pid,
        time=time.time(),
        exitcode=code,
        signal=signal_name(code),
        out_of_memory=handle.process.starved,
        reason=reason_of(handle),
        call=call,
        started=started,
        call_age=age if started and handle.has_begun else None,  # it may only count as begun
        # Where its words come with its replies, that of the last call may not have come.
        calls=max(_word(words, t.CALL_ID), handle.calls_sent if started else 0),
        uptime=(ended_ns - handle.ready_ns) / 1e9 if handle.ready_ns else 0.0,
        rss_bytes=_word(words, t.RSS_BYTES),
        stack="" if handle.box is None else handle.box.last(),
        output=() if handle.transcript is None else handle.transcript.last_lines(),
    )


def _words(handle: Any) -> list[int]:
    """Return the words of a worker, and not of the next one in its slot."""
    while True:
        row = handle.row
        words: list[int] = row[t.WORKER_WORDS].tolist()
        if handle.row is row:  # else it was buried meanwhile, and has a copy of its own now
            return words


def _word(words: list[int], word: int) -> int:
    return words[word - t.WORKER_WORDS.start]


def reason_of(handle: Any) -> str:
    """Return why a worker was killed by minipool, or how it ended by itself."""
    ours = handle.process.killed and (handle.killed_for or handle.tainted)
    return with_stop(handle, ours) if ours else describe(handle.process)


def with_stop(handle: Any, reason: str) -> str:
    """Return why a worker was killed, and that it could not go on by itself if it was stopped."""
    stopped = handle.process.stopped
    return f"{reason} ({stopped})" if stopped and stopped not in reason else reason


def ending_of(handle: Any) -> str:
    """Say in words how a worker ended, and in the midst of what or by which order of the pool."""
    how = describe(handle.process)
    if handle.process.killed:
        reason = handle.killed_for or handle.tainted
        why = handle.process.stopped if reason is None else with_stop(handle, reason)
        return f"{how} ({why})" if why else how
    call = _running_call(handle)
    return f"{how} between calls" if call is None else f"{how} during {call!r}"


def _running_call(handle: Any) -> Optional[str]:
    """Return the target of the call that the worker was running, by what it said itself."""
    name = handle.in_call
    if isinstance(name, bytes) and (t.running(handle.row) or handle.unheard):
        return name.decode(errors="replace")
    return None


def describe(process: Any) -> str:
    """Say in words how a process ended."""
    how = describe_exit(process.exitcode(0), process.unknown)
    return f"{how}, killed by the kernel's out-of-memory killer" if process.starved else how


def obituary(handle: Any, target: str, started: bool) -> WorkerDied:
    """Describe the death of a worker to the one who held it."""
    handle.death = death = hold(handle, started)
    begun = "the call had begun" if started else "the call had not begun"
    advice = "retry only if it may run twice" if started else "it may be made again"
    ours = handle.process.killed and handle.killed_for
    why = f" (the pool killed it: {ours})" if ours else ""
    ending = f"worker {handle.slot} (pid {handle.pid}) died {describe(handle.process)}{why}"
    error = WorkerDied(
        f"{ending} during {target!r}; {begun}: {advice}, on a new lease",
        worker_id=handle.slot, pid=handle.pid, exitcode=death.exitcode, signal=death.signal,
        started=started, target=target, out_of_memory=death.out_of_memory,
        call_age=death.call_age, rss_bytes=death.rss_bytes, stack=death.stack,
        output=death.output, deaths=(ending,),
    )  # fmt: skip
    _add_note(error, death)
    return error


def verdict(handle: Any, target: str, started: bool, timeout: Optional[float]) -> CallTimeout:
    """Describe the end of a worker that was killed because it was too late."""
    handle.death = death = hold(handle, started)
    refused, stopped = handle.process.refused, handle.process.stopped
    begun = "it was killed" if started else "it had not begun; its worker was killed"
    if refused:
        begun = f"it could not be killed, and is cut off: {refused}"
    advice = (
        "; raise the timeout (`call_timeout`, or that of `options()`), or make the call shorter"
    )
    if stopped:
        advice = f"; {stopped}: find out what does so, and let it go on with SIGCONT"
    elif refused:
        advice = ""  # it says what to do
    error = CallTimeout(
        f"{target!r} did not end within {_brief(timeout)} s on worker {handle.slot} "
        f"(pid {handle.pid}); {begun}{advice}",
        worker_id=handle.slot, pid=handle.pid, timeout=timeout, started=started, target=target,
        stack=death.stack, output=death.output,
    )  # fmt: skip
    _add_note(error, death)
    return error


def _brief(seconds: Optional[float]) -> str:
    """Write a time without the digits that subtraction left: it may be the rest of another."""
    return "no" if seconds is None else str(float(f"{seconds:.6g}"))


def _add_note(error: Exception, death: Death) -> None:
    """Add the short form of the stack to what is printed of an error, from CPython 3.11 on."""
    lines = brief(death.stack)
    if lines and hasattr(error, "add_note"):
        error.add_note(f"worker {death.worker_id}, most recent call first:\n{lines}")
