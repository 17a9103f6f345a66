"""From the constructor to the last process: open, close, terminate, forget, exit."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

import scripts
from ears import Ear, wait_until
from gates import Gate, pass_gate
from minipool import (
    CheckoutTimeout,
    ConfigError,
    LeaseRevoked,
    Pool,
    PoolClosed,
    PoolConfig,
)
from scripts import wait_gone
from troublemakers import (
    HangsInClose,
    IgnoresSigterm,
    NotesItsEnd,
    RaisesInClose,
    StopsAtGateInInit,
    busy_in_c,
    busy_in_python,
)
from workers import Counter, getpid

PORTABLE = os.environ.get("MINIPOOL_PORTABLE") == "1"


def _open_descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that lists them
            continue
    return found


def _pids(pool: Pool[Any]) -> list[int]:
    return [info.pid or 0 for info in pool.workers()]


def _closing(pool: Pool[Any]) -> None:
    """Wait until a close that another thread makes has begun."""
    desk = pool._desk
    assert desk is not None
    wait_until(pool, lambda: desk.manager.closing)


# -- before it is open -------------------------------------------------------------------------


def test_constructor_starts_nothing() -> None:
    """A new pool has no process, thread, descriptor or shared memory."""
    threads, descriptors = threading.enumerate(), _open_descriptors()
    pool = Pool(Counter, size=3)
    assert threading.enumerate() == threads
    assert _open_descriptors() == descriptors  # a memfd and a process's sentinel would be in it
    assert pool.workers() == []
    assert pool.stats().workers_started == 0


def test_defaults_are_as_documented() -> None:
    config = PoolConfig()
    assert config.size == config.min_size == config.max_size
    assert (config.init_timeout, config.checkout_timeout, config.call_timeout) == (30.0, 5.0, 60.0)
    assert (config.max_overflow, config.overflow_idle, config.max_idle) == (0, 30.0, None)
    assert (config.lazy, config.strategy, config.startup_batch) == (False, "lifo", 8)
    assert (config.health_check_interval, config.health_check_timeout) == (30.0, 5.0)
    assert (config.max_health_failures, config.max_waiting) == (3, None)
    assert (config.kill_group, config.max_message) == (True, 4 << 30)
    assert (config.close_timeout, config.lease_timeout, config.leak_warn_after) == (
        30.0,
        None,
        None,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0}, {"size": -1}, {"size": 2.0}, {"size": True}, {"min_size": 3, "max_size": 2},
        {"size": 1, "min_size": 2}, {"call_timeout": -1}, {"close_timeout": float("nan")},
        {"init_timeout": "soon"}, {"close_timeout": None}, {"sise": 2}, {"max_message": 65535},
        {"kill_group": None},
    ],
)  # fmt: skip
def test_wrong_sizes_and_durations_are_refused_by_the_constructor(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        Pool(Counter, **options)
    assert isinstance(caught.value, ConfigError)
    assert repr(next(iter(options.values()))) in str(caught.value)


# -- opening -----------------------------------------------------------------------------------


def test_opening_twice_does_nothing_more() -> None:
    pool = Pool(Counter, size=2)
    with pool.open():
        before = _pids(pool)
        assert pool.open() is pool
        assert _pids(pool) == before
        assert pool.stats().workers_started == 2


def test_concurrent_opening_opens_once() -> None:
    """Eight threads open at the same moment; one pool is started, and all see it open."""
    pool = Pool(Counter, size=2)
    ear, start = Ear(pool, "pool.init", "worker.init"), threading.Barrier(8)

    def open_it(_: int) -> int:
        start.wait(20)
        return pool.open().call("add", 0)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(open_it, range(8))) == [0] * 8
    assert len(ear.of("pool.init")) == 1
    assert len(ear.of("worker.init")) == pool.stats().workers == 2
    pool.close()


@pytest.mark.parametrize(
    "use",
    [
        lambda pool: pool.open(), lambda pool: pool.__enter__(), lambda pool: pool.checkout(),
        lambda pool: pool.call("add"), lambda pool: pool.options(timeout=1).call("add"),
        lambda pool: pool.wait_ready(), lambda pool: pool.resize(2), lambda pool: pool.drain(),
    ],
    ids=["open", "with", "checkout", "call", "options", "wait_ready", "resize", "drain"],
)  # fmt: skip
@pytest.mark.parametrize("opened", [True, False], ids=["was-open", "never-open"])
def test_closed_pool_does_not_reopen(opened: bool, use: Callable[[Any], Any]) -> None:
    pool = Pool(Counter, size=1)
    if opened:
        pool.open()
    pool.close()
    with pytest.raises(PoolClosed, match="closed"):
        use(pool)
    assert pool.workers() == []


def test_not_open_yet_and_closed_are_told_apart() -> None:
    """repr, stats and health_check say which of the two it is, also if it never was open."""
    pool = Pool(Counter, size=1)
    assert "not open yet" in repr(pool)
    assert pool.health_check().reasons == (f"{pool.config.name} is not open",)
    assert pool.stats().uptime == 0 and pool.stats().size == 0
    assert not pool.closed
    with pool:
        assert "1 of 1 workers" in repr(pool)
        assert pool.call("add", 3) == 3
    for closed in (pool, Pool(Counter, size=1)):
        closed.close()
        assert closed.closed
        assert "closed" in repr(closed) and "not open yet" not in repr(closed)
        report = closed.health_check(probe=True)
        assert report.status == "unhealthy"
        assert report.reasons == (f"{closed.config.name} is closed",)
    assert pool.stats().calls == 1 and pool.stats().uptime > 0
    assert pool.stats() == pool.stats(), "the clock of a closed pool stands still"


@pytest.mark.parametrize(
    "use",
    [
        lambda pool: pool.call("add"), lambda pool: pool.checkout().release(),
        lambda pool: pool.options(timeout=20).call("add"), lambda pool: pool.wait_ready(),
        lambda pool: (pool.resize(2), pool.wait_ready()),
        lambda pool: (pool.drain(), pool.wait_ready()),
    ],
    ids=["call", "checkout", "options", "wait_ready", "resize", "drain"],
)  # fmt: skip
def test_first_use_opens(use: Callable[[Any], Any]) -> None:
    pool = Pool(Counter, size=1)
    use(pool)
    assert pool.stats().workers_started >= 1
    pool.close()


def test_open_without_waiting_returns_before_a_worker_is_ready(gate: Gate) -> None:
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=2).open(wait=False)
    gate.wait_arrived(2)
    assert pool.stats().starting == 2
    gate.open(2)
    pool.wait_ready(timeout=20)
    assert pool.stats().idle == 2
    pool.close()


def test_wait_ready_returns_once_the_asked_number_is_ready(gate: Gate) -> None:
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=2).open(wait=False)
    gate.wait_arrived(2)
    gate.open(1)
    pool.wait_ready(1, timeout=20)
    assert (pool.stats().idle, pool.stats().starting) == (1, 1)
    with pytest.raises(ValueError, match="workers=3"):
        pool.wait_ready(3)
    assert not pool.closed, "to ask too much is no reason to close"
    pool.close()


def test_wait_ready_that_runs_out_of_time_leaves_the_pool_open(gate: Gate) -> None:
    """Only an open() that fails closes: who waits a second time may have more luck."""
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=1).open(wait=False)
    gate.wait_arrived(1)
    (pid,) = _pids(pool)
    with pytest.raises(CheckoutTimeout, match="0 of 1 workers") as caught:
        pool.wait_ready(timeout=0.05)
    assert (caught.value.timeout, caught.value.size) == (0.05, 1)
    assert not pool.closed
    gate.open()
    pool.wait_ready(timeout=20)
    assert pool.call("pid") == pid
    pool.close()


def test_first_ready_worker_serves_the_first_waiter_before_the_pool_is_full(gate: Gate) -> None:
    """A checkout works while other workers are still starting."""
    with_one = Pool(StopsAtGateInInit, args=(gate.path,), size=2).open(wait=False)
    gate.wait_arrived(2)
    with ThreadPoolExecutor(1) as threads:
        ear = Ear(with_one, "queue.depth")
        first = threads.submit(with_one.checkout, timeout=20)
        ear.wait("queue.depth")
        gate.open(1)
        lease = first.result(20)
        assert lease.pid in _pids(with_one)
        assert with_one.stats().starting == 1
        lease.release()
    with_one.close()


def test_idle_worker_is_given_without_queueing() -> None:
    with Pool(Counter, size=2) as pool:
        for _ in range(20):
            pool.call("add")
        assert pool.stats().queued == 0
        assert pool.stats().leases == 20


@pytest.mark.parametrize("strategy, used", [("lifo", 1), ("fifo", 3)])
def test_strategy_decides_which_idle_worker_is_next(strategy: str, used: int) -> None:
    """The last used one again and again, or each in turn."""
    with Pool(Counter, size=3, strategy=strategy) as pool:
        counts = [0, 0, 0]
        for _ in range(12):
            with pool.checkout() as w:
                counts[w.worker_id] += 1
        assert sorted(counts) == [0] * (3 - used) + [12 // used] * used


# -- closing -----------------------------------------------------------------------------------


def test_with_block_closes_also_on_an_exception() -> None:
    with pytest.raises(KeyError, match="from the body"):
        with Pool(Counter, size=1) as pool:
            (pid,) = _pids(pool)
            raise KeyError("from the body")
    assert pool.closed and pool.workers() == []
    wait_gone(pid, timeout=0)


def test_close_is_idempotent_and_may_come_from_several_threads() -> None:
    """Each close returns when everything has ended, also those that came second."""
    pool = Pool(Counter, size=2).open()
    ear, pids, start = Ear(pool, "pool.terminate"), _pids(pool), threading.Barrier(6)

    def close(_: int) -> list[Any]:
        start.wait(20)
        pool.close()
        return pool.workers()

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(close, range(6))) == [[]] * 6
    pool.close()
    pool.terminate()
    wait_gone(*pids, timeout=0)
    assert len(ear.heard) == 1


def test_close_wakes_all_waiters_at_once() -> None:
    """They get PoolClosed while the lease they waited for is still out."""
    pool = Pool(Counter, size=1).open()
    ear, lease = Ear(pool, "queue.depth"), pool.checkout()
    with ThreadPoolExecutor(4) as threads:
        waiters = [threads.submit(pool.checkout, timeout=None) for _ in range(3)]
        ear.wait("queue.depth", 3)
        closer = threads.submit(pool.close, 20)
        for waiter in waiters:
            with pytest.raises(PoolClosed):
                waiter.result(15)
        assert not closer.done()
        assert lease.add(5) == 5, "the lease is good until the grace ends"
        lease.release()
        closer.result(15)


def test_lease_that_outlasts_the_grace_is_revoked() -> None:
    pool = Pool(Counter, size=1).open()
    lease = pool.checkout()
    (pid,) = _pids(pool)
    pool.close(0.1)
    wait_gone(pid, timeout=0)
    with pytest.raises(LeaseRevoked, match="the pool was closed") as caught:
        lease.add(1)
    assert caught.value.reason == "the pool was closed"
    lease.release()


def test_call_that_outlasts_the_grace_gets_lease_revoked(gate: Gate) -> None:
    pool = Pool(Counter, size=1).open()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(pool.call, pass_gate, gate.path)
        gate.wait_arrived()
        pool.close(0.1)
        with pytest.raises(LeaseRevoked, match="the pool was closed"):
            call.result(15)


def test_lease_that_ends_within_the_grace_ends_well(gate: Gate, tmp_path: Path) -> None:
    """The call returns its result, and the worker's own close() is called after it."""
    notes = tmp_path / "notes"
    pool = Pool(NotesItsEnd, args=(str(notes),), size=1).open()
    with ThreadPoolExecutor(2) as threads:
        call = threads.submit(pool.call, "wait_at", gate.path)
        gate.wait_arrived()
        closer = threads.submit(pool.close)
        _closing(pool)
        assert not notes.exists()
        gate.open()
        pid = call.result(15)
        closer.result(15)
    assert notes.read_text() == f"{pid}\n"


