"""Resources: the memory and descriptors of a process, and what the kernel lets it use at most."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from typing import TYPE_CHECKING, Any, Mapping

from .descriptors import STREAMS, lift_connection, lifted
from .wire import Ends

if TYPE_CHECKING:
    from .assignment import Setup

_CPU_GRACE = 5  # seconds from SIGXCPU, which can be ignored, to SIGKILL


def resident_bytes(pid: int | str = "self") -> int:
    """Return the resident size of a process; 0 where the kernel does not say."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError):
        return 0


def keep_standard_streams(conn: Any, setup: Setup) -> None:
    """Have the descriptors 0 to 2 be nothing of minipool's, but a stream each.

    Where the program has closed one of them, what is opened for a worker gets its number. It would
    be written to by the first `print`, or fail that once it is closed again. So what the worker
    uses goes to other numbers, and what is closed then leads to nowhere.
    """
    if os.name != "posix":
        return
    from multiprocessing import parent_process

    voice = () if setup.voice is None else setup.voice.descriptors
    ends = (conn.reader, conn.writer) if isinstance(conn, Ends) else ()
    for used in (setup.table, setup.lifeline, setup.box, *voice, *ends):
        if used is not None:
            used.fd = lifted(used.fd)
    if not ends:
        lift_connection(conn)
    parent: Any = parent_process()
    if parent is not None:
        parent._sentinel = lifted(parent._sentinel)
    with contextlib.suppress(OSError):  # there is no /dev/null
        null = os.stat(os.devnull)
        for fd in range(STREAMS):
            if _leads_nowhere(fd, null):
                _lead_nowhere(fd)
        _open_missing_streams()


def _leads_nowhere(fd: int, null: os.stat_result) -> bool:
    """Tell whether it is closed, or what multiprocessing gives for a standard input.

    That is /dev/null for reading, and its number is the lowest that was free.
    """
    try:
        return os.path.samestat(os.fstat(fd), null)
    except OSError:
        return True


def _lead_nowhere(fd: int) -> None:
    """Have it lead to nowhere, for reading and writing, also in programs that this one runs."""
    null = os.open(os.devnull, os.O_RDWR)
    if null == fd:
        os.set_inheritable(fd, True)
    else:
        os.dup2(null, fd)
        os.close(null)


def _open_missing_streams() -> None:
    """Have no stream be None: an empty input, and outputs that take all.

    Not by the descriptors 0 to 2, which may be files of the program's by now.
    """
    missing = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    nowhere = os.open(os.devnull, os.O_RDWR) if missing else -1
    for name in missing:
        mode = "r" if name == "stdin" else "w"
        stream = open(nowhere, mode, 1, "utf-8", "backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def limit(limits: Mapping[str, float]) -> None:
    """Have the kernel refuse this process more than that; for a worker, before user code.

    Memory is what it has of its own (RLIMIT_DATA): the heap, stacks, private maps. The address
    space (RLIMIT_AS) would count what is reserved and never used as well, which is more than most
    machines have. Where there is no such limit for maps, it is taken all the same.

    Raises:
        ValueError, OSError: the system does not let it.
    """
    import resource  # by who is limited; not on every system
    import signal

    if "memory_limit" in limits:
        kind = resource.RLIMIT_DATA if sys.platform == "linux" else resource.RLIMIT_AS
        _set(resource, kind, int(limits["memory_limit"]))
    if "open_files" in limits:
        _set(resource, resource.RLIMIT_NOFILE, int(limits["open_files"]))
    if "cpu_limit" in limits:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        seconds = math.ceil(limits["cpu_limit"])
        _set(resource, resource.RLIMIT_CPU, seconds, seconds + _CPU_GRACE)


def _set(resource: Any, kind: int, soft: int, hard: int | None = None) -> None:
    """Lower a limit, both what counts and what it could be raised to again."""
    present = resource.getrlimit(kind)[1]
    hard = soft if hard is None else hard
    if present != resource.RLIM_INFINITY:
        soft, hard = min(soft, present), min(hard, present)
    resource.setrlimit(kind, (soft, hard))
