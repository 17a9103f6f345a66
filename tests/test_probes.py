"""Health on real pools: probes, deaths seen at once, lost slots, and the manager's own failures."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import scripts
from ears import Ear, handle_of, wait_until
from gates import Gate, pass_gate
from minipool import Pool, WorkerDied
from troublemakers import (
    HangsInHealthCheck,
    RaisesInHealthCheck,
    SickWhileFileExists,
    StopsAtGateInHealthCheck,
    StopsAtGateInInit,
)
from workers import Counter, getpid, identity

CHECKED = "worker.health_check"


def _manager(pool: Pool[Any]) -> Any:
    desk = pool._desk
    assert desk is not None
    return desk.manager


def _pids(pool: Pool[Any]) -> list[int]:
    return [info.pid or 0 for info in pool.workers()]


def _prove(pool: Pool[Any]) -> None:
    """Make a call in each worker, so that its end is no failed start."""
    leases = [pool.checkout(timeout=20) for _ in pool.workers()]
    for lease in leases:
        lease.call(getpid)
        lease.release()


# -- probes ------------------------------------------------------------------------------------


def test_check_passes_over_a_token_of_a_worker_that_is_gone() -> None:
    """A releaser that slept may leave one behind; the manager goes on, and the others are asked."""
    with Pool(Counter, size=2, health_check_interval=None) as pool:
        ear = Ear(pool, CHECKED)
        _prove(pool)
        gone = handle_of(pool, 1)
        os.kill(gone.pid, signal.SIGKILL)
        wait_until(pool, lambda: pool.stats().workers_lost == 1 and pool.stats().idle == 2)
        turnstile, handles = _manager(pool).turnstile, _manager(pool).fleet.handles
        turnstile.idle[7] = gone
        assert 7 not in handles
        assert pool.health_check(probe=True).status == "healthy"
        assert {event.metadata["worker_id"] for event in ear.heard} == {0, 1}


def test_idle_workers_are_probed_every_interval(start_method: str, tmp_path: Path) -> None:
    """Each of them, not more often than asked for, with the object's own health_check()."""
    start = time.monotonic()
    pool = Pool(
        SickWhileFileExists, args=(str(tmp_path / "sick"),), size=2,
        start_method=start_method, health_check_interval=0.1,
    )  # fmt: skip
    with pool:
        ear = Ear(pool, CHECKED)
        for worker_id in range(2):
            ear.wait(CHECKED, 3, fits=lambda event, w=worker_id: event.metadata["worker_id"] == w)
        took = time.monotonic() - start
        leases = [pool.checkout(timeout=20) for _ in range(2)]
        for lease in leases:
            mine = [e for e in ear.of(CHECKED) if e.metadata["worker_id"] == lease.worker_id]
            assert all(event.metadata["healthy"] for event in mine)
            assert 3 <= len(mine) <= lease.call("counted")
            assert len(mine) <= (took + 1) / 0.1
            lease.release()
        assert (pool.stats().workers_started, pool.stats().leases) == (2, 2), "probes are no leases"


def test_health_check_interval_is_kept() -> None:
    """No probe comes sooner after the one before than the interval."""
    with Pool(Counter, size=1, health_check_interval=0.2) as pool:
        times: list[float] = []
        pool.hooks[CHECKED].append(lambda *_: times.append(time.monotonic()))
        Ear(pool, CHECKED).wait(CHECKED, 3)
        assert all(later - sooner >= 0.19 for sooner, later in zip(times, times[1:]))


def test_leased_worker_is_not_probed() -> None:
    with Pool(Counter, size=2, health_check_interval=0.05) as pool:
        with pool.checkout() as held:
            ear = Ear(pool, CHECKED)
            ear.wait(CHECKED, 4)
            assert held.worker_id not in {event.metadata["worker_id"] for event in ear.heard}


