"""What the kernel lets a worker have: memory, processor time, open files."""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

import pytest

from ears import Ear, handle_of
from minipool import Pool, PoolStartError, WorkerDied
from minipool.engine.table import CPU_NS
from troublemakers import Hoards, HoardsInInit, burn, open_many
from workers import Counter, memory_at_start

MB = 1_000_000


def _limits() -> dict[str, tuple[int, int]]:
    return {
        name: resource.getrlimit(getattr(resource, name))
        for name in ("RLIMIT_DATA", "RLIMIT_CPU", "RLIMIT_NOFILE")
    }


def test_memory_beyond_the_limit_is_a_memory_error_and_the_worker_is_replaced(
    start_method: str,
) -> None:
    limit = memory_at_start(start_method) + 200 * MB
    with Pool(Hoards, size=1, memory_limit=limit, start_method=start_method) as pool:
        ear, old = Ear(pool, "worker.terminate"), pool.call("pid")
        assert pool.call("hoard", 50 * MB) == 1
        with pytest.raises(MemoryError):
            pool.call("hoard", 400 * MB)
        gone = ear.wait("worker.terminate")
        assert (gone.metadata["pid"], gone.metadata["exitcode"]) == (old, 0)
        assert gone.metadata["reason"] == "the call ended in MemoryError"
        assert pool.options(timeout=20).call("hoard", MB) == 1


def test_limits_hold_before_user_code_runs() -> None:
    """A constructor that takes too much is a start that failed, with the reason."""
    with pytest.raises(PoolStartError) as caught:
        Pool(HoardsInInit, args=(2000 * MB,), size=1, memory_limit=200 * MB).open()
    assert isinstance(caught.value.__cause__, MemoryError)


def test_call_that_uses_up_the_processor_time_is_ended_by_its_signal(start_method: str) -> None:
    with Pool(size=1, cpu_limit=1, start_method=start_method) as pool:
        with pytest.raises(WorkerDied, match=r"SIGXCPU.*processor time") as caught:
            pool.call(burn)
        assert (caught.value.signal, caught.value.started) == ("SIGXCPU", True)
        assert pool.options(timeout=20).call(abs, -1) == 1


def test_worker_that_has_used_most_of_its_processor_time_is_recycled() -> None:
    """In good order, before an innocent call would be struck."""
    with Pool(size=1, cpu_limit=1000.0) as pool:
        ear, pid = Ear(pool, "worker.terminate"), pool.workers()[0].pid
        assert pool.call(abs, -1) == 1
        handle_of(pool).row[CPU_NS] = 901_000_000_000  # as if it had said so
        gone = ear.wait("worker.terminate")
        assert (gone.metadata["pid"], gone.metadata["exitcode"]) == (pid, 0)
        assert gone.metadata["reason"] == "its cpu_limit is nearly used up"


def test_open_files_are_limited(start_method: str) -> None:
    with Pool(Counter, size=1, open_files=64, start_method=start_method) as pool:
        with pytest.raises(OSError, match="Too many open files"):
            pool.call(open_many, 64)
        assert pool.call("add") == 1, "the worker is well"


def test_limits_cannot_be_raised_again_in_the_worker() -> None:
    with Pool(size=1, open_files=64, memory_limit=900 * MB, cpu_limit=50.5) as pool:
        limits = pool.call(_limits)
        assert limits["RLIMIT_NOFILE"] == (64, 64)
        assert limits["RLIMIT_DATA"] == (900 * MB, 900 * MB)
        assert limits["RLIMIT_CPU"] == (51, 56), "the second is for who ignores SIGXCPU"


def test_limits_are_those_of_this_process_unless_they_are_given() -> None:
    with Pool(size=1) as pool:
        assert pool.call(_limits) == _limits()


def test_limit_above_what_the_system_allows_is_what_it_allows(monkeypatch: Any) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with Pool(size=1, open_files=hard + 1) as pool:
        assert pool.call(_limits)["RLIMIT_NOFILE"] == (hard, hard)


def test_signal_of_a_spent_processor_limit_is_explained() -> None:
    from minipool.engine.process import describe_exit

    assert describe_exit(-signal.SIGXCPU) == "by SIGXCPU (its processor time was used up)"
    assert describe_exit(-signal.SIGTERM) == "by SIGTERM"
    assert os.strerror(24) == "Too many open files"
