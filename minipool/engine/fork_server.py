"""What we ask of multiprocessing's fork server: one for each process, that forks our workers.

The first start that needs it starts it, and waits while it imports the main module (on newer
Pythons) and what is to be preloaded. It passes over an ImportError, and ends with any other
exception, whose traceback goes to standard error (but see `nesting.silence`); the start then fails
with a bare EOFError or, since CPython 3.14, ConnectionResetError. Where a module's import hangs, so
does the start.

So a server that ends before its first answer is started once more, without those modules. Each
worker imports what the server has not (see `child`), and what that raises reaches the parent like
every failed start: with its type, text and traceback. A server that does not answer in time is
killed, and so is one that a pool waits for which is closed meanwhile. Others that wait for it have
another one started.

`preload` is called in the thread that opens a pool, all else in the manager's.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
import warnings
from multiprocessing import connection, forkserver, spawn
from typing import Any, Callable, TypeVar

from .._sync import Latch
from .bell import Closing
from .blackbox import of_servers
from .shortage import lost_directory, processes

T = TypeVar("T")

_PROMPT = 0.05  # seconds in which a server that is not held up answers
_STUCK = 30.0  # seconds for each later answer of a server that may take any time for the first
_END = 1.0  # seconds from the end of its sockets, or of its watch, to that of process or thread
_MOMENT = 1.0  # seconds that a server has to answer once a pool that waits for it is closed
# What `runpy` imports with a main module, and what a process is unpickled by; else in each worker.
_FOR_ALL = ("pkgutil", "multiprocessing.popen_forkserver")
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)  # exit codes


class ServerGone(EOFError):
    """The fork server has ended, or was killed for its silence. No process was started."""

    in_words = True  # it says all that there is to say


class Left(ServerGone):
    """The pool was closed while it waited for the fork server. No process was started."""


class _Known:
    """What is known of this process's server, and how it is to be started."""

    own: tuple[str, ...] = ()  # modules that it may import at any time: for our side of a worker
    patience: float | None = None  # seconds until its first answer; None: for ever
    answered: int | None = None  # the pid of the one that has answered
    silent: int | None = None  # the pid of the one that has not in time, and was killed for it
    stuck: int | None = None  # the pid of the one that had, did not again, and was killed for it
    left: int | None = None  # the pid of the one that was killed as a pool was closed


def preload(context: Any, own: str, modules: tuple[str, ...], patience: float | None) -> None:
    """Ask the fork server to import our side of a worker, and the user's modules, once for all.

    There is one server for the whole process. If it runs already, what it has not imported is
    imported by each worker, which is slower and takes more memory, so that is said. A server that
    is started from now on has `patience` seconds for its first answer.
    """
    server: Any = forkserver._forkserver
    _forget_strange_server(server)
    _Known.own, _Known.patience = (own, *_FOR_ALL), patience
    first = [name for name in _Known.own if name not in server._preload_modules]
    wanted = [name for name in modules if name not in server._preload_modules]
    running = getattr(server, "_forkserver_pid", None) is not None
    if running and wanted:
        warnings.warn(
            f"preload={modules!r} comes too late: this process's fork server is already running, "
            f"so each worker imports them by itself; open this pool before other processes are "
            f"started",
            RuntimeWarning,
            stacklevel=2,
        )
    if (first or wanted) and not running:
        context.set_forkserver_preload([*first, *server._preload_modules, *wanted])


def _forget_strange_server(server: Any) -> None:
    """Make multiprocessing start a server anew in a process that was forked from its owner.

    The owner's server cannot be used here: it is no child of ours, and its lock may be held.
    """
    try:
        if server._forkserver_pid is None or os.waitpid(server._forkserver_pid, os.WNOHANG)[0] == 0:
            return
    except ChildProcessError:
        pass
    modules, alive_fd = server._preload_modules, server._forkserver_alive_fd
    server.__init__()
    server._preload_modules = modules
    os.close(alive_fd)


def launched(
    ensure_running: Callable[[], object],
    launch: Callable[[Watch], T],
    closing: Closing | None = None,
) -> T:
    """Return what `launch` returns, which asks the server for a process and waits by its watch.

    It is called twice if the server ends while it imports modules, or was killed. `ensure_running`
    starts the server, if there is none. `closing` is that of the pool: from then on the server has
    a second to answer.

    Raises:
        Left: the pool was closed first.
        ServerGone: the server has ended, or did not answer in time; no process was started.
        OSError: as `launch` does.
    """
    server: Any = forkserver._forkserver
    closing = closing or Closing()
    for _ in range(2):
        if closing.happened:
            raise Left("the pool was closed before the fork server was asked for a process")
        pid = None
        try:
            ensure_running()
            pid = server._forkserver_pid
            made = launch(Watch(closing))
            _Known.answered = server._forkserver_pid
            return made
        except (EOFError, ConnectionError):
            if closing.happened:
                why = f"the pool was closed before the fork server (pid {pid}) answered"
                raise Left(why) from None
            killed = pid is not None and pid in (_Known.left, _Known.stuck)
            problem, may_be_imports = _explained()
        # The error is forgotten here: its frames hold the descriptors of the start that failed.
        if not killed and not (may_be_imports and _drop_modules()):
            break
    raise problem


