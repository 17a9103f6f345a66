"""`python -m minipool top`: pools are seen from outside, as they are, and do not notice."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from ears import Ear, wait_until
from gates import Gate, pass_gate
from minipool import Pool
from minipool.engine import table as t
from minipool.engine.states import WorkerState as S
from minipool.engine.table import Table
from minipool.observe import onlooker, top
from minipool.observe.onlooker import PoolSight, WorkerSight, look
from minipool.observe.watch import SPAN, Watch, as_object
from minipool.tools import procfs
from rogues import Stateful, raise_it
from scripts import ROOT, finish, start, wait_gone
from terminals import Terminal
from workers import identity

LAST = 20.0
ME = os.getpid()
PORTABLE = bool(os.environ.get("MINIPOOL_PORTABLE"))
pytestmark = pytest.mark.skipif(
    not onlooker.available() or PORTABLE, reason="there is no table to be seen from outside"
)


def seen(pid: int = ME) -> PoolSight:
    """Return the one pool of a process, as it is seen from outside."""
    pools, unreadable = look(pid)
    assert not unreadable
    (sight,) = pools
    return sight


def wait_told(pool: Pool[Any], condition: Callable[[PoolSight], bool]) -> PoolSight:
    """Wait until the manager has told something, once more than a tick from now."""
    wait_until(pool, lambda: condition(seen()))
    return seen()


def signal_until(pid: int, signum: int, stopped: bool) -> None:
    """Stop a process, or let it go on; return when the kernel has done it."""
    os.kill(pid, signum)
    deadline = time.monotonic() + LAST
    while (procfs.stat(pid)[0] == "T") != stopped:
        assert time.monotonic() < deadline


# -- what is seen --------------------------------------------------------------------------------


def test_pool_is_seen_as_it_is(start_method: str) -> None:
    """Name, process, workers, generations and counts are those that the pool tells itself."""
    with Pool(Stateful, size=2, name="sëen", start_method=start_method, overflow_idle=0.1) as pool:
        ear = Ear(pool, "recovery")
        for _ in range(10):
            pool.call("add", 1)
        with pytest.raises(KeyError):
            pool.call(raise_it, "KeyError", "k")
        used = max(pool.workers(), key=lambda worker: worker.calls)
        os.kill(used.pid or 0, signal.SIGKILL)
        ear.wait("recovery")
        sight = wait_told(pool, lambda sight: sight.started == 3)

        stats, workers = pool.stats(), pool.workers()
        assert (sight.name, sight.pid, sight.status) == ("sëen", ME, "open")
        assert (sight.size, sight.lost, sight.retired, sight.start_failures) == (2, 1, 0, 0)
        assert sight.leases == stats.leases == 11 and sum(sight.call_times) == stats.calls == 11
        assert [(w.worker_id, w.generation, w.pid, w.state, w.calls) for w in sight.workers] == [
            (w.worker_id, w.generation, w.pid, w.state, w.calls) for w in workers
        ]
        assert sum(worker.raised for worker in sight.workers) <= 1
        assert all(worker.rss_bytes > 1_000_000 for worker in sight.workers)
    assert look(ME) == ([], [])


def test_header_words_are_told_once_a_tick(gate: Gate) -> None:
    """Size and line, which only the parent knows; and that the pool is closing."""
    with Pool(Stateful, size=1, overflow_idle=0.1) as pool:
        with pool.checkout() as w:
            waiter = threading.Thread(target=lambda: pool.call("add", 1))
            waiter.start()
            wait_told(pool, lambda sight: sight.waiting == 1)
            w.call("add", 1)
        waiter.join(LAST)
        pool.resize(3)
        wait_told(pool, lambda sight: (sight.size, sight.waiting) == (3, 0))
        lease = pool.checkout()
        closing = threading.Thread(target=pool.close)
        closing.start()
        wait_told(pool, lambda sight: sight.status == "closing")
        lease.release()
        closing.join(LAST)


def test_call_that_hangs_is_seen_with_its_time(gate: Gate) -> None:
    """For how long it has run, from the moment it began."""
    with Pool(size=2) as pool:
        caller = threading.Thread(target=lambda: pool.call(pass_gate, gate.path))
        caller.start()
        gate.wait_arrived()
        before = time.monotonic()
        views, _ = Watch(ME, stuck=1e-9).look()
        views_later, _ = Watch(ME).look()
        worker, idle = sorted(views[0].workers, key=lambda each: each.sight.state, reverse=True)

        assert worker.stuck and worker.sight.state == "leased" and not idle.stuck
        assert 0 < (worker.sight.in_call_for or 0) <= (worker.sight.leased_for or 0) < LAST
        assert (worker.sight.in_call_for or 0) <= time.monotonic() - before + LAST
        assert top.state_of(worker).startswith("STUCK ")
        assert [top.state_of(w)[:7] for w in views_later[0].workers if w.sight.in_call_for] == [
            "calling"
        ]
        gate.open()
        caller.join(LAST)


def test_stopped_worker_is_seen_as_such(start_method: str) -> None:
    """From the first look that finds it so; it is not taken for idle, nor for dead."""
    with Pool(size=2, start_method=start_method) as pool:
        watch, victim = Watch(ME), pool.workers()[1]
        watch.look()
        signal_until(victim.pid or 0, signal.SIGSTOP, stopped=True)
        (first,), _ = watch.look()
        (second,), _ = watch.look()
        signal_until(victim.pid or 0, signal.SIGCONT, stopped=False)
        (third,), _ = watch.look()

    assert [w.sight.process == "stopped" for w in first.workers] == [False, True]
    assert first.workers[0].stopped_for is None and first.workers[1].stopped_for == 0
    assert second.workers[1].stopped_for == pytest.approx(second.sight.at - first.sight.at)
    assert top.state_of(second.workers[1]).startswith("STOPPED ")
    assert third.workers[1].stopped_for is None


PARENT = """
import sys, threading
from minipool import Pool
if __name__ == "__main__":
    with Pool(size=2, name="of a script") as pool:
        pool.call(abs, -1)
        print(*(worker.pid for worker in pool.workers()), flush=True)
        threading.Thread(target=sys.stdin.read, daemon=True).start()
        end = threading.Event()
        while not end.wait(0.001):
            pool.call(abs, -1)
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process of its own with a pool that is busy, and the workers' pids."""
    process = start(tmp_path, PARENT)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    yield process, pids
    process.kill()
    finish(process)
    wait_gone(*pids)


