"""Diagnosis: what kept a worker from starting, in words, with what only the parent knows of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import wire
from .inquest import with_stop
from .process import describe_exit
from .shortage import address_space, in_words, lost_directory, of_memory

if TYPE_CHECKING:
    from .handle import Handle
    from .launch import Launcher


def of_start(
    launcher: Launcher, exitcode: int | None, cause: BaseException | None, handle: Handle | None
) -> str:
    """Say why a worker did not start. `cause` is what it, or the attempt to start it, raised."""
    ended = describe_exit(exitcode, None if handle is None else handle.process.unknown)
    if cause is not None and handle is None:
        return f"did not start: {in_words(cause)}"
    if cause is not None:
        return f"did not start: {wire.named(cause)}{_room(cause)}"
    if handle is not None and handle.ready_ns:
        return f"ended {ended} as soon as it was ready"
    if handle is not None and handle.tainted:
        silent = handle.killed_for is not None and not (handle.box and handle.box.last())
        why = with_stop(handle, handle.tainted)
        return f"did not start: {why}{_silence(launcher) if silent else ''}"
    said = f"ended {ended} before it could say anything; its standard error tells why"
    if exitcode is not None and exitcode < 0:
        return f"{said}{_last_place(handle)}"
    if exitcode != 1 and launcher.method == "spawn":  # no import of a Python's has failed
        said += f"; it was started by sys.executable={_executable()!r}, which must be a Python"
    return "; ".join(filter(None, [said, lost_directory() or _guard(launcher)]))


def _room(cause: BaseException) -> str:
    """Say how much memory there may be at most, if there was too little."""
    limit = address_space() if of_memory(cause) else None
    return "" if limit is None else f"; {limit}"


def _last_place(handle: Handle | None) -> str:
    """Say where a worker that crashed was then, in the line that the stack shows first."""
    stack = handle.box.last() if handle and handle.box else ""
    place = next((line.strip() for line in stack.splitlines() if line.startswith("  File ")), "")
    return f"; it was in {place}" if place else ""


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
