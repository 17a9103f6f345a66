"""The lifeline: what ends a worker when its parent ends, and with the worker what it has started.

A pipe whose only write end is the parent's. The worker opens its read end anew, so that it has a
file description of its own, and asks the kernel to send *it* SIGKILL when that end hangs up
(`F_SETSIG` with `O_ASYNC`). This works while a C function holds the GIL, whoever the forking
thread was, and without a thread in the worker. Where the kernel does not offer it, a daemon thread
waits for the hang-up instead.

A worker leads a process group of its own. So the keys that interrupt, stop or quit the program at
a terminal do not reach it, nor what it starts; and both ways above, and its parent, can kill all of
the group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import weakref
from functools import partial  # see `descriptors`
from itertools import islice
from typing import Callable, NoReturn

from . import wire
from .descriptors import pipe_into

_F_SETSIG = 10  # Linux; the fcntl module has no name for it before 3.11


class Lifeline:
    """A pipe that hangs up when this process ends, which ends the workers."""

    read_fd: int | None = None
    _close_reader: Callable[[], object] = bool  # nothing to close
    _close_writer: Callable[[], object] = bool
    _pid = 0

    def __init__(self) -> None:
        self._pid = os.getpid()
        _lifelines.add(self)  # at once: a process forked from now on must not hold its write end
        if sys.platform != "win32":
            fds: list[int] = []  # the read end, and then the write end
            self._close_reader = partial(any, map(os.close, islice(fds, 1)))
            self._close_writer = partial(any, map(os.close, islice(fds, 1, None)))
            pipe_into(fds)
            self.read_fd = fds[0]

    def abandon(self) -> None:
        """Close the write end in a process that was forked from the owner."""
        self._close_writer()

    def close(self) -> None:
        """Close both ends. Workers that are still there are killed by it."""
        self._close_writer()
        self._close_reader()
        self.read_fd = None

    def __del__(self) -> None:  # for an opening that was interrupted
        if self._pid == os.getpid():
            self.close()


_lifelines: weakref.WeakSet[Lifeline] = weakref.WeakSet()


def _abandon_all() -> None:
    for lifeline in tuple(_lifelines):
        lifeline.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)


def lead_a_group() -> bool:
    """Become the leader of a new process group; False where there is no such thing."""
    if not hasattr(os, "setpgid"):
        return False
    with contextlib.suppress(OSError):  # it leads one already
        os.setpgid(0, 0)
    return os.getpgrp() == os.getpid()


def end_all(group: bool) -> NoReturn:
    """End this process, with its group: nobody is there to do so."""
    if group:
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def die_with_parent(lifeline: wire.Descriptor | None, group: bool) -> None:
    """See to it that this process does not outlive its parent by more than a moment."""
    fd = None if lifeline is None else lifeline.fd
    own = None if fd is None else _killed_on_hangup(fd, group)
    if fd is not None:
        _tell_of_parent_by(fd if own is None else own)
    if own is None:
        import threading

        watch = threading.Thread(target=_wait_for_parent, args=(fd, group), daemon=True)
        watch.name = "minipool-lifeline"
        watch.start()


def _tell_of_parent_by(fd: int) -> None:
    """Make a descriptor the one by which multiprocessing tells whether the parent is alive.

    Its own means would cost the parent a descriptor for each worker, which it has closed by now.
    """
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is not None:
        former, parent._sentinel = parent._sentinel, fd  # type: ignore[attr-defined]
        os.close(former)


def _killed_on_hangup(fd: int, group: bool) -> int | None:
    """Ask the kernel to kill this process, or its group, at the pipe's end; None if it cannot.

    Returns the pipe, opened anew.
    """
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.fcntl(own, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpid() if group else os.getpid())
        fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
        if os.read(own, 1) == b"":
            os._exit(1)  # it hung up before we asked
    except BlockingIOError:
        pass  # still open
    except OSError:
        os.close(own)
        return None
    os.close(fd)
    return own


def _wait_for_parent(fd: int | None, group: bool) -> None:
    if fd is not None:
        os.read(fd, 1)
    else:
        from multiprocessing import connection, parent_process

        parent = parent_process()
        if parent is not None:
            connection.wait([parent.sentinel])
    end_all(group)
