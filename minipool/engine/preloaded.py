"""What the fork server imports before all else, and no other process does: it stays to the end.

multiprocessing has one fork server for a whole program. It ends when its parent does, as the pipe
between them hangs up. A signal to all processes of a service, or one that a program handles, would
end it sooner, and with it every exit code that it has not passed on. So such signals do nothing
there. What it forks, workers and processes of the program's own, has their defaults again.
"""

from __future__ import annotations

import _signal
import os
from typing import Any

from . import child  # noqa: F401  # which every worker needs

_NAMES = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


def _stay(signum: int, frame: Any) -> None:
    """Handle a signal that is none of the server's business."""


def _restore() -> None:
    # The thread that has started the server blocks these, so that no import here is interrupted.
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (_signal.SIGINT, _signal.SIGPIPE))
    for signum in _ours:
        if _signal.getsignal(signum) is _stay:
            _signal.signal(signum, _signal.SIG_DFL)


_present = [getattr(_signal, name) for name in _NAMES if hasattr(_signal, name)]
_ours = [signum for signum in _present if _signal.getsignal(signum) == _signal.SIG_DFL]
for _signum in _ours:
    _signal.signal(_signum, _stay)
os.register_at_fork(after_in_child=_restore)
