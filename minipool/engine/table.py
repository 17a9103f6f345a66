"""The status table: one page of words for each slot, seen by parent, workers and onlookers.

Words are native, 8-byte aligned int64 behind `memoryview.cast("q")`: a reader gets the old value
or the new one, never half of each (`struct` with a byte order, or a word across a cache line,
does tear). Each word has one writer, so `words[i] += 1` is exact without a lock:

* the *owner line* is written in the parent, by whoever owns the slot at the moment;
* the *worker line* is written by the worker process alone;
* the histograms are written by the lease holder, into the row of its worker.

The memory is anonymous and made here: a memfd, else an unlinked temporary file, else, where
nothing can be shared, private memory of the parent (then the worker's words come with its
replies). Nothing has a name that could leak, and nothing needs /dev/shm or `sem_open`.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import time
from functools import partial  # see `descriptors`
from itertools import repeat
from typing import Callable, Iterable, Sequence

from .descriptors import close_all, mapped, open_into

MAGIC = 0x6D696E69706F6F6C  # "minipool"
LAYOUT = 2  # raise it whenever a word moves

# Header words, written when the table is made; the pool's name follows as bytes.
H_MAGIC, H_LAYOUT, H_ROW_WORDS, H_ROWS, H_PID, H_OPENED_NS, H_NAME_BYTES = range(7)
# What only the parent knows, for onlookers: the manager writes it once a tick. TOLD_NS is when.
H_TOLD_NS, H_SIZE, H_WAITING, H_CLOSING, H_STARTED, H_LOST, H_RETIRED, H_FAILED = range(8, 16)
H_NAME = 32

# Owner line: who holds the slot, and what the pool counts about it. An IDLE worker is leased while
# LEASED_SINCE_NS is not 0. LEASES numbers the leases as well; how many replies came, and how many
# leases did not have to wait, is in the histograms: a lease without a wait is in none.
STATE, GENERATION, PID, LEASED_SINCE_NS, LEASED_NS, LEASES, RAISED, SESSION_HITS = range(8)

# Worker line: what the worker says of itself.
# CALL_ID counts the calls that have begun, from 1; the last of them is running while
# CALL_STARTED_NS is later than BEAT_NS. READY_GENERATION is negative while its object is made.
READY_GENERATION, PHASE, BEAT_NS, CALL_ID, CALL_STARTED_NS = range(16, 21)
FAILURES, BUSY_NS, CPU_NS, RSS_BYTES = range(21, 25)
WORKER_WORDS = slice(16, 25)

PHASE_BOOTING, PHASE_SERVING, PHASE_STOPPING, PHASE_LEAVING = range(4)

OCTAVES, STEPS = 30, 8  # a bucket is at most 1/8 wide: quantiles err by less than 6 %
BUCKETS = OCTAVES * STEPS
WAIT_TIMES, CALL_TIMES = 32, 32 + BUCKETS
ROW_WORDS = 32 + 2 * BUCKETS  # 512 words: one page
ROW_BYTES = ROW_WORDS * 8
MAX_ROWS = 4096
_COUNTED = (
    *range(LEASED_NS, SESSION_HITS + 1),
    *range(WAIT_TIMES, ROW_WORDS),
)  # in the parent


def bucket(ns: int) -> int:
    """Return a duration's histogram bucket; below 256 ns is the first, over 4 min the last."""
    if ns < 256:
        return 0
    octave = ns.bit_length()
    if octave > 8 + OCTAVES:
        return BUCKETS - 1
    return ((octave - 9) << 3) + ((ns >> (octave - 4)) & 7)


def bucket_start_ns(index: int) -> int:
    """Return the shortest duration that falls into a bucket."""
    octave, step = divmod(index, STEPS)
    return (STEPS + step) << (octave + 5)


def quantile(counts: Sequence[int], fraction: float) -> float | None:
    """Return the duration in seconds below which `fraction` of the counted ones lie, or None.

    Nearest rank, then that place in its bucket which is never more than 6 % from the true one.
    """
    total = sum(counts)
    if not total:
        return None
    rank = max(1.0, fraction * total)
    seen = 0
    for index, count in enumerate(counts):
        if count and seen + count >= rank:
            low, high = bucket_start_ns(index), bucket_start_ns(index + 1)
            return 2 * low * high / (low + high) / 1e9
        seen += count
    raise AssertionError("the ranks add up")


def mean(counts: Sequence[int]) -> float | None:
    """Return the mean duration in seconds, as near as the buckets tell, or None."""
    total = sum(counts)
    if not total:
        return None
    middles = (bucket_start_ns(i) + bucket_start_ns(i + 1) for i in range(len(counts)))
    return sum(count * middle for count, middle in zip(counts, middles)) / total / 2e9


def histograms(rows: Iterable[memoryview]) -> tuple[list[int], list[int]]:
    """Return how many waits and how many calls fell into each bucket, over all rows.

    The counts of a row are added as one big number: no count is so large that it would carry.
    """
    total = sum(int.from_bytes(row[WAIT_TIMES:ROW_WORDS], sys.byteorder) for row in rows)
    words = memoryview(total.to_bytes(2 * BUCKETS * 8, sys.byteorder)).cast("q").tolist()
    return words[:BUCKETS], words[BUCKETS:]