def test_pool_of_a_stopped_parent_is_read(parent: tuple[subprocess.Popen[str], list[int]]) -> None:
    """Nothing of it runs; its table is there all the same, and how long it has been stopped."""
    process, pids = parent
    watch = Watch(process.pid)
    watch.look()
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    (first,), _ = watch.look()
    (second,), unreadable = watch.look()

    assert not unreadable
    assert first.sight.name == "of a script" and first.sight.status == "stopped"
    assert [worker.sight.pid for worker in second.workers] == pids
    assert second.stopped_for == pytest.approx(second.sight.at - first.sight.at)
    assert top.lines([second], [])[0][1] == "bad" and "STOPPED" in top.lines([second], [])[0][0]
    assert second.sight.leases == first.sight.leases > 0


def test_worker_that_died_under_a_stopped_parent_is_seen_dead(
    parent: tuple[subprocess.Popen[str], list[int]],
) -> None:
    """The pool cannot know it yet, and its table says idle; the process says otherwise."""
    process, pids = parent
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    os.kill(pids[0], signal.SIGKILL)
    wait_gone(pids[0])
    (view,), _ = Watch(process.pid).look()
    assert top.state_of(view.workers[0]) == "DEAD"


def test_pool_may_die_at_any_moment(tmp_path: Path) -> None:
    """It is there or it is not; looking never fails, whatever happens meanwhile."""
    process = start(tmp_path, PARENT)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    watch = Watch(process.pid)
    assert len(watch.look()[0]) == 1
    process.kill()
    while watch.look()[0]:
        pass
    finish(process)
    wait_gone(*pids)
    assert watch.look() == ([], [(process.pid, "", "there is no such process")])


