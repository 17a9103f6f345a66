"""Warm-up: each worker by its slot, in three ways; and of each worker before it is offered."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

from ears import Ear, handle_of, wait_until
from gates import Gate, pass_gate
from minipool import CallMismatch, CallTimeout, ConfigError, Pool, PoolStartError, WorkerDied
from minipool.commands import Command, commands_of
from troublemakers import FailsWhileFileExists, fails_so_often
from workers import Counter, fail, getpid, kill_self

LAST = 20.0


@pytest.fixture
def pool() -> Iterator[Pool[Counter]]:
    with Pool(Counter, size=4) as opened:
        yield opened


def counts(pool: Pool[Counter]) -> list[int]:
    """Return the number that each worker keeps."""
    leases = [pool.checkout(timeout=LAST) for _ in range(pool.stats().size)]
    found = [lease.call("add", 0) for lease in leases]
    for lease in leases:
        lease.release()
    return found


# -- commands ------------------------------------------------------------------------------------


def test_command_is_a_target_with_or_without_arguments() -> None:
    given = ["load", getpid, ("predict", [3]), ["f", (), {"n": 2}], Command("g")]
    assert commands_of(given) == (
        Command("load"), Command(getpid), Command("predict", (3,)), Command("f", (), {"n": 2}),
        Command("g"),
    )  # fmt: skip


# -- pool.warm_up() ------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["parallel", "sequential", "staged"])
def test_every_worker_is_warmed_up_once(pool: Pool[Counter], strategy: str) -> None:
    """Not as many checkouts as there are workers, of which some get the same one."""
    report = pool.warm_up(["add", ("add", (10,)), (Counter.add, (), {"amount": 100})], strategy)
    assert counts(pool) == [111] * 4
    assert (report.workers, report.succeeded, report.success_rate) == (4, 4, 1.0)
    assert report.complete and report.seconds > 0
    assert [each.target for each in report.commands] == ["add", "add", "Counter.add"]
    for each in report.commands:
        assert each.succeeded == 4 and each.failures == {}
        assert each.mean is not None and each.max is not None and 0 < each.mean <= each.max


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_each_start_method_and_functions_too(method: str) -> None:
    with Pool(size=2, start_method=method) as pool:
        assert pool.warm_up([getpid, (math.factorial, (5,))]).success_rate == 1.0
        assert [info.calls for info in pool.workers()] == [2, 2]


def arrivals(strategy: str, gate: Gate, size: int) -> Iterator[int]:
    """Yield how many workers come to the gate at once, stage by stage."""
    with Pool(size=size) as pool:
        reports: list[Any] = []
        warming = threading.Thread(
            target=lambda: reports.append(pool.warm_up([(pass_gate, (gate.path,))], strategy))
        )
        warming.start()
        through = 0
        while through < size:
            stage = yield through
            gate.wait_arrived(stage)
            wait_until(pool, lambda: True)
            assert sum(info.state == "leased" for info in pool.workers()) == stage
            gate.open(stage)
            through += stage
        warming.join(LAST)
        assert reports[0].succeeded == size


@pytest.mark.parametrize(
    "strategy, stages", [("parallel", [7]), ("sequential", [1] * 7), ("staged", [2, 2, 2, 1])]
)
def test_strategy_says_how_many_are_warmed_up_at_once(
    strategy: str, stages: list[int], gate: Gate
) -> None:
    story = arrivals(strategy, gate, size=7)
    next(story)
    for stage in stages[:-1]:
        story.send(stage)
    with pytest.raises(StopIteration):
        story.send(stages[-1])


def test_leased_worker_is_waited_for(pool: Pool[Counter]) -> None:
    reports: list[Any] = []
    with pool.checkout() as w:
        slot = w.worker_id
        warming = threading.Thread(target=lambda: reports.append(pool.warm_up(["add"])))
        warming.start()
        desk = pool._desk
        assert desk is not None
        wait_until(pool, lambda: bool(desk.manager.turnstile.waiters))
        assert pool.worker(slot).calls == 0
    warming.join(LAST)
    assert reports[0].succeeded == 4 and counts(pool) == [1] * 4


def test_what_your_code_raises_is_told_of_its_worker_alone(
    pool: Pool[Counter], tmp_path: Path
) -> None:
    """The other commands are called nevertheless, and the worker is well."""
    once = (fails_so_often, (str(tmp_path / "notes"), 1, "raises"))
    report = pool.warm_up([once, "add"], strategy="sequential")
    assert (report.succeeded, report.success_rate, report.complete) == (3, 0.75, True)
    failing, adding = report.commands
    assert failing.succeeded == 3 and adding.succeeded == 4
    assert list(failing.failures) == [0] and isinstance(failing.failures[0], ConnectionError)
    assert counts(pool) == [1] * 4 and pool.stats().workers_lost == 0


def test_death_in_a_command_is_told_and_costs_no_other_worker(pool: Pool[Counter]) -> None:
    pids = {info.pid for info in pool.workers()}
    report = pool.warm_up([kill_self, "add"])
    killing, adding = report.commands
    assert (report.succeeded, report.complete) == (0, True)
    assert sorted(killing.failures) == [0, 1, 2, 3] and adding.succeeded == 0
    assert all(isinstance(error, WorkerDied) for error in killing.failures.values())
    pool.wait_ready(timeout=LAST)
    assert pids.isdisjoint({info.pid for info in pool.workers()})


def test_command_that_hangs_ends_with_its_timeout(pool: Pool[Counter]) -> None:
    report = pool.warm_up([signal.pause], command_timeout=0.2)
    assert report.complete and report.succeeded == 0
    assert all(isinstance(error, CallTimeout) for error in report.commands[0].failures.values())


@pytest.mark.parametrize("strategy, limit", [("parallel", "timeout"), ("staged", "stage_timeout")])
def test_when_the_time_is_over_the_report_is_partial(
    pool: Pool[Counter], strategy: str, limit: str
) -> None:
    """What was done is told; a leased worker is left to its lease."""
    with pool.checkout() as w:
        start = time.monotonic()
        report = pool.warm_up(["add"], strategy, **{limit: 0.4})
        assert time.monotonic() - start < 5.0
        assert not report.complete and report.workers == 4
        assert report.succeeded == report.commands[0].succeeded == 4 - 1
        assert w.call("add") == 1
    assert sorted(counts(pool)) == [1, 1, 1, 1]


def test_time_for_all_ends_a_command_under_way(pool: Pool[Counter]) -> None:
    report = pool.warm_up(["add", signal.pause], timeout=0.5, command_timeout=None)
    assert not report.complete and report.succeeded == 0
    assert report.commands[0].succeeded == 4 and len(report.commands[1].failures) == 4
    pool.wait_ready(timeout=LAST)


def test_booting_worker_is_waited_for(gate: Gate) -> None:
    pool = Pool("troublemakers:StopsAtGateInInit", args=(gate.path,), size=2).open(wait=False)
    gate.wait_arrived(2)
    reports: list[Any] = []
    warming = threading.Thread(target=lambda: reports.append(pool.warm_up(["pid"])))
    gate.open(1)
    pool.wait_ready(1, timeout=LAST)
    warming.start()
    wait_until(pool, lambda: sum(info.calls for info in pool.workers()) == 1)
    gate.open(1)
    warming.join(LAST)
    assert (reports[0].workers, reports[0].succeeded) == (2, 2)
    pool.close()


def test_worker_that_was_let_go_is_not_waited_for(pool: Pool[Counter]) -> None:
    reports: list[Any] = []
    leases = [pool.checkout() for _ in range(4)]
    warming = threading.Thread(target=lambda: reports.append(pool.warm_up(["add"], timeout=LAST)))
    warming.start()
    desk = pool._desk
    assert desk is not None
    wait_until(pool, lambda: len(desk.manager.turnstile.waiters) == 4)
    pool.resize(3)
    for lease in leases:
        lease.release()
    warming.join(LAST / 2)
    assert (reports[0].workers, reports[0].succeeded, reports[0].complete) == (4, 3, True)
    assert isinstance(next(iter(reports[0].commands[0].failures.values())), LookupError)


@pytest.mark.parametrize(
    "commands, error",
    [([("add", (1, 2, 3))], CallMismatch), ([("add", (lambda: 0,))], CallMismatch),
     ([5], ValueError), ("add", ValueError)],
)  # fmt: skip
def test_command_that_cannot_be_sent_is_refused_before_any_has_run(
    pool: Pool[Counter], commands: Any, error: type[Exception]
) -> None:
    good = ["add"] if isinstance(commands, list) else []
    with pytest.raises(error):
        pool.warm_up([*good, *commands] if good else commands)
    assert pool.stats().calls == 0


def test_method_that_is_not_there_is_a_failure_everywhere(pool: Pool[Counter]) -> None:
    """As in any call, only the workers' own objects can tell."""
    failures = pool.warm_up(["no_such_method"]).commands[0].failures
    assert len(failures) == 4
    assert all(isinstance(error, CallMismatch) for error in failures.values())
    with pytest.raises(PoolStartError, match="no_such_method"):
        Pool(Counter, size=1, warm_up=["no_such_method"]).open()