def test_close_while_others_release_and_check_out_leaves_no_worker() -> None:
    """Everybody gets a result or PoolClosed; a race of close with anything loses nothing."""
    for round_ in range(12):
        pool = Pool(Counter, size=2).open()
        pids, start = _pids(pool), threading.Barrier(5)

        def use(pool: Pool[Any] = pool, start: threading.Barrier = start) -> str:
            start.wait(20)
            try:
                while True:
                    with pool.checkout(timeout=20) as w:
                        w.add()
            except PoolClosed:
                return "closed"

        with ThreadPoolExecutor(4) as threads:
            users = [threads.submit(use) for _ in range(4)]
            start.wait(20)
            if round_ % 2:
                pool.call("add")
            pool.close(20)
            assert [user.result(20) for user in users] == ["closed"] * 4
        assert pool.workers() == []
        wait_gone(*pids, timeout=0)


def test_close_while_workers_start_leaves_no_worker() -> None:
    """Whichever wins, the pool ends closed, and open() returns or says so."""
    for _ in range(12):
        pool = Pool(Counter, size=3)
        ear = Ear(pool, "pool.init", "pool.terminate")
        with ThreadPoolExecutor(1) as threads:
            opening = threads.submit(pool.open)
            ear.wait("pool.init")
            pool.close()
            try:
                opening.result(20)
            except PoolClosed:
                pass
        ear.wait("pool.terminate")
        assert pool.workers() == []


