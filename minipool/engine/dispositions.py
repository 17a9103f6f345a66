"""Signal dispositions: what each signal does in a worker, and in what the worker starts.

SIGINT is the parent's business and does nothing. SIGTERM ends a worker that is booting; one that
serves finishes its call, answers and leaves (see `child`). A read of the terminal fails, and does
not stop the worker: no worker is ever in a terminal's foreground.

What a worker forks or executes is no worker, so SIGINT and SIGTERM have their defaults there. For
what it executes that takes handlers, which the kernel resets; a signal that is ignored stays so.
"""

from __future__ import annotations

import _signal  # without the enums of `signal`: a forked child pays for each page it touches
import os
import sys
from typing import Any, Callable

_OWN = (_signal.SIGINT, _signal.SIGTERM)
# A worker's group is never a terminal's foreground, so that a read would stop it, and a write too
# after `stty tostop`. To ignore them is not enough for programs that it runs: one that asks for a
# password handles them and tries again, for ever. Where they are blocked, the read just fails.
_OF_TERMINALS = ("SIGTTIN", "SIGTTOU")

DEAF_WHEN_FORKED = sys.version_info >= (3, 13)
_LARGE = 1 << 40  # more than one digit, as CPython keeps them

_leave: Callable[[int, Any], None] | None = None


def begin() -> None:
    """Take on the dispositions of a worker, whatever its parent had."""
    _signal.signal(_signal.SIGINT, _do_nothing)
    _signal.signal(_signal.SIGTERM, _signal.SIG_DFL)
    _signal.set_wakeup_fd(-1)  # forked, it would write into the parent's event loop
    if hasattr(_signal, "siginterrupt"):
        _signal.siginterrupt(_signal.SIGINT, False)  # no call of a C library fails of it
    if hasattr(_signal, "pthread_sigmask"):
        sigpipe = getattr(_signal, "SIGPIPE", _signal.SIGINT)  # the manager's thread blocks it
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (*_OWN, sigpipe))
    for name in _OF_TERMINALS:
        if hasattr(_signal, name):
            _signal.signal(getattr(_signal, name), _signal.SIG_IGN)
            _signal.pthread_sigmask(_signal.SIG_BLOCK, (getattr(_signal, name),))
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_restore)


def leave_on_sigterm(leave: Callable[[], None]) -> None:
    """Call `leave` when SIGTERM comes, unless the user's code handles that signal."""
    global _leave
    pid = os.getpid()

    def asked(signum: int, frame: Any) -> None:
        if os.getpid() == pid:  # else it was forked in this very moment
            leave()

    if _signal.getsignal(_signal.SIGTERM) == _signal.SIG_DFL:
        _leave = asked
        _signal.signal(_signal.SIGTERM, asked)


def heard_first(receive: Callable[[], Any]) -> Callable[[], Any]:
    """Return a `receive` before which handlers of signals that have come are run.

    For a process that another thread than the main one has forked: from CPython 3.13 on, a signal
    marks a thread that is not there any more, so that Python code goes on without its handler. A
    product of large numbers looks for signals itself, and costs less than a system call.
    """

    def receive_after_handlers() -> Any:
        _LARGE * _LARGE
        return receive()

    return receive_after_handlers


def _do_nothing(signum: int, frame: Any) -> None:
    """Handle a signal that is not the worker's business."""


def _restore() -> None:
    """Have the defaults again in a process that a worker forked, where the worker's own are."""
    if _signal.getsignal(_signal.SIGINT) is _do_nothing:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    if _leave is not None and _signal.getsignal(_signal.SIGTERM) is _leave:
        _signal.signal(_signal.SIGTERM, _signal.SIG_DFL)
