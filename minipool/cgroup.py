"""What control groups let this process have: processor time, memory, processes.

A limit of a group holds for all groups below it, and a process may sit far below the group that
somebody has limited (a slice of systemd, a pod, `docker run --cgroup-parent`). So each limit is
looked for on the whole path, from this process's own group up to where the hierarchy is mounted,
and the smallest counts. Versions 1 and 2 of control groups, also side by side. In a container, the
mount may show the group itself as its root, or the path may begin outside of what is mounted.

Nothing is cached: a group may be given another limit, and a process another group, at any time.
"""

from __future__ import annotations

import os
from typing import Iterator

_PROC = "/proc/self"
_USUAL_PLACE = "/sys/fs/cgroup"
_UNLIMITED = 1 << 60  # bytes; version 1 says "no limit" by a number close to 2 ** 63


def cpus() -> float | None:
    """Return how many CPUs' time this process may use; None where no group says so."""
    quotas = []
    for folder in _folders("cpu"):
        quotas.append(_quota(_words(folder, "cpu.max")))
        period = _words(folder, "cpu.cfs_period_us")
        quotas.append(_quota([*_words(folder, "cpu.cfs_quota_us")[:1], *period[:1]]))
    return min((quota for quota in quotas if quota is not None), default=None)


def memory() -> int | None:
    """Return how many bytes of memory this process's group may have; None: as many as there are."""
    limits = []
    for folder in _folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += [limit for limit in _numbers(folder, name) if 0 < limit < _UNLIMITED]
    return min(limits, default=None)


def pids() -> list[tuple[int, int]]:
    """Return how many processes each limited group on the path has, and how many it may have."""
    found = []
    for folder in _folders("pids"):
        limits, counts = _numbers(folder, "pids.max"), _numbers(folder, "pids.current")
        if limits and counts:
            found.append((counts[0], limits[0]))
    return found


def _quota(words: list[str]) -> float | None:
    try:
        quota, period = float(words[0]), float(words[1])
    except (ValueError, IndexError):
        return None
    return quota / period if quota > 0 and period > 0 and quota != float("inf") else None


def _numbers(folder: str, name: str) -> list[int]:
    return [int(word) for word in _words(folder, name)[:1] if word.isdigit()]


def _words(folder: str, name: str) -> list[str]:
    try:
        with open(os.path.join(folder, name), encoding="ascii", errors="replace") as file:
            return file.read().split()
    except OSError:
        return []


def _folders(controller: str) -> Iterator[str]:
    """Yield the folders of this process's group and of those above it, in each hierarchy."""
    groups = _groups(controller)
    for version, root, mount in _mounts(controller):
        group = groups.get(version, "/")
        inside = root == "/" or group == root or group.startswith(f"{root}/")
        below = group[len(root.rstrip("/")) :] if inside else ""
        folder = os.path.normpath(f"{mount}/{below}")
        if folder != mount and not folder.startswith(f"{mount}/"):
            folder = mount  # "/..": the group is outside of this process's namespace
        while True:
            yield folder
            if len(folder) <= len(mount):
                break
            folder = os.path.dirname(folder)


def _groups(controller: str) -> dict[int, str]:
    """Return this process's group in the hierarchy of version 1 for that, and in that of 2."""
    groups = {}
    for line in _lines("cgroup"):
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            groups[2] = group
        elif controller in controllers.split(","):
            groups[1] = group
    return groups


def _mounts(controller: str) -> Iterator[tuple[int, str, str]]:
    """Yield version, root and place of what is mounted of them: see proc(5), mountinfo."""
    lines = _lines("mountinfo")
    if not lines:  # nothing is told of mounts; this is where they are, as a rule
        yield from ((2, "/", _USUAL_PLACE), (1, "/", f"{_USUAL_PLACE}/{controller}"))
    for line in lines:
        place, _, kind = line.partition(" - ")
        words, (kind, _, options) = place.split(), (*kind.split(), "", "", "")[:3]
        if len(words) < 5:
            continue
        root, mount = _unescaped(words[3]), _unescaped(words[4])
        if kind == "cgroup2":
            yield 2, root, mount
        elif kind == "cgroup" and controller in options.split(","):
            yield 1, root, mount


def _unescaped(path: str) -> str:
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(octal, character)
    return path


def _lines(name: str) -> list[str]:
    try:
        with open(f"{_PROC}/{name}", encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError:
        return []
