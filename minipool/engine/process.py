"""One worker process: started, signalled, waited for, reaped. Knows nothing of pipes and calls.

The manager alone starts and reaps; any thread may kill, and ask how it ended.

An exit code can be read once: the kernel forgets it when the process is reaped, and a fork server
sends it once. So nothing else may read it. `multiprocessing` would: it polls all children that it
has listed, whenever it starts another and when a program asks for `active_children()`. Workers
are therefore never listed.

A worker leads a process group of its own (see `child`), so that what it started can be ended with
it. The group's number is the worker's pid, which the kernel gives to no new process as long as the
worker is not reaped or the group has a member. A signal through the pidfd reaches that very group
at any time; without it the number is used only where one of the two is known.

A process costs its parent one descriptor here: the pidfd, or where there is none the sentinel of
multiprocessing. A fork server's exit code comes through the black box (see `popen`); where it
cannot, through the sentinel, which is a second descriptor then.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import signal
import struct
import sys
import time
from multiprocessing import connection
from typing import Any, Callable

from .._sync import Guard, guarded
from . import popen
from .bell import Closing
from .blackbox import LAST_WORDS, BlackBox
from .descriptors import close_all, close_held, lifted
from .oom import OOM_KILLS
from .sigpipe import unsignalled
from .standstill import LATE

_TO_GROUP = 1 << 2  # PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9
_DESCRIPTORS = 10  # more than any start method needs at once
_EXIT_STATUS = struct.Struct("q")  # as `multiprocessing.forkserver` sends it
_UNSENT = _EXIT_STATUS.pack(-(1 << 63))  # no process ends with that
_SERVER_GONE = "the fork server is gone"
_SERVER_SILENT = "the fork server has not sent it"
_TAKEN = "something else in this program has reaped the process, or SIGCHLD is ignored"
_STOPPED = {b"T": "a signal such as SIGSTOP had stopped it", b"t": "a debugger had stopped it"}
REAP_TIMEOUT = 1.0  # seconds from a worker's death to its exit code, which a server may pass on


class WorkerProcess:
    """A process; with a pidfd where the system has them.

    With `kill_group`, SIGKILL and the process's own end also end what it started. With `bare` its
    target imports the main module itself.
    """

    _pidfd: int | None = None

    def __init__(
        self,
        context: Any,
        name: str,
        target: Callable[..., None],
        args: tuple[Any, ...],
        kill_group: bool = False,
        box: BlackBox | None = None,
        bare: bool = False,
    ) -> None:
        self._reaping = Guard()  # a signal handler may kill what its thread reaps
        self._waiting = Guard()  # for its end, on descriptors that stay open meanwhile
        self._last_exitcode: int | None = None
        self._sent = bytearray(_UNSENT)  # by the fork server
        self._closed = False
        self._vanished = False  # it had ended, and was reaped, before we could ask for a pidfd
        self.unknown: str | None = None  # why its exit code will never be known
        self.stopped: str | None = None  # in words, if it was so when it was to be ended
        self.refused: str | None = None  # why this process could not kill it
        self._shot = False  # we have sent a signal that ends it, and it was alive
        self._starved: bool | None = None  # None: not known yet
        self._process: Any = context.Process(target=target, args=args, name=name)
        self._served = context.get_start_method() == "forkserver"  # the child of a server
        self._kills_group = kill_group and hasattr(os, "killpg")
        # What the fork server has to say comes through it; it stays open until `close`.
        self._bare = bare
        self._box = box if self._served and _has_pidfds() and _can_reopen() else None

    def start(self, closing: Closing | None = None) -> None:
        """Start it, and wait for a fork server no longer than a second once `closing` happens.

        Raises:
            OSError, EOFError, RuntimeError: no process was started.
        """
        reap_outlived(0.0)
        _expect_room()
        popen.use_for(self._process, self._box, self._bare, closing)
        try:
            unsignalled(_start_unlisted, self._process)
        except OSError as error:
            _close_lost_pipes(error)
            raise
        try:
            self._pidfd = _pidfd(self.pid)
        except ProcessLookupError:
            self._vanished = True
        if self._box is not None and self._pidfd is None and not self._vanished:
            self._process.kill()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if sys.platform != "win32":
            needed = self._pidfd is None or self._served
            popen.shed(self._process._popen, sentinel=needed and self._box is None)

    @property
    def pid(self) -> int | None:
        pid: int | None = self._process.pid
        return pid

    @property
    def exitcode_fd(self) -> int:
        """What becomes readable when there is an exit code to be had, or more to be read first."""
        if self._box is not None:
            return self._box.fd
        if self._served or self._pidfd is None:
            return int(self._process.sentinel)
        return self._pidfd

    @property
    def death_fd(self) -> int:
        """What becomes readable when the process has ended; for `connection.wait`.

        A pidfd where there is one: the sentinel of a forked process stays silent while children
        of the worker hold copies of its pipe.
        """
        return self._pidfd if self._pidfd is not None else self.exitcode_fd

    def kill(self, signum: int = signal.SIGKILL) -> bool:
        """Send a signal, if the process is still there. Never hits another: no stored pid.

        False: it has ended, or this signal cannot be sent here; `refused` says so if this process
        has not the right to.
        """
        if self._pidfd is None and signum != signal.SIGKILL:
            return False
        with contextlib.suppress(OSError, ValueError):
            return self._reaping.run(self._shoot, signum)
        return False

    def _shoot(self, signum: int) -> bool:
        ended, shot = self.has_ended(), self._shot
        if signum in (signal.SIGKILL, LAST_WORDS) and not ended:
            self.stopped = self.stopped or _how_stopped(self.pid)
            self._shot = True
        if signum == signal.SIGKILL:
            self._kill_group()  # first: afterwards its leader may be reaped
        try:
            return self._send(signum, ended)
        except PermissionError:
            self._shot, self.refused = shot, _why_refused(self.pid)
        return False

    def _send(self, signum: int, ended: bool) -> bool:
        if self._pidfd is not None:
            signal.pidfd_send_signal(self._pidfd, signum)
        elif ended:
            return False  # its pid may be another's
        else:
            os.kill(self._process.pid, signum)
        return True

    @property
    def killed(self) -> bool:
        """Whether it was ended by us: by the signal that we sent, while it was alive."""
        return self._shot and self.exitcode(0) in (None, -signal.SIGKILL)

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
        """Tell whether the worker's pid cannot be the number of a stranger's group.

        Nobody gets the number of a process that was not reaped, or of a group that has members.
        """
        if not self._may_be_reaped():
            return True
        try:
            os.kill(self._process.pid, 0)
        except ProcessLookupError:
            return True  # a group without its leader
        return False

    def _may_be_reaped(self) -> bool:
        """Tell whether the pid may be free. A fork server reaps first, and tells us later."""
        if self._served:
            return self._pidfd is None or self.has_ended()
        return self._closed or self.unknown is not None

    def has_ended(self, timeout: float = 0.0) -> bool:
        """Wait until the process has ended; False if it may still be alive."""
        if self._closed or self._vanished or self._last_exitcode is not None:
            return True
        with contextlib.suppress(ValueError, OSError):  # closed meanwhile
            guard = self._waiting if timeout else self._reaping  # either keeps `close` away
            seen = guard.run(self._saw_end, timeout)
            if seen is not None:
                return seen
        return self.exitcode(0) is not None or self._closed or self.unknown == _TAKEN

    def _saw_end(self, timeout: float) -> bool | None:
        """Wait for the end; None where there is no pidfd, and the exit code has to tell."""
        if self._pidfd is not None:
            return bool(connection.wait([self._pidfd], timeout))
        if timeout:
            connection.wait([self.exitcode_fd], timeout)
        return None

    def exitcode(self, timeout: float = REAP_TIMEOUT) -> int | None:
        """Return how the process ended; None if it has not within `timeout`, or if it is not known.

        Once it has ended, a fork server has REAP_TIMEOUT to send the code.
        """
        if self._last_exitcode is not None or self.unknown is not None:
            return self._last_exitcode
        with contextlib.suppress(ValueError, OSError):  # closed by the manager meanwhile
            if timeout:
                self._wait_ended(timeout)
            self._read_exitcode()
        return self._last_exitcode

    @guarded("_reaping")
    def _read_exitcode(self) -> None:
        code = self._sent_exitcode() if self._served else self._reapable_exitcode()
        if code and code == -LAST_WORDS:  # who asked for them wanted it killed
            code = -signal.SIGKILL
        self._last_exitcode = code

    def _sent_exitcode(self) -> int | None:
        """Return what the fork server has sent; never waits.

        It is read into memory that is there already. Code that interrupts, between the reading
        and the next line, finds it there.
        """
        if self._box is not None:
            if self._pidfd is not None and not connection.wait([self._pidfd], 0):
                return None
            return self._code_in_box(self._box)
        if self._sent == _UNSENT:
            if self._closed or not connection.wait([self.exitcode_fd], 0):
                return None
            if os.readv(self.exitcode_fd, [self._sent]) == 0:
                self.unknown = _SERVER_GONE
                return None
        code: int = _EXIT_STATUS.unpack(self._sent)[0]
        return code

    def _code_in_box(self, box: BlackBox) -> int | None:
        code = box.exitcode()
        if code is None and box.ended:
            self.unknown = _SERVER_GONE
        return code

    def _reapable_exitcode(self) -> int | None:
        """Ask the kernel; the process is left for `close` to reap, so it can be asked again."""
        if not hasattr(os, "waitid"):
            code: int | None = self._process.exitcode
            return code
        try:
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            found = os.waitid(os.P_PID, self._process.pid, flags)
        except ChildProcessError:
            self.unknown = _TAKEN
            return None
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def give_up(self, why: str = _SERVER_SILENT) -> None:
        """Wait no longer for the exit code of a process that has ended, or cannot be ended."""
        if self.exitcode(0) is None and self.unknown is None:
            self.unknown = why

    @property
    def starved(self) -> bool:
        """Whether the kernel killed it for want of memory. Ask soon, and before killing it."""
        return self._reaping.run(self._was_starved)

    def _was_starved(self) -> bool:
        if self._starved is None and self._last_exitcode is not None:
            killed = self._last_exitcode == -signal.SIGKILL and not self._shot
            self._starved = killed and OOM_KILLS.explain()
        return bool(self._starved)

    @guarded("_waiting")
    def _wait_ended(self, timeout: float) -> None:
        """Wait until the process has ended and its exit code can be had.

        The sentinel of a child of ours ends a moment before there is a code, or, while its own
        children hold copies, long after; that of a fork server's child brings the code.

        `close` lets a waiting thread hear of the end first: the numbers of closed descriptors go
        to whatever is opened next, the next worker's pipe above all, and that may stay silent for
        ever. Copies would not do: an exception raised by a signal or another thread could lose
        them.
        """
        ended = _awake([self.death_fd], timeout)
        if ended and self._served and (self._pidfd is not None or self._box is not None):
            deadline = time.monotonic() + REAP_TIMEOUT
            while _awake([self.exitcode_fd], deadline - time.monotonic()):
                if self._box is None or self._box.exitcode() is not None or self._box.ended:
                    return  # else it was what the worker said last

    def close(self) -> None:
        """Forget a process that has ended, and end what it has left behind."""
        self.exitcode(0)
        self._reaping.run(self._close)

    def _close(self) -> None:
        self._kill_group()
        # Whoever waits has heard of the end, at once as a rule, and leaves.
        if not self._waiting.run_within(REAP_TIMEOUT, self._forget):
            self._forget()

    def _forget(self) -> bool:
        self._closed = True
        with contextlib.suppress(ValueError, AssertionError):
            popen = self._process._popen
            if popen is not None and (self._served or popen.poll() is None):
                if not self._served:
                    _outlived.append(popen.pid)
                popen.returncode = self._last_exitcode or 0  # else it could not be closed
            self._process.close()
        self._close_pidfd()
        return True

    def abandon(self) -> None:
        """Let go of it in a process that was forked from the owner, whose child it is."""
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        close_held(self, "_pidfd")


def _awake(sources: list[Any], timeout: float) -> list[Any]:
    """Wait as `connection.wait` does, and anew if this process was stopped meanwhile.

    The other process was stopped as well. What is that short ends much too late by any stop, so
    no account is asked, and none may be there.
    """
    while True:
        due = time.monotonic() + max(0.0, timeout)
        ready = connection.wait(sources, timeout)
        if ready or time.monotonic() - due <= LATE:
            return ready


_outlived: collections.deque[int] = collections.deque()  # children that were given up alive


def reap_outlived(timeout: float) -> None:
    """Reap the children that were given up and have ended since, or do so in time.

    Their pids are nobody else's until then.
    """
    until = time.monotonic() + timeout
    for _ in range(len(_outlived)):
        with contextlib.suppress(IndexError):  # another thread was faster
            pid = _outlived.popleft()
            if not _reaped(pid, max(0.0, until - time.monotonic())):
                _outlived.append(pid)


def _reaped(pid: int, timeout: float) -> bool:
    try:
        fd = _pidfd(pid)
        if fd is not None:
            try:
                connection.wait([fd], timeout)
            finally:
                os.close(fd)
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except (ProcessLookupError, ChildProcessError):
        return True  # something else in this program did, or this is a fork of its parent


def _start_unlisted(child: Any) -> None:
    """Start a process as `Process.start` does, but for the list of children that it is put on."""
    child._popen = popen = child._Popen(child)
    child._sentinel = popen.sentinel
    del child._target, child._args, child._kwargs  # they may lead back to `child`: bpo-30775


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


def _has_pidfds() -> bool:
    """Whether the system, and what guards this process, lets it have pidfds."""
    with contextlib.suppress(ProcessLookupError):
        own = _pidfd(os.getpid())
        if own is None:
            return False
        os.close(own)
    return True


def _can_reopen() -> bool:
    """Whether a pipe can be opened anew, which takes /proc."""
    return sys.platform.startswith("linux") and os.path.exists("/proc/self/fd")


def _pidfd(pid: int | None) -> int | None:
    """Return a descriptor of a process; None where there are none.

    Raises:
        ProcessLookupError: there is no such process any more.
    """
    try:
        return lifted(os.pidfd_open(pid)) if pid is not None else None
    except ProcessLookupError:
        raise
    except (AttributeError, OSError):
        return None


def _how_stopped(pid: int | None) -> str | None:
    """Say what has stopped a process; None if it is not, or the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[:1]
    except OSError:
        return None
    return _STOPPED.get(b"".join(state))


def _why_refused(pid: int | None) -> str:
    """Say why a signal was not sent."""
    ours = os.geteuid() if hasattr(os, "geteuid") else "?"
    try:
        theirs: int | str = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        theirs = "another"
    return (
        f"this process runs as user {ours} and may send no signal to it, which runs as user "
        f"{theirs}; give up rights before the pool is opened"
    )


def signal_name(exitcode: int | None) -> str | None:
    """Return the name of the signal an exit code tells of, or None."""
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"


def describe_exit(exitcode: int | None, unknown: str | None = None) -> str:
    """Say in words how a process ended; `unknown` says why there is no exit code."""
    if exitcode is None:
        return f"(its exit code is not known: {unknown or 'it has not come yet'})"
    name = signal_name(exitcode)
    if name == "SIGXCPU":
        return "by SIGXCPU (its processor time was used up)"
    return f"by {name}" if name else f"with exit code {exitcode}"
