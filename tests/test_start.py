"""Starting workers: what is needed for it, how it fails, and how it recovers."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

import scripts
from ears import Ear, handle_of, wait_until
from gates import Gate
from minipool import (
    CheckoutTimeout,
    ConfigError,
    Pool,
    PoolConfig,
    PoolStartError,
    WorkerDied,
    WorkerStartError,
)
from minipool.engine import manager as manager_module
from minipool.engine import wire
from minipool.engine.channel import FastEnd
from minipool.engine.fleet import STRUCK_PAUSE, Fleet
from minipool.engine.handle import Handle
from minipool.engine.portable import PortableEnd
from minipool.engine.process import WorkerProcess
from minipool.telemetry import Hooks
from troublemakers import (
    CannotStart,
    FailsWhileFileExists,
    HangsInInit,
    KillsItselfInInit,
    LeavesInInit,
    LeavesOnceReady,
    StopsAtGateInInit,
    environment,
    priority,
)
from workers import Counter, DiesOnCall, RaisesAtStart, getpid

TESTS = Path(__file__).parent

PORTABLE = os.environ.get("MINIPOOL_PORTABLE") == "1"


def test_worker_keeps_its_state_between_calls(start_method: str) -> None:
    with Pool(Counter, args=(10,), size=2, start_method=start_method) as pool:
        with pool.checkout() as w:
            assert w.call("add", 5) == 15
            assert w.add() == 16
            assert w.call(Counter.add, 4) == 20
        assert pool.stats().workers == 2


# -- a worker that does not start --------------------------------------------------------------


def test_error_in_the_constructor_comes_out_of_open_at_once(start_method: str) -> None:
    """With the worker's own exception as cause, and its traceback; the pool is closed."""
    pool = Pool(RaisesAtStart, size=2, start_method=start_method, init_timeout=None)
    with pytest.raises(PoolStartError, match="no weights here") as caught:
        pool.open()
    cause = caught.value.__cause__
    assert isinstance(cause, LookupError) and cause.args == ("no weights here",)
    assert "in __init__" in str(cause.__cause__), "the remote traceback"
    assert pool.closed and pool.workers() == []


def test_first_use_that_cannot_start_a_worker_raises_the_start_error() -> None:
    pool = Pool(RaisesAtStart, size=1)
    with pytest.raises(PoolStartError) as caught:
        pool.call("anything")
    assert isinstance(caught.value.__cause__, LookupError)


@pytest.mark.parametrize(
    "worker, args, exitcode, says",
    [
        (LeavesInInit, (9,), 9, "with exit code 9"),
        (LeavesInInit, (0,), 0, "with exit code 0"),
        (KillsItselfInInit, (), -9, "by SIGKILL"),
    ],
)
def test_worker_that_dies_in_its_constructor_is_told_with_its_exit_code(
    start_method: str, worker: Any, args: tuple[Any, ...], exitcode: int, says: str
) -> None:
    """At once, not when init_timeout is over, and with the end it really had."""
    pool = Pool(worker, args=args, size=1, start_method=start_method, init_timeout=None)
    with pytest.raises(PoolStartError, match=says) as caught:
        pool.open()
    cause = caught.value.__cause__
    assert isinstance(cause, WorkerStartError)
    assert (cause.exitcode, cause.signal) == (exitcode, "SIGKILL" if exitcode < 0 else None)


def test_worker_that_hangs_in_its_constructor_is_given_up_after_init_timeout() -> None:
    pool = Pool(HangsInInit, size=1, init_timeout=0.3)
    ear = Ear(pool, "worker.terminate")
    with pytest.raises(PoolStartError, match=r"not ready within 0\.3 s"):
        pool.open()
    assert ear.of("worker.terminate")[0].metadata["exitcode"] == -9
    assert pool.workers() == []


# -- back-off and recovery ---------------------------------------------------------------------


