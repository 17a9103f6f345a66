"""What the kernel tells of processes: descendants, cores, memory, switches, processor time.

Linux only; elsewhere `available()` is False, and the bench says what it cannot measure.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Iterator, NamedTuple


def available() -> bool:
    """Tell whether this system has what the rest of this module reads."""
    return sys.platform.startswith("linux") and os.path.exists("/proc/self/smaps_rollup")


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _threads(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def stat(pid: int) -> list[str]:
    """Return the fields of a process's stat after its name: state, parent and so on.

    Raises:
        OSError: there is no such process (any more).
    """
    return _text(f"/proc/{pid}/stat").rpartition(")")[2].split()


def descendants() -> set[int]:
    """Return the pids of all processes below this one, multiprocessing's own included."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                parents[int(name)] = int(stat(int(name))[1])
    found: set[int] = set()
    family = {os.getpid()}
    while True:
        new = {pid for pid, parent in parents.items() if parent in family} - found
        if not new:
            return found
        found |= new
        family |= new


@contextlib.contextmanager
def pinned() -> Iterator[int | None]:
    """Keep every thread of this process and of all below it on one core, and then set it free.

    What is started meanwhile stays there as well, and is freed at the end. Gives the core, or None
    where nothing can be pinned.
    """
    allowed = cores()
    if not allowed:
        yield None
        return
    _place({allowed[-1]})
    try:
        yield allowed[-1]
    finally:
        _place(set(allowed))


def _place(cores: set[int]) -> None:
    for pid in {os.getpid()} | descendants():
        with contextlib.suppress(OSError):
            for thread in _threads(pid):
                os.sched_setaffinity(thread, cores)


def cores() -> list[int]:
    """Return the cores this process may use; empty where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def memory(pid: int) -> tuple[int, int]:
    """Return the resident and the proportional size of a process, in bytes."""
    sizes = {}
    for line in _text(f"/proc/{pid}/smaps_rollup").splitlines():
        words = line.split()
        if words[0] in ("Rss:", "Pss:"):
            sizes[words[0]] = int(words[1]) * 1024
    return sizes["Rss:"], sizes["Pss:"]


class Activity(NamedTuple):
    """What processes have done so far, all their threads together."""

    wakeups: int  # voluntary context switches: each is a wait that ended
    ticks: int  # processor time as `ps` sees it, in clock ticks
    cpu_ns: int  # the same by the scheduler's own clock

    def since(self, before: Activity) -> Activity:
        return Activity(*(now - then for now, then in zip(self, before)))


def activity(pids: list[int]) -> Activity:
    """Add up what these processes have done."""
    wakeups = ticks = cpu_ns = 0
    for pid in pids:
        user, system = stat(pid)[11:13]
        ticks += int(user) + int(system)
        for thread in _threads(pid):
            cpu_ns += int(_text(f"/proc/{pid}/task/{thread}/schedstat").split()[0])
            for line in _text(f"/proc/{pid}/task/{thread}/status").splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    wakeups += int(line.split()[1])
    return Activity(wakeups, ticks, cpu_ns)
