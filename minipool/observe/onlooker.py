"""The onlooker: what this user's pools do, read from outside, through `/proc`. Linux only.

A pool's status table is a memfd, and the kernel shows it among the descriptors of the process
that made it. It is opened there read-only, copied and closed again, so the pool has no part in
it: it may be busy, hung or stopped, and can die at any moment. Its table has all that workers and
lease holders count; what only the manager knows is written there once a tick. What a *process*
does (whether it is stopped, what memory and processor time it takes) the kernel tells.

A row may get another worker while it is copied. It is copied again then: words of two generations
are never shown as one worker's.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
from typing import Iterator, List, NamedTuple, Optional, Tuple

from ..engine import table as t
from ..engine.states import WorkerState as S
from ..tools import procfs

_LINK = "/memfd:minipool:"
_TRIES = 100  # copies of a row whose worker changes meanwhile, a hundred times in a millisecond
_SILENT = 5.0  # seconds; a manager tells something every second, or at rest every three


class Process(NamedTuple):
    """What the kernel tells of a process."""

    state: str  #: "running", "sleeping", "waiting" (for a disk), "stopped", "zombie" or "other"
    parent: int
    cpu_seconds: float
    rss_bytes: int


class WorkerSight(NamedTuple):
    """One worker, as seen from outside. Durations are seconds."""

    worker_id: int  #: its slot
    generation: int
    pid: int
    state: str  #: as the pool has it: "starting", "idle", "leased", "probing", "stopping", "lost"
    process: Optional[str]  #: as the kernel has it, or "gone"; None: it does not tell us
    calls: int  #: done by this process
    raised: int  #: of them, those that ended in an exception
    in_call_for: Optional[float]  #: the call that runs now has taken so long
    leased_for: Optional[float]  #: the present lease has lasted so long
    quiet_for: Optional[float]  #: since it last began or ended a call, or answered a probe
    cpu_seconds: float
    rss_bytes: int
    leases: int  #: the next four are the slot's: what former workers did there is in it
    leased: float
    wait_times: List[int]  #: a histogram; see `table.quantile`
    call_times: List[int]


class PoolSight(NamedTuple):
    """One pool, as seen from outside. Durations are seconds."""

    at: float  #: monotonic, when it was seen
    name: str
    pid: int  #: of the process that opened it
    opened: float  #: monotonic; together with `pid` it tells this pool from all others
    status: str  #: "open", "closing", "stopped" (by a signal) or "silent" (its manager hangs)
    told_for: Optional[float]  #: the next seven are so old; None: nothing was told yet
    size: int  #: workers wanted
    waiting: int  #: callers in the queue
    started: int  #: workers, in all
    lost: int
    retired: int
    start_failures: int
    leases: int  #: the next four are about all slots, also those that are vacant now
    leased: float
    wait_times: List[int]
    call_times: List[int]
    workers: Tuple[WorkerSight, ...]


class Unreadable(NamedTuple):
    """A process that cannot be looked at, or a table, and why."""

    pid: int
    name: str
    reason: str


def available() -> bool:
    """Tell whether this system lets pools be seen from outside."""
    return os.path.exists("/proc/self/fd")


def look(pid: int | None = None) -> tuple[list[PoolSight], list[Unreadable]]:
    """Return every live pool of this user, or of one process of theirs; and what could not be read.

    Other users' processes are passed over; the one that was asked for by its pid is told of.
    """
    pools: dict[tuple[int, int], PoolSight] = {}
    unreadable: list[Unreadable] = []
    for one in _processes() if pid is None else [pid]:
        try:
            _look_at(one, pools, unreadable)
        except OSError as problem:  # it is another user's, or has just ended
            if one == pid:
                gone = isinstance(problem, (FileNotFoundError, ProcessLookupError))
                reason = "there is no such process" if gone else problem.strerror or str(problem)
                unreadable.append(Unreadable(one, "", reason))
    found = sorted(pools.values(), key=lambda sight: (sight.pid, sight.opened))
    return found, list(dict.fromkeys(unreadable))  # a mapped table has two descriptors


def _look_at(
    pid: int, pools: dict[tuple[int, int], PoolSight], unreadable: list[Unreadable]
) -> None:
    if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
        raise PermissionError("it belongs to another user")
    for fd, name in _tables(pid):
        try:
            key, sight = _see(pid, fd)
        except ValueError as problem:
            unreadable.append(Unreadable(pid, name, str(problem)))
        except FileNotFoundError:
            continue  # it was closed since
        else:
            if sight is not None:
                pools[key] = sight


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _tables(pid: int) -> list[tuple[int, str]]:
    """Return descriptor and pool's name of each table that a process has open."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # it has been closed
            link = os.readlink(f"/proc/{pid}/fd/{fd}")
            if link.startswith(_LINK):
                found.append((int(fd), link[len(_LINK) :].rpartition(" (deleted)")[0]))
    return found


