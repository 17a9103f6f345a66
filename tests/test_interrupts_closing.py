"""A close that is struck, wherever that may be, ends the pool soon: it waits for no lease."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from minipool import LeaseRevoked, Pool, lifecycle
from minipool.engine import holdups, manager
from strikes import Strike, strike_everywhere, unstruck
from workers import getpid

SOON, GRACE = 15.0, 60.0  # seconds


class Forsaken:
    """Stands for `Manager.wait_done`: the first to wait is struck while it does, and then no more."""

    def __init__(self, wait: Any) -> None:
        self._wait, self._came = wait, False

    def __call__(self, timeout: float) -> Any:
        if not self._came:
            self._came = True
            sys.setprofile(None)
            raise Strike
        return self._wait(timeout)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a callback
def test_close_that_is_struck_anywhere_revokes_its_leases() -> None:
    left: list[Any] = []

    def look() -> None:
        """See the last pool ended, by the close that was struck; it was closed if that began."""
        while left:
            pool, lease = left.pop()
            if not pool.closed:
                del pool._desk.manager.wait_done
                pool.close(0.0)
            assert pool._desk.manager.wait_for(bool, SOON), f"it waits for the lease: {pool!r}"
            with pytest.raises(LeaseRevoked):
                lease.call(getpid)
            lease.release()
            pool.close()

    def close() -> None:
        with unstruck():
            look()
            pool = Pool(size=1, start_method="fork").open()
            left.append((pool, pool.checkout()))
            its_manager: Any = pool._desk.manager  # type: ignore[union-attr]
            its_manager.wait_done = Forsaken(its_manager.wait_done)
        pool.close(GRACE)

    assert strike_everywhere(close, lifecycle, manager, holdups) > 10
    look()