def test_starts_that_are_struck_down_from_outside_are_tried_again_soon() -> None:
    """However often: it says little about the next one. The pauses stay short, the breaker shut."""
    pool = Pool(HangsInInit, size=1, lazy=True, init_timeout=None)
    with pool:
        ear = Ear(pool, "error")
        desk = pool._desk
        assert desk is not None
        with pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0)
        for count in range(1, 8):
            wait_until(pool, lambda: any(info.state == "starting" for info in pool.workers()))
            os.kill(pool.workers()[0].pid or 0, signal.SIGKILL)
            ear.wait("error", count)
            assert desk.manager.fleet.not_before - time.monotonic() <= STRUCK_PAUSE
        assert pool.stats().breaker == "closed"
        assert pool.stats().start_failures == 7
        pool.terminate()


@pytest.mark.parametrize("luck, factor", [(0.5, 1.0), (0.0, 0.75), (1.0, 1.25)])
def test_back_off_doubles_up_to_a_cap_with_jitter(luck: float, factor: float) -> None:
    """0.1 s, 0.2 s and so on up to 30 s, each up to a quarter longer or shorter."""
    launcher: Any = CannotStart()
    fleet = Fleet(launcher, PoolConfig(size=1, breaker=False), Hooks(""), jitter=lambda: luck)
    for failures in range(1, 14):
        before = time.monotonic()
        assert fleet.spawn(1) == []
        after = time.monotonic()
        delay = min(30.0, 0.1 * 2 ** (failures - 1)) * factor
        assert before + delay <= fleet.not_before <= after + delay
        assert fleet.start_failures == fleet.failures_in_a_row == failures
    assert fleet.handles == {}
    for give_back in fleet.givings_back():
        give_back()


def test_pool_recovers_by_itself_when_starting_works_again(tmp_path: Path) -> None:
    """Meanwhile each failure is told once, later and later, and health_check says why."""
    obstacle = tmp_path / "obstacle"
    with Pool(FailsWhileFileExists, args=(str(obstacle),), size=2) as pool:
        ear, handle = Ear(pool, "error", "worker.init"), handle_of(pool, 1)
        leases = [pool.checkout(), pool.checkout()]
        assert len({lease.call("pid") for lease in leases}) == 2, "both have proved well"
        for lease in leases:
            lease.release()
        obstacle.touch()
        handle.kill()
        ear.wait("error", 3, fits=lambda event: event.metadata["kind"] == "start")
        report = pool.health_check()
        assert report.status == "degraded"
        assert any("is in the way" in reason for reason in report.reasons), report
        assert "1 of 2 workers are in service" in report.reasons
        starts = [event for event in ear.of("error") if event.metadata["kind"] == "start"]
        assert all("is in the way" in str(event.metadata["error"]) for event in starts)
        assert pool.stats().start_failures == len(starts)
        assert pool.call("pid") == handle_of(pool, 0).pid, "the other one serves"
        initialised = len(ear.of("worker.init"))
        assert initialised == 0
        obstacle.unlink()
        ear.wait("worker.init")
        pool.wait_ready(timeout=20)
        assert pool.stats().idle == 2


def test_old_worker_does_not_end_the_back_off_of_new_ones(tmp_path: Path) -> None:
    """That one worker goes on well is no sign that others can be started."""
    obstacle = tmp_path / "obstacle"
    with Pool(
        FailsWhileFileExists, args=(str(obstacle),), size=2, health_check_interval=0.04
    ) as pool:
        desk = pool._desk
        assert desk is not None and desk.manager.config.tick <= 0.01
        ear, fleet = Ear(pool, "error", "worker.health_check"), desk.manager.fleet
        assert pool.call("pid")
        obstacle.touch()
        handle_of(pool, 1).kill()
        ear.wait("error", 3, fits=lambda event: event.metadata["kind"] == "start")
        seen = len(ear.of("worker.health_check"))
        ear.wait("worker.health_check", seen + 3)  # the manager has swept meanwhile
        assert fleet.failures_in_a_row >= 2 and fleet.last_failure is not None


