"""A forked child of the program: it cannot use the pool, and does it no harm."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import pickle
import select
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import scripts
from ears import Ear, handle_of
from gates import Gate, pass_gate
from minipool import Pool, PoolForked, lifecycle
from minipool._sync import Guard
from scripts import wait_gone
from troublemakers import fork_and_wait, nested_sum
from workers import Counter, getpid


def in_fork(function: Callable[[], Any], timeout: float = 20.0) -> Any:
    """Run `function` in a forked child and return its result; fail if it raises or hangs."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer: Any = True, function()
        except BaseException:
            answer = False, traceback.format_exc()
        os.write(write, pickle.dumps(answer))
        os._exit(0)
    os.close(write)
    try:
        came = select.select([read], [], [], timeout)[0]
        if not came:
            os.kill(pid, signal.SIGKILL)
        with open(read, "rb") as pipe:
            data = pipe.read()
    finally:
        os.waitpid(pid, 0)
    assert came, "the forked child hangs"
    well, result = pickle.loads(data)
    assert well, result
    return result


def _refused(use: Callable[..., Any], *args: Any) -> str:
    """Return the message with which a use is refused; anything else is raised."""
    try:
        use(*args)
    except PoolForked as error:
        assert error.owner_pid == os.getppid()
        return str(error)
    raise AssertionError("it was not refused")


USES: dict[str, Callable[[Pool[Any]], Any]] = {
    "open": lambda pool: pool.open(),
    "open(wait=False)": lambda pool: pool.open(wait=False),
    "with": lambda pool: pool.__enter__(),
    "wait_ready": lambda pool: pool.wait_ready(),
    "checkout": lambda pool: pool.checkout(),
    "checkout(timeout=0)": lambda pool: pool.checkout(timeout=0),
    "call": lambda pool: pool.call("add"),
    "options.call": lambda pool: pool.options(timeout=5, idempotent=True).call("add"),
    "stats": lambda pool: pool.stats(),
    "workers": lambda pool: pool.workers(),
    "deaths": lambda pool: pool.deaths(),
    "dump": lambda pool: pool.dump(),
    "worker": lambda pool: pool.worker(0),
    "health_check": lambda pool: pool.health_check(),
    "health_check(probe)": lambda pool: pool.health_check(probe=True),
    "checkout(session)": lambda pool: pool.checkout(session="ada"),
    "checkout(hint)": lambda pool: pool.checkout(hint="ada"),
    "session": lambda pool: pool.session("ada").__enter__(),
    "create_session": lambda pool: pool.create_session("ada"),
    "end_session": lambda pool: pool.end_session("ada"),
    "session_state": lambda pool: pool.session_state("ada"),
    "sessions": lambda pool: pool.sessions(),
    "breaker": lambda pool: pool.breaker,
    "dashboard": lambda pool: pool.dashboard(),
    "warm_up": lambda pool: pool.warm_up(["add"]),
    "resize": lambda pool: pool.resize(2),
    "drain": lambda pool: pool.drain(),
    "install_signal_handlers": lambda pool: pool.install_signal_handlers(),
    "close": lambda pool: pool.close(),
    "terminate": lambda pool: pool.terminate(),
}  # fmt: skip


def test_every_use_of_a_pool_in_a_fork_is_refused(start_method: str) -> None:
    """Each method raises PoolForked at once, whether a worker is idle, leased or busy."""
    with Pool(Counter, size=2, start_method=start_method) as pool:
        before = pool.stats()
        messages = in_fork(lambda: {name: _refused(use, pool) for name, use in USES.items()})
        assert set(messages) == set(USES)
        assert all("open a pool of your own" in message for message in messages.values())
        after = pool.stats()
        assert (after.leases, after.calls, after.idle) == (before.leases, before.calls, 2)
        assert pool.call("add", 2) == 2


def test_every_public_method_is_in_that_list() -> None:
    names = {name for name in dir(Pool) if not name.startswith("_")}
    assert names - {"options", "closed"} == {name.split("(")[0] for name in USES} - {
        "with", "options.call",
    }  # fmt: skip


def test_repr_in_a_fork_tells_whose_the_pool_is() -> None:
    with Pool(Counter, size=1) as pool:
        assert f"belongs to process {os.getpid()}" in in_fork(lambda: repr(pool))


@pytest.mark.parametrize("size", [1, 100_000], ids=["short", "long"])
def test_lease_from_before_the_fork_is_refused_in_the_child(size: int) -> None:
    """Also when its arguments are too long for one write; the parent's lease goes on."""
    with Pool(Counter, size=1) as pool, pool.checkout() as lease:
        assert lease.add(3) == 3
        message = in_fork(lambda: _refused(lambda: lease.call(len, b"x" * size)))
        assert "open a pool of your own" in message
        assert in_fork(lambda: _refused(lambda: lease.options(timeout=1).call("add")))
        assert lease.add(4) == 7


