"""What there is too little of to start a worker, in words: what there is, the limit, the remedy.

In the parent. It reads limits and never changes one: `select()` fails on descriptors above 1,023,
so a program may well depend on the one it has. Any thread may ask.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from ..cgroup import pids
from ..errors import ConfigError, MinipoolError, PoolStartError

if TYPE_CHECKING:
    from ..config import PoolConfig

PER_WORKER = 4  # descriptors: two pipes, a black box, a pidfd
PER_LOG, PER_OUTPUT = 1, 2  # more of them, where log records or standard streams are forwarded
_OWN = 12  # at most, that a pool has of its own, with multiprocessing's helpers
_PASSING = 12  # that one start needs for a moment
_THEIR_ENDS = 3  # that each of those which are started together needs for a moment


def descriptors_each(config: PoolConfig) -> int:
    """Return how many descriptors of this process one worker takes."""
    logs, output = config.forward_logs, config.capture_output
    return PER_WORKER + (PER_LOG if logs else 0) + (PER_OUTPUT if output else 0)


def _passing(config: PoolConfig, workers: int) -> int:
    """Return how many more it takes while so many workers are being started."""
    together = min(workers, config.startup_batch)
    return _PASSING + together * (_THEIR_ENDS + descriptors_each(config) - PER_WORKER)


def expect_descriptors(config: PoolConfig) -> None:
    """Check that there are descriptors for a pool that is about to be opened.

    Raises:
        PoolStartError: there are too few; with the limit, what is needed, and what to do.
    """
    workers = (config.size or 0) + config.spares
    why = _too_few(config, workers, _OWN)
    if why is not None:
        raise PoolStartError(f"{config.name} was not opened, and nothing was started: {why}")


def expect_descriptors_for(config: PoolConfig, size: int, present: int) -> None:
    """Check that there are descriptors for `size` workers, where so many are `present`.

    Raises:
        ConfigError: there are too few; with the limit, what is needed, and what to do.
    """
    why = _too_few(config, size + config.spares - present, 0) if size > present else None
    if why is not None:
        raise ConfigError(f"size={size!r}: {why}", option="size", value=size)


def _too_few(config: PoolConfig, workers: int, others: int) -> str | None:
    limit = descriptor_limit()
    if limit is None:
        return None
    each, taken = descriptors_each(config), descriptors_taken(limit)
    need = workers * each + others + _passing(config, 1)  # started one by one, if need be
    if taken + need <= limit:
        return None
    return (
        f"{workers} workers need {need} descriptors ({each} each, and some to start them), this "
        f"process has {taken} open, and may have {limit}; raise the limit of open files "
        f"(`ulimit -n {taken + need}`), or lower `size`"
    )


def workers_that_fit(config: PoolConfig, count: int) -> int:
    """Return how many of `count` workers there are descriptors for; at least one, to fail by."""
    limit = descriptor_limit()
    if count <= 1 or limit is None:
        return count
    free = limit - descriptors_taken(limit)
    while count > 1 and count * descriptors_each(config) + _passing(config, count) > free:
        count -= 1
    return count


def descriptor_limit() -> int | None:
    """Return how many descriptors this process may have; None: no limit, or none that is told."""
    try:
        import resource
    except ImportError:
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def descriptors_taken(limit: int) -> int:
    """Return how many descriptors this process has; `limit` where none is left to count by."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(folder)) - 1
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return limit
    return sum(map(_is_open, range(min(limit, 1 << 16))))


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# -- why a start has failed ----------------------------------------------------------------------


def of_descriptors(problem: BaseException | None) -> bool:
    """Whether descriptors have run out, which says nothing about the worker."""
    return getattr(problem, "errno", None) in (errno.EMFILE, errno.ENFILE)


def of_memory(problem: BaseException | None) -> bool:
    """Whether memory has run out, or the room for addresses."""
    told = getattr(problem, "type_name", None), getattr(problem, "message", None)  # by a worker
    return (
        isinstance(problem, MemoryError)
        or getattr(problem, "errno", None) == errno.ENOMEM
        or told[0] == "MemoryError"
        or os.strerror(errno.ENOMEM) in str(told[1])
    )


def address_space() -> str | None:
    """Return how much of it this process, and each that it starts, may have; None: no limit."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            return (
                f"a process may have {soft >> 10} KiB of address space (`ulimit -v`): raise that "
                f"limit"
            )
    return None


def lost_directory() -> str | None:
    """Say that the current directory is gone: no Python starts there that has to ask for it."""
    try:
        os.getcwd()
    except OSError:
        path = os.environ.get("PYTHONPATH", "")
        relative = any(not os.path.isabs(entry) for entry in path.split(os.pathsep) if entry)
        seen = f" and PYTHONPATH={path!r} is relative to it" if relative else ""
        return (
            f"this process's current directory does not exist any more{seen}; give absolute paths "
            f"in PYTHONPATH, or change to a directory that is there (`os.chdir()`)"
        )
    return None


def in_words(problem: BaseException) -> str:
    """Say why this process could not start a process, or a thread, for somebody to act on."""
    number = getattr(problem, "errno", None)
    if isinstance(problem, MinipoolError) or hasattr(problem, "in_words"):
        return str(problem)
    if number == errno.EMFILE:
        limit = descriptor_limit() or 0
        taken = descriptors_taken(limit)
        return f"Too many open files: this process has {taken} and may have {limit} (`ulimit -n`)"
    if number == errno.ENFILE:
        return "Too many open files on this machine (`sysctl fs.file-max`)"
    if number == errno.EAGAIN:
        return f"{os.strerror(errno.EAGAIN)}: no process can be forked; {processes()}"
    if of_memory(problem):
        why = f"{type(problem).__name__} as a process was being started: {problem}"
        return "; ".join(filter(None, [why, address_space()]))
    if "start new thread" in str(problem):
        return "; ".join(filter(None, [str(problem), processes(), address_space()]))
    if isinstance(problem, (EOFError, ConnectionResetError, BrokenPipeError)):
        return (
            f"the fork server ended when it was asked for a process, and its standard error tells "
            f"why; where it could not fork: {processes()}"
        )
    named = getattr(problem, "filename", None)
    if isinstance(problem, OSError) and named is not None and "listener-" in os.fsdecode(named):
        return (
            f"the fork server cannot be reached at {os.fsdecode(named)!r}: {problem.strerror}; has "
            f"the temporary directory been cleaned, or the user changed?"
        )
    if isinstance(problem, OSError) and named is None:
        return f"{type(problem).__name__} as a process was being started: {problem}"
    return f"{type(problem).__name__}: {problem}"


def processes() -> str:
    """Return how many processes there are, and may be: of this user, and of the control group."""
    told = []
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        if soft != resource.RLIM_INFINITY:
            count = _tasks_of_user()
            told.append(f"this user has {count} processes and threads, and may have {soft} "
                        f"(`ulimit -u`)")  # fmt: skip
    for count, most in pids():
        told.append(f"the control group has {count}, and may have {most} (`pids.max`)")
    return "; ".join(told) or "no limit of processes (`ulimit -u`, `pids.max`) is known"


def _tasks_of_user() -> int:
    """Return how many processes and threads this user has, as far as /proc shows them."""
    user, count = os.getuid(), 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):  # it has ended
            if entry.name.isdigit() and entry.stat().st_uid == user:
                count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count