def test_workers_that_fail_together_are_one_step_of_back_off(tmp_path: Path) -> None:
    obstacle = tmp_path / "obstacle"
    with Pool(FailsWhileFileExists, args=(str(obstacle),), size=4) as pool:
        desk = pool._desk
        assert desk is not None
        ear, fleet = Ear(pool, "error"), desk.manager.fleet
        steps: list[int] = []
        pool.hooks["error"].append(
            lambda _, __, facts: facts["kind"] == "start" and steps.append(fleet.failures_in_a_row)
        )
        for _ in range(4):
            pool.call("pid")
        obstacle.touch()
        desk.manager.order(lambda: [handle.kill() for handle in list(fleet.handles.values())])  # type: ignore[arg-type,return-value]
        ear.wait("error", 4, fits=lambda event: event.metadata["kind"] == "start")
        assert steps[0] == 1 and steps[3] < 4, steps


def test_crash_loop_does_not_spin(start_method: str) -> None:
    """A worker that is gone as soon as it is ready counts as a failed start: with back-off."""
    pool = Pool(LeavesOnceReady, size=1, start_method=start_method)
    ear = Ear(pool, "error", "worker.init")
    pool.open(wait=False)
    ear.wait("error", 4, fits=lambda event: event.metadata["kind"] == "start")
    desk = pool._desk
    assert desk is not None
    assert desk.manager.fleet.failures_in_a_row >= 4
    assert len(ear.of("worker.init")) <= desk.manager.fleet.failures_in_a_row + 1
    assert "as soon as it was ready" in str(desk.manager.fleet.last_failure)
    waited = desk.manager.fleet.not_before - time.monotonic()
    assert waited > 0.3, "the fourth pause is 0.8 s"
    pool.terminate()


def test_death_in_the_first_call_is_no_failed_start() -> None:
    """The worker started well; what its user's code does is not the start's fault."""
    with Pool(DiesOnCall, size=1) as pool:
        for _ in range(5):
            with pytest.raises(WorkerDied):
                pool.options(timeout=20).call("die")
        wait_until(pool, lambda: pool.stats().workers_lost == 5)
        assert pool.stats().start_failures == 0


def test_no_more_than_startup_batch_are_starting_at_once(gate: Gate) -> None:
    pool = Pool(StopsAtGateInInit, args=(gate.path,), size=5, startup_batch=2).open(wait=False)
    most: list[int] = []
    pool.hooks["worker.init"].append(lambda *_: most.append(pool.stats().starting))
    for _ in range(5):
        gate.wait_arrived()
        wait_until(pool, lambda: pool.stats().starting in (1, 2))
        assert pool.stats().starting <= 2
        gate.open()
    pool.wait_ready(timeout=20)
    assert pool.stats().idle == 5 and max(most) <= 2
    pool.close()


# -- workers by name ---------------------------------------------------------------------------


def test_worker_may_be_named_instead_of_imported(start_method: str) -> None:
    with Pool("workers:Counter", args=(2,), size=1, start_method=start_method) as pool:
        assert pool.call("add", 3) == 5


@pytest.mark.parametrize("name", ["workers", "workers:", ":Counter", ""])
def test_bad_name_is_refused_by_the_constructor(name: str) -> None:
    with pytest.raises(ConfigError, match=r"package\.module:Class"):
        Pool(name)


@pytest.mark.parametrize("name", ["no_such_module:Class", "no_such_package.module:Class"])
def test_missing_module_is_refused_before_anything_is_started(name: str) -> None:
    pool = Pool(name, size=1)
    with pytest.raises(PoolStartError, match="no_such_"):
        pool.open()
    assert pool.stats().workers_started == pool.stats().start_failures == 0


def test_missing_class_is_told_with_the_workers_own_error() -> None:
    with pytest.raises(PoolStartError, match="NoSuchClass") as caught:
        Pool("workers:NoSuchClass", size=1).open()
    assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize(
    ("name", "near"), [("workers:Countr", "'Counter'"), ("workers:Counter.ad", "'add'")]
)
def test_name_that_is_nearly_right_is_told_the_right_one(name: str, near: str) -> None:
    with pytest.raises(PoolStartError, match=f"; did you mean {near}.*\\?; correct that name"):
        Pool(name, size=1).open()


