"""How multiprocessing launches a process, without its wait for standard output and error.

`Process.start` flushes both streams first. Where one is a pipe that nobody reads, that waits for
as long, or for the thread that is stuck in writing to it; the manager must not. Only a forked
process would write again what is in their buffers, so for others nothing is flushed at all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import select
import sys
from multiprocessing import process
from typing import Any, Callable, Iterator

_kept: list[Any] = []  # in a forked process: streams that must not be collected, which flushes
_MODULES = {
    "fork": "multiprocessing.popen_fork",
    "spawn": "multiprocessing.popen_spawn_posix",
    "forkserver": "multiprocessing.popen_forkserver",
}


def use_for(child: Any) -> None:
    """Have a process object that is not started yet be launched this way, where it can be.

    It is to be no daemon, whatever this process is: what ends with us may have children.
    """
    child.daemon = False
    child.authkey = bytes(child.authkey)  # see `_authkey_of_ours`
    if sys.platform != "win32":
        child._Popen = _popen


def _popen(child: Any) -> Any:
    """Launch a process: as `Process._Popen`, whose place this takes."""
    del child._Popen  # the object may have to be pickled
    method = child._start_method
    if method == "fork":
        stuck = _flush_what_takes_it()
        if stuck:
            child._target = functools.partial(_run_with_new_streams, stuck, child._target)
    popen = importlib.import_module(_MODULES[method]).Popen

    def launch() -> Any:
        made = popen.__new__(popen)
        made._fds = []
        made.returncode = made.finalizer = None
        try:
            made._launch(child)
        except BrokenPipeError:
            if not _was_started(made):
                raise
        return made

    with _authkey_of_ours():
        if method == "forkserver":
            from .fork_server import launched  # where there is one

            return launched(launch)
        return launch()


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