@pytest.mark.parametrize("ending", ["close", "terminate"])
@pytest.mark.parametrize("event", ["pool.init", "worker.init"])
def test_pool_may_be_closed_from_a_hook_while_it_opens(event: str, ending: str) -> None:
    """Also from one that runs in the manager's own thread, where it only begins the end."""
    pool = Pool(Counter, size=2)
    ear = Ear(pool, "pool.terminate")
    pool.hooks[event].append(lambda *_: getattr(pool, ending)())
    try:
        pool.open()
    except PoolClosed:
        pass
    ear.wait("pool.terminate")
    assert pool.closed
    pool.close()
    assert pool.workers() == []


def test_hook_of_the_opening_may_use_the_pool() -> None:
    """`pool.init` is emitted when the pool is there, and under no lock."""
    pool = Pool(Counter, size=1)
    results: list[int] = []
    pool.hooks["pool.init"].append(lambda *_: results.append(pool.call("add", 7)))
    with pool:
        assert results == [7]


def test_pool_may_be_closed_from_a_hook_while_a_worker_ends() -> None:
    pool = Pool(Counter, size=1).open()
    ear = Ear(pool, "pool.terminate")
    pool.hooks["worker.terminate"].append(lambda *_: pool.close())
    os.kill(_pids(pool)[0], signal.SIGKILL)
    ear.wait("pool.terminate")
    pool.close()
    assert pool.workers() == []