def test_pools_that_come_and_go_are_looked_at_all_the_while() -> None:
    """Opening, closing, replacing: each look is whole, and none fails."""
    over, wrong, found = threading.Event(), [], set()

    def look_on() -> None:
        while not over.is_set():
            try:
                pools, unreadable = look(ME)
                assert not unreadable
                found.update(pool.name for pool in pools)
            except BaseException as error:
                wrong.append(error)
                return

    onlooking = threading.Thread(target=look_on)
    onlooking.start()
    try:
        for number in range(6):
            with Pool(size=1, name=f"number {number}") as pool:
                pool.call(identity, 1)
                pool.drain()
    finally:
        over.set()
        onlooking.join(LAST)
    assert not wrong
    assert found


# -- rows and tables that are not as they should be ----------------------------------------------


@pytest.fixture
def table() -> Iterator[Table]:
    made = Table("by hand")
    assert made.fd is not None
    yield made
    made.close()


def test_table_of_another_layout_is_told_of(table: Table) -> None:
    table._words[t.H_LAYOUT] = 99
    pools, (problem,) = look(ME)
    assert pools == []
    assert problem.name == "by hand" and "layout 99" in problem.reason
    assert problem.reason in top.lines([], [problem])[0][0]


@pytest.mark.parametrize(("word", "value", "said"), [
    (t.H_MAGIC, 7, "no table of minipool"), (t.H_ROW_WORDS, 8, "layout"),
    (t.H_ROWS, -1, "damaged"), (t.H_ROWS, 10**6, "damaged"),
])  # fmt: skip
def test_damaged_table_is_told_of(table: Table, word: int, value: int, said: str) -> None:
    table._words[word] = value
    pools, (problem,) = look(ME)
    assert pools == [] and said in problem.reason


def test_table_that_is_being_made_is_passed_over(table: Table) -> None:
    """Its magic is written last; before that even its size may be missing."""
    table._words[t.H_MAGIC] = 0
    empty = os.memfd_create("minipool:empty")
    try:
        assert look(ME) == ([], [])
    finally:
        os.close(empty)


@pytest.mark.parametrize("kind", ["socket", "pipe", "file", "nothing"])
def test_number_that_became_another_files_is_passed_over(
    kind: str, monkeypatch: Any, tmp_path: Path
) -> None:
    """Between finding a table and opening it the pool may close it, and open something else."""
    (tmp_path / "file").write_bytes(b"x" * 8192)
    one, other = {
        "socket": lambda: [end.detach() for end in socket.socketpair()],
        "pipe": os.pipe,
        "file": lambda: [os.open(tmp_path / "file", os.O_RDONLY), os.open("/", os.O_RDONLY)],
        "nothing": lambda: [os.dup(0), os.dup(0)],
    }[kind]()
    monkeypatch.setattr(onlooker, "_tables", lambda pid: [(one, "was here"), (other, "too")])
    if kind == "nothing":
        os.close(one), os.close(other)
    assert look(ME) == ([], [])
    if kind != "nothing":
        os.close(one), os.close(other)


def test_copy_in_a_forked_child_is_no_pool(table: Table) -> None:
    """Its owner is another process, which may be gone long since."""
    table._words[t.H_PID] = 1
    assert look(ME) == ([], [])


def test_looking_changes_and_costs_nothing(table: Table) -> None:
    """No word is written, no page of the table comes into being, no descriptor is left."""
    assert table.fd is not None
    row = table.row(3)
    row[t.STATE], row[t.PID] = S.IDLE, ME
    before = bytes(table._words[: 5 * t.ROW_WORDS]), os.fstat(table.fd).st_blocks
    descriptors = len(os.listdir("/proc/self/fd"))
    seen()
    assert (bytes(table._words[: 5 * t.ROW_WORDS]), os.fstat(table.fd).st_blocks) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_booting_worker_does_not_show_its_predecessors_words(table: Table) -> None:
    """Until it is ready its calls are nobody's."""
    row = table.row(0)
    row[t.STATE], row[t.GENERATION], row[t.READY_GENERATION], row[t.CALL_ID] = S.STARTING, 2, 1, 50
    (worker,) = seen().workers
    assert (worker.state, worker.generation, worker.calls, worker.quiet_for) == (
        "starting",
        2,
        0,
        None,
    )


