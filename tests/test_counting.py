"""What the pool counts stays exact when workers end in the middle of being counted."""

from __future__ import annotations

import gc
import os
import signal
import threading
from typing import Any

from minipool import Lease, Pool
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