@pytest.mark.parametrize("ending", ["close", "terminate"])
def test_pool_may_be_closed_from_a_signal_handler(gate: Gate, ending: str) -> None:
    """It interrupts a thread that waits in the very same pool; that one gets PoolClosed."""
    pool = Pool(Counter, size=1).open()
    ear = Ear(pool, "queue.depth")
    main = threading.main_thread().ident
    assert main is not None

    def end(*_: object) -> None:
        pool.terminate() if ending == "terminate" else pool.close(0.1)

    previous = signal.signal(signal.SIGUSR1, end)
    try:
        with ThreadPoolExecutor(2) as threads:
            call = threads.submit(pool.call, pass_gate, gate.path)
            gate.wait_arrived()
            threads.submit(
                lambda: (ear.wait("queue.depth"), signal.pthread_kill(main, signal.SIGUSR1))
            )
            with pytest.raises(PoolClosed):
                pool.checkout(timeout=None)
            with pytest.raises(LeaseRevoked):
                call.result(15)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert pool.workers() == []


def test_signal_handler_may_close_while_the_pool_opens(gate: Gate) -> None:
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=1)
    main = threading.main_thread().ident
    assert main is not None
    previous = signal.signal(signal.SIGUSR1, lambda *_: pool.close())
    try:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(lambda: (gate.wait_arrived(), signal.pthread_kill(main, signal.SIGUSR1)))
            with pytest.raises(PoolClosed):
                pool.open()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert pool.workers() == []


def test_close_in_the_midst_of_the_first_steps_of_opening_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal handler runs in the very thread that opens, and so inside its lock."""
    pool = Pool(Counter, size=1)
    first_step = pool._launcher.open

    def interrupted() -> None:
        first_step()
        pool.close()  # what the handler would do

    monkeypatch.setattr(pool._launcher, "open", interrupted)
    ear = Ear(pool, "pool.terminate")
    with pytest.raises(PoolClosed):
        pool.open()
    ear.wait("pool.terminate")
    assert pool.closed and pool.workers() == []
    pool.close()


# -- the worker's own end ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "resize", "drain"])
def test_object_is_closed_when_its_worker_retires(how: str, tmp_path: Path) -> None:
    """The user's close() is called wherever a worker ends in good order."""
    notes = tmp_path / "notes"
    pool = Pool(NotesItsEnd, args=(str(notes),), size=2).open()
    ear, pids = Ear(pool, "worker.terminate"), _pids(pool)
    if how == "resize":
        pool.resize(1)
        ear.wait("worker.terminate", 1)
        assert [int(notes.read_text())] == [one.metadata["pid"] for one in ear.heard]
    elif how == "drain":
        pool.drain()
        ear.wait("worker.terminate", 2)
        assert sorted(map(int, notes.read_text().split())) == sorted(pids)
    pool.close()
    assert set(pids) <= set(map(int, notes.read_text().split()))
    codes = {one.metadata["pid"]: one.metadata["exitcode"] for one in ear.heard}
    assert [codes[pid] for pid in pids] == [0, 0]


