"""Forensics: a worker that crashed, hung or was killed is told of well enough to mend it."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import scripts
import wrecks
from ears import Ear, wait_until
from gates import Gate
from minipool import (
    CallMismatch,
    CallTimeout,
    Death,
    LeaseRevoked,
    Pool,
    PoolStartError,
    WorkerDied,
    WorkerStartError,
)
from minipool.engine import blackbox as blackbox_module
from minipool.engine import handle as handle_module
from minipool.engine import manager as manager_module
from minipool.engine import process as process_module
from minipool.engine.blackbox import _apart, brief
from minipool.engine.oom import OomKills
from rogues import Stateful
from troublemakers import StopsAtGateInInit

LAST = 20.0
CRASHES = ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE"]


@pytest.fixture(autouse=True)
def patient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give workers on a loaded machine all the time to answer, but where it is the time we test."""
    if not request.node.get_closest_marker("impatient"):
        monkeypatch.setattr(handle_module, "_LAST_WORDS", LAST)
        monkeypatch.setattr(blackbox_module, "PATIENCE", LAST)


@pytest.fixture
def pool() -> Iterator[Pool[Stateful]]:
    with Pool(Stateful, size=1, checkout_timeout=LAST) as made:
        yield made


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def too_late(pool: Pool[Any], target: Any, *args: Any, timeout: float = 0.1) -> CallTimeout:
    with pytest.raises(CallTimeout) as caught:
        pool.options(timeout=timeout).call(target, *args)
    return caught.value


def died(pool: Pool[Any], target: Any, *args: Any) -> WorkerDied:
    with pytest.raises(WorkerDied) as caught:
        pool.call(target, *args)
    return caught.value


def last_death(pool: Pool[Any], count: int = 1) -> Death:
    wait_until(pool, lambda: len(pool.deaths()) >= count)
    return pool.deaths()[-1]


def line_of(function: Callable[..., Any], text: str) -> str:
    """Return how a stack shows that line of a function."""
    code = function.__code__
    lines = Path(code.co_filename).read_text().splitlines()
    number = next(i for i in itertools.count(code.co_firstlineno) if text in lines[i]) + 1
    return f'File "{code.co_filename}", line {number} in {code.co_name}'


# -- too late ------------------------------------------------------------------------------------


