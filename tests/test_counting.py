"""What the pool counts stays exact when workers end in the middle of being counted."""

from __future__ import annotations

import gc
import os
import signal
import threading
from typing import Any

import pytest

from minipool import Lease, Pool
from minipool.engine import table
from workers import Counter


def call_counted_late(pool: Pool[Counter], lease: Lease[Counter]) -> None:
    """Make a call whose reply comes, but is counted only when its worker is dead and buried."""
    buried = threading.Event()

    def hear(event: str, measurements: dict[str, Any], metadata: dict[str, Any]) -> None:
        buried.set()

    pool.hooks["worker.terminate"].append(hear)
    handle = lease._held[0]
    exchange, pid = handle._exchange, handle.pid
    assert pid is not None

    def exchange_and_kill(*args: Any) -> Any:
        reply = exchange(*args)
        os.kill(pid, signal.SIGKILL)
        assert buried.wait(20)
        return reply

    handle._exchange = exchange_and_kill
    try:
        assert lease.call("add", 1) == 1
    finally:
        pool.hooks["worker.terminate"].remove(hear)


def test_last_replies_of_workers_that_ended_are_counted() -> None:
    """Each is counted once: while its lease goes on, after that, and in the pool's last word."""
    with Pool(Counter, size=1) as pool:
        for done in range(1, 4):
            with pool.checkout(timeout=20) as w:
                call_counted_late(pool, w)
                assert (pool.stats().calls, pool.stats().leases) == (done, done)
            gc.collect()
            assert (pool.stats().calls, pool.stats().leases) == (done, done)
    assert (pool.stats().calls, pool.stats().workers_lost) == (3, 3)
    assert pool.stats().utilization <= 1.0


def test_row_of_a_worker_that_ended_is_counted_once_at_any_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also by a thread that looks while the row is being added to those of the past."""
    with Pool(Counter, size=1) as pool:
        seen: list[tuple[int, int]] = []
        assert pool._desk is not None
        fleet, add = pool._desk.manager.fleet, table.add_counts

        def look_and_add(total: memoryview, row: memoryview) -> None:
            rows = fleet.counted_rows()  # as whoever has begun to add them up
            before = calls(rows)
            add(total, row)
            seen.extend([(before, calls(rows)), (before, calls(fleet.counted_rows()))])

        monkeypatch.setattr(table, "add_counts", look_and_add)
        for _ in range(3):
            with pool.checkout(timeout=20) as w:
                call_counted_late(pool, w)  # in the row that is left of the worker
            gc.collect()
        assert seen, "no row was added"
        assert all(before == after for before, after in seen)


def calls(rows: list[memoryview]) -> int:
    return sum(table.histograms(rows)[1])