class Table:
    """The parent's table: a header and `MAX_ROWS` rows, of which only the used take memory."""

    _fd: int | None = None
    _close_fd: Callable[[], object] = bool  # nothing to close
    _pid = 0

    def __init__(self, pool_name: str, portable: bool = False) -> None:
        self._reserved, self._pid = 0, os.getpid()
        fds: list[int] = []
        self._close_fd = partial(any, map(os.close, iter(fds)))
        self._map = _make(fds, pool_name, portable)
        self._fd = fds[0] if fds else None
        self._words = memoryview(self._map).cast("q")
        self._write_header(pool_name)

    def _write_header(self, pool_name: str) -> None:
        name = pool_name.encode(errors="replace")[: ROW_BYTES - H_NAME * 8]
        words = self._words
        words[H_LAYOUT], words[H_ROW_WORDS], words[H_ROWS] = LAYOUT, ROW_WORDS, 0
        words[H_PID], words[H_NAME_BYTES] = os.getpid(), len(name)
        words[H_OPENED_NS] = time.monotonic_ns()
        self._map[H_NAME * 8 : H_NAME * 8 + len(name)] = name
        words[H_MAGIC] = MAGIC  # last: an onlooker who sees it sees the rest

    @property
    def fd(self) -> int | None:
        """The descriptor a worker can attach to, or None where memory cannot be shared."""
        return self._fd

    def tell(self, *facts: int) -> None:
        """Write the words from H_SIZE on, for onlookers, and that they are of this moment."""
        for word, fact in enumerate(facts, H_SIZE):
            self._words[word] = fact
        self._words[H_TOLD_NS] = time.monotonic_ns()

    def row(self, slot: int) -> memoryview:
        """Return the words of one slot, reserving memory for it first.

        Raises:
            OSError: there is no room for one more row (ENOSPC); the table is as before.
        """
        if slot >= self._reserved:
            if self._fd is not None:  # a mapped write on a full mount would be a SIGBUS
                _reserve(self._fd, slot + 1)
            self._reserved = slot + 1
            self._words[H_ROWS] = slot + 1
        return row_of(self._words, slot)

    def used_rows(self) -> list[memoryview]:
        """Return the words of every slot that was ever filled."""
        return [row_of(self._words, slot) for slot in range(self._reserved)]

    def close(self) -> None:
        """Give back the shared memory; the words as they are now stay readable.

        A thread that still holds a row keeps the old memory alive, and harms nothing with it.
        """
        size = (self._reserved + 1) * ROW_BYTES
        self._words = memoryview(bytearray(self._words.cast("B")[:size])).cast("q")
        del self._map
        self.__del__()

    def __del__(self) -> None:  # for an opening that was interrupted
        if self._pid == os.getpid():
            self._close_fd()
            self._fd = None


def running(row: memoryview) -> bool:
    """Tell whether a call is running in the worker of a row."""
    return row[CALL_STARTED_NS] > row[BEAT_NS]


def calls_done(row: memoryview) -> int:
    """Return how many calls the present worker of a row has ended."""
    return row[CALL_ID] - running(row)


def parting_copy(row: memoryview) -> memoryview:
    """Return a private copy of a row, for who holds its worker still; it counts from 0 again."""
    copy = memoryview(bytearray(row)).cast("q")
    for word in _COUNTED:
        copy[word] = 0
    return copy


def add_counts(total: memoryview, row: memoryview) -> None:
    """Add what was counted in one row to another."""
    for word in _COUNTED:
        total[word] += row[word]


def row_of(words: memoryview, slot: int) -> memoryview:
    """Return the words of one slot out of those of a whole table."""
    start = (slot + 1) * ROW_WORDS  # the first page is the header
    return words[start : start + ROW_WORDS]


def attach(fd: int) -> memoryview:
    """Map the table behind a descriptor, in a worker; return its words."""
    return memoryview(mmap.mmap(fd, _size())).cast("q")


def _size() -> int:
    return (MAX_ROWS + 1) * ROW_BYTES


def _reserve(fd: int, rows: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, (rows + 1) * ROW_BYTES)


def _make(fds: list[int], pool_name: str, portable: bool) -> mmap.mmap:
    """Make the memory; the descriptor of what can be shared is the only one in `fds`, then."""
    makings: Iterable[Callable[[list[int], str], None]] = (_memfd, _unlinked_file)
    if portable or sys.platform == "win32":
        makings = ()
    for making in makings:
        try:
            making(fds, pool_name)
            os.ftruncate(fds[0], _size())
            _reserve(fds[0], 0)
            return mapped(fds, _size())
        except OSError as error:
            close_all(map(fds.pop, repeat(0, len(fds))))  # taken out and closed, in a step
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # the next making would fail alike, and portable memory is no remedy
    return mmap.mmap(-1, _size())


def _memfd(fds: list[int], pool_name: str) -> None:
    if not hasattr(os, "memfd_create"):
        raise OSError(errno.ENOSYS, "this platform has no memfd_create")
    open_into(fds, os.memfd_create, f"minipool:{pool_name}"[:200])


def _unlinked_file(fds: list[int], pool_name: str) -> None:
    import tempfile  # which imports much; no worker needs it, nor a parent with a memfd

    with tempfile.TemporaryFile(prefix="minipool-") as file:
        open_into(fds, os.dup, file.fileno())