class Replaced:
    """A row whose worker is replaced while it is read: one step before each of these reads."""

    def __init__(self, table: Table, moments: tuple[int, ...]) -> None:
        row = self.row = table.row(0)
        row[t.STATE], row[t.GENERATION], row[t.PID], row[t.READY_GENERATION] = S.IDLE, 1, 1, 1
        row[t.CALL_ID] = row[t.FAILURES] = 1
        self.words, self.reads, self.moments = table._words, 0, moments
        self.steps = iter([self.reap, self.prepare, self.start, self.get_ready, self.call])

    def reap(self) -> None:
        self.row[t.STATE] = S.VACANT

    def prepare(self) -> None:
        self.row[t.WORKER_WORDS] = memoryview(bytes(72)).cast("q")

    def start(self) -> None:
        self.row[t.GENERATION] = self.row[t.PID] = 2
        self.row[t.STATE] = S.STARTING

    def get_ready(self) -> None:
        self.row[t.READY_GENERATION] = 2
        self.row[t.STATE] = S.IDLE

    def call(self) -> None:
        self.row[t.CALL_ID] = self.row[t.FAILURES] = 2

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self
        for _ in range(self.moments.count(self.reads)):
            next(self.steps)()
        self.reads += 1
        return self.words[index]

    def tolist(self) -> list[int]:
        """Copy the words that matter one by one: anything may happen in between."""
        found = [0] * t.ROW_WORDS
        for word in (t.STATE, t.GENERATION, t.PID, t.READY_GENERATION, t.CALL_ID, t.FAILURES):
            found[word] = self[t.ROW_WORDS + word]
        return found


def test_row_is_never_shown_of_two_generations(table: Table) -> None:
    """However the steps of a replacement fall between the reads, each sight is of one worker."""
    seen_generations = set()
    for moments in itertools.combinations_with_replacement(range(13), 5):
        row = onlooker._row(Replaced(table, moments), 0)  # type: ignore[arg-type]
        generation = row[t.GENERATION]
        seen_generations.add(generation)
        assert row[t.STATE] == S.VACANT or row[t.PID] == generation, moments
        assert row[t.READY_GENERATION] in (0, generation), moments
        assert row[t.CALL_ID] in (0, generation), moments
        assert row[t.FAILURES] in (0, generation), moments
    assert seen_generations == {1, 2}


def test_strangers_process_with_a_workers_pid_is_not_taken_for_it(monkeypatch: Any) -> None:
    """A worker is a child of its parent, or of the fork server's; the rest has only its number."""
    parents = {10: 5, 11: 6, 6: 5, 12: 7, 7: 8, 13: 1}
    monkeypatch.setattr(
        onlooker, "_process", lambda pid: onlooker.Process("sleeping", parents.get(pid, 0), 0.0, 1)
    )
    states = [onlooker._worker_process(pid, owner=5).state for pid in (10, 11, 12, 13)]
    assert states == ["sleeping", "sleeping", "gone", "sleeping"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("user", [0, 65534], ids=["own", "other"])
def test_other_users_processes_are_passed_over(table: Table, user: int) -> None:
    """Also where we might look; who asks for one by its pid is told why not."""
    assert table.fd is not None
    holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[table.fd], user=user)
    table._words[t.H_PID] = holder.pid
    try:
        everywhere, (pools, unreadable) = look()[0], look(holder.pid)
    finally:
        holder.communicate()
    assert (holder.pid in {pool.pid for pool in everywhere}) == (user == 0)
    if user == 0:
        assert [pool.name for pool in pools] == ["by hand"] and unreadable == []
    else:
        assert (pools, unreadable) == ([], [(holder.pid, "", "it belongs to another user")])


# -- rates ---------------------------------------------------------------------------------------


def histogram(**counts: int) -> list[int]:
    """Return a histogram with so many durations, named as us100=3."""
    found = [0] * t.BUCKETS
    for name, count in counts.items():
        found[t.bucket(int(name[2:]) * 1000)] += count
    return found


def worker_at(**facts: Any) -> WorkerSight:
    blank: dict[str, Any] = dict.fromkeys(WorkerSight._fields, 0)
    blank.update(state="idle", process="sleeping", in_call_for=None, leased_for=None,
                 quiet_for=None, wait_times=histogram(), call_times=histogram())  # fmt: skip
    return WorkerSight(**{**blank, **facts})