@pytest.mark.parametrize("portable", ["", "1"])
def test_timeout_shows_the_line_the_worker_was_on(
    start_method: str, portable: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it ran Python or sat in a C function that holds the GIL."""
    monkeypatch.setenv("MINIPOOL_PORTABLE", portable)
    with Pool(size=1, start_method=start_method, checkout_timeout=LAST) as pool:
        stack = too_late(pool, wrecks.stand, gate.path, timeout=0.5).stack
        assert line_of(wrecks.stand, "return pass_gate") in stack
        stack = too_late(pool, wrecks.stand_in_c, gate.path, timeout=0.5).stack
        assert line_of(wrecks.stand_in_c, ".read(") in stack
        assert "multiprocessing" not in stack, "how it came to its loop is not told"


def test_timeout_shows_every_thread(pool: Pool[Stateful], gate: Gate) -> None:
    stack = too_late(pool, wrecks.stand_with_a_thread, gate.path, timeout=0.5).stack
    assert "in second_thread" in stack
    assert "in stand_with_a_thread" in brief(stack)
    assert "in second_thread" not in brief(stack)


def test_timeout_leaves_an_exit_like_any_other_kill(pool: Pool[Stateful], gate: Gate) -> None:
    """By which signal the worker was made to speak is nobody's business."""
    ear = Ear(pool, "worker.terminate")
    too_late(pool, "wait_at", gate.path)
    facts = ear.wait("worker.terminate").metadata
    assert facts["exitcode"] == -signal.SIGKILL
    assert facts["reason"] == "too late during 'wait_at'"


@pytest.mark.impatient
def test_timeout_does_not_wait_for_a_worker_that_cannot_answer(
    pool: Pool[Stateful], gate: Gate
) -> None:
    """Stopped, or with its signals blocked, when there is no stack: no delay but a moment."""
    for prepare in (_stop, _deafen):
        with pool.checkout() as w:
            prepare(w)
            start = time.monotonic()
            with pytest.raises(CallTimeout) as caught:
                w.options(timeout=0.1).call("wait_at", gate.path)
            assert time.monotonic() - start < LAST / 4
        assert (caught.value.stack == "") is (prepare is _deafen)
    assert pool.call("get") == 0


def _stop(w: Any) -> None:
    assert w.call("get") == 0
    os.kill(w.pid, signal.SIGSTOP)


def _deafen(w: Any) -> None:
    w.call(wrecks.block_all_signals)


def test_revoked_lease_leaves_the_stack(gate: Gate) -> None:
    with Pool(Stateful, size=1, lease_timeout=0.2, checkout_timeout=LAST) as pool:
        with pytest.raises(LeaseRevoked):
            pool.call(wrecks.stand_in_c, gate.path)
        death = last_death(pool)
    assert "lease_timeout" in death.reason
    assert "in stand_in_c" in death.stack


def test_worker_that_hangs_in_a_probe_leaves_the_stack() -> None:
    with Pool(
        wrecks.HangsWhenProbed, size=1, health_check_interval=0.05, health_check_timeout=0.1,
        max_health_failures=2,
    ) as pool:  # fmt: skip
        death = last_death(pool)
    assert death.reason == "failed 2 health checks in a row"
    assert "in health_check" in death.stack
    assert (death.call, death.started, death.call_age) == (None, False, None)


def test_revoked_worker_that_is_stopped_ends_all_the_same() -> None:
    with Pool(Stateful, size=1, lease_timeout=0.2, checkout_timeout=LAST) as pool:
        with pool.checkout() as w:
            pid = w.pid
            os.kill(pid or 0, signal.SIGSTOP)
            assert last_death(pool).pid == pid
        assert pool.call("get") == 0


# -- crashes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CRASHES)
def test_crash_shows_the_line_it_happened_on(start_method: str, name: str) -> None:
    crash = getattr(wrecks, f"crash_by_{name.lower()}")
    with Pool(size=1, start_method=start_method) as pool:
        error = died(pool, crash)
        death = last_death(pool)
    assert error.signal == name and error.started
    assert f"in {crash.__name__}" in error.stack and "Fatal Python error" in error.stack
    assert error.call_age is not None and 0 <= error.call_age < LAST
    assert error.rss_bytes > 1_000_000
    assert pickle.loads(pickle.dumps(error)).stack == error.stack
    assert death.stack == error.stack
    assert (death.worker_id, death.pid, death.signal) == (0, error.pid, name)
    assert (death.reason, death.calls, death.started) == (f"by {name}", 1, True)
    assert death.call == f"wrecks:{crash.__name__}"
    assert abs(death.time - time.time()) < 60 and 0 < death.uptime < LAST


def test_killed_worker_had_no_time_to_say_anything(pool: Pool[Stateful], gate: Gate) -> None:
    """What it said when it was asked earlier is not taken for its last words."""
    pool.dump()
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(died, pool, "wait_at", gate.path)
        gate.wait_arrived()
        pool.dump()
        os.kill(pool.workers()[0].pid or 0, signal.SIGKILL)
        error = call.result(LAST)
    assert (error.signal, error.stack, error.out_of_memory) == ("SIGKILL", "", False)


def test_crash_of_a_process_that_the_worker_forked_is_not_its_own(pool: Pool[Stateful]) -> None:
    assert os.WTERMSIG(pool.call(wrecks.crash_in_a_child)) == signal.SIGSEGV
    error = died(pool, os._exit, 3)
    assert (error.exitcode, error.stack) == (3, "")


def test_death_of_an_idle_worker_is_remembered(pool: Pool[Stateful]) -> None:
    assert pool.call("add", 1) == 1
    pid = pool.workers()[0].pid
    os.kill(pid or 0, signal.SIGKILL)
    death = last_death(pool)
    assert (death.pid, death.call, death.calls, death.started) == (pid, None, 1, False)


def test_only_deaths_that_nobody_wanted_are_remembered() -> None:
    with Pool(Stateful, size=2) as pool:
        pool.drain()
        wait_until(pool, lambda: pool.stats().workers_retired == 2)
        assert pool.call("get") == 0
    assert pool.deaths() == []
    assert Pool(Stateful).deaths() == []


def test_last_hundred_deaths_are_remembered(pool: Pool[Stateful]) -> None:
    """Oldest first, also after the pool was closed; each is frozen."""
    generations = []
    for number in range(105):
        with pool.checkout() as w:
            generations.append(w.generation)
            with pytest.raises(WorkerDied):
                w.call(os._exit, 1 + number % 100)
    wait_until(pool, lambda: pool.stats().workers_lost == 105)
    pool.close()
    assert [death.generation for death in pool.deaths()] == generations[5:]
    with pytest.raises(AttributeError):
        pool.deaths()[0].pid = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "worker, init_timeout", [(wrecks.HangsInInit, 0.5), (wrecks.CrashesInInit, 20.0)]
)
def test_worker_that_does_not_start_shows_where(worker: Any, init_timeout: float) -> None:
    """One that crashes is tried again, so it needs the time to get that far each time."""
    with pytest.raises(PoolStartError) as caught:
        Pool(worker, size=1, init_timeout=init_timeout).open()
    cause = caught.value.__cause__
    assert isinstance(cause, WorkerStartError)
    assert "in __init__" in cause.stack


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before 3.11")
def test_short_form_is_a_note(pool: Pool[Stateful], gate: Gate) -> None:
    (note,) = too_late(pool, wrecks.stand, gate.path).__notes__  # type: ignore[attr-defined]
    head, *lines = note.splitlines()
    assert head == "worker 0, most recent call first:"
    assert line_of(wrecks.stand, "return pass_gate").strip() == lines[-1].strip()
    assert "child.py" not in note


