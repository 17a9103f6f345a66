"""Descriptors: how they are opened and closed where an exception may strike between any two steps.

What an interrupt raises comes between two steps of the interpreter. A descriptor that was closed
and not yet forgotten would be closed a second time, when its number may be another file's; one
that was forgotten first would be lost; and so would one that was opened and not yet noted. A chain
of C functions is one step.

The owner of descriptors may keep such a chain from before it has them:
`partial(any, map(os.close, iter(fds)))` closes, once, whatever the list holds by then. No function
here makes that chain, because the begin of a function is a step.

To close one takes time in which another thread may fork. In the child the same owner lets go of
what it has: so what is closed is taken out first, and in the same step.

None of ours has the number of a standard stream, 0 to 2. Where a program has closed one of these,
what is opened next gets its number: what the program then prints would go into a pipe of ours, and
a program that it runs would read from one. So what came out there is duplicated to a higher number.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from itertools import chain, filterfalse, repeat, starmap
from typing import Any, Callable, Iterable

STREAMS = 3  # descriptors: standard input, output and error
_HAS_STREAMS = sys.platform != "win32"


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors in one step."""
    any(map(os.close, fds))


def close_held(owner: object, name: str) -> None:
    """Close the descriptor that an attribute of the object holds, if it holds one.

    The attribute has the value of its class from then on. One step: whoever comes again, in this
    process or in one that is forked meanwhile, finds nothing to close.
    """
    close_all(filter(None, map(owner.__dict__.pop, (name,), (None,))))


def open_into(fds: list[int], make: Callable[..., int], *args: Any) -> None:
    """Append the descriptor that `make(*args)` opens.

    Raises:
        OSError: what `fds` holds now is still the caller's to close.
    """
    fds.extend(starmap(make, (args,)))
    lift(fds)


def pipe_into(fds: list[int]) -> None:
    """Append the read end and the write end of a new pipe; as `open_into`."""
    fds.extend(chain.from_iterable(starmap(os.pipe, ((),))))
    lift(fds)


def lift(fds: list[int]) -> None:
    """Have none of them be a standard stream's, in the same order; as `open_into`."""
    if min(fds) < STREAMS and _HAS_STREAMS:
        import fcntl

        low = tuple(fds)
        fds.extend(map(fcntl.fcntl, low, repeat(fcntl.F_DUPFD_CLOEXEC), repeat(STREAMS)))
        close_all(map(fds.pop, repeat(0, len(low))))  # taken out and closed, in a step


def pipe() -> tuple[int, int]:
    """Return the read end and the write end of a new pipe; in the place of `os.pipe`."""
    fds: list[int] = []
    try:
        pipe_into(fds)
    except BaseException:
        close_all(fds)
        raise
    return fds[0], fds[1]


def lifted(fd: int) -> int:
    """Return what takes the place of a descriptor if its number is a standard stream's.

    Raises:
        OSError: there is no other number; it is closed.
    """
    fds = [fd]
    try:
        lift(fds)
    except BaseException:
        close_all(fds)
        raise
    return fds[0]


def lift_connection(conn: Any) -> None:
    """As `lifted`, of what a `multiprocessing.Connection` holds."""
    fds = [conn.fileno()]
    if fds[0] < STREAMS and _HAS_STREAMS:
        try:
            conn._handle = None
            lift(fds)
            conn._handle = fds[0]
        except BaseException:
            close_all(fds)
            raise


def mapped(fds: list[int], size: int) -> mmap.mmap:
    """Map the file of the only descriptor in `fds`.

    Before CPython 3.13 the map keeps a descriptor of its own, for which others make way in `fds`.
    """
    if sys.version_info >= (3, 13):
        return mmap.mmap(fds[0], size, trackfd=False)
    try:
        _take_streams(fds)
        return mmap.mmap(fds[0], size)
    finally:
        any(map(os.close, map(fds.pop, repeat(-1, len(fds) - 1))))  # in a step


def beyond_streams(action: Callable[..., Any], *args: Any) -> Any:
    """Call what opens descriptors in ways of its own; none of them gets a standard stream's number.

    What is free of those numbers is taken meanwhile, and leads to nowhere. A stream that another
    thread puts there by `os.dup2` stays: it can be inherited, as ours cannot.
    """
    taken: list[int] = []
    try:
        _take_streams(taken)
        return action(*args)
    finally:
        while taken:
            with contextlib.suppress(OSError):  # closed by another thread
                close_all(filterfalse(os.get_inheritable, map(taken.pop, (-1,))))


def _take_streams(fds: list[int]) -> None:
    """Open what leads to nowhere until it has a higher number; append it."""
    while True:
        fds.extend(map(os.open, (os.devnull,), (os.O_RDWR,)))
        if fds[-1] >= STREAMS or not _HAS_STREAMS:
            return
