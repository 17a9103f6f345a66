"""What the manager logs: in order, and never at the cost of a wait."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import warnings
from pathlib import Path
from typing import Any, Iterator

import pytest

import scripts
from ears import Ear
from minipool import Pool, opening
from minipool.engine import jobs
from minipool.engine.logrelay import MOST, LogRelay
from minipool.telemetry import INFO, WARNING, attach_logger, log_through, logger, remark
from workers import getpid

LAST = 20.0  # seconds after which a test has failed


class Stuck(logging.Handler):
    """A log handler that blocks until it is let go, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.reached.set()
        assert self.go_on.wait(LAST)
        self.records.append(record)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    handler = Stuck()
    logging.getLogger("minipool").addHandler(handler)
    yield handler
    handler.go_on.set()
    logging.getLogger("minipool").removeHandler(handler)


def kill_one(pool: Pool[Any]) -> int:
    """Kill an idle worker; return its pid."""
    pid: int = pool.call(getpid)
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_handler_that_blocks_delays_no_replacement(stuck: Stuck) -> None:
    with Pool(size=1) as pool:
        ear = Ear(pool, "recovery")
        pids = []
        for deaths in range(1, 4):
            pids.append(kill_one(pool))
            ear.wait("recovery", deaths, LAST)
            assert stuck.reached.wait(LAST)
        assert not stuck.records
        stuck.go_on.set()
    told = [record for record in stuck.records if "died" in record.getMessage()]
    assert [f"(pid {pid})" in record.getMessage() for pid, record in zip(pids, told)] == [True] * 3


def test_records_tell_when_and_where_they_were_made(stuck: Stuck) -> None:
    """Not when and where they were written."""
    with Pool(size=1, name="told") as pool:
        ear = Ear(pool, "recovery")
        for deaths in (1, 2):
            kill_one(pool)
            ear.wait("recovery", deaths)
        stuck.go_on.set()
    first, second = (record for record in stuck.records if "died" in record.getMessage())
    assert first.threadName == "minipool-told"
    assert first.filename == "care.py"
    assert first.funcName == "_mourn"
    assert first.created < second.created
    assert first.relativeCreated < second.relativeCreated
    assert 0 <= first.msecs < 1000


def test_a_handler_that_never_returns_does_not_keep_a_pool_from_closing(stuck: Stuck) -> None:
    pool = Pool(size=1).open()
    ear = Ear(pool, "recovery")
    kill_one(pool)
    ear.wait("recovery")

    pool.close()

    assert pool.closed
    assert not stuck.records
    left = [thread.name for thread in threading.enumerate() if "minipool" in thread.name]
    assert left == [f"minipool-{pool.config.name}-log"]


def test_a_handler_may_close_the_pool() -> None:
    class Closer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            pool.close()
            closed.set()

    closed, closer = threading.Event(), Closer()
    pool = Pool(size=1).open()
    logging.getLogger("minipool").addHandler(closer)
    try:
        kill_one(pool)
        assert closed.wait(LAST)
        pool.close()
    finally:
        logging.getLogger("minipool").removeHandler(closer)


def test_the_attached_logger_delays_no_replacement(stuck: Stuck) -> None:
    """It is a listener of ours: what it logs in the manager's thread goes the same way."""
    events = logging.getLogger("test.events")
    events.addHandler(stuck)
    events.setLevel(INFO)
    try:
        with Pool(size=1) as pool:
            detach = attach_logger(pool, events)
            ear = Ear(pool, "recovery")
            kill_one(pool)
            ear.wait("recovery")
            assert stuck.reached.wait(LAST)
            stuck.go_on.set()
        detach()
    finally:
        events.removeHandler(stuck)
    names = [getattr(record, "event", "") for record in stuck.records]
    assert [name for name in names if name in ("worker.terminate", "recovery")] == [
        "worker.terminate", "recovery", "worker.terminate",
    ]  # fmt: skip
    assert names[-1] == "pool.terminate"


FULL = """
    import os, signal, sys, threading
    from minipool import Pool

    def fill(fd):
        os.set_blocking(fd, False)
        try:
            while True:
                os.write(fd, b"x" * 4096)
        except BlockingIOError:
            os.set_blocking(fd, True)

    if __name__ == "__main__":
        full, other = {"1": (1, 2), "2": (2, 1)}[sys.argv[2]]
        stream = (None, sys.stdout, sys.stderr)[full]
        with Pool(size=1, start_method=sys.argv[1]) as pool:
            hears, told = os.pipe()
            pool.hooks["recovery"].append(lambda *event: os.write(told, b"!"))
            fill(full)
            threading.Thread(target=lambda: print("a thread is stuck", file=stream, flush=True)).start()
            for _ in range(3):
                os.kill(pool.call(os.getpid), signal.SIGKILL)
                os.read(hears, 1)
            os.write(other, b"replaced\\n")
            sys.stdin.readline()
"""


def buffering() -> dict[str, str]:
    """Return an environment in which standard output and error have buffers, and those locks."""
    env = scripts.environment()
    env.pop("PYTHONUNBUFFERED", None)
    return env


@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_a_stream_that_nobody_reads_delays_no_replacement(
    tmp_path: Path, start_method: str, full: str
) -> None:
    """Neither by what the manager logs, nor by what starting a process flushes."""
    number = {"stdout": "1", "stderr": "2"}[full]
    program = scripts.start(tmp_path, FULL, start_method, number, stdin=-1, env=buffering())
    assert program.stdin is not None and program.stdout is not None and program.stderr is not None
    read = program.stderr if full == "stdout" else program.stdout
    lines = [read.readline()]
    while lines[-1] not in ("", "replaced\n"):  # what was logged comes before
        lines.append(read.readline())
    program.stdin.write("\n")
    status, out, err = scripts.finish(program)
    assert (lines[-1], status) == ("replaced\n", 0)
    assert ("".join(lines) + err).count("died by SIGKILL") == 3
    assert (out if full == "stdout" else err).count("a thread is stuck") == 1


