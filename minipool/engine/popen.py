"""How multiprocessing launches a process, where it is not good enough for a pool.

`Process.start` flushes standard output and error first. Where one is a pipe that nobody reads, that
waits for as long, or for the thread that is stuck in writing to it; the manager must not. Only a
forked process would write again what is in their buffers, so for others nothing is flushed at all.

It keeps two descriptors for each process: one tells of the end of the process, the other tells the
process of ours. A pool has better means for both (a pidfd, the lifeline), so `shed` closes what is
not needed. A fork server needs a pipe to send the exit code through; where it can be, that is the
black box, which is read to its end anyway.

What a process is told of its parent is made by multiprocessing as well. It must not fail where the
current directory is gone, nor where `sys.path` holds what the import system ignores.
"""

from __future__ import annotations

import _signal
import contextlib
import importlib
import io
import os
import select
import sys
import types
from functools import partial
from multiprocessing import process
from typing import TYPE_CHECKING, Any, Callable, Iterator

from . import mainmodule
from .descriptors import beyond_streams, close_all, pipe, pipe_into

if TYPE_CHECKING:
    from .bell import Closing
    from .blackbox import BlackBox
    from .fork_server import Watch

_kept: list[Any] = []  # what must not be closed, and streams whose collection would flush them
_MODULES = {
    "fork": "multiprocessing.popen_fork",
    "spawn": "multiprocessing.popen_spawn_posix",
    "forkserver": "multiprocessing.popen_forkserver",
}


def use_for(
    child: Any, box: BlackBox | None, bare: bool = False, closing: Closing | None = None
) -> None:
    """Have a process object that is not started yet be launched this way, where it can be.

    It is to be no daemon, whatever this process is: what ends with us may have children. `box`
    takes the word of the fork server, too; None: a pipe of its own does. `bare`: its target imports
    the main module itself (see `main_module`). `closing`: see `fork_server.launched`.
    """
    child.daemon = False
    child.authkey = bytes(child.authkey)  # see `_authkey_of_ours`
    if sys.platform != "win32":
        child._Popen = partial(_popen, box=box, bare=bare, closing=closing)


def _popen(child: Any, box: BlackBox | None, bare: bool, closing: Closing | None) -> Any:
    """Launch a process: as `Process._Popen`, whose place this takes."""
    del child._Popen  # the object may have to be pickled
    method = child._start_method
    if method == "fork":
        stuck = _flush_what_takes_it()
        if stuck:
            child._target = partial(_run_with_new_streams, stuck, child._target)
    with _authkey_of_ours():
        if method == "forkserver":
            from .fork_server import launched  # where there is one

            return launched(ensure_server, partial(_launch, method, child, box, bare), closing)
        return _launch(method, child, None, bare)


def _launch(
    method: str, child: Any, box: BlackBox | None, bare: bool, watch: Watch | None = None
) -> Any:
    popen = importlib.import_module(_MODULES[method]).Popen
    made = popen.__new__(popen)
    made._fds = []
    made.returncode = made.finalizer = None
    if box is not None and watch is not None:
        _launch_by_server(made, child, box, bare, watch)
        return made
    if method == "fork":
        launch = rebound(popen._launch, os=_Pipes())
    else:
        _ensure_tracker()
        launch = partial(beyond_streams, rebound(popen._launch, spawn=_Spawn(bare)))
    if watch is not None:
        launch = partial(watch.around, launch)
    try:
        launch(made, child)
    except BrokenPipeError:
        if not _was_started(made):
            _close_ends(made)
            raise
    except BaseException:
        _close_ends(made)
        raise
    return made


def _close_ends(popen: Any) -> None:
    """Close what is kept for a process that was not started; its error may keep `popen` alive."""
    if popen.finalizer is not None:
        popen.finalizer()


def _ensure_tracker() -> None:
    """Start multiprocessing's resource tracker, if it does not run; here nothing changes by that.

    Some Pythons unblock SIGINT by that, in this thread and so in all that it starts.
    """
    from multiprocessing import resource_tracker

    blocked = _signal.pthread_sigmask(_signal.SIG_BLOCK, ())
    try:
        beyond_streams(resource_tracker.ensure_running)
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, blocked)


