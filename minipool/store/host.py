"""This host and this process as a store names them: boot, pid namespace, start times, clocks.

Whatever the system does not tell is None; nothing here raises or waits.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from typing import NamedTuple

GONE = "gone"  # what `start_of` says of a process that there is not


class Moment(NamedTuple):
    """One moment by two clocks: within one boot the second one decides."""

    wall: float
    boot: str | None  # None: there is no clock that counts from the boot
    since_boot: float | None


def moment(seconds_ago: float = 0.0) -> Moment:
    """Return the present moment, or one so many seconds ago."""
    boot = boot_id()
    since_boot = None if boot is None else time.clock_gettime(time.CLOCK_BOOTTIME) - seconds_ago
    return Moment(time.time() - seconds_ago, boot, since_boot)


_boot: list[str | None] = []


def boot_id() -> str | None:
    """Return what tells this boot of this kernel from any other one."""
    if not _boot:
        _boot.append(_read_boot_id())
    return _boot[0]


def _read_boot_id() -> str | None:
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return None
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            text = file.read().strip()
    except (OSError, ValueError):
        return None
    # A time namespace has a CLOCK_BOOTTIME of its own.
    text += _link("/proc/self/ns/time") or ""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def host_name() -> str:
    """Return the name of this host, for people to read: others may have the same."""
    return socket.gethostname()


def pid_namespace() -> str | None:
    """Return what tells the namespace that this process's pid belongs to."""
    return _link("/proc/self/ns/pid")


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def start_of(pid: int) -> str | None:
    """Return when a process of this namespace began, which tells it from a later one of that pid.

    `GONE`: there is no such process, or only its exit status. None: it cannot be seen (other
    users' processes under `hidepid`, a system without /proc).
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            words = file.read().rpartition(")")[2].split()
        return GONE if words[0] in "ZX" else words[19]
    except (OSError, IndexError):
        pass
    if os.name != "posix":  # there `os.kill` ends the process, whatever the signal
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return GONE
    except (OSError, OverflowError):
        pass
    return None