def test_a_lease_dropped_in_the_managers_thread_is_warned_about_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The collector may run in any thread; what is printed may block."""
    warned: list[str] = []

    def show(message: Any, *args: Any, **more: Any) -> None:
        warned.append(f"{threading.current_thread().name}: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        with Pool(size=1, name="dropping") as pool:
            leases = [pool.checkout()]
            desk: Any = pool._desk
            desk.manager.command(leases.clear)
        assert len(warned) == 1, "it is written by the time that the pool is closed"
    assert warned[0].startswith("minipool-dropping-log: a lease of worker 0")


def is_relayed() -> bool:
    return not isinstance(logger(), logging.Logger)


def test_worker_code_logs_by_itself(start_method: str) -> None:
    """A forked worker comes from the manager's thread, and has no thread to hand records to."""
    with Pool(size=1, start_method=start_method) as pool:
        assert pool.call(is_relayed) is False


# -- the relay by itself -------------------------------------------------------------------------


@pytest.fixture
def relay() -> Iterator[LogRelay]:
    made = LogRelay("test")
    log_through(made.put)
    yield made
    log_through(None)
    made.close(LAST)


def test_what_waits_is_bounded_and_the_dropped_are_counted(stuck: Stuck, relay: LogRelay) -> None:
    logger().warning("%d", 0)
    assert stuck.reached.wait(LAST)
    for number in range(1, MOST + 50):
        logger().warning("%d", number)
    stuck.go_on.set()
    relay.close(LAST)
    *told, last = [record.getMessage() for record in stuck.records]
    assert told == [str(number) for number in range(MOST)]
    assert last.startswith("test: 50 log records of the manager were dropped")


def test_each_dropped_record_is_told_of_once(stuck: Stuck, relay: LogRelay) -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "dropped" in record.getMessage():
                told.put(record.getMessage())

    handler = Told()
    logging.getLogger("minipool").addHandler(handler)
    try:
        for dropped in (2, 3):
            stuck.reached.clear()
            stuck.go_on.clear()
            logger().warning("the first")
            assert stuck.reached.wait(LAST)
            for _ in range(MOST - 1 + dropped):
                logger().warning("more")
            stuck.go_on.set()
            assert told.get(timeout=LAST).startswith(f"test: {dropped} log records")
        logger().warning("one that is written")
        relay.close(LAST)
    finally:
        logging.getLogger("minipool").removeHandler(handler)
    assert told.empty()


def test_what_is_left_after_the_time_to_close_is_not_written(stuck: Stuck, relay: LogRelay) -> None:
    logger().warning("one")
    assert stuck.reached.wait(LAST)
    logger().warning("two")
    relay.close(0.01)
    thread = relay._thread
    assert thread is not None
    stuck.go_on.set()
    thread._thread.join(LAST)
    assert [record.getMessage() for record in stuck.records] == ["one"]


def test_what_nobody_would_hear_starts_no_thread(relay: LogRelay) -> None:
    remark(logging.DEBUG, "not shown")
    assert relay._thread is None


def test_a_handler_that_raises_costs_its_own_record_only(relay: LogRelay, caplog: Any) -> None:
    class Raises(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise SystemExit(record.getMessage())

    handler = Raises()
    logging.getLogger("minipool").addHandler(handler)
    try:
        logger().warning("one")
        logger().warning("two")
        relay.close(LAST)
    finally:
        logging.getLogger("minipool").removeHandler(handler)
    assert [record.getMessage() for record in caplog.records] in (["one", "two"], [])


def test_without_a_thread_records_are_written_at_the_end(
    relay: LogRelay, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def none_left(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(jobs.JobThread, "start", none_left)
    logger().warning("one")
    logger().log(WARNING, "two %d", 2)
    assert not caplog.records
    relay.close(LAST)
    assert [record.getMessage() for record in caplog.records] == ["one", "two 2"]


def test_without_logging_records_are_written_to_standard_error(
    relay: LogRelay, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minipool.telemetry._own_logger", __import__(
        "minipool.telemetry", fromlist=["_Unlogged"])._Unlogged)  # fmt: skip
    logger().warning("that is %d", 1)
    try:
        raise ValueError("of this kind")
    except ValueError:
        logger().exception("and an error")
    relay.close(LAST)
    written = capsys.readouterr().err
    assert written.startswith("that is 1\nand an error\nTraceback")
    assert written.endswith("ValueError: of this kind\n")


ONCE = """
    import sys
    from minipool import Pool

    if __name__ == "__main__":
        sys.stdout.write("out once;")
        with Pool(size=2, start_method=sys.argv[1]) as pool:
            sys.stdout.write(str(pool.call(abs, -1)))
"""


def test_what_is_in_a_buffer_is_written_by_nobody_else(tmp_path: Path, start_method: str) -> None:
    ran = scripts.run(tmp_path, ONCE, start_method, env=buffering())
    assert ran == (0, "out once;1", "")


def test_what_was_logged_is_written_before_the_program_ends(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that was left open is ended at exit, and its log handlers have the time of a close."""
    pool = Pool(size=1)
    ear = Ear(pool, "recovery")
    kill_one(pool)
    ear.wait("recovery")
    assert stuck.reached.wait(LAST)
    pool.hooks["pool.terminate"].append(lambda *_: stuck.go_on.set())
    manager = pool._opened().manager
    monkeypatch.setattr(opening, "live_managers", lambda: [manager])
    opening._close_all()
    assert not manager._thread.is_alive()
    assert [record.levelname for record in stuck.records] == ["WARNING"]
