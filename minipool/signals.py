"""Signals: a pool that ends in good order when its process is asked to end.

The handler runs in the main thread, wherever that is: perhaps in a call of the same pool. So it
waits for nothing; it begins the close and returns, and the interrupted call may finish. When the
last worker is gone, the manager sends the same signal once more, and now the handler makes way:
what the signal did before it was installed happens. If the pool has ended by then, the handler
makes way at once; who of the two passes the signal on, is settled by the pop of a list.

The kernel lets no signal have its default in the first process of a container (PID 1), so there
the handler ends the process itself, as shells tell such an end: with 128 and the signal's number.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, Callable, Optional

# They end nothing by default. No system has all of them.
_NAMES = ("CHLD", "CONT", "URG", "WINCH", "TSTP", "TTIN", "TTOU", "INFO")
_HARMLESS = [getattr(signal, f"SIG{name}", None) for name in _NAMES]

Ask = Callable[[bool], bool]  # begin to end, with True at once; return whether that is over


class SignalHandlers:
    """The handlers of one pool. Installed and restored by the main thread only."""

    def __init__(self, ask: Callable[[], Optional[Ask]], signums: tuple[int, ...]) -> None:
        self._ask = ask  # returns None once the pool has been collected
        self._signums = signums or (signal.SIGTERM,)
        self._former: dict[int, Any] = {}
        self._came: int | None = None  # the first that came
        self._turn = [None]  # whoever pops it sees to it that what came is passed on

    def install(self) -> None:
        """Take the place of the present handlers.

        Raises:
            RuntimeError: this is not the main thread.
            OSError, ValueError: there is no such signal, or nobody may handle it.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signal handlers can be installed by the main thread only")
        for signum in self._signums:
            self._former[signum] = signal.signal(signum, self)

    def restore(self) -> None:
        """Put the former handlers back, where ours are still there; in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            for signum, former in self._former.items():
                if signal.getsignal(signum) is self:
                    signal.signal(signum, signal.SIG_DFL if former is None else former)

    def __call__(self, signum: int, frame: Any) -> None:
        passing = not self._turn  # then there is nothing more to do here
        if not passing:
            ask = self._ask()
            again, self._came = self._came is not None, self._came or signum
            passing = (ask is None or ask(again)) and self._may_pass()
        if passing:
            self._make_way(signum, frame)

    def _may_pass(self) -> bool:
        try:
            self._turn.pop()
        except IndexError:
            return False
        return True

    def _make_way(self, signum: int, frame: Any) -> None:
        self.restore()
        former = self._former[signum]
        if callable(former):
            former(signum, frame)
        elif former != signal.SIG_IGN:
            os.kill(os.getpid(), signum)
            if os.getpid() == 1 and signum not in _HARMLESS:
                os._exit(128 + signum)  # to the first process of a container nothing has happened

    def ended(self, *event: Any) -> None:
        """Hear that the pool has ended; if a signal asked for it, let it have its course."""
        if self._came is not None and self._may_pass():
            if hasattr(signal, "pthread_kill"):  # which also wakes the main thread from a wait
                signal.pthread_kill(threading.main_thread().ident or 0, self._came)
            else:
                signal.raise_signal(self._came)