def _see(pid: int, fd: int) -> tuple[tuple[int, int], PoolSight | None]:
    """Read one table, with a key that is the same for all its descriptors; None: not this user's.

    Raises:
        ValueError: it is no table that can be read; the text says why.
        OSError: it is not there any more, or may not be opened.
    """
    ours = _open(pid, fd)
    try:
        facts = os.fstat(ours)
        key = facts.st_dev, facts.st_ino
        if facts.st_size < t.ROW_BYTES:
            return key, None  # being made this moment
        with _words(ours, facts.st_size) as words:
            if words[t.H_MAGIC] == 0 or not _is_owner(pid, words):
                return key, None  # being made, or a copy that a forked child has
            _check(words)
            return key, _pool(pid, words)
    finally:
        os.close(ours)


def _open(pid: int, fd: int) -> int:
    """Open a table to read it. Since it was found, its number may have become another file's.

    Raises:
        FileNotFoundError: so it is, or nobody's. OSError: it may not be opened.
    """
    try:  # a pipe must not block us
        ours = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as problem:
        if problem.errno == errno.ENXIO:  # a socket
            raise FileNotFoundError("it was closed") from problem
        raise
    if not os.readlink(f"/proc/self/fd/{ours}").startswith(_LINK):
        os.close(ours)
        raise FileNotFoundError("it was closed")
    return ours


@contextlib.contextmanager
def _words(fd: int, size: int) -> Iterator[memoryview]:
    length = size // t.ROW_BYTES * t.ROW_BYTES
    with mmap.mmap(fd, length, access=mmap.ACCESS_READ) as mapped:
        with memoryview(mapped) as data, data.cast("q") as words:
            yield words


def _check(words: memoryview) -> None:
    if words[t.H_MAGIC] != t.MAGIC:
        raise ValueError("it is no table of minipool")
    if words[t.H_LAYOUT] != t.LAYOUT or words[t.H_ROW_WORDS] != t.ROW_WORDS:
        raise ValueError(
            f"its table has layout {words[t.H_LAYOUT]}, this minipool reads {t.LAYOUT}; use the "
            f"version that the pool was made with"
        )
    if not 0 <= words[t.H_ROWS] < len(words) // t.ROW_WORDS:
        raise ValueError("its table is damaged")


