"""SIGPIPE: how a program that has it at its default outlives the readers of what is written.

Python ignores the signal, but command-line tools set it back, so that they end with what reads
their output. To such a program a worker that dies in the wrong moment would be the same. No
disposition is changed here, as that is the program's: three ways, each for a kind of writing.
"""

from __future__ import annotations

import _signal  # its numbers are quicker than the enums of `signal`
import os
import sys
from typing import Any, Callable

from .descriptors import lifted


def lasting(reader: int, writer: int) -> tuple[int, ...]:
    """Return what takes the place of a pipe's write end: a descriptor, and one more if need be.

    A pipe has a reader as long as they are open, and its end comes when they are closed. What is
    written after the other readers have gone goes nowhere. The write end given is used up.

    Linux opens a pipe anew through /proc, for reading and writing at once: no write costs more by
    that, and no descriptor. Elsewhere the second one is a copy of the read end.

    Raises:
        OSError: out of descriptors; nothing has changed.
    """
    if sys.platform.startswith("linux"):
        try:
            both = lifted(os.open(f"/proc/self/fd/{writer}", os.O_RDWR | os.O_NONBLOCK))
        except OSError:
            pass  # no /proc, or one that hides it
        else:
            os.close(writer)
            return (both,)
    return writer, lifted(os.dup(reader))


def unsignalled(action: Callable[..., Any], *args: Any) -> Any:
    """Call what may write to a pipe or socket without a reader, which is then only an OSError.

    Meant for what is done seldom. An exception that strikes between two steps may leave the signal
    blocked in this thread; it never lets one through.
    """
    if not at_default():
        return action(*args)
    blocked = _signal.SIGPIPE in _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGPIPE,))
    try:
        return action(*args)
    finally:
        if not blocked:
            if _signal.SIGPIPE in _signal.sigpending():
                _signal.sigwait((_signal.SIGPIPE,))
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (_signal.SIGPIPE,))


def block_here() -> None:
    """Block it in this thread, and in those that it starts, for as long as they live."""
    if hasattr(_signal, "SIGPIPE"):
        _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGPIPE,))


def at_default() -> bool:
    """Tell whether this program has set SIGPIPE back to end it."""
    return hasattr(_signal, "SIGPIPE") and _signal.getsignal(_signal.SIGPIPE) == _signal.SIG_DFL
