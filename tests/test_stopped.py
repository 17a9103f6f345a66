"""A worker that a signal or a debugger has stopped: whatever ends it says that it was stopped."""

from __future__ import annotations

import os
import signal

import pytest

from ears import handle_of, wait_until
from minipool import CallTimeout, LeaseRevoked, Pool, PoolStartError

STOPPED = "a signal such as SIGSTOP had stopped it"


def _nothing() -> None:
    pass


def _stop_myself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.impatient
@pytest.mark.parametrize("path", ["", "1"], ids=["fast", "portable"])
def test_timeout_says_so_and_where_the_worker_was(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is let go on to say that, but runs nothing of its own any more."""
    monkeypatch.setenv("MINIPOOL_PORTABLE", path)
    with Pool(size=1) as pool:
        with pool.checkout() as w, pytest.raises(CallTimeout, match=STOPPED) as caught:
            w.call(_nothing)  # from now on this module is imported there
            w.options(timeout=0.5).call(_stop_myself)
        assert "SIGCONT" in str(caught.value)
        assert "_stop_myself" in caught.value.stack
        assert [death.reason.endswith(f"({STOPPED})") for death in pool.deaths()] == [True]


def test_timeout_of_one_that_ran_says_nothing_of_the_kind() -> None:
    with Pool(size=1) as pool:
        with pool.checkout() as w, pytest.raises(CallTimeout) as caught:
            w.options(timeout=0.1).call(signal.pause)
        assert "stopped" not in str(caught.value)
        assert "stopped" not in pool.deaths()[0].reason


def test_revocation_says_so() -> None:
    with Pool(size=1, lease_timeout=0.3, call_timeout=None) as pool:
        with pytest.raises(LeaseRevoked, match=STOPPED):
            pool.call(signal.raise_signal, signal.SIGSTOP)


def test_one_that_is_killed_for_no_reason_given_is_buried_all_the_same() -> None:
    with Pool(size=1, start_method="fork") as pool:  # a child of this process: it can be waited for
        handle = handle_of(pool, 0)
        assert pool.call(abs, -1) == 1  # its end is no failed start
        pid = handle.pid or 0
        os.kill(pid, signal.SIGSTOP)
        assert os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        handle.kill()
        wait_until(pool, lambda: pool.stats().workers_lost == 1)
        assert pool.call(abs, -1) == 1


def test_failed_start_says_so() -> None:
    with pytest.raises(PoolStartError, match=STOPPED):
        Pool(signal.raise_signal, args=(signal.SIGSTOP,), size=1, init_timeout=0.5).open()