def test_close_that_raises_ends_the_worker_all_the_same(capfd: Any) -> None:
    pool = Pool(RaisesInClose, size=1, start_method="fork").open()  # it writes to our stderr
    ear = Ear(pool, "worker.terminate")
    pool.close()
    assert ear.wait("worker.terminate").metadata["exitcode"] == 0
    assert "cannot let go" in capfd.readouterr().err


def test_worker_that_hangs_in_close_is_killed() -> None:
    """It was asked to end once; SIGTERM would ask it for the same a second time."""
    pool = Pool(HangsInClose, size=1, close_timeout=0.2).open()
    ear = Ear(pool, "worker.terminate")
    pool.close()
    assert ear.wait("worker.terminate").metadata["exitcode"] == -signal.SIGKILL


def test_worker_that_hangs_in_close_when_it_retires_is_killed() -> None:
    """The pool goes on meanwhile: who retires does not keep the others waiting."""
    with Pool(HangsInClose, size=2, close_timeout=0.2) as pool:
        ear = Ear(pool, "worker.terminate")
        pool.resize(1)
        assert pool.call(getpid) in _pids(pool)
        assert ear.wait("worker.terminate").metadata["exitcode"] == -signal.SIGKILL
        pool.terminate()


# -- terminate ---------------------------------------------------------------------------------


def _ignoring_sigterm(pool: Pool[Any], gate: Gate) -> None:
    pool.call("wait_at", gate.path)


def _in_python(pool: Pool[Any], gate: Gate) -> None:
    pool.call(busy_in_python, gate.path)


def _in_c(pool: Pool[Any], gate: Gate) -> None:
    pool.call(busy_in_c, gate.path)


@pytest.mark.parametrize("busy", [_ignoring_sigterm, _in_python, _in_c])
def test_terminate_does_not_wait_for_a_busy_worker(busy: Callable[..., Any], gate: Gate) -> None:
    """A worker that ignores SIGTERM, computes, or holds the GIL in C ends at once."""
    pool = Pool(IgnoresSigterm, size=1, call_timeout=None).open()
    (pid,) = _pids(pool)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(busy, pool, gate)
        gate.wait_arrived()
        start = time.monotonic()
        pool.terminate()
        assert time.monotonic() - start < 10, "close_timeout is 30 s"
        with pytest.raises(LeaseRevoked):
            call.result(15)
    wait_gone(pid, timeout=0)


def test_terminate_does_not_wait_for_a_stopped_worker() -> None:
    pool = Pool(Counter, size=2).open()
    pids = _pids(pool)
    os.kill(pids[0], signal.SIGSTOP)
    start = time.monotonic()
    pool.terminate()
    assert time.monotonic() - start < 10
    wait_gone(*pids, timeout=0)


def test_terminate_cuts_a_close_short() -> None:
    """A close that waits for a lease is over as soon as somebody terminates."""
    pool = Pool(Counter, size=1).open()
    lease = pool.checkout()
    with ThreadPoolExecutor(1) as threads:
        closer = threads.submit(pool.close, 600)
        _closing(pool)
        pool.terminate()
        closer.result(15)
    with pytest.raises(LeaseRevoked):
        lease.add()
    lease.release()


def test_closed_pool_keeps_no_descriptor_for_a_lease_that_was_given_back() -> None:
    """Not even while the revoked lease and the pool are still referred to."""
    before = _open_descriptors()
    pool = Pool(Counter, size=2).open()
    leases = [pool.checkout(), pool.checkout()]
    pool.terminate()
    for lease in leases:
        lease.release()
    assert _open_descriptors() == before
    assert pool.closed and len(leases) == 2


# -- forgotten, and left open at exit ----------------------------------------------------------