@pytest.mark.parametrize("most", [1, 3])
def test_sick_worker_is_replaced_after_so_many_failures_in_a_row(most: int, tmp_path: Path) -> None:
    """health_check() returned False; the next worker is well."""
    sick = tmp_path / "sick"
    pool = Pool(
        SickWhileFileExists, args=(str(sick),), size=1,
        health_check_interval=0.05, max_health_failures=most,
    )  # fmt: skip
    with pool:
        _prove(pool)
        ear, (pid,) = Ear(pool, CHECKED, "worker.terminate"), _pids(pool)
        pool.hooks["worker.terminate"].append(lambda *_: sick.unlink(missing_ok=True))
        sick.touch()
        ended = ear.wait("worker.terminate")
        assert ended.metadata["pid"] == pid
        assert ended.metadata["reason"] == f"failed {most} health checks in a row"
        failed = [event for event in ear.of(CHECKED) if not event.metadata["healthy"]]
        assert [event.measurements["failures"] for event in failed] == [*range(1, most + 1)]
        pool.wait_ready(timeout=20)
        assert pool.call("pid") != pid
        assert pool.health_check().status == "healthy"


def test_fewer_failures_in_a_row_do_not_replace_a_worker(tmp_path: Path) -> None:
    """Twice two failures, with a good answer between them, are not three in a row."""
    sick = tmp_path / "sick"
    pool = Pool(
        SickWhileFileExists, args=(str(sick),), size=1,
        health_check_interval=0.05, max_health_failures=3,
    )  # fmt: skip
    with pool:
        (pid,) = _pids(pool)

        def change(_: str, measurements: dict[str, Any], facts: dict[str, Any]) -> None:
            if measurements["failures"] == 2:
                sick.unlink()

        pool.hooks[CHECKED].append(change)
        ear = Ear(pool, CHECKED)
        for times in (1, 2):
            sick.touch()
            ear.wait(CHECKED, times, fits=lambda event: event.measurements["failures"] == 2)
            seen = len(ear.of(CHECKED))
            ear.wait(CHECKED, seen + 1)
            assert ear.of(CHECKED)[seen].metadata["healthy"]
        assert pool.call("pid") == pid
        assert pool.stats().workers_started == 1


def test_health_check_that_raises_is_a_failure() -> None:
    pool = Pool(RaisesInHealthCheck, size=1, health_check_interval=0.05, max_health_failures=2)
    with pool:
        _prove(pool)
        ear, (pid,) = Ear(pool, "worker.terminate"), _pids(pool)
        assert ear.wait("worker.terminate").metadata["pid"] == pid


def test_worker_that_hangs_in_health_check_is_replaced_when_all_its_time_is_over() -> None:
    """That is max_health_failures times health_check_timeout, and not before."""
    pool = Pool(
        HangsInHealthCheck, size=1, health_check_interval=0.05,
        health_check_timeout=0.15, max_health_failures=3,
    )  # fmt: skip
    with pool:
        _prove(pool)
        times: list[float] = []
        for event in (CHECKED, "worker.terminate"):
            pool.hooks[event].append(lambda *_: times.append(time.monotonic()))
        ear, (pid,) = Ear(pool, CHECKED, "worker.terminate"), _pids(pool)
        ended = ear.wait("worker.terminate")
        assert ended.metadata["pid"] == pid and ended.metadata["exitcode"] == -signal.SIGKILL
        assert ended.metadata["reason"] == "failed 3 health checks in a row"
        assert [event.measurements["failures"] for event in ear.of(CHECKED)[:2]] == [1, 2]
        assert times[2] - times[0] >= 0.3, "two more timeouts after the first"
        pool.terminate()


def test_stopped_idle_worker_is_found_and_replaced(start_method: str) -> None:
    """It is alive, and would never answer anybody."""
    pool = Pool(
        Counter, size=2, start_method=start_method, health_check_interval=0.05,
        health_check_timeout=0.1, max_health_failures=2,
    )  # fmt: skip
    with pool:
        _prove(pool)
        ear, pids = Ear(pool, "worker.terminate"), _pids(pool)
        os.kill(pids[0], signal.SIGSTOP)
        ended = ear.wait("worker.terminate")
        assert (ended.metadata["pid"], ended.metadata["exitcode"]) == (pids[0], -signal.SIGKILL)
        pool.wait_ready(timeout=20)
        assert pids[1] in _pids(pool) and pids[0] not in _pids(pool)


def test_probes_are_never_seen_by_callers() -> None:
    """Each call gets its own answer, whatever is asked of the workers meanwhile."""
    with Pool(size=3, strategy="fifo", health_check_interval=0.02) as pool:
        ear = Ear(pool, CHECKED)

        def call(number: int) -> bool:
            return all(pool.call(identity, (number, n)) == (number, n) for n in range(40))

        with ThreadPoolExecutor(2) as threads:
            rounds = 0
            while len(ear.of(CHECKED)) < 10:
                assert all(threads.map(call, range(2)))
                rounds += 1
        stats = pool.stats()
        assert (stats.calls, stats.faults, stats.workers_started) == (rounds * 80, 0, 3)


