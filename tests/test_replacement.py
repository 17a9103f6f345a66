"""What the replacement of one worker costs, however many there are."""

from __future__ import annotations

import collections
import os
import signal
from typing import Any

import pytest

from ears import handle_of, wait_until
from minipool import Pool, PoolConfig
from minipool.engine import manager as manager_module
from workers import identity


def test_replacement_of_a_worker_is_no_reason_to_look_at_the_others(
    start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the sweeps, which come by the clock: here, never."""
    monkeypatch.setattr(PoolConfig, "tick", 60.0)
    looked: collections.Counter[int] = collections.Counter()
    row = manager_module._row

    def look(handle: Any, *args: Any) -> Any:
        looked[handle.slot] += 1
        return row(handle, *args)

    with Pool(size=4, start_method=start_method) as pool:
        monkeypatch.setattr(manager_module, "_row", look)
        for lost in range(1, 6):
            for lease in [pool.checkout(timeout=20) for _ in range(4)]:
                assert lease.call(identity, 1) == 1  # its end is no failed start
                lease.release()
            looked.clear()
            os.kill(handle_of(pool, 2).pid, signal.SIGKILL)
            wait_until(pool, lambda: pool.stats().workers_lost == lost)  # noqa: B023
            wait_until(pool, lambda: pool.stats().idle == 4)
            assert set(looked) <= {2}
