"""Metrics: what two readings of a pool tell, and for how long it is remembered."""

from __future__ import annotations

from typing import Any, Iterator

import pytest

from minipool import Metrics, Pool
from rogues import Stateful

LAST = 20.0


@pytest.fixture
def pool() -> Iterator[Pool[Any]]:
    with Pool(Stateful, size=2, checkout_timeout=LAST) as made:
        yield made


def test_snapshot_tells_what_was_done(pool: Pool[Any]) -> None:
    """Rates and quantiles are of what happened since, gauges of now."""
    with Metrics(pool, interval=None) as metrics:
        metrics.sample()
        with pool.checkout() as w:
            for _ in range(50):
                w.call("add", 1)
            now = metrics.sample()

    assert (now.active, now.idle, now.starting, now.pool_size) == (1, 1, 0, 2)
    assert (now.calls, now.call_count, now.wait_count, now.queue_depth) == (50, 50, 1, 0)
    assert 0 < (now.call_p50 or 0) <= (now.call_p95 or 0) <= (now.call_p99 or 0) < LAST
    assert now.throughput > 0 and 0 < now.utilization <= 0.5
    assert (now.health, now.health_score) == ("green", 100.0)
    assert sorted(worker.calls for worker in now.workers) == [0, 50]