def test_caller_gets_a_worker_when_its_probe_has_ended(gate: Gate) -> None:
    """Who comes during the probe of the only worker queues, and is served by that very one."""
    pool = Pool(StopsAtGateInHealthCheck, args=(gate.path,), size=1, health_check_interval=0.05)
    with pool, ThreadPoolExecutor(1) as threads:
        (pid,) = _pids(pool)
        gate.wait_arrived()
        ear = Ear(pool, "queue.depth")
        call = threads.submit(pool.call, "pid")
        ear.wait("queue.depth")
        assert pool.stats().probing == 1 and not call.done()
        gate.open(1000)  # and all that come later
        assert call.result(20) == pid


def test_close_during_a_probe_waits_for_its_answer(gate: Gate) -> None:
    pool = Pool(StopsAtGateInHealthCheck, args=(gate.path,), size=1, health_check_interval=0.05)
    ear = Ear(pool.open(), "worker.terminate")
    gate.wait_arrived()
    with ThreadPoolExecutor(1) as threads:
        closer = threads.submit(pool.close)
        wait_until(pool, lambda: _manager(pool).closing)
        gate.open(10)
        closer.result(20)
    assert ear.of("worker.terminate")[0].metadata["exitcode"] == 0


# -- reports -----------------------------------------------------------------------------------


def test_report_of_a_healthy_pool_has_a_row_for_each_worker() -> None:
    with Pool(Counter, size=3) as pool:
        ear = Ear(pool, CHECKED)
        report = pool.health_check(probe=True)
        assert (report.status, report.reasons) == ("healthy", ())
        assert [info.worker_id for info in report.workers] == [0, 1, 2]
        assert len(ear.of(CHECKED)) == 3
        pool.health_check()
        assert len(ear.of(CHECKED)) == 3, "without `probe` nobody is asked"


def test_probing_report_finds_a_sick_worker(tmp_path: Path) -> None:
    """Degraded, with the reason; healthy again when it is."""
    sick = tmp_path / "sick"
    with Pool(SickWhileFileExists, args=(str(sick),), size=2) as pool:
        before = _pids(pool)
        sick.touch()
        assert pool.health_check().status == "healthy", "nobody has asked yet"
        report = pool.health_check(probe=True)
        assert report.status == "degraded"
        assert report.reasons == tuple(
            f"worker {worker_id} failed 1 health checks in a row" for worker_id in (0, 1)
        )
        assert [info.probe_failures for info in report.workers] == [1, 1]
        sick.unlink()
        assert pool.health_check().status == "degraded", "nobody has asked again"
        assert pool.health_check(probe=True).status == "healthy"
        assert _pids(pool) == before


def test_probing_report_does_not_wait_for_a_hanging_worker_for_ever() -> None:
    pool = Pool(
        HangsInHealthCheck, size=1, health_check_timeout=0.1, max_health_failures=10**6
    ).open()
    report = pool.health_check(probe=True)
    assert report.status == "degraded"
    assert any("health checks in a row" in reason for reason in report.reasons)
    pool.terminate()


def test_report_tells_who_is_missing_and_who_waits(gate: Gate) -> None:
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=2).open(wait=False)
    gate.wait_arrived(2)
    report = pool.health_check()
    assert (report.status, report.reasons) == ("unhealthy", ("0 of 2 workers are in service",))
    with ThreadPoolExecutor(2) as threads:
        ear = Ear(pool, "queue.depth")
        waiters = [threads.submit(pool.checkout, timeout=20) for _ in range(2)]
        ear.wait("queue.depth", 2)
        gate.open(1)
        pool.wait_ready(1, timeout=20)
        wait_until(pool, lambda: pool.stats().waiting == 1)
        report = pool.health_check()
        assert report.status == "degraded"
        assert report.reasons == (
            "1 of 2 workers are in service",
            "1 callers are waiting for a worker",
        )
        gate.open(1)
        for waiter in waiters:
            waiter.result(20).release()
    pool.wait_ready(timeout=20)
    assert pool.health_check().status == "healthy"
    pool.close()


# -- deaths ------------------------------------------------------------------------------------