def test_lease_of_another_thread_in_mid_call_is_refused_in_the_child(gate: Gate) -> None:
    with Pool(Counter, size=1) as pool, ThreadPoolExecutor(1) as threads:
        lease = pool.checkout()
        call = threads.submit(lease.call, pass_gate, gate.path)
        gate.wait_arrived()
        assert in_fork(lambda: _refused(lambda: lease.call("add")))
        gate.open()
        assert call.result(20) == lease.pid
        lease.release()
        assert pool.call("add", 5) == 5, "the same worker, with its state"


def test_leaving_blocks_and_dropping_leases_in_the_child_is_silent() -> None:
    """The child may unwind what it was forked in the middle of; nothing is said or sent."""
    pool = Pool(Counter, size=3)
    with pool:
        pids = {info.pid for info in pool.workers()}
        held = [pool.checkout(), pool.checkout()]

        def unwind() -> list[str]:
            heard = Ear(pool)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with held[0]:
                    pass
                held[1].release()
                held[1].discard("of no use")
                held.clear()
                pool.__exit__(None, None, None)
                gc.collect()
            return [str(one.message) for one in caught] + [one.name for one in heard.heard]

        assert in_fork(unwind) == []

        def drop() -> list[str]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                held.clear()
                gc.collect()
            return [str(one.message) for one in caught]

        assert in_fork(drop) == []
        assert [lease.add(1) for lease in held] == [1, 1]
        for lease in held:
            lease.release()
        assert {info.pid for info in pool.workers()} == pids
        stats = pool.stats()
        assert (stats.idle, stats.discarded, stats.workers_lost) == (3, 0, 0)


def test_fork_while_other_threads_hold_leases_and_call() -> None:
    """No lock, slot or reply is lost on either side."""
    with Pool(Counter, size=2) as pool:
        stop = threading.Event()

        def call_on() -> int:
            calls = 0
            while not stop.is_set():
                with pool.checkout(timeout=20) as w:
                    w.add()
                calls += 1
            return calls

        with ThreadPoolExecutor(4) as threads:
            callers = [threads.submit(call_on) for _ in range(4)]
            try:
                for _ in range(10):
                    assert in_fork(lambda: _refused(lambda: pool.call("add")))
            finally:
                stop.set()
            calls = sum(caller.result(20) for caller in callers)
        stats = pool.stats()
        assert (stats.calls, stats.leases, stats.idle) == (calls, calls, 2)
        assert (stats.faults, stats.workers_started) == (0, 2)