def pool_at(at: float, *workers: WorkerSight, **facts: Any) -> PoolSight:
    blank: dict[str, Any] = dict.fromkeys(PoolSight._fields, 0)
    blank.update(at=at, name="p", opened=100.0, status="open", workers=workers)
    for name in ("wait_times", "call_times"):
        columns = zip(*(getattr(worker, name) for worker in workers))
        blank[name] = [sum(column) for column in columns] or histogram()
    for name in ("leases", "leased"):
        blank[name] = sum(getattr(worker, name) for worker in workers)
    return PoolSight(**{**blank, **facts})


def watching(*sights: PoolSight) -> Watch:
    rest = list(sights)
    return Watch(look=lambda pid: ([rest.pop(0)], []))


def test_rates_and_percentiles_are_the_difference_of_two_looks() -> None:
    """What was before the first look is in none of them."""
    watch = watching(
        pool_at(200.0, worker_at(leases=5, leased=2.0, cpu_seconds=1.0, generation=1,
                                 call_times=histogram(us900000=50))),
        pool_at(204.0, worker_at(leases=45, leased=4.0, cpu_seconds=1.5, generation=1,
                                 wait_times=histogram(us3000=4),
                                 call_times=histogram(us900000=50, us100=98, us5000=2))),
    )  # fmt: skip
    (first,), _ = watch.look()
    (second,), _ = watch.look()

    assert first.rates is None and first.workers[0].rates is None
    for rates in (second.rates, second.workers[0].rates):
        assert rates is not None
        assert (rates.seconds, rates.calls, rates.leases) == (4.0, 25.0, 10.0)
        assert (rates.utilization, rates.cpu) == (0.5, 0.125)
        assert rates.call_p50 == pytest.approx(100e-6, rel=0.07)
        assert rates.call_p99 == pytest.approx(5e-3, rel=0.07)
        assert rates.wait_p50 is not None and rates.wait_p50 < 1e-6
        assert rates.wait_p99 == pytest.approx(3e-3, rel=0.07)


def test_rates_are_about_the_last_ten_seconds() -> None:
    """Older looks are forgotten, one a second; memory does not grow."""
    looks = [pool_at(200.0 + n, worker_at(leases=n, call_times=histogram(us100=n * n)))
             for n in range(60)]  # fmt: skip
    watch = watching(*looks)
    views = [watch.look()[0][0] for _ in looks]
    assert views[5].rates is not None and views[5].rates.seconds == 5.0
    for view in views[11:]:
        assert view.rates is not None and view.rates.seconds == SPAN
    assert views[59].rates is not None
    assert views[59].rates.calls == pytest.approx((59**2 - 49**2) / 10)
    assert len(next(iter(watch._past.values()))) <= SPAN + 2


def test_who_looks_often_keeps_no_more() -> None:
    """One look a second is kept, and the rates are still about ten seconds."""
    looks = [pool_at(200.0 + n / 50, worker_at(leases=n)) for n in range(1500)]
    watch = watching(*looks)
    views = [watch.look()[0][0] for _ in looks]
    assert len(next(iter(watch._past.values()))) <= SPAN + 3
    assert views[1].rates is not None and views[1].rates.seconds == pytest.approx(0.02)
    assert all(SPAN <= view.rates.seconds <= SPAN + 1 for view in views[600:] if view.rates)


def test_pool_without_workers_is_wrong_only_if_it_wants_some() -> None:
    """A lazy pool that nobody has used yet is well."""
    for size, kind in [(0, "pool"), (2, "bad")]:
        (view,), _ = watching(pool_at(200.0, size=size)).look()
        assert top.lines([view], [])[0][1] == kind


def test_new_generation_begins_with_no_processor_time_of_the_old() -> None:
    watch = watching(
        pool_at(200.0, worker_at(generation=1, cpu_seconds=50.0)),
        pool_at(202.0, worker_at(generation=2, cpu_seconds=0.5)),
    )
    watch.look()
    (view,), _ = watch.look()
    rates = view.workers[0].rates
    assert rates is not None and rates.cpu == 0.25


def test_pool_with_the_same_pid_later_is_another_pool() -> None:
    watch = watching(pool_at(200.0, worker_at()), pool_at(201.0, worker_at(), opened=200.5))
    watch.look()
    (view,), _ = watch.look()
    assert view.rates is None