def test_nothing_is_called_by_no_name(pool: Pool[Stateful]) -> None:
    """A call under way is known by its name, so there must be one."""
    with pytest.raises(CallMismatch, match="name of nothing"):
        pool.call("")


# -- dump ----------------------------------------------------------------------------------------


def test_dump_shows_every_worker_and_stops_none(
    start_method: str, gate: Gate, callers: ThreadPoolExecutor
) -> None:
    """Idle, busy in Python, and in C with the GIL held; twice, because it leaves no trace."""
    with Pool(Stateful, size=3, start_method=start_method, checkout_timeout=LAST) as pool:
        before = {info.worker_id: info.pid for info in pool.workers()}
        calls = [
            callers.submit(pool.call, function, gate.path)
            for function in (wrecks.stand, wrecks.stand_in_c)
        ]
        gate.wait_arrived(2)
        for _ in range(2):
            dump = pool.dump()
            assert set(dump) == {0, 1, 2}
            texts = list(dump.values())
            for name in ("stand", "stand_in_c"):
                assert sum(f" in {name}\n" in text for text in texts) == 1, texts
            assert all('child.py"' in text for text in texts), texts
            assert [text.count("most recent call first") for text in texts] == [1, 1, 1], texts
        gate.open(2)
        assert {call.result(LAST) for call in calls} <= set(before.values())
        assert {info.worker_id: info.pid for info in pool.workers()} == before
        assert pool.deaths() == []


def test_dumps_of_many_threads_at_once_are_whole(callers: ThreadPoolExecutor) -> None:
    with Pool(Stateful, size=2) as pool:
        dumps = [callers.submit(pool.dump) for _ in range(20)]
        for dump in dumps:
            assert all('child.py"' in text for text in dump.result(LAST).values())
        assert pool.deaths() == []