@pytest.mark.parametrize("bad", [{"strategy": "random"}, {"timeout": -1}, {"command_timeout": -1}])
def test_wrong_options_are_refused(pool: Pool[Counter], bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give"):
        pool.warm_up(["add"], **bad)


def test_warm_up_of_nobody_succeeds() -> None:
    with Pool(size=2, lazy=True) as pool:
        report = pool.warm_up([getpid])
        assert (report.workers, report.success_rate, report.complete) == (0, 1.0, True)


def test_listener_in_the_managers_thread_may_warm_up() -> None:
    """It gets the workers that are free, and waits for none."""
    pool, reports = Pool(Counter, size=4), []

    def warm_up(*event: Any) -> None:
        pool.hooks["worker.terminate"].remove(warm_up)
        reports.append(pool.warm_up(["add"], timeout=LAST))

    pool.hooks["worker.terminate"].append(warm_up)
    with pool, pool.checkout() as w:
        handle_of(pool, (w.worker_id + 1) % 4).kill()
        wait_until(pool, lambda: bool(reports))
        report = reports[0]
        assert (report.workers, report.succeeded, report.complete) == (3, 2, False)
        assert report.seconds < LAST / 2


# -- Pool(warm_up=) ------------------------------------------------------------------------------


def test_worker_is_warm_before_anybody_gets_it(start_method: str) -> None:
    """The first ones and those that come after them."""
    commands = [("add", (5,)), (os.getcwd,), ("add", (), {"amount": 2})]
    with Pool(Counter, size=2, warm_up=commands, start_method=start_method) as pool:
        ear = Ear(pool, "recovery")
        assert counts(pool) == [7, 7]
        assert pool.stats().calls == 2, "these calls are nobody's"
        handle_of(pool, 0).kill()
        ear.wait("recovery")
        assert counts(pool) == [7, 7]
        pool.resize(3)
        pool.wait_ready(timeout=LAST)
        assert counts(pool) == [7, 7, 7]


def test_worker_is_not_offered_while_it_warms_up(gate: Gate) -> None:
    pool = Pool(Counter, size=1, warm_up=[(pass_gate, (gate.path,))]).open(wait=False)
    gate.wait_arrived()
    assert pool.stats().starting == 1
    got: list[int] = []
    caller = threading.Thread(target=lambda: got.append(pool.options(timeout=LAST).call("add")))
    caller.start()
    desk = pool._desk
    assert desk is not None
    wait_until(pool, lambda: bool(desk.manager.turnstile.waiters))
    gate.open()
    caller.join(LAST)
    assert got == [1]
    pool.close()


def test_failing_command_is_a_failed_start(start_method: str) -> None:
    pool = Pool(
        Counter, size=1, warm_up=[(fail, (LookupError, "no index"))], start_method=start_method
    )
    with pytest.raises(PoolStartError, match="no index") as caught:
        pool.open()
    assert isinstance(caught.value.__cause__, LookupError)
    assert "in fail" in str(caught.value.__cause__.__cause__), "the remote traceback"
    assert pool.stats().start_failures == 1


def test_command_that_fails_later_backs_off_and_recovers(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.write_text("!!")  # the first worker of all starts well
    command = (fails_so_often, (str(notes), 2, "raises"))
    with Pool(FailsWhileFileExists, args=("",), size=1, warm_up=[command]) as pool:
        ear = Ear(pool, "error", "recovery")
        pool.call("pid")
        notes.write_text("")
        handle_of(pool).kill()
        ear.wait("error", 2, fits=lambda event: event.metadata["kind"] == "start")
        ear.wait("recovery")
        assert pool.options(timeout=LAST).call("pid") and pool.stats().start_failures == 2


def test_command_that_hangs_is_bounded_by_init_timeout() -> None:
    pool = Pool(size=1, warm_up=[signal.pause], init_timeout=0.5)
    with pytest.raises(PoolStartError, match=r"not ready within 0\.5 s"):
        pool.open()


@pytest.mark.parametrize("commands", [[("add", (1, 2, 3))], [("add", (lambda: 0,))], [lambda: 0]])
def test_wrong_command_is_refused_at_construction(commands: list[Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Pool(Counter, size=1, warm_up=commands)
    assert caught.value.option == "warm_up" and str(caught.value).startswith("warm_up=")


def test_commands_go_through_the_codec_of_the_pool() -> None:
    with Pool(
        Counter, size=1, codec=json, warm_up=[("add", (3,)), ("add", (), {"amount": 4})]
    ) as pool:
        assert pool.call("add", 0) == 7


def test_names_of_methods_may_come_from_the_environment() -> None:
    from minipool import PoolConfig

    config = PoolConfig.from_env({"MINIPOOL_WARM_UP": "add,add"}, size=1)
    with Pool(Counter, config=config) as pool:
        assert pool.call("add", 0) == 2