class _Pipes:
    """`os`, but that no end of its pipes has the number of a standard stream."""

    pipe = staticmethod(pipe)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _was_started(popen: Any) -> bool:
    """Tell whether there was a process, which has ended before it had read what it is told.

    It is our child, to be reaped, and how it ended says more than that nobody read.
    """
    if popen.method == "forkserver" and hasattr(popen, "sentinel"):
        from multiprocessing import forkserver

        with contextlib.suppress(EOFError, OSError):
            popen.pid = forkserver.read_signed(popen.sentinel)
    return getattr(popen, "pid", None) is not None


@contextlib.contextmanager
def _authkey_of_ours() -> Iterator[None]:
    """Have the current process's key be one that multiprocessing lets pass to a child.

    In a process of billiard's (Celery's prefork children) it is one that billiard alone does.
    """
    config = process.current_process()._config  # type: ignore[attr-defined]
    key = config["authkey"]
    if isinstance(key, process.AuthenticationString):  # type: ignore[attr-defined]
        yield
        return
    config["authkey"] = process.AuthenticationString(key)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        config["authkey"] = key


def shed(popen: Any, sentinel: bool) -> None:
    """Close what multiprocessing keeps of a process that was started, but for its `sentinel`.

    The process takes the lifeline for that which tells of our end.
    """
    util: Any = importlib.import_module("multiprocessing.util")
    finalizer = popen.finalizer
    if finalizer is None:
        return
    held = set(finalizer._args)
    kept = held & {popen.sentinel} if sentinel else set()
    popen.finalizer = util.Finalize(popen, util.close_fds, tuple(kept)) if kept else None
    finalizer.cancel()
    close_all(held - kept)


# -- by the fork server --------------------------------------------------------------------------


def ensure_server() -> None:
    """Start the fork server, if it does not run; as `multiprocessing.forkserver.ensure_running`.

    Raises:
        OSError: it could not be started; where its socket is the cause, the folder is named.
    """
    current: Any = importlib.import_module("multiprocessing.process").current_process()
    folder = current._config.get("tempdir")
    if folder is not None:
        with contextlib.suppress(OSError):
            os.mkdir(folder, 0o700)  # something has cleaned the temporary directory
    server = _server()
    try:
        _ensure_tracker()
        beyond_streams(rebound(type(server).ensure_running, spawn=_Spawn()), server)
    except (FileNotFoundError, PermissionError) as error:
        raise OSError(error.errno, error.strerror, error.filename or folder) from error


def _server() -> Any:
    from multiprocessing import forkserver

    return forkserver._forkserver


def _launch_by_server(made: Any, child: Any, box: BlackBox, bare: bool, watch: Watch) -> None:
    """Have the fork server start a process, and send what it has to say of it to the black box.

    The process is told what to do when its pid is known: so nothing comes before that.

    Raises:
        OSError, EOFError: no process was started; everything is given back.
    """
    payload = _payload(made, child, bare)
    status: list[int] = [box.lend_to_server()]
    ends: list[int] = []
    try:
        pipe_into(ends)
        theirs, ours = ends
        beyond_streams(_ask_server, [theirs, *status], made._fds, watch)
        # Else the end of the server would not be the end of the pipe.
        close_all(map(status.pop, (-1,)))
        watch.await_word(box.fd)
        made.pid = box.pid_from_server()
        made.sentinel = None
        _send(ours, payload, box.fd)
    finally:
        close_all((*ends, *status))


def _payload(made: Any, child: Any, bare: bool) -> memoryview:
    """Return what the new process reads first: the words about its parent, and its object."""
    from multiprocessing import context, reduction

    buffer = io.BytesIO()
    words = preparation_data(child._name, bare)
    context.set_spawning_popen(made)
    try:
        reduction.dump(words, buffer)
        reduction.dump(child, buffer)
    finally:
        context.set_spawning_popen(None)
    return memoryview(buffer.getvalue())  # of the buffer itself, a cycle would collect it too soon


def _send(fd: int, payload: memoryview, end: int) -> None:
    """Write to a new process, until it has all or `end` tells that it has ended.

    There is another reader, so no signal comes of it if the process is gone.
    """
    os.set_blocking(fd, False)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.register(end, select.POLLIN)
    while payload and all(ready == fd for ready, _ in poll.poll()):
        payload = payload[os.write(fd, payload) :]