def test_name_without_a_near_one_is_told_as_python_does() -> None:
    with pytest.raises(PoolStartError, match="has no attribute 'Xyzzyqq'; correct that name"):
        Pool("workers:Xyzzyqq", size=1).open()


# -- main modules that workers cannot import ---------------------------------------------------

UNGUARDED = """
    import os, sys
    with open(sys.argv[2], "a") as file:
        file.write("imported\\n")
    from minipool import Pool
    from workers import Counter
    pool = Pool(Counter, size=2, startup_batch=2, start_method=sys.argv[1])
    pool.open()
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_script_without_the_guard_is_told_so_instead_of_a_storm(
    method: str, tmp_path: Path
) -> None:
    """One clear error, and no more processes than the first batch."""
    imports = tmp_path / "imports"
    code, _, err = scripts.run(tmp_path, UNGUARDED, method, str(imports))
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert "PoolStartError" in last and "if __name__ == '__main__':" in last
    assert len(imports.read_text().splitlines()) <= 4  # script, fork server, a batch of two


def test_script_without_the_guard_works_where_workers_are_forked(tmp_path: Path) -> None:
    imports = tmp_path / "imports"
    assert scripts.run(tmp_path, UNGUARDED, "fork", str(imports))[0] == 0
    assert imports.read_text() == "imported\n"


WITHOUT_FILE = """
from minipool import ConfigError, Pool
class Local:
    def where(self): return __name__
def answer(): return 42
try:
    with Pool(Local, size=1, start_method=METHOD) as pool:
        print(pool.call("where"), pool.call(answer))
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["-c", "stdin"])
def test_class_of_a_program_without_a_file(start_method: str, how: str, tmp_path: Path) -> None:
    """Refused with the remedy where workers would have to import it; well where they are forked."""
    code = WITHOUT_FILE.replace("METHOD", repr(start_method))
    command = [sys.executable, *scripts.WARNINGS, *(["-c", code] if how == "-c" else [])]
    done = subprocess.run(
        command, input=code, capture_output=True, text=True, timeout=30,
        env=scripts.environment(), cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    if start_method == "fork":
        assert done.stdout == "__main__ 42\n"
    else:
        assert "put it into a module of its own" in done.stdout


@pytest.mark.parametrize("how", ["-c", "stdin"])
def test_program_without_a_file_may_use_what_workers_can_import(
    start_method: str, how: str, tmp_path: Path
) -> None:
    code = textwrap.dedent(f"""
        from minipool import Pool
        from workers import Counter
        with Pool(Counter, size=1, start_method={start_method!r}) as pool:
            print(pool.call("add", 4))
    """)
    command = [sys.executable, *scripts.WARNINGS, *(["-c", code] if how == "-c" else [])]
    done = subprocess.run(
        command, input=code, capture_output=True, text=True, timeout=30,
        env=scripts.environment(), cwd=tmp_path,
    )  # fmt: skip
    if how == "stdin" and start_method != "fork":  # multiprocessing would look for its file
        assert done.returncode == 1 and "PoolStartError" in done.stderr
        assert "save the program as a file" in done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_class_in_the_main_of_a_zip_file_is_refused(method: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("__main__.py", WITHOUT_FILE.replace("METHOD", repr(method)))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "app.zip")], capture_output=True, text=True, timeout=30,
        env=scripts.environment(), cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "zip file's __main__" in done.stdout and "module of its own" in done.stdout


GUARDED = """
    import sys
    from minipool import Pool

    class Local:
        def where(self): return __name__

    def answer(): return 42

    if __name__ == "__main__":
        with Pool(Local, size=1, start_method=sys.argv[1]) as pool:
            print(pool.call("where") in ("__main__", "__mp_main__"), pool.call(answer))
"""


def test_class_of_a_guarded_script_works(start_method: str, tmp_path: Path) -> None:
    assert scripts.run(tmp_path, GUARDED, start_method) == (0, "True 42\n", "")


# -- environments ------------------------------------------------------------------------------