def _deaf(pool: Pool[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the manager wake by events alone: no tick will save the test."""
    manager = _manager(pool)
    monkeypatch.setattr(manager, "_patience", lambda: 600.0)
    manager.bell.ring()
    looked = threading.Event()
    manager.order(looked.set)
    assert looked.wait(20)


def test_death_of_an_idle_worker_is_seen_by_its_sentinel(
    start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and without anybody asking for it; the next checkout is clean."""
    with Pool(size=2, start_method=start_method) as pool:
        _prove(pool)
        ear, pids = Ear(pool, "worker.terminate", "recovery"), _pids(pool)
        _deaf(pool, monkeypatch)
        os.kill(pids[1], signal.SIGKILL)
        ended = ear.wait("worker.terminate")
        assert (ended.metadata["pid"], ended.metadata["exitcode"]) == (pids[1], -signal.SIGKILL)
        ear.wait("recovery")
        assert pool.stats().idle == 2
        assert {pool.call(getpid) for _ in range(4)} <= set(_pids(pool))
        assert (pool.stats().faults, pool.stats().workers_lost) == (0, 1)


def test_death_of_a_booting_worker_is_seen_by_its_sentinel(
    start_method: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(
        StopsAtGateInInit, args=(gate.path,), size=1, start_method=start_method, init_timeout=None
    )
    ear = Ear(pool.open(wait=False), "error", "worker.terminate")
    gate.wait_arrived()
    _deaf(pool, monkeypatch)
    os.kill(_pids(pool)[0], signal.SIGKILL)
    assert ear.wait("worker.terminate").metadata["exitcode"] == -signal.SIGKILL
    assert "by SIGKILL" in str(ear.wait("error").metadata["error"])
    monkeypatch.undo()
    pool.terminate()


def test_death_of_a_busy_worker_is_seen_by_its_sentinel(
    start_method: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call ends with the exit code, and the worker is replaced."""
    pool = Pool(size=1, start_method=start_method, call_timeout=None)
    with pool, ThreadPoolExecutor(1) as threads:
        ear = Ear(pool, "worker.terminate", "recovery")
        call = threads.submit(pool.call, pass_gate, gate.path)
        gate.wait_arrived()
        _deaf(pool, monkeypatch)
        os.kill(_pids(pool)[0], signal.SIGKILL)
        with pytest.raises(WorkerDied) as caught:
            call.result(20)
        assert (caught.value.exitcode, caught.value.started) == (-signal.SIGKILL, True)
        ear.wait("recovery")
        assert pool.stats().idle == 1


def test_begin_of_a_call_that_is_heard_after_the_death_counts(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without shared memory the worker says that a call has begun, and the manager may bury it
    before the caller has come to read that: the call must not be made again."""
    monkeypatch.setenv("MINIPOOL_PORTABLE", "1")
    pool = Pool(size=1, call_timeout=None)
    with pool, ThreadPoolExecutor(1) as threads:
        handle, buried = handle_of(pool), threading.Event()
        pool.hooks["worker.terminate"].append(lambda *_: buried.set())
        take_note = handle.channel.on_words

        def is_late(words: Any) -> None:
            assert buried.wait(20)
            take_note(words)

        handle.channel.on_words = is_late
        call = threads.submit(pool.call, pass_gate, gate.path)
        gate.wait_arrived()
        handle.kill()
        with pytest.raises(WorkerDied, match="the call had begun"):
            call.result(20)
        gate.open()


def test_only_the_dead_are_replaced() -> None:
    with Pool(size=3) as pool:
        _prove(pool)
        ear, pids = Ear(pool, "worker.init"), _pids(pool)
        os.kill(pids[1], signal.SIGKILL)
        ear.wait("worker.init")
        pool.wait_ready(timeout=20)
        assert [_pids(pool)[0], _pids(pool)[2]] == [pids[0], pids[2]]
        assert _pids(pool)[1] != pids[1]


def test_pool_whose_workers_were_all_killed_is_filled_again(start_method: str) -> None:
    with Pool(size=3, start_method=start_method) as pool:
        _prove(pool)
        ear, pids = Ear(pool, "worker.init"), _pids(pool)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        ear.wait("worker.init", 3)
        pool.wait_ready(timeout=20)
        assert not set(pids) & set(_pids(pool)) and pool.stats().idle == 3
        assert pool.stats().workers_lost == 3


# -- lost slots --------------------------------------------------------------------------------


def test_slot_lost_between_claim_and_lease_is_fenced_and_replaced() -> None:
    """An exception fell between two steps: the capacity is there again a few looks later."""
    with Pool(Counter, size=2, health_check_interval=0.1) as pool:
        _prove(pool)
        ear, before = Ear(pool, "worker.terminate"), _pids(pool)
        token = None
        while token is None:  # both may be claimed by a probe this moment
            token = _manager(pool).turnstile.try_take()
        slot = token[0]
        del token
        ended = ear.wait("worker.terminate")
        assert ended.metadata["worker_id"] == slot and ended.metadata["pid"] == before[slot]
        assert "its lease was lost" in ended.metadata["reason"]
        pool.wait_ready(timeout=20)
        leases = [pool.checkout(timeout=20) for _ in range(2)]
        assert [lease.add() for lease in leases if lease.worker_id == slot] == [1]
        for lease in leases:
            lease.release()
        assert pool.stats().workers_lost == 1


PAUSED = """
    import os, signal, sys
    from ears import Ear
    from minipool import Pool
    from workers import Counter

    def main(method):
        with Pool(Counter, size=2, start_method=method, health_check_interval=0.04) as pool:
            ear = Ear(pool, "utilization")
            with pool.checkout() as lease:
                pid = lease.pid
                for pause in range(3):
                    print("pausing", flush=True)
                    os.kill(os.getpid(), signal.SIGSTOP)
                    ear.wait("utilization", len(ear.of("utilization")) + 5)
                    assert lease.add() == pause + 1, "the same worker"
                assert lease.pid == pid
            stats = pool.stats()
            print(stats.workers_started, stats.workers_lost, stats.calls)

    if __name__ == "__main__":
        main(sys.argv[1])
"""


def test_lease_of_a_paused_process_is_never_taken_away(start_method: str, tmp_path: Path) -> None:
    """Stopped for many looks of its manager, and continued: its lease is good."""
    process = scripts.start(tmp_path, PAUSED, start_method)
    try:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "pausing\n"
            status = os.waitpid(process.pid, os.WUNTRACED)[1]
            assert os.WIFSTOPPED(status)
            threading.Event().wait(0.05)  # five ticks: no event, time itself is what is tested
            os.kill(process.pid, signal.SIGCONT)
        assert scripts.finish(process) == (0, "2 0 3\n", "")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


# -- the manager itself ------------------------------------------------------------------------


def test_pool_that_lacks_a_worker_is_not_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the step that replaces the dead have missed one, the next tick makes up for it."""
    with Pool(Counter, size=1, health_check_interval=0.1) as pool:
        _prove(pool)
        manager, missed = _manager(pool), threading.Event()
        works = manager.staff.reconcile

        def misses_one(whole: bool) -> None:
            if manager.fleet.handles or missed.is_set():
                works(whole)
            else:
                missed.set()

        monkeypatch.setattr(manager.staff, "reconcile", misses_one)
        ear = Ear(pool, "recovery")
        handle_of(pool).kill()
        ear.wait("recovery", timeout=5)
        assert missed.is_set()


@pytest.mark.logs_errors
@pytest.mark.parametrize("step", ["_look", "staff.reconcile", "_sweep", "care.ended", "_wait"])
def test_manager_survives_its_own_failure(
    step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and everything goes on, deaths included."""
    with Pool(Counter, size=1, health_check_interval=0.1) as pool:
        _prove(pool)
        manager, failed = _manager(pool), threading.Event()
        *room, name = step.split(".")
        owner = getattr(manager, room[0]) if room else manager
        works = getattr(owner, name)

        def fails_once(*args: Any) -> Any:
            if not failed.is_set():
                failed.set()
                raise ZeroDivisionError("a bug in the manager")
            return works(*args)

        monkeypatch.setattr(owner, name, fails_once)
        ear = Ear(pool, "recovery")
        handle_of(pool).kill()
        assert failed.wait(20)
        ear.wait("recovery", timeout=5)  # not at the next thing to do, which may be far off
        assert pool.call("add", 4) == 4

        def failures() -> list[Any]:
            return [r for r in caplog.records if "failed and goes on" in r.getMessage()]

        wait_until(pool, lambda: bool(failures()))
        records = failures()
        assert len(records) == 1
        assert records[0].exc_info is not None and records[0].exc_info[0] is ZeroDivisionError