def _ask_server(pipes: list[int], fds: list[int], watch: Watch) -> None:
    """Ask for a new process: as `multiprocessing.forkserver.connect_to_new_process`."""
    import socket
    from multiprocessing import connection, reduction, resource_tracker

    server = _server()
    with socket.socket(socket.AF_UNIX) as client:
        try:
            _connect(client, server)
        except FileNotFoundError:
            _leave(server)
            ensure_server()
            _connect(client, server)
        key = getattr(server, "_forkserver_authkey", None)  # from Python 3.14 on
        if key:

            class Awaited(connection.Connection):
                """The end of a client who waits for each word of the server as long as for one."""

                def recv_bytes(self, maxlength: int | None = None) -> bytes:
                    watch.await_word(self.fileno())
                    return super().recv_bytes(maxlength)

            end: Any = Awaited(client.fileno())
            try:
                connection.answer_challenge(end, key)
                connection.deliver_challenge(end, key)
            finally:
                end._detach()
        kept = [server._forkserver_alive_fd, resource_tracker.getfd()]
        reduction.sendfds(client, [*pipes, *kept, *fds])


def _connect(client: Any, server: Any) -> None:
    """Connect to the fork server; what it raises names the address."""
    try:
        client.connect(server._forkserver_address)
    except OSError as error:
        raise OSError(error.errno, error.strerror, server._forkserver_address) from None


def _leave(server: Any) -> None:
    """Have multiprocessing start another server; this one goes on for those that it has started.

    Its socket has been removed, so nobody can reach it any more.
    """
    modules, alive = server._preload_modules, server._forkserver_alive_fd
    server.__init__()
    server._preload_modules = modules
    _kept.append(alive)  # closed with this process, upon which that server ends


# -- what a process is told of its parent --------------------------------------------------------


class _Spawn:
    """`multiprocessing.spawn`, but for what it tells a new process."""

    def __init__(self, bare: bool = False) -> None:
        self._bare = bare

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("multiprocessing.spawn"), name)

    def get_preparation_data(self, name: str) -> dict[str, Any]:
        return preparation_data(name, self._bare)


class _Os:
    """`os`, in a directory that is gone."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def getcwd(self) -> str:
        return ""


def main_module() -> dict[str, Any] | None:
    """Return how a new process is told to import the main module; None: by multiprocessing alone.

    What its import raises there ends the process before anything of ours runs in it.
    """
    if sys.platform == "win32":
        return None
    return mainmodule.how_to_import()


def preparation_data(name: str, bare: bool = False) -> dict[str, Any]:
    """Return what multiprocessing tells a process of that name about this one.

    Without the current directory if that is gone: the process is where the fork server is, or
    where we are. Without what is no string in `sys.path`, which is not looked at anyway. And, with
    `bare`, without the main module.
    """
    from multiprocessing import spawn

    get = spawn.get_preparation_data
    try:
        words = get(name)
    except OSError:
        words = rebound(get, os=_Os())(name)
        words.pop("dir", None)
    if "sys_path" in words:  # plain strings, as the fork server is told them in Python's words
        entries = [entry for entry in words["sys_path"] if isinstance(entry, str)]
        words["sys_path"] = [str.__str__(entry) for entry in entries]
    for key in (mainmodule.BY_NAME, mainmodule.BY_PATH):
        words.pop(key, None)
    if not bare:
        words.update(mainmodule.how_to_import())
    if hasattr(_signal, "pthread_sigmask"):
        words["minipool"] = _Uninterrupted()
    return words


class _Uninterrupted:
    """Blocks SIGINT in the process that reads it, before that imports anything of the program's.

    Until it leads a group of its own, the keys that interrupt the program reach it as well.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _signal.pthread_sigmask, (_signal.SIG_BLOCK, (int(_signal.SIGINT),))


def rebound(function: Any, **names: object) -> Callable[..., Any]:
    """Return a function of the standard library to which some names mean something else."""
    made = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


# -- standard streams of a process that is forked ------------------------------------------------


def _flush_what_takes_it() -> list[str]:
    """Flush standard output and error, as far as somebody reads them; return which nobody does."""
    stuck = []
    for name in ("stdout", "stderr"):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # none, closed, or no file
            stream, poll = getattr(sys, name), select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            if poll.poll(0):
                stream.flush()
            else:
                stuck.append(name)
    return stuck


def _run_with_new_streams(names: list[str], target: Callable[..., object], *args: Any) -> None:
    """Run a forked process without what its parent has not written, or is stuck in writing.

    The old streams must not be touched: their locks may be held, by threads that are not here.
    """
    for name in names:
        old = getattr(sys, name)
        _kept.append(old)
        new = open(old.fileno(), "w", 1, old.encoding, old.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    target(*args)