def _is_owner(pid: int, words: memoryview) -> bool:
    """Tell whether a process made the table; it knows itself by the pid of its own namespace."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("NSpid:"):
                return words[t.H_PID] == int(line.split()[-1])
    return bool(words[t.H_PID] == pid)


# -- a pool and its workers ----------------------------------------------------------------------


def _pool(pid: int, words: memoryview) -> PoolSight:
    at, head = time.monotonic(), words[: t.H_NAME].tolist()
    raw = words[t.H_NAME : t.ROW_WORDS].tobytes()[: max(0, head[t.H_NAME_BYTES])]
    rows = [_row(words, slot) for slot in range(head[t.H_ROWS])]
    here = _same_namespace(pid)
    workers = tuple(
        _worker(slot, row, at, pid, here)
        for slot, row in enumerate(rows)
        if row[t.STATE] != S.VACANT
    )
    waits, calls = _added(rows, t.WAIT_TIMES), _added(rows, t.CALL_TIMES)
    told_for = max(0.0, at - head[t.H_TOLD_NS] / 1e9) if head[t.H_TOLD_NS] else None
    return PoolSight(
        at=at,
        name=raw.decode(errors="replace"),
        pid=pid,
        opened=head[t.H_OPENED_NS] / 1e9,
        status=_status(pid, told_for, bool(head[t.H_CLOSING])),
        told_for=told_for,
        size=head[t.H_SIZE],
        waiting=head[t.H_WAITING],
        started=head[t.H_STARTED],
        lost=head[t.H_LOST],
        retired=head[t.H_RETIRED],
        start_failures=head[t.H_FAILED],
        leases=sum(row[t.LEASES] for row in rows),
        leased=sum(_leased(row, at) for row in rows),
        wait_times=waits,
        call_times=calls,
        workers=workers,
    )


def _status(pid: int, told_for: float | None, closing: bool) -> str:
    if _process(pid).state == "stopped":
        return "stopped"
    if told_for is not None and told_for > _SILENT:
        return "silent"
    return "closing" if closing else "open"


def _row(words: memoryview, slot: int) -> list[int]:
    """Copy the row of one worker; its own words are zeros until it is ready.

    1. The generation is read, and which one the worker's words are of. 2. The row is copied.
    3. Both are read again: they are written when a worker is replaced, the words of the dead one
    being wiped out first. If they are the same, nobody has come in between.
    """
    start = (slot + 1) * t.ROW_WORDS
    for _ in range(_TRIES):
        before = _whose(words, start)
        row: list[int] = words[start : start + t.ROW_WORDS].tolist()
        if _whose(words, start) == before:
            break
    if row[t.READY_GENERATION] != row[t.GENERATION] or _whose(words, start) != before:
        row[t.WORKER_WORDS] = [0] * len(row[t.WORKER_WORDS])
    return row


def _whose(words: memoryview, start: int) -> tuple[int, int, bool]:
    return (
        words[start + t.GENERATION],
        words[start + t.READY_GENERATION],
        words[start + t.STATE] == S.VACANT,
    )


def _worker(slot: int, row: list[int], at: float, owner: int, here: bool) -> WorkerSight:
    state = S(row[t.STATE]).name.lower()
    running = row[t.CALL_STARTED_NS] > row[t.BEAT_NS]
    since = row[t.LEASED_SINCE_NS] if state == "idle" else 0
    last = max(row[t.CALL_STARTED_NS], row[t.BEAT_NS])
    process = _worker_process(row[t.PID], owner) if here else None
    return WorkerSight(
        worker_id=slot,
        generation=row[t.GENERATION],
        pid=row[t.PID],
        state="leased" if since else state,
        process=None if process is None else process.state,
        calls=row[t.CALL_ID] - running,
        raised=row[t.FAILURES],
        in_call_for=_ago(at, row[t.CALL_STARTED_NS]) if running and state == "idle" else None,
        leased_for=_ago(at, since) if since else None,
        quiet_for=_ago(at, last) if last else None,
        cpu_seconds=process.cpu_seconds if process else row[t.CPU_NS] / 1e9,
        rss_bytes=process.rss_bytes if process else row[t.RSS_BYTES],
        leases=row[t.LEASES],
        leased=_leased(row, at),
        wait_times=row[t.WAIT_TIMES : t.WAIT_TIMES + t.BUCKETS],
        call_times=row[t.CALL_TIMES : t.CALL_TIMES + t.BUCKETS],
    )


def _ago(at: float, then_ns: int) -> float:
    return max(0.0, at - then_ns / 1e9)


def _leased(row: list[int], at: float) -> float:
    """Return how long all leases of a slot have lasted, the present one included."""
    since = row[t.LEASED_SINCE_NS]
    return row[t.LEASED_NS] / 1e9 + (_ago(at, since) if since else 0.0)


def _added(rows: list[list[int]], first: int) -> list[int]:
    columns = zip(*(row[first : first + t.BUCKETS] for row in rows))
    return [sum(column) for column in columns] or [0] * t.BUCKETS


# -- processes -----------------------------------------------------------------------------------

_STATES = {
    "R": "running", "S": "sleeping", "I": "sleeping", "D": "waiting",
    "T": "stopped", "t": "stopped", "Z": "zombie", "X": "gone",
}  # fmt: skip
_GONE = Process("gone", 0, 0.0, 0)


def _process(pid: int) -> Process:
    try:
        fields = procfs.stat(pid)
    except OSError:
        return _GONE
    ticks = int(fields[11]) + int(fields[12])
    return Process(
        state=_STATES.get(fields[0], "other"),
        parent=int(fields[1]),
        cpu_seconds=ticks / os.sysconf("SC_CLK_TCK"),
        rss_bytes=int(fields[21]) * os.sysconf("SC_PAGESIZE"),
    )


def _worker_process(pid: int, owner: int) -> Process:
    """Return what a worker's process does; a stranger's that got its pid later does not count.

    A worker is a child of the pool's process, or of its fork server, or an orphan.
    """
    process = _process(pid)
    family = (owner, 1)
    if process.parent in family or _process(process.parent).parent == owner:
        return process
    return _GONE


def _same_namespace(pid: int) -> bool:
    """Tell whether pids mean to that process what they mean here; in a container they do not."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    except OSError:
        return False