@pytest.mark.parametrize("leases", [0, 1])
def test_pool_that_is_collected_ends_its_workers(leases: int) -> None:
    """Nobody closed it; nobody has it any more, nor its leases."""
    pool = Pool(Counter, size=2).open()
    pids, ended = _pids(pool), threading.Event()
    pool.hooks["pool.terminate"].append(lambda *_: ended.set())
    held = [pool.checkout() for _ in range(leases)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.disable()  # it is in no cycle, so it need not wait for the collector
        try:
            del pool, held
            assert ended.wait(20)
        finally:
            gc.enable()
    wait_gone(*pids)


def test_lease_keeps_its_worker_when_the_pool_is_forgotten() -> None:
    """What is still in use is not collected."""
    lease = Pool(Counter, size=1).open().checkout()
    gc.collect()
    pid = lease.pid
    assert lease.add(4) == 4
    lease.release()
    del lease
    gc.collect()
    wait_gone(pid or 0)


LEFT_OPEN = """
    import sys, threading
    from minipool import Pool, PoolError, LeaseError
    from gates import pass_gate
    from troublemakers import IgnoresSigterm, busy_in_c
    from workers import getpid

    def main(method, state, gate):
        pool = Pool(IgnoresSigterm, size=2, start_method=method, call_timeout=None).open()
        print(*(info.pid for info in pool.workers()), flush=True)
        if state == "leased":
            globals()["kept"] = [pool.checkout() for _ in range(2)]
        elif state == "busy":
            def call():
                try:
                    pool.call(pass_gate, gate)
                except LeaseError:
                    pass
            threading.Thread(target=call, daemon=True).start()
        elif state == "calling":
            enough = threading.Event()
            def call_on():
                try:
                    for number in range(10 ** 9):
                        pool.call(getpid)
                        if number == 20:
                            enough.set()
                except (PoolError, LeaseError):
                    pass
            for _ in range(3):
                threading.Thread(target=call_on, daemon=True).start()
            enough.wait(20)
        elif state == "sys.exit":
            with pool:
                pool.call(getpid)
                sys.exit(5)
        globals()["pool"] = pool
        if state == "busy":
            with open(gate + ".in", "rb") as arrived:
                arrived.read(1)

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("state", ["idle", "leased", "busy", "calling", "sys.exit"])
def test_exit_with_an_open_pool_is_quick_and_silent(
    start_method: str, state: str, gate: Gate, tmp_path: Path
) -> None:
    """Exit code as asked for, nothing on standard error, no worker left."""
    start = time.monotonic()
    code, out, err = scripts.run(tmp_path, LEFT_OPEN, start_method, state, gate.path)
    assert (code, err) == (5 if state == "sys.exit" else 0, "")
    assert time.monotonic() - start < 15, "close_timeout is 30 s"
    pids = [int(word) for word in out.split()]
    assert len(pids) == 2
    wait_gone(*pids)


IN_CHILD = """
    import multiprocessing, sys
    from minipool import Pool
    from workers import Counter

    def use():
        globals()["pool"] = pool = Pool(Counter, size=2, start_method=sys.argv[1]).open()
        print(*(info.pid for info in pool.workers()), flush=True)

    if __name__ == "__main__":
        child = multiprocessing.get_context(sys.argv[1]).Process(target=use)
        child.start()
        child.join(20)
        sys.exit(child.exitcode)
"""


def test_process_of_multiprocessing_ends_with_its_pool_left_open(
    start_method: str, tmp_path: Path
) -> None:
    """Such a process joins its children before it ends, so the pool must end before that."""
    code, out, err = scripts.run(tmp_path, IN_CHILD, start_method)
    assert (code, err) == (0, "")
    assert len(out.split()) == 2
    wait_gone(*map(int, out.split()))


WITHOUT_LOGGING = """
    import os, signal, sys
    from ears import wait_until
    from minipool import Pool

    if __name__ == "__main__":
        with Pool(size=2, start_method=sys.argv[1]) as pool:
            sys.modules.pop("logging", None)
            sys.modules["logging"] = None  # as for who has another root by now, or no rights
            before = pool.workers()[0].pid
            os.kill(before, signal.SIGKILL)
            wait_until(pool, lambda: pool.stats().workers_lost == 1 and pool.stats().idle == 2)
            print(before not in [worker.pid for worker in pool.workers()], pool.call(abs, -3))
"""


def test_pool_goes_on_in_a_process_that_can_import_no_more(
    start_method: str, tmp_path: Path
) -> None:
    """What cannot be logged for want of `logging` is written; the worker is replaced as ever."""
    code, out, err = scripts.run(tmp_path, WITHOUT_LOGGING, start_method)
    assert (code, out) == (0, "True 3\n"), err
    assert "died by SIGKILL" in err and "Traceback" not in err
