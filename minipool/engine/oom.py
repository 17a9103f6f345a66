"""Whether the kernel has killed for want of memory, as far as its counters tell.

The kernel counts each process that it kills so, for the control group and for the whole machine;
not which. So a worker that ended by a SIGKILL which is not ours was killed so if the counter rose
within the last moment, and each count explains one death. In the parent; any thread may ask.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Callable

from .._sync import Guard, guarded
from .descriptors import open_into

_MOMENT = 1.0  # seconds; what was counted before the last but one look is old
_ROOT = "/sys/fs/cgroup"
# Name of the file for a control group; where the whole of it is said, how the group's path begins.
_GROUPS = (("0::", "", "memory.events"), (":memory:", "/memory", "memory.oom_control"))


class OomKills:
    """The counter of the killed. `path` None: that of this process's group, else the machine's."""

    def __init__(
        self, path: str | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._clock = clock
        self._explaining = Guard()
        self._fds: list[int] = []  # of the counter; it stays open while somebody looks
        self._watchers = 0  # managers that look
        self._before = self._latest = 0
        self._looked = float("-inf")

    def look(self) -> None:
        """Note how it stands. Called once a tick, so that what is old explains nothing."""
        now = self._clock()
        if now - self._looked >= _MOMENT:
            self._note(now)

    @guarded("_explaining")
    def _note(self, now: float) -> None:
        first = self._looked == float("-inf")
        self._looked = now
        count = self._count()
        self._before = count if first else max(self._before, self._latest)
        self._latest = count

    @guarded("_explaining")
    def explain(self) -> bool:
        """Tell whether a death of this moment is one of those counted; takes it as explained."""
        if self._count() <= self._before:
            return False
        self._before += 1
        return True

    def _count(self) -> int:
        try:
            if not self._fds:  # to open it is most of the work
                self._path = self._path or _path()
                open_into(self._fds, os.open, self._path, os.O_RDONLY)
            words = os.pread(self._fds[0], 1 << 16, 0).split()
            return int(words[words.index(b"oom_kill") + 1])
        except (OSError, ValueError, IndexError):
            return 0  # none here, and none later
        finally:
            self._put_away()

    @guarded("_explaining")
    def begin(self) -> None:
        """Hear that one more manager will look once a tick."""
        self._watchers += 1
        self._count()  # opens what is read: a pool has all its descriptors from its start

    @guarded("_explaining")
    def end(self) -> None:
        """Hear that one of them will not any more."""
        self._watchers -= 1
        self._put_away()

    def abandon(self) -> None:
        """Begin anew in a process that was forked: who held the lock is not in it."""
        self._explaining = Guard()
        self._watchers = 0
        self._put_away()

    def _put_away(self) -> None:
        """Give back the descriptor, if nobody looks regularly."""
        if not self._watchers and self._fds:
            with contextlib.suppress(IndexError):  # a signal handler was faster
                any(map(os.close, map(self._fds.pop, [-1])))  # taken out and closed, in a step


def _path() -> str:
    """Return the file that counts for this process: the nearest there is."""
    with open("/proc/self/cgroup") as file:
        lines = file.read().splitlines()
    for mark, mount, name in _GROUPS:
        groups = [line.partition(mark)[2] for line in lines if mark in line]
        for group in (*groups, ""):  # in a container the mount may be that of the group itself
            path = f"{_ROOT}{mount}{group.rstrip('/')}/{name}"
            if os.path.exists(path):
                return path
    return "/proc/vmstat"


OOM_KILLS = OomKills()  # one for all pools, so that each count explains one death