def test_manager_that_hangs_is_told_of() -> None:
    """Who tells something every second, and has not for a while, is silent."""
    (view,), _ = watching(pool_at(200.0, worker_at(), status="silent", told_for=65.0)).look()
    text, kind = top.lines([view], [])[0]
    assert "SILENT 65.0 s" in text and kind == "bad"
    assert onlooker._status(ME, 65.0, False) == "silent"
    assert onlooker._status(ME, 0.5, False) == "open"


def test_names_cannot_command_the_terminal() -> None:
    (view,), _ = watching(pool_at(200.0, worker_at(), name="a\x1b[2Jb\nc")).look()
    assert top.lines([view], [])[0][0].startswith("a?[2Jb?c  pid ")


@pytest.mark.parametrize("column", range(len(top.COLUMNS)), ids=[c.head for c in top.COLUMNS])
def test_every_column_can_be_sorted_by(column: int) -> None:
    """The most first, but for numbers that only name; reversed with r."""
    small = worker_at(worker_id=0, pid=1, generation=1)
    large = worker_at(
        worker_id=1, pid=2, generation=2, calls=5, in_call_for=1.0, leased_for=2.0, raised=3,
        cpu_seconds=1.0, rss_bytes=10**7, leased=1.0, call_times=histogram(us100=9), leases=3,
    )  # fmt: skip
    empty = worker_at(worker_id=1, pid=2, generation=2)
    watch = watching(pool_at(200.0, small, empty), pool_at(201.0, small, large))
    watch.look()
    views, _ = watch.look()
    rows = [line for line, kind in top.lines(views, [], column) if kind == "worker"]
    back = [line for line, kind in top.lines(views, [], column, True) if kind == "worker"]
    assert [row.split()[0] for row in rows] == (["0", "1"] if column < 2 else ["1", "0"])
    assert back == rows[::-1]
    heads = next(line for line, kind in top.lines(views, [], column) if kind == "head")
    assert f"{top.COLUMNS[column].head}*" in heads


@pytest.mark.parametrize(("seconds", "text"), [
    (None, "-"), (0.0, "0 us"), (15.4e-6, "15 us"), (0.00123, "1.23 ms"), (0.9996, "1.0 s"),
    (12.34, "12.3 s"), (99.96, "2 min"), (3600.0, "60 min"), (36000.0, "10 h"),
])  # fmt: skip
def test_times_fit_into_their_column(seconds: float | None, text: str) -> None:
    assert top._time(seconds) == text


# -- the command ---------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "minipool", "top", *arguments]


