"""The status table: how it is made, what fits into it, and that no word is ever torn."""

from __future__ import annotations

import bisect
import errno
import gc
import mmap
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minipool.engine import table as t
from minipool.engine.table import Table, bucket, bucket_start_ns, quantile


def _no_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)


def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only everywhere")

    monkeypatch.setattr(t, "_unlinked_file", refuse)


@pytest.fixture(params=["memfd", "file", "private", "portable"])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A table made in each way, together with the way's name."""
    if request.param in ("file", "private"):
        _no_memfd(monkeypatch)
    if request.param == "private":
        _no_files(monkeypatch)
    if request.param == "memfd" and not hasattr(os, "memfd_create"):
        pytest.skip("this platform has no memfd")
    made = Table("a pool", portable=request.param == "portable")
    yield request.param, made
    if hasattr(made, "_map"):  # the test has not closed it
        made.close()


def test_each_making_is_what_it_claims(made: tuple[str, Table]) -> None:
    """A memfd with the pool's name, a file that has none any more, or memory without either."""
    way, table = made

    if way in ("private", "portable"):
        assert table.fd is None
        return
    assert table.fd is not None
    target = os.readlink(f"/proc/self/fd/{table.fd}")
    assert target.endswith(" (deleted)"), "nothing has a name that could be left behind"
    assert ("memfd:minipool:a pool" in target) == (way == "memfd")


def test_header_tells_an_onlooker_everything(made: tuple[str, Table]) -> None:
    """Magic, layout, sizes, process and the pool's name, for who finds the memory."""
    _, table = made
    table.row(2)
    words = table._words

    assert words[t.H_MAGIC].to_bytes(8, "big") == b"minipool"
    assert (words[t.H_LAYOUT], words[t.H_ROW_WORDS]) == (t.LAYOUT, t.ROW_WORDS)
    assert (words[t.H_ROWS], words[t.H_PID]) == (3, os.getpid())
    name = words.cast("B")[t.H_NAME * 8 :][: words[t.H_NAME_BYTES]]
    assert bytes(name) == b"a pool"


def test_row_is_seen_by_who_attaches(made: tuple[str, Table]) -> None:
    """What either side writes the other one reads, at once and in both directions."""
    _, table = made
    if table.fd is None:
        pytest.skip("this memory is not shared")
    row = table.row(5)
    other = t.row_of(t.attach(table.fd), 5)

    row[t.STATE] = 3
    other[t.CALL_ID] = 77

    assert (other[t.STATE], row[t.CALL_ID]) == (3, 77)
    assert table.used_rows()[5][t.CALL_ID] == 77
    other.release()


def test_rows_do_not_overlap(made: tuple[str, Table]) -> None:
    """Each word of each row, and of the header, is a word of its own."""
    _, table = made
    rows = [table.row(slot) for slot in range(3)]
    for slot, row in enumerate(rows):
        for word in range(t.ROW_WORDS):
            row[word] = slot * t.ROW_WORDS + word

    assert [row.tolist() for row in rows] == [
        list(range(slot * t.ROW_WORDS, (slot + 1) * t.ROW_WORDS)) for slot in range(3)
    ]
    assert table._words[t.H_MAGIC] == t.MAGIC


def test_words_stay_readable_after_close(made: tuple[str, Table]) -> None:
    """What was counted can be read when the shared memory and its descriptor are gone."""
    _, table = made
    row = table.row(1)
    row[t.LEASES] = 42
    fd = table.fd

    table.close()

    assert table.used_rows()[1][t.LEASES] == 42
    row[t.LEASES] = 43  # a straggler harms nobody
    assert table.used_rows()[1][t.LEASES] == 42
    assert table.fd is None
    if fd is not None:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_close_gives_back_memory_and_descriptor() -> None:
    """Nothing of a closed table is mapped or open; a held row keeps its memory, no descriptor."""
    table = Table("gone for good")
    table.row(0)

    table.close()

    assert "gone for good" not in Path("/proc/self/maps").read_text()