@pytest.mark.impatient
def test_dump_waits_for_a_stopped_worker_only_so_long(
    pool: Pool[Stateful], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not take its late answer for anything."""
    pid = pool.workers()[0].pid
    assert pool.call("get") == 0
    os.kill(pid or 0, signal.SIGSTOP)
    start = time.monotonic()
    assert pool.dump() == {0: ""}
    assert time.monotonic() - start < 5
    os.kill(pid or 0, signal.SIGCONT)
    assert pool.call("add", 1) == 1
    assert pool.workers()[0].pid == pid
    monkeypatch.setattr(blackbox_module, "PATIENCE", LAST)
    assert 'child.py"' in pool.dump()[0]
    assert died(pool, os._exit, 3).stack == ""


def test_dump_spares_a_worker_that_is_booting(gate: Gate) -> None:
    """The signal would end a process that does not know it yet."""
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=1)
    try:
        pool.open(wait=False)
        gate.wait_arrived()
        assert pool.dump() == {0: ""}
        pid = pool.workers()[0].pid
        gate.open()
        pool.wait_ready(timeout=LAST)
        assert pool.call("pid") == pid
    finally:
        pool.terminate()


def test_who_asks_one_that_has_crashed_does_not_make_it_forgotten() -> None:
    """A dump may come between the crash and its being heard of."""
    box = blackbox_module.make()
    assert box is not None
    try:
        theirs = box.lend()
        assert theirs is not None
        crash = "Fatal Python error: Bus error\n\nCurrent thread 0x1 (most recent call first):\n  a"
        os.write(theirs.fd, crash.encode())
        theirs.close()
        assert box.ask(lambda signum: True, signal.SIGUSR1) is None
        assert box.last() == crash
    finally:
        box.close()


def test_answers_are_taken_apart() -> None:
    """Also after one that was still being written when the next was asked for, torn anywhere."""
    other, main = "Thread 0x1 (most recent):\n  a", "Current thread 0x2 (most recent):\n  b"
    whole = f"{other}\n\n{main}\n"
    assert _apart(whole + whole + other[:9])[:2] == [f"{other}\n\n{main}"] * 2
    assert _apart(whole) == [f"{other}\n\n{main}"]
    for cut in range(len(whole)):
        first, *_, last = _apart(whole[cut:] + 2 * whole)
        assert first in (f"{other}\n\n{main}", main)
        assert last == f"{other}\n\n{main}"


# -- the out-of-memory killer --------------------------------------------------------------------

EVENTS_V2 = "low 0\nhigh 0\nmax 9\noom {0}\noom_kill {0}\noom_group_kill 0\n"
CONTROL_V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {0}\n"
VMSTAT = "nr_free_pages 17\noom_kill {0}\nnuma_hit 4\n"


@pytest.mark.parametrize("kernels", [EVENTS_V2, CONTROL_V1, VMSTAT])
def test_kill_that_the_kernel_counted_is_told_as_such(
    kernels: str, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One count explains one death: the next SIGKILL is nobody's but who sent it."""
    counter = tmp_path / "counter"
    counter.write_text(kernels.format(3))
    kills = OomKills(str(counter))
    monkeypatch.setattr(manager_module, "OOM_KILLS", kills)
    monkeypatch.setattr(process_module, "OOM_KILLS", kills)
    with Pool(Stateful, size=1, checkout_timeout=LAST) as pool:
        for count, starved in ((4, True), (4, False), (5, True)):
            with pool.checkout() as w, ThreadPoolExecutor(1) as caller:
                call = caller.submit(_death_of, w, gate)
                gate.wait_arrived()
                counter.write_text(kernels.format(count))  # the kernel counts before it kills
                os.kill(w.pid or 0, signal.SIGKILL)
                error = call.result(LAST)
            assert error.out_of_memory is starved
            assert ("killed by the kernel's out-of-memory killer" in str(error)) is starved
        wait_until(pool, lambda: len(pool.deaths()) == 3)
        assert [death.out_of_memory for death in pool.deaths()] == [True, False, True]
        assert "out-of-memory" in pool.deaths()[0].reason


@pytest.fixture
def starving() -> Iterator[Path]:
    """A control group inside ours in which there are 200 MB of memory."""
    folder, limit = _group_of_ours()
    group = folder / f"minipool-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as problem:
        pytest.skip(f"no control group of our own: {problem}")
    try:
        (group / limit).write_text(str(200 << 20))
        yield group
    except OSError as problem:
        pytest.skip(f"memory cannot be limited here: {problem}")
    finally:
        scripts.wait_gone(*map(int, (group / "cgroup.procs").read_text().split()))
        group.rmdir()


def _group_of_ours() -> tuple[Path, str]:
    """Return our control group's folder, and the name of what limits the memory of one in it."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return Path(f"/sys/fs/cgroup/memory{path}"), "memory.limit_in_bytes"
    return Path(f"/sys/fs/cgroup{lines[-1].split(':', 2)[2]}"), "memory.max"


HOARDING = """
    import os, sys
    from minipool import Pool, WorkerDied
    from workers import getpid
    from wrecks import hoard

    if __name__ == "__main__":
        with open(os.path.join(sys.argv[2], "cgroup.procs"), "w") as group:
            group.write(str(os.getpid()))
        with Pool(size=2, start_method=sys.argv[1]) as pool:
            try:
                pool.call(hoard, 500 << 20)
            except WorkerDied as error:
                print(error.signal, error.out_of_memory, "out-of-memory killer" in str(error))
            print(pool.call(getpid) != os.getpid(), pool.deaths()[-1].out_of_memory)
"""


@pytest.mark.skipif(not Path("/sys/fs/cgroup").exists(), reason="there are no control groups")
def test_worker_that_the_kernel_kills_for_memory_is_known(
    tmp_path: Path, start_method: str, starving: Path
) -> None:
    """Really done: in a group with little memory the kernel kills who takes too much."""
    code, out, err = scripts.run(tmp_path, HOARDING, start_method, str(starving))
    assert (code, out.splitlines()) == (0, ["SIGKILL True True", "True True"]), err


def _death_of(w: Any, gate: Gate) -> WorkerDied:
    with pytest.raises(WorkerDied) as caught:
        w.call("wait_at", gate.path)
    return caught.value


def test_timeout_is_no_lack_of_memory(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of our own kills it is known whose they are, whatever the kernel counts."""
    counter = tmp_path / "counter"
    counter.write_text(VMSTAT.format(0))
    kills = OomKills(str(counter))
    monkeypatch.setattr(manager_module, "OOM_KILLS", kills)
    monkeypatch.setattr(process_module, "OOM_KILLS", kills)
    with Pool(Stateful, size=1, checkout_timeout=LAST) as pool:
        counter.write_text(VMSTAT.format(1))
        too_late(pool, "wait_at", gate.path)
        assert last_death(pool).out_of_memory is False


def test_old_count_explains_nothing(tmp_path: Path) -> None:
    now = 100.0
    counter = tmp_path / "counter"
    counter.write_text(VMSTAT.format(7))
    kills = OomKills(str(counter), clock=lambda: now)
    kills.look()
    assert not kills.explain(), "counted before anybody looked"
    counter.write_text(VMSTAT.format(8))
    now += 1
    kills.look()
    assert kills.explain(), "counted a moment ago"
    assert not kills.explain()
    counter.write_text(VMSTAT.format(9))
    for _ in range(2):
        now += 1
        kills.look()
    assert not kills.explain(), "counted two looks ago"


def test_counter_stays_open_while_anybody_looks_and_no_longer(tmp_path: Path) -> None:
    """Of several managers the last one gives it back; who asks after that leaves nothing open."""
    counter = tmp_path / "counter"
    counter.write_text(VMSTAT.format(1))
    kills = OomKills(str(counter))

    def taken() -> int:
        return [
            os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
        ].count(str(counter))

    kills.begin(), kills.begin()
    assert taken() == 1
    kills.look()
    kills.end()
    assert taken() == 1
    kills.end()
    assert taken() == 0
    counter.write_text(VMSTAT.format(2))
    assert kills.explain() and taken() == 0


def test_forked_process_does_not_wait_for_a_thread_that_is_not_in_it(tmp_path: Path) -> None:
    """The thread that was looking at the moment of the fork holds the lock for ever there."""
    counter = tmp_path / "counter"
    counter.write_text(VMSTAT.format(1))
    kills = OomKills(str(counter))
    kills.begin()
    with ThreadPoolExecutor(1) as other:
        other.submit(kills._explaining._lock.acquire).result(LAST)
        kills.abandon()  # as after a fork
        assert not kills._fds
        kills.look()
        assert not kills.explain()


def test_kernel_that_does_not_count_explains_nothing(tmp_path: Path) -> None:
    for content in (None, "", "oom_kill", "oom_kill many"):
        counter = tmp_path / "counter"
        if content is not None:
            counter.write_text(content)
        kills = OomKills(str(counter))
        kills.look()
        assert not kills.explain()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux counts")
def test_counter_of_this_machine_is_found_and_read() -> None:
    from minipool.engine import oom

    path = oom._path()
    assert "oom_kill " in Path(path).read_text()
    OomKills().look()
