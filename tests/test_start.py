"""The first steps: open, call, close, under each start method."""

from __future__ import annotations

from minipool import Pool

from workers import Counter


def test_worker_keeps_its_state_between_calls(start_method: str) -> None:
    with Pool(Counter, args=(10,), size=2, start_method=start_method) as pool:
        with pool.checkout() as w:
            assert w.call("add", 5) == 15
            assert w.add() == 16
            assert w.call(Counter.add, 4) == 20
        assert pool.stats().workers == 2
