"""What the pool counts stays exact when workers end in the middle of being counted."""

from __future__ import annotations

import gc
import os
import signal
import threading
from typing import Any

import pytest

from chatters import keys, take_unreadable
from ears import handle_of
from liars import never_have_it
from minipool import Lease, Pool, ProtocolError, RemoteError
from minipool.engine import table, wire
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


def test_call_that_is_sent_again_with_its_state_counts_once() -> None:
    """The worker has committed what could not be read here, so it lacks what is committed."""
    with Pool(size=1, max_calls=4) as pool:
        with pool.checkout(session="ada") as w:
            pid = w.pid
            for _ in range(2):
                with pytest.raises(RemoteError, match="cannot be unpickled here"):
                    w.call(take_unreadable)
            assert w.call(keys) == [], "nothing was committed"
            assert handle_of(pool).calls_sent == 3
            assert pool.workers()[0].calls == 3
        with pool.checkout() as w:
            assert w.pid == pid, "it may make one call more"
            assert w.call(os.getpid) == pid
        with pool.checkout(timeout=20) as w:
            assert w.pid != pid


def test_worker_that_never_has_the_state_is_asked_twice() -> None:
    with Pool(size=1) as pool, pool.checkout(session="ada") as w:
        w.call(keys)
        with pytest.raises(ProtocolError, match="lacks the state that came along"):
            w.options(timeout=20.0).call(never_have_it, handle_of(pool).calls_sent + 1)
        assert pool.stats().faults == 1


def test_call_whose_worker_dies_before_it_comes_again_had_not_begun() -> None:
    """It was at the worker once, without its state; it may be made elsewhere all the same."""
    with Pool(size=2) as pool:
        with pool.checkout(session="ada") as w:
            with pytest.raises(RemoteError):
                w.call(take_unreadable)
        with pool.checkout(session="ada") as w:
            handle, pid = handle_of(pool, w.worker_id), w.pid
            exchange = handle._exchange

            def exchange_and_die(*args: Any) -> Any:
                reply = exchange(*args)
                assert reply[0] == wire.NOT_HERE
                handle._exchange = exchange
                handle.kill()
                assert handle.process.exitcode(20) is not None
                return reply

            handle._exchange = exchange_and_die
            assert w.call(keys) == []
            assert (w.affinity, w.pid != pid) == ("lost", True)
