"""Resources: how much memory a process uses, and what the kernel lets it use at most."""

from __future__ import annotations

import math
import os
import sys
from typing import Any, Mapping

_CPU_GRACE = 5  # seconds from SIGXCPU, which can be ignored, to SIGKILL


def resident_bytes(pid: int | str = "self") -> int:
    """Return the resident size of a process; 0 where the kernel does not say."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError):
        return 0


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
