"""One worker process: started, signalled, waited for, reaped. Knows nothing of pipes and calls.

The manager alone starts and reaps; any thread may kill, and ask how it ended.

A worker leads a process group of its own (see `child`), so that what it started can be ended with
it. The group's number is the worker's pid, which the kernel gives to no new process as long as the
worker is not reaped or the group has a member. A signal through the pidfd reaches that very group
at any time; without it the number is used only where one of the two is known.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from multiprocessing import connection, process
from typing import Any, Callable

from . import popen
from .blackbox import LAST_WORDS
from .oom import OOM_KILLS
from .wire import close_all

_TO_GROUP = 1 << 2  # PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9
_DESCRIPTORS = 10  # more than any start method needs at once
_UNKNOWN = 255  # what a fork server says of a child that it cannot say anything of
REAP_TIMEOUT = 1.0  # seconds from a worker's death to its exit code, which a server may pass on


class WorkerProcess:
    """A process; with a pidfd where the system has them.

    With `kill_group`, SIGKILL and the process's own end also end what it started.
    """

    def __init__(
        self,
        context: Any,
        name: str,
        target: Callable[..., None],
        args: tuple[Any, ...],
        kill_group: bool = False,
    ) -> None:
        self._reaping = threading.RLock()  # a signal handler may kill what its thread reaps
        self._waiting = threading.RLock()  # for its end, on descriptors that stay open meanwhile
        self._last_exitcode: int | None = None
        self.killed = False  # by us
        self.untold = False  # somebody else has reaped it: its exit code will never be known
        self._starved: bool | None = None  # None: not known yet
        self._process = context.Process(target=target, args=args, name=name)
        self._served = context.get_start_method() == "forkserver"  # the child of a server
        self._pidfd: int | None = None
        self._kills_group = kill_group and hasattr(os, "killpg")

    def start(self) -> None:
        """Start it.

        Raises:
            OSError, EOFError, RuntimeError: no process was started.
        """
        _expect_room()
        popen.use_for(self._process)
        try:
            self._process.start()
        except OSError as error:
            _close_lost_pipes(error)
            raise
        self._pidfd = _pidfd(self.pid)

    @property
    def pid(self) -> int | None:
        pid: int | None = self._process.pid
        return pid

    @property
    def sentinel(self) -> int:
        """What multiprocessing says becomes readable when the process has ended."""
        return int(self._process.sentinel)

    @property
    def death_fd(self) -> int:
        """What becomes readable when the process has ended; for `connection.wait`.

        A pidfd where there is one: the sentinel of a forked process stays silent while children
        of the worker hold copies of its pipe.
        """
        return self._pidfd if self._pidfd is not None else self.sentinel

    def kill(self, signum: int = signal.SIGKILL) -> bool:
        """Send a signal, if the process is still there. Never hits another: no stored pid.

        False: it has ended, or this signal cannot be sent here.
        """
        with self._reaping, contextlib.suppress(OSError, ValueError):
            if self._last_exitcode is None and signum in (signal.SIGKILL, LAST_WORDS):
                self.killed = True
            if signum == signal.SIGKILL:
                self._kill_group()  # first: afterwards its leader may be reaped
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, signum)
            elif signum == signal.SIGTERM:
                self._process.terminate()
            elif signum == signal.SIGKILL:
                self._process.kill()
            else:
                return False
            return True
        return False

    def _kill_group(self) -> None:
        """Kill whatever is in the worker's group; does nothing where there is none (any more)."""
        if not self._kills_group:
            return
        with contextlib.suppress(OSError, ValueError):
            if not self._signal_group_by_pidfd() and self._group_is_its_own():
                os.killpg(self._process.pid, signal.SIGKILL)

    def _signal_group_by_pidfd(self) -> bool:
        """Kill the group; False if this system cannot do so by pidfd."""
        if self._pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL, None, _TO_GROUP)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        return True

    def _group_is_its_own(self) -> bool:
        """Tell whether the worker's pid cannot be the number of a stranger's group."""
        if self._process.exitcode is None:
            return True  # not reaped
        try:
            os.kill(self._process.pid, 0)
        except ProcessLookupError:
            return True  # a group without its leader: nobody has got the number meanwhile
        return False

    def exitcode(self, timeout: float = REAP_TIMEOUT) -> int | None:
        """Return the exit code of a process that ended or is about to; None if not to be had."""
        if self._last_exitcode is not None:
            return self._last_exitcode
        with contextlib.suppress(ValueError, OSError):  # closed by the manager meanwhile
            if timeout:
                self._wait_ended(timeout)
            with self._reaping:  # two readers would spoil each other's answer
                code = self._told_exitcode()
                if code and code == -LAST_WORDS:  # who asked for them wanted it killed
                    code = -signal.SIGKILL
                self._last_exitcode = code
        return self._last_exitcode

    def _told_exitcode(self) -> int | None:
        """Ask for the exit code; a child of ours is left for `close` to reap.

        An interrupt between the kernel's answer and its being noted would lose the code for good.
        """
        if not self._served and hasattr(os, "waitid"):
            try:
                flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
                found = os.waitid(os.P_PID, self._process.pid, flags)
            except ChildProcessError:  # reaped: multiprocessing has noted the code, or never will
                self.untold = self._process.exitcode is None
            else:
                if found is None:
                    return None
                return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        code: int | None = self._process.exitcode
        return code

    @property
    def starved(self) -> bool:
        """Whether the kernel killed it for want of memory. Ask soon, and before killing it."""
        with self._reaping:
            if self._starved is None and self._last_exitcode is not None:
                killed = self._last_exitcode == -signal.SIGKILL and not self.killed
                self._starved = killed and OOM_KILLS.explain()
            return bool(self._starved)

    def _wait_ended(self, timeout: float) -> None:
        """Wait until the exit code can be had.

        That of a fork server's child comes through the sentinel. The sentinel of a child of ours
        ends a moment before there is a code, or, while its own children hold copies, long after.

        `close` lets us hear of it first: the numbers of closed descriptors go to whatever is
        opened next, the next worker's pipe above all, and that may stay silent for ever. Copies
        would not do: an exception raised by a signal or another thread could lose them.
        """
        with self._waiting:
            connection.wait([self.sentinel if self._served else self.death_fd], timeout)

    def close(self) -> None:
        """Forget a process that has ended, and end what it has left behind."""
        self.exitcode(0)
        with self._reaping:
            self._kill_group()
            heard = self._waiting.acquire(timeout=REAP_TIMEOUT)  # whoever waits, at once as a rule
            with contextlib.suppress(ValueError, AssertionError):
                if self._process.exitcode is None:  # somebody else has reaped it, or the system
                    self._process._popen.returncode = _UNKNOWN
                self._process.join()
                self._process.close()
            self._close_pidfd()
            if heard:
                self._waiting.release()

    def abandon(self) -> None:
        """Let go of it in a process that was forked from the owner, whose child it is."""
        with contextlib.suppress(AttributeError):  # else multiprocessing joins it at exit
            process._children.discard(self._process)  # type: ignore[attr-defined]
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def _expect_room() -> None:
    """Raise OSError if there are too few descriptors: multiprocessing loses some in mid-start."""
    taken: list[int] = []
    try:
        while len(taken) < _DESCRIPTORS:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        close_all(taken)


def _close_lost_pipes(error: OSError) -> None:
    """Close the two pipes that `popen_fork` makes and forgets when it cannot fork."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_globals.get("__name__") == "multiprocessing.popen_fork":
            for names in (("parent_r", "child_w"), ("child_r", "parent_w")):
                ends = [frame.f_locals.get(name, -1) for name in names]
                with contextlib.suppress(OSError):  # closed, or not made
                    if len({os.fstat(fd).st_ino for fd in ends}) == 1:  # one pipe still
                        close_all(ends)
        trace = trace.tb_next


def _pidfd(pid: int | None) -> int | None:
    try:
        return os.pidfd_open(pid) if pid is not None else None
    except (AttributeError, OSError):
        return None


def signal_name(exitcode: int | None) -> str | None:
    """Return the name of the signal an exit code tells of, or None."""
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"


def describe_exit(exitcode: int | None) -> str:
    """Say in words how a process ended."""
    if exitcode is None:
        return "(its exit code is not known)"
    name = signal_name(exitcode)
    if name == "SIGXCPU":
        return "by SIGXCPU (its processor time was used up)"
    return f"by {name}" if name else f"with exit code {exitcode}"