def run_top(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=30,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_once_prints_every_pool_of_this_user() -> None:
    """Found without being told where; two looks, so rates are there."""
    with Pool(size=1, name="one-of-mine"), Pool(size=2, name="another-of-mine") as pool:
        done = run_top("--once", "--interval", "0.2")
        assert (done.returncode, done.stderr) == (0, "")
        for worker in pool.workers():
            assert f" {worker.pid} " in done.stdout
    assert re.search(rf"^one-of-mine  pid {ME}  open  1 of 1 workers: 1 idle", done.stdout, re.M)
    assert re.search(rf"^another-of-mine  pid {ME}  open  2 of 2", done.stdout, re.M)
    assert re.search(r"^  [0-9.]+ calls/s: p50 ", done.stdout, re.M)


def test_json_is_for_scripts() -> None:
    """One object, the same facts; no histogram, nothing that JSON has not."""
    with Pool(size=1, name="j") as pool:
        pool.call(identity, 1)
        done = run_top(str(ME), "--json", "--interval", "0.2")
        pid = pool.workers()[0].pid
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    (seen_pool,) = found["pools"]
    assert found["unreadable"] == [] and done.returncode == 0
    assert (seen_pool["name"], seen_pool["pid"], seen_pool["status"]) == ("j", ME, "open")
    assert seen_pool["leases"] == 1 and seen_pool["uptime"] > 0
    assert seen_pool["rates"]["seconds"] >= 0.2
    (worker,) = seen_pool["workers"]
    assert (worker["pid"], worker["calls"], worker["state"]) == (pid, 1, "idle")
    assert worker["stopped_for"] is None and worker["stuck"] is False
    assert not {"call_times", "wait_times"} & (set(seen_pool) | set(worker))
    views, unreadable = Watch(ME).look()
    assert set(as_object(views, unreadable)) == {"pools", "unreadable"}


def test_no_pool_is_exit_status_1() -> None:
    """A process without pools, or none at all: said, and for scripts an empty list."""
    done = run_top("--once", str(ME))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "no live pool was found\n"
    done = run_top("--json", "4194305")
    assert done.returncode == 1
    assert json.loads(done.stdout)["unreadable"][0]["reason"] == "there is no such process"


def test_without_a_terminal_it_says_what_to_do() -> None:
    done = run_top()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "minipool: top needs a terminal; --once and --json do without\n"


@pytest.fixture
def screen() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_screen(*arguments: str) -> Terminal:
        opened.append(Terminal(command(*arguments), cwd=str(ROOT)))
        return opened[-1]

    yield open_screen
    for terminal in opened:
        terminal.close()


def calls_shown(text: str) -> int:
    """Return the calls of worker 0, as the screen shows them; -1 if it does not."""
    found = re.search(r"^ +0 +\d+ +\d+ \S+( [\d.]+ \w+)? +(\d+) ", text, re.M)
    return int(found[2]) if found else -1


def test_screen_lives_while_the_pool_works(screen: Callable[..., Terminal]) -> None:
    """Numbers change by themselves, keys are heard, a stopped worker stands out, q ends it."""
    pytest.importorskip("curses")
    with Pool(size=2, name="busy", strategy="fifo") as pool:
        for _ in range(4):
            pool.call(identity, 1)
        terminal = screen(str(ME), "--interval", "0.1")
        text = terminal.wait(lambda text: calls_shown(text) == 2)
        assert f"busy  pid {ME}  open  2 of 2 workers: 2 idle" in text
        assert "pools: 1, workers: 2" in text and "q quit" in text
        for _ in range(20):
            pool.call(identity, 1)
        terminal.wait(lambda text: calls_shown(text) == 12)

        assert "ID*" in text
        terminal.press("s")
        terminal.wait(lambda text: "    PID* " in text)
        terminal.press("r")
        terminal.wait(lambda text: re.search(r"^ +1 .*\n +0 ", text, re.M))

        stopped = pool.workers()[0].pid or 0
        os.kill(stopped, signal.SIGSTOP)
        terminal.wait(lambda text: re.search(rf" {stopped} +\d+ STOPPED [1-9]", text))
        os.kill(stopped, signal.SIGCONT)
        terminal.wait(lambda text: re.search(rf" {stopped} +\d+ idle", text))
    terminal.wait(lambda text: "pools: 0, workers: 0" in text and "busy" not in text)
    terminal.press("q")
    assert terminal.end() == 0


def test_screen_may_be_small_and_change_its_size(screen: Callable[..., Terminal]) -> None:
    pytest.importorskip("curses")
    with Pool(size=2, name="small"):
        terminal = screen(str(ME), "--interval", "0.1")
        terminal.wait(lambda text: "small  pid" in text)
        for rows, columns in ((3, 20), (1, 5), (24, 100)):
            terminal.resize(rows, columns)
            os.killpg(terminal.process.pid, signal.SIGWINCH)
        terminal.press("\x1b[B\x1b[A")
        terminal.wait(lambda text: re.search(r"small  pid \d+  open", text))
        terminal.press("q")
        assert terminal.end() == 0


def test_ctrl_c_leaves_the_screen_with_130(screen: Callable[..., Terminal]) -> None:
    """As any command: no traceback."""
    pytest.importorskip("curses")
    terminal = screen(str(ME), "--interval", "30")
    terminal.wait(lambda text: "pools: 0" in text)
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.text()


def test_screen_ends_with_its_terminal(screen: Callable[..., Terminal]) -> None:
    """Also when SIGHUP is ignored, as under nohup: without a terminal nothing would slow it down."""
    pytest.importorskip("curses")
    terminal = screen(str(ME), "--interval", "30")
    terminal.wait(lambda text: "pools: 0" in text)
    terminal.hang_up()
    assert terminal.process.wait(20) is not None
