"""Diagnosis: what kept a worker from starting, in words, with what only the parent knows of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import table as t
from . import wire
from .blackbox import frames_of
from .health import NOT_READY
from .inquest import with_stop
from .process import describe_exit
from .shortage import address_space, in_words, lost_directory, of_memory

if TYPE_CHECKING:
    from .handle import Handle
    from .launch import Launcher

_STDLIB = os.path.dirname(os.__file__) + os.sep
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_CORRECT = "correct what kept that worker from starting"
_LATE = "; raise `init_timeout` if that may take so long, or correct what holds it up"
_LEFT = (
    "correct what ended the process there (a crash, `os._exit()`, a signal); its standard error "
    "may tell more"
)


def of_start(
    launcher: Launcher, exitcode: int | None, cause: BaseException | None, handle: Handle | None
) -> str:
    """Say why a worker did not start. `cause` is what it, or the attempt to start it, raised.

    Without a cause the remedy is told as well; with one, whoever knows that tells it.
    """
    ended = describe_exit(exitcode, None if handle is None else handle.process.unknown)
    if cause is not None and handle is None:
        return f"did not start: {in_words(cause)}"
    if cause is not None:
        return f"did not start: {wire.named(cause)}{_room(cause)}"
    if handle is not None and handle.ready_ns:
        return f"ended {ended} as soon as it was ready; {_CORRECT}"
    if handle is not None and handle.tainted:
        why = f"did not start: {with_stop(handle, handle.tainted)}{_where(handle)}"
        if not handle.tainted.startswith(NOT_READY):
            return f"{why}; {_CORRECT}"
        silent = not (handle.box and handle.box.last())
        return f"{why}{(silent and _silence(launcher)) or _LATE}"
    if handle is not None and handle.row[t.READY_GENERATION] == -handle.generation:
        starved = ", killed by the kernel's out-of-memory killer" if handle.process.starved else ""
        return f"ended {ended} as its object was being made{starved}{_where(handle)}; {_LEFT}"
    said = f"ended {ended} before it could say anything; its standard error may tell why"
    if exitcode is not None and exitcode < 0:
        return f"{said}{_where(handle)}; {_CORRECT}"
    if exitcode != 1 and launcher.method == "spawn":  # no import of a Python's has failed
        said += f"; it was started by sys.executable={_executable()!r}, which must be a Python"
    return "; ".join(filter(None, [said, lost_directory() or _guard(launcher)]))


def _room(cause: BaseException) -> str:
    """Say how much memory there may be at most, if there was too little."""
    limit = address_space() if of_memory(cause) else None
    return "" if limit is None else f"; {limit}"


def _where(handle: Handle | None) -> str:
    """Say where a worker was at its end: in the innermost line, and which line of the user's."""
    stack = handle.box.last() if handle and handle.box else ""
    frames = [line.strip() for line in frames_of(stack) if line.startswith("  File ")]
    if not frames:
        return ""
    own = next((frame for frame in frames if not _of_a_library(frame)), frames[0])
    return f"; it was in {frames[0]}{f', by {own}' if own is not frames[0] else ''}"


def _of_a_library(frame: str) -> bool:
    path = frame[len('File "') :]
    return path.startswith((_STDLIB, "<frozen ")) or any(name in path for name in _INSTALLED)


def _guard(launcher: Launcher) -> str:
    """Say what may be wrong with a program whose workers cannot even import its main module.

    A forked worker imports none.
    """
    if launcher.method == "fork":
        return ""
    opening = launcher.opening
    if opening is not None and opening.comes_by_itself:
        return (
            f"{opening.text}, and if workers come to do so as well, each would open one: "
            f"{opening.remedy}"
        )
    return (
        "if your main script opens the pool without an `if __name__ == '__main__':` guard, add one"
    )


def _silence(launcher: Launcher) -> str:
    """Say what may be wrong with a process that was told to be a worker and never said a word."""
    if launcher.method == "fork":
        return ""
    return (
        f", and no stack could be had: it imports the main module first, which may take too long "
        f"(raise `init_timeout`), or sys.executable={_executable()!r}, by which it was started, is "
        f"no Python (`multiprocessing.set_executable()` names one)"
    )


def _executable() -> str:
    from multiprocessing import spawn

    return os.fsdecode(spawn.get_executable() or "")