LACKING = """
    import sys

    LACKS = sys.argv[2].split("+")

    def missing(*args, **kwargs):
        raise OSError(38, "not implemented here")

    import os, tempfile, _multiprocessing, _posixshmem
    if "semaphores" in LACKS:
        _multiprocessing.SemLock = _posixshmem.shm_open = missing
    if "tempdir" in LACKS:
        tempfile._candidate_tempdir_list = lambda: []
        tempfile.tempdir = None
    if "memfd" in LACKS:
        os.memfd_create = missing
    if "files" in LACKS:
        tempfile.TemporaryFile = missing

    from minipool import Pool
    from workers import Counter

    def main():
        method = None if sys.argv[1] == "default" else sys.argv[1]
        with Pool(Counter, size=2, start_method=method) as pool:
            assert [pool.call("add", 2) for _ in range(3)] == [2, 4, 6]
            assert pool.health_check(probe=True).status == "healthy"
            stats = pool.stats()
            assert (stats.calls, stats.idle) == (3, 2), stats
            assert sum(info.calls for info in pool.workers()) == 3
            table = pool._desk.manager.fleet.table
            target = "" if table.fd is None else os.readlink(f"/proc/self/fd/{table.fd}")
            print(pool._launcher.method, target or "private")

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize(
    "lacks, method, table",
    [
        ("nothing", "forkserver", "/memfd:minipool"),
        ("semaphores", "forkserver", "/memfd:minipool"),
        ("tempdir", "spawn", "/memfd:minipool"),
        ("memfd", "forkserver", "/"),
        ("memfd+files", "forkserver", "private"),
        ("memfd+tempdir", "spawn", "private"),
    ],
)
def test_default_pool_works_where_the_system_lacks_something(
    lacks: str, method: str, table: str, tmp_path: Path
) -> None:
    """No semaphores, no shared memory, no memfd, no temporary directory: there is a way."""
    env = scripts.environment(MINIPOOL_PORTABLE="0", TMPDIR=str(tmp_path))
    code, out, err = scripts.run(tmp_path, LACKING, "default", lacks, env=env)
    assert (code, err) == (0, "")
    used, where = out.split(None, 1)
    assert used == method and table in where
    assert ("memfd" in where) == ("memfd" not in lacks)
    assert "(deleted)" in where or "private" in where, "the table has no name in the file system"


@pytest.mark.parametrize("lacks", ["semaphores", "memfd+files"])
def test_each_start_method_works_without_shared_memory_and_semaphores(
    start_method: str, lacks: str, tmp_path: Path
) -> None:
    code, out, err = scripts.run(tmp_path, LACKING, start_method, lacks)
    assert (code, err) == (0, "")
    assert out.split()[0] == start_method


def test_worker_env_is_set_before_the_class_is_imported(start_method: str) -> None:
    """Libraries read such variables once, when they are imported."""
    if start_method == "fork":
        with Pool(size=1, start_method="fork", worker_env={"MINIPOOL_TEST_WORD": "hush"}) as pool:
            assert pool.call(environment, "MINIPOOL_TEST_WORD") == "hush"
    else:
        with Pool(
            "troublemakers:ReadsEnvironmentAtImport", size=1, start_method=start_method,
            worker_env={"MINIPOOL_TEST_WORD": "hush"},
        ) as pool:  # fmt: skip
            assert pool.call("seen") == "hush"
    assert "MINIPOOL_TEST_WORD" not in os.environ


@pytest.mark.parametrize("niceness", [0, 1, 5])
def test_niceness_is_added_to_the_workers(start_method: str, niceness: int) -> None:
    with Pool(size=1, start_method=start_method, niceness=niceness) as pool:
        assert pool.call(priority) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + niceness)


PRELOAD = """
    import pathlib, sys, warnings
    from minipool import Pool
    from troublemakers import imported

    def main(counts):
        with Pool(size=3, start_method="forkserver", preload=["loads_slowly"]) as pool:
            leases = [pool.checkout() for _ in range(3)]
            assert all(lease.call(imported, "loads_slowly") for lease in leases)
            for lease in leases:
                lease.release()
        print(len(pathlib.Path(counts).read_text()), "loads_slowly" in sys.modules)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Pool(size=1, start_method="forkserver", preload=["loads_slowly"]).open().close()
            assert not caught, caught
            Pool(size=1, start_method="forkserver", preload=["colorsys"]).open().close()
        print(*(str(one.message) for one in caught))

    if __name__ == "__main__":
        main(sys.argv[1])