EXITS = """
    import contextlib, os, sys
    from minipool import Pool
    from workers import Counter

    def main(method, how):
        stack = contextlib.ExitStack()
        pool = stack.enter_context(Pool(Counter, args=(5,), size=2, start_method=method))
        lease = stack.enter_context(pool.checkout())
        lease.add(1)
        before = pool.stats()
        pids = [info.pid for info in pool.workers()]
        child = os.fork()
        if child == 0:
            if how == "os._exit":
                os._exit(3)
            if how == "sys.exit":
                sys.exit(3)
            if how == "raise":
                with stack:  # leaves the blocks of lease and pool
                    sys.exit(3)
            return 0
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (0 if how == "return" else 3), code
        assert lease.add(1) == 7
        lease.release()
        after = pool.stats()
        assert [info.pid for info in pool.workers()] == pids
        assert (after.workers_lost, after.workers_retired, after.idle) == (0, 0, 2), after
        assert after.calls == before.calls + 1 == 2, after
        assert pool.health_check(probe=True).status == "healthy"
        pool.close()
        print("well")
        return 0

    if __name__ == "__main__":
        sys.exit(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("how", ["return", "os._exit", "sys.exit", "raise"])
def test_end_of_the_child_does_not_hurt_the_parents_workers(
    start_method: str, how: str, tmp_path: Path
) -> None:
    """However it ends, with exit handlers or without: same workers, same counters, no noise."""
    assert scripts.run(tmp_path, EXITS, start_method, how) == (0, "well\n", "")


def test_fork_in_worker_code_is_allowed(start_method: str) -> None:
    with Pool(size=1, start_method=start_method) as pool:
        (before,) = pool.workers()
        assert pool.call(fork_and_wait) == 7
        assert pool.call(fork_and_wait) == 7
        assert pool.call(getpid) == before.pid


def test_pool_made_before_the_fork_and_not_open_belongs_to_who_opens_it() -> None:
    pool = Pool(Counter, args=(1,), size=1, start_method="spawn")

    def use() -> int:
        with pool:
            result: int = pool.call("add", 1)
            return result

    assert in_fork(use) == 2
    assert pool.workers() == [] and "not open yet" in repr(pool)


def test_child_may_have_a_pool_of_its_own(start_method: str) -> None:
    """It works beside the inherited one, which stays refused, and ends without it."""
    with Pool(Counter, size=1, start_method=start_method) as pool:
        assert pool.call("add", 1) == 1

        def own() -> tuple[int, int]:
            with Pool(Counter, args=(10,), size=1, start_method=start_method) as mine:
                _refused(lambda: pool.call("add"))
                (info,) = mine.workers()
                return mine.call("add", 1), info.pid or 0

        result, pid = in_fork(own)
        assert result == 11
        wait_gone(pid)
        assert pool.call("add", 1) == 2


@pytest.mark.parametrize("close", [True, False], ids=["closed", "left-open"])
def test_pool_inside_a_worker_works(start_method: str, close: bool) -> None:
    """Also one that user code never closes: it ends with its worker, and holds nothing up."""
    with Pool(size=1, start_method=start_method) as pool:
        ear = Ear(pool, "worker.terminate")
        assert pool.options(timeout=30).call(nested_sum, start_method, close) == 42
    assert ear.wait("worker.terminate").metadata["exitcode"] == 0, "it was not killed"


def test_killed_worker_takes_its_own_pool_along(start_method: str) -> None:
    with Pool(size=1, start_method=start_method) as pool:
        assert pool.options(timeout=30).call(nested_sum, start_method, False) == 42
        pids = pool.call(nested_pids)
        ear = Ear(pool, "worker.terminate")
        handle_of(pool).kill()
        ear.wait("worker.terminate")
        assert pids
        wait_gone(*pids)


def nested_pids() -> list[int]:
    from troublemakers import _kept

    return [info.pid for pool in _kept for info in pool.workers()]


# -- what a fork copies as held ------------------------------------------------------------------


@contextlib.contextmanager
def held_elsewhere(hold: Callable[[Callable[[], object]], object]) -> Iterator[None]:
    """Have another thread hold something: it waits in what it gives to `hold`, meanwhile."""
    holds, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        holds.set()
        go_on.wait(20)

    thread = threading.Thread(target=hold, args=(wait,))
    thread.start()
    try:
        assert holds.wait(20)
        yield
    finally:
        go_on.set()
        thread.join(20)


def _in_lock(lock: Any) -> Callable[[Callable[[], object]], object]:
    def hold(wait: Callable[[], object]) -> None:
        with lock:
            wait()

    return hold


@pytest.mark.parametrize("module", ["resource_tracker", "forkserver", "tempfile"])
def test_own_pool_of_the_child_waits_for_no_lock_that_was_held_at_the_fork(module: str) -> None:
    """As when the parent's pool starts a worker in that moment."""
    with Pool(Counter, size=1, start_method="forkserver") as pool:
        assert pool.call("add", 1) == 1
    lock = {
        "resource_tracker": resource_tracker._resource_tracker._lock,  # type: ignore[attr-defined]
        "forkserver": forkserver._forkserver._lock,  # type: ignore[attr-defined]
        "tempfile": tempfile._once_lock,  # type: ignore[attr-defined]
    }[module]

    def own() -> int:
        tempfile.tempdir = None  # asked for anew
        tempfile.gettempdir()
        with Pool(Counter, size=1, start_method="forkserver", init_timeout=10) as mine:
            return int(mine.call("add", 7))

    with held_elsewhere(_in_lock(lock)):
        assert in_fork(own) == 7


def _import_half(name: str, wait: Callable[[], object]) -> None:
    """Begin to import a module, and wait in the midst of that."""
    with importlib._bootstrap._ModuleLockManager(name):  # type: ignore[attr-defined]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        spec._initializing = True  # type: ignore[attr-defined]
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            wait()
        finally:
            del sys.modules[name]


def test_module_that_another_thread_is_importing_is_imported_in_the_child() -> None:
    """As ours and the standard library's are, when the parent opens its first pool."""
    assert "colorsys" not in sys.modules
    with held_elsewhere(lambda wait: _import_half("colorsys", wait)):
        assert in_fork(lambda: importlib.import_module("colorsys").rgb_to_hsv(0, 0, 0)) == (0, 0, 0)


def test_guard_that_another_thread_holds_is_free_in_the_child() -> None:
    """And one that the forking thread holds stays its own."""
    theirs, ours = Guard(), Guard()
    with held_elsewhere(lambda wait: theirs.run(wait)):

        def outcome() -> tuple[object, bool, object]:
            held = ours._lock._is_owned()
            return theirs.run_within(0.0, int), held, ours.run_within(0.0, int)

        assert ours.run(in_fork, outcome) == (0, True, 0)
        assert theirs.run_within(0.0, int) is None


def test_pool_that_is_being_opened_at_the_fork_is_refused_in_the_child(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits for nobody, and takes over nothing that is half made."""
    real, waits = lifecycle.open_desk, []

    def open_desk(*args: Any) -> Any:
        made = real(*args)
        waits.pop()()  # before the pool knows what was made
        return made

    monkeypatch.setattr(lifecycle, "open_desk", open_desk)
    pool = Pool(Counter, size=1)

    def open_it(wait: Callable[[], object]) -> None:
        waits.append(wait)
        pool.open()

    with held_elsewhere(open_it):
        for use in (pool.open, pool.__enter__, pool.close, pool.terminate):
            assert "open a pool of your own" in in_fork(lambda use=use: _refused(use))
        assert in_fork(lambda: pool.__exit__(None, None, None)) is None
    assert pool.call("add", 2) == 2
    pool.close()