def test_rows_are_whole_pages_and_words_aligned() -> None:
    """A row is a page, so each of its words lies in one cache line, and the lines are whole."""
    assert t.ROW_BYTES % mmap.PAGESIZE == 0 or t.ROW_BYTES % 4096 == 0
    worker_line = [t.READY_GENERATION, t.PHASE, t.BEAT_NS, t.CALL_ID, t.CALL_STARTED_NS,
                   t.FAILURES, t.BUSY_NS, t.CPU_NS, t.RSS_BYTES]  # fmt: skip
    owner_line = [t.STATE, t.GENERATION, t.PID, t.LEASED_SINCE_NS, t.LEASED_NS, t.LEASES,
                  t.RAISED]  # fmt: skip
    assert len({*worker_line, *owner_line}) == 16
    assert not {word // 8 for word in worker_line} & {word // 8 for word in owner_line}
    assert list(range(32))[t.WORKER_WORDS] == sorted(worker_line)


def test_unused_rows_take_no_memory() -> None:
    """A table is made for thousands of workers and costs what its few rows need."""
    table = Table("small")
    try:
        for slot in range(4):
            table.row(slot)
        assert table.fd is not None
        assert os.fstat(table.fd).st_blocks * 512 <= 6 * t.ROW_BYTES
    finally:
        table.close()


# -- no room -------------------------------------------------------------------------------------


def test_full_mount_is_an_error_and_leaves_the_table_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ENOSPC comes from the reservation of a row, and not as a SIGBUS from writing to it."""
    table = Table("full")
    table.row(0)

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError) as caught:
            table.row(1)

        assert caught.value.errno == errno.ENOSPC
        assert len(table.used_rows()) == 1
        table.row(0)[t.LEASES] = 1  # the reserved row is usable as ever

    assert table.row(1)[t.LEASES] == 0
    table.close()


FILLS_A_MOUNT = """
import os
from minipool.engine import table as t

os.__dict__.pop("memfd_create", None)
table = t.Table("on a small mount")
assert os.environ["TMPDIR"] in os.readlink(f"/proc/self/fd/{table.fd}")
rows = []
try:
    while True:
        rows.append(table.row(len(rows)))
        rows[-1][t.ROW_WORDS - 1] = 7
except OSError as error:
    rows[-1][t.LEASES] = 7  # those that are there are usable as ever
    print("refused", error.errno, len(rows) == len(table.used_rows()))
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs a mount of its own")
def test_mount_that_really_is_full_is_an_error(tmp_path: Path) -> None:
    """On a file system of 64 KB the process gets ENOSPC, is alive, and has the rows before."""
    mounted = f"mount -t tmpfs -o size=64k none {tmp_path}"
    alone = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-r", "-m"]
    if subprocess.run([*alone, "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("this user may not mount anything")
    script = f'{mounted} && exec "$0" -c "$1"'
    done = subprocess.run(
        [*alone, "sh", "-c", script, sys.executable, FILLS_A_MOUNT],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=30,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip

    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.split() == ["refused", str(errno.ENOSPC), "True"]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_out_of_descriptors_is_said_and_not_worked_around(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next making would fail alike, and private memory would hide the true reason."""

    def refuse(*args: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(t, "_memfd", refuse)

    with pytest.raises(OSError) as caught:
        Table("p")

    assert caught.value.errno == code


def test_failed_making_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memfd that cannot be sized is closed, and the next making tried."""
    real, tried = os.ftruncate, []

    def refuse_first(fd: int, size: int) -> None:
        tried.append(fd)
        if len(tried) == 1:
            raise OSError(errno.EINVAL, "no")
        real(fd, size)

    monkeypatch.setattr(os, "ftruncate", refuse_first)
    table = Table("p")

    assert len(tried) == 2
    assert "memfd" not in os.readlink(f"/proc/self/fd/{table.fd}")
    table.close()


@pytest.mark.parametrize("name", ["p" * 300, "é" * 300, "\udc80", "a/b"])
def test_any_name_makes_a_table(name: str) -> None:
    """Long names, names beyond ASCII and half characters are cut or replaced, not refused."""
    table = Table(name)

    assert table._words[t.H_NAME_BYTES] > 0
    table.close()


# -- torn words ----------------------------------------------------------------------------------

WRITER = """
import sys
from minipool.engine import table as t

words = t.attach(int(sys.argv[1]))
row = t.row_of(words, 0)
patterns = [0, -1, 0x0123456789ABCDEF, -0x0123456789ABCDF0]
places = [t.STATE, t.CALL_ID, t.RSS_BYTES, t.ROW_WORDS - 1]
row[t.PHASE] = 1
while row[t.PHASE] == 1:
    for pattern in patterns:
        for place in places:
            row[place] = pattern
"""


def test_word_is_never_torn() -> None:
    """A reader in another process sees only whole values while the writer changes them."""
    table = Table("torn")
    row = table.row(0)
    assert table.fd is not None
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(table.fd)],
        cwd=Path(__file__).parent.parent, pass_fds=[table.fd],
    )  # fmt: skip
    try:
        while row[t.PHASE] != 1:
            assert writer.poll() is None
        whole = {0, -1, 0x0123456789ABCDEF, -0x0123456789ABCDF0}
        places = [t.STATE, t.CALL_ID, t.RSS_BYTES, t.ROW_WORDS - 1]
        seen = set()
        looks, until = 0, time.monotonic() + 20  # the writer may have to wait for its turn
        while looks < 200_000 or (seen != whole and time.monotonic() < until):
            looks += 1
            for place in places:
                seen.add(row[place])
    finally:
        row[t.PHASE] = 2
        assert writer.wait(20) == 0
        del row
        table.close()

    assert seen <= whole, f"torn: {seen - whole}"
    assert seen == whole, "the writer was at work all the time"


# -- histograms ----------------------------------------------------------------------------------


def test_buckets_are_contiguous_and_ordered() -> None:
    """Each duration is in the bucket whose bounds enclose it, from below 256 ns to minutes."""
    starts = [bucket_start_ns(index) for index in range(t.BUCKETS + 1)]

    assert starts == sorted(set(starts))
    for index in range(1, t.BUCKETS):
        assert bucket(starts[index]) == index
        assert bucket(starts[index] - 1) == index - 1


def test_bucket_takes_every_duration() -> None:
    """Nothing is too short or too long to be counted."""
    assert bucket(0) == bucket(-5) == bucket(255) == 0
    assert bucket(1 << 62) == t.BUCKETS - 1


def test_bucket_agrees_with_its_bounds_everywhere() -> None:
    """Random durations over the whole range fall where a search in the bounds puts them."""
    starts = [bucket_start_ns(index) for index in range(t.BUCKETS)]
    dice = random.Random(1)
    for _ in range(20_000):
        ns = int(2 ** dice.uniform(8, 37.9))
        assert bucket(ns) == bisect.bisect_right(starts, ns) - 1


def test_no_bucket_is_wider_than_an_eighth() -> None:
    """That is what bounds the error of a quantile."""
    for index in range(t.BUCKETS):
        start, end = bucket_start_ns(index), bucket_start_ns(index + 1)
        assert (end - start) / start <= 1 / 8 + 1e-9


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.9, 0.99, 0.999, 1.0])
def test_quantile_errs_by_less_than_six_percent(seed: int, fraction: float) -> None:
    """Against the exact nearest rank of latencies of several shapes."""
    dice = random.Random(seed)
    shapes = [
        lambda: dice.lognormvariate(11, 1.5), lambda: dice.expovariate(1e-6),
        lambda: dice.uniform(1e3, 1e9), lambda: dice.choice([12_000, 3e9]) * dice.uniform(1, 1.1),
    ]  # fmt: skip
    shape = shapes[seed % len(shapes)]
    sample = sorted(max(300, int(shape())) for _ in range(5_000))
    counts = [0] * t.BUCKETS
    for ns in sample:
        counts[bucket(ns)] += 1

    exact = sample[max(0, -(-int(fraction * 5_000 * 1000) // 1000) - 1)] / 1e9
    estimate = quantile(counts, fraction)

    assert estimate is not None
    assert abs(estimate - exact) / exact < 0.06


def test_quantile_of_nothing_is_none() -> None:
    assert quantile([0] * t.BUCKETS, 0.5) is None


def test_quantile_of_one_is_near_it() -> None:
    """A single duration is all quantiles."""
    counts = [0] * t.BUCKETS
    counts[bucket(1_000_000)] = 1

    for fraction in (0.0, 0.5, 1.0):
        assert quantile(counts, fraction) == pytest.approx(1e-3, rel=0.06)


def test_quantile_of_equal_durations_errs_by_less_than_six_percent() -> None:
    """Also at the edges of a bucket, where the middle is farthest."""
    for index in range(t.BUCKETS):
        counts = [0] * t.BUCKETS
        counts[index] = 9
        estimate = quantile(counts, 0.5)
        for edge in (bucket_start_ns(index), bucket_start_ns(index + 1) - 1):
            assert estimate == pytest.approx(edge / 1e9, rel=0.06)


# -- running -------------------------------------------------------------------------------------


def test_calls_are_done_when_their_end_was_noted() -> None:
    """A call runs from its start word to the beat after it, and is counted at its end."""
    row = memoryview(bytearray(t.ROW_BYTES)).cast("q")

    assert (t.running(row), t.calls_done(row)) == (False, 0)
    row[t.CALL_STARTED_NS], row[t.CALL_ID] = 100, 1
    assert (t.running(row), t.calls_done(row)) == (True, 0)
    row[t.BEAT_NS] = 150
    assert (t.running(row), t.calls_done(row)) == (False, 1)


def test_table_whose_making_was_interrupted_at_once_is_collected_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    made = Table.__new__(Table)
    del made
    gc.collect()
    assert heard == []