class Watch:
    """Bounds the wait for one answer of the server, which is killed if it does not come in time.

    The thread that waits is the manager's. It hears of a close by the bell; where it cannot poll,
    another thread does (`around`).
    """

    def __init__(self, closing: Closing) -> None:
        self._closing = closing
        self._begin(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]

    def _begin(self, pid: int) -> None:
        self._pid = pid
        self._first = self._pid != _Known.answered
        patience = _Known.patience
        if patience is None and not self._first:
            patience = _STUCK
        self._due = None if patience is None else time.monotonic() + patience  # None: for ever
        self._last = self._first  # when it is due, it is killed; else it has a moment more
        self._closed = False

    def await_word(self, fd: int) -> None:
        """Wait until a word of the server can be read from `fd`.

        Meanwhile nothing may hold it up: whatever it has said of other workers is read.

        Raises:
            EOFError: it has ended without one. No end of a pipe tells so: others may hold it.
        """
        pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        if pid != self._pid:  # another one has its place
            self._begin(pid)
        try:
            its_end = os.pidfd_open(pid)
        except ProcessLookupError:
            raise EOFError("the fork server has ended") from None
        rung = False
        try:
            ready = connection.wait([fd, its_end], _PROMPT)
            while fd not in ready and its_end not in ready:
                boxes, limit = of_servers(), self.seconds()
                bell = None if self._closing.happened else self._closing.bell
                bells = [] if bell is None else [bell.reader]
                ready = connection.wait([fd, its_end, *bells, *boxes], limit)
                for full in boxes.keys() & set(ready):
                    boxes[full].listen()
                if bell is not None and bell.reader in ready:
                    rung = True
                    bell.silence()
            if fd not in ready and not connection.wait([fd], 0):
                raise EOFError("the fork server has ended")
        finally:
            os.close(its_end)
            if rung and self._closing.bell is not None:
                self._closing.bell.ring()  # others listen to it as well

    def seconds(self) -> float | None:
        """Return how long to wait before this is asked again (None: no limit). Kills the server."""
        now = time.monotonic()
        if self._closing.happened and not self._closed:
            self._closed = self._last = True
            self._due = now + _MOMENT
        if self._due is not None and now >= self._due:
            if self._last:
                _kill(self._pid, "left" if self._closed else "silent" if self._first else "stuck")
                self._due = None  # its end is heard of
            else:  # it may have been stopped together with this process
                self._last, self._due = True, now + _MOMENT
        return None if self._due is None else self._due - now

    def around(self, launch: Callable[..., T], *args: Any) -> T:
        """Return what `launch` returns, which cannot poll: another thread watches."""
        done = Latch()

        def watch() -> None:
            while not done.happened:
                first = done if self._closing.happened else self._closing
                first.wait(self.seconds(), lambda: done.happened)

        thread = threading.Thread(target=watch, name="minipool-server-watch", daemon=True)
        try:
            with contextlib.suppress(RuntimeError):  # out of threads: it is waited for all the same
                thread.start()
            return launch(*args)
        finally:
            done.set()
            self._closing.stir()
            if thread.is_alive():
                thread.join(_END)


def _kill(pid: int, why: str) -> None:
    """Kill the server, which is our child; if it is reaped already, another one has its place."""
    if forkserver._forkserver._forkserver_pid == pid:  # type: ignore[attr-defined]
        setattr(_Known, why, pid)  # first: whoever waits for it looks as soon as it is dead
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _explained() -> tuple[ServerGone, bool]:
    """Return what has become of the server, and whether what it imported may have ended it."""
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    interpreter = f"it was started as sys.executable={executable()!r}"
    how, code = _end_of(pid)  # first: until then the next start would take it for alive
    if pid is not None and pid == _Known.silent:
        _drop_modules()  # so that the next one is not as silent
        return ServerGone(
            f"the fork server (pid {pid}) did not answer within {_Known.patience:g} s and was "
            f"killed: it imports the main module and what `preload` names, which takes too long, "
            f"or is no Python at all; {interpreter}; raise `init_timeout`, or name a Python by "
            f"`multiprocessing.set_executable()`"
        ), False
    if pid is not None and pid == _Known.answered:
        return ServerGone(
            f"the fork server (pid {pid}) {how}; its standard error tells why; "
            f"where it could not fork: {processes()}"
        ), False
    why = lost_directory() or (
        f"{interpreter}: if that is no Python, name one by `multiprocessing.set_executable()`; "
        f"where it could not fork: {processes()}"
    )
    said = f"the fork server (pid {pid}) {how} before its first answer; {why}"
    return ServerGone(said), code not in _FROM_OUTSIDE


def _end_of(pid: int | None) -> tuple[str, int | None]:
    """Say how the server has ended, and leave it to multiprocessing to reap it.

    None: that is not known.
    """
    try:
        ended = os.pidfd_open(pid or 0)
    except (AttributeError, OSError):
        return "ended", None
    try:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.poll(_END * 1000)
        found = os.waitid(os.P_PID, pid or 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except OSError:  # somebody else has reaped it
        return "ended", None
    finally:
        os.close(ended)
    if found is None:
        return "did not do what it was asked", None
    code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
    return f"ended {_words(code)}", code


def _words(exitcode: int) -> str:
    if exitcode >= 0:
        return f"with exit code {exitcode}"
    try:
        return f"by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"by signal {-exitcode}"


def executable() -> str:
    """Return the interpreter that multiprocessing starts: `sys.executable`, unless it was set."""
    return os.fsdecode(spawn.get_executable() or "")


def _drop_modules() -> bool:
    """Have the next server import our side of a worker alone; False if this one did just that."""
    server: Any = forkserver._forkserver
    if server._preload_modules == [*_Known.own]:
        return False
    server._preload_modules = [*_Known.own]
    return True