"""


def test_preload_is_imported_once_for_all_workers_and_says_when_it_comes_too_late(
    tmp_path: Path,
) -> None:
    counts = tmp_path / "counts"
    code = f"with open({str(counts)!r}, 'a') as file: file.write('!')\n"
    (tmp_path / "loads_slowly.py").write_text(code)
    env = scripts.environment(first_path=str(tmp_path))
    exitcode, out, err = scripts.run(tmp_path, PRELOAD, str(counts), env=env)
    assert (exitcode, err) == (0, "")
    first, second = out.splitlines()
    assert first == "1 False", "once, in the server, and not in the parent"
    assert "colorsys" in second and "comes too late" in second


# -- the package -------------------------------------------------------------------------------


def test_import_does_not_pull_in_what_few_need() -> None:
    """`import minipool`, and everything a worker and its parent need to run."""
    unwanted = "http argparse json asyncio sqlite3 concurrent.futures logging"
    code = f"""
import sys
import minipool
minipool.Pool, minipool.PoolConfig, minipool.Lease
print(*(name for name in {unwanted.split()!r} if name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=30,
        env={**os.environ, "PYTHONPATH": str(scripts.ROOT)}, check=True,
    )  # fmt: skip
    assert done.stdout.split() == []


VENDORED = """
    import sys
    from yourapp import serve

    if __name__ == "__main__":
        print(serve.answer(sys.argv[1]))
"""
SERVE = """
    from ._vendor.minipool import Pool, PoolConfig, current_worker

    class Model:
        def __init__(self, add):
            self.add = add

        def predict(self, x):
            return x + self.add, type(current_worker()).__module__

        def fail(self):
            from ._vendor.minipool import WorkerDied
            raise LookupError("its own")

    def answer(method):
        with Pool(Model, args=(2,), size=2, start_method=method) as pool:
            try:
                pool.call("fail")
            except LookupError as error:
                assert "remote" in type(error.__cause__).__name__.lower()
            return pool.call("predict", 40)
"""


def test_vendored_copy_works_in_its_child_processes(start_method: str, tmp_path: Path) -> None:
    """Copied to yourapp/_vendor/minipool, with no other minipool to be found."""
    vendor = tmp_path / "yourapp" / "_vendor"
    vendor.mkdir(parents=True)
    for package in (vendor, vendor.parent):
        (package / "__init__.py").touch()
    (vendor.parent / "serve.py").write_text(textwrap.dedent(SERVE))
    ignored = shutil.ignore_patterns("__pycache__", "tools")
    shutil.copytree(scripts.ROOT / "minipool", vendor / "minipool", ignore=ignored)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code, out, err = scripts.run(tmp_path, VENDORED, start_method, env=env)
    assert (code, err) == (0, "")
    assert out == "(42, 'yourapp._vendor.minipool.engine.child')\n"


def test_waiter_is_told_the_last_start_failure(tmp_path: Path) -> None:
    """A checkout that times out because nothing starts carries the reason as cause."""
    obstacle = tmp_path / "obstacle"
    with Pool(FailsWhileFileExists, args=(str(obstacle),), size=1) as pool:
        ear = Ear(pool, "error")
        pool.call("pid")  # it has proved well
        obstacle.touch()
        handle_of(pool).kill()
        ear.wait("error", 1, fits=lambda event: event.metadata["kind"] == "start")
        with pytest.raises(CheckoutTimeout) as caught:
            pool.checkout(timeout=0.05)
        assert isinstance(caught.value.__cause__, WorkerStartError)
        assert "is in the way" in str(caught.value.__cause__)


def test_default_start_method_is_the_best_offered() -> None:
    with Pool(size=1) as pool:
        assert pool._launcher.method == "forkserver"
        assert pool.call(getpid) != os.getpid()


def test_failure_in_mid_batch_keeps_who_was_started(
    monkeypatch: pytest.MonkeyPatch, start_method: str
) -> None:
    """Of four that are started together the third cannot be: two serve, and all four soon do."""
    begin, tries = WorkerProcess.start, itertools.count(1)

    def start(self: WorkerProcess, *args: Any) -> None:
        if next(tries) == 3:
            raise BlockingIOError(errno.EAGAIN, "no more processes")
        begin(self, *args)

    monkeypatch.setattr(WorkerProcess, "start", start)
    pool: Pool[None] = Pool(size=4, start_method=start_method)
    ear = Ear(pool, "worker.init", "error")
    pool.open(wait=False)
    assert ear.wait("error").metadata["worker_id"] == 2
    assert pool.call(os.getpid) in {ear.wait("worker.init", n).metadata["pid"] for n in (1, 2)}
    pool.wait_ready()
    assert [worker.worker_id for worker in pool.workers()] == [0, 1, 2, 3]
    assert pool.stats().start_failures == 1
    pool.close()


# -- a manager that lacks what a step of its own takes -----------------------------------------


def test_no_memory_for_what_a_worker_is_sent_costs_that_worker_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is started anew, and those that were started with it serve."""
    kind_of_end: Any = PortableEnd if PORTABLE else FastEnd
    post, failed = kind_of_end.post, []

    def post_with_little_memory(end: Any, call_id: int, kind: int, *parts: bytes) -> None:
        if kind == wire.ASSIGN and not failed:
            failed.append(end)
            raise MemoryError
        post(end, call_id, kind, *parts)

    monkeypatch.setattr(kind_of_end, "post", post_with_little_memory)
    with Pool(Counter, size=3) as pool:
        assert failed
        assert pool.stats().start_failures == 1
        assert pool.call("add") == 1


@pytest.mark.parametrize("step", ["an end", "the assignment", "its name"])
def test_worker_that_cannot_be_talked_to_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Whatever is raised once it was started: it is killed, and started anew; the others serve."""
    kind_of_end: Any = PortableEnd if PORTABLE else FastEnd
    owner, name = {
        "an end": (kind_of_end, "__init__"),
        "the assignment": (kind_of_end, "post"),
        "its name": (Handle, "started"),
    }[step]
    real, failed = getattr(owner, name), []

    def fails_once(*args: Any) -> Any:
        if not failed:
            failed.append(args)
            raise OSError(errno.EMFILE, "Too many open files")
        return real(*args)

    monkeypatch.setattr(owner, name, fails_once)
    pool = Pool(Counter, size=3)
    ear = Ear(pool, "worker.init", "error")
    pool.open(wait=False)
    told = ear.wait("error").metadata
    assert failed and isinstance(told["error"].__cause__, OSError), told
    ear.wait("worker.init", 3)
    pool.wait_ready()
    assert len({worker.pid for worker in pool.workers()}) == 3
    assert pool.stats().start_failures == 1
    assert pool.call("add") == 1
    pool.close()


@pytest.mark.logs_errors  # what the manager cannot do is logged, each time
def test_a_manager_that_fails_before_it_hears_its_bell_takes_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bell that was rung stays so: it must not make the manager try again at once."""
    with Pool(Counter, size=1) as pool:
        manager, waits = pool._opened().manager, []
        wait = manager._wait

        def failing() -> Any:
            if len(waits) >= 2:
                return wait()
            raise RuntimeError("no memory to wait with")

        def noting(sources: list[Any], timeout: float) -> set[Any]:
            waits.append(sources)
            return set()

        monkeypatch.setattr(manager_module, "ready", noting)
        monkeypatch.setattr(manager, "_wait", failing)
        manager.bell.ring()
        assert manager.wait_for(lambda: len(waits) >= 2, 20)
        monkeypatch.undo()
        assert waits[0] == [manager.bell.reader] and waits[1] == []
        assert pool.call("add") == 1
