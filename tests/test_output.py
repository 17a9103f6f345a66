"""What workers log and print reaches the parent's log handlers, and harms nobody on the way."""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import threading
from contextvars import Context
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import talkers
from ears import wait_until
from gates import Gate
from minipool import CallTimeout, Pool, PoolStartError, WorkerDied
from minipool.engine import teller
from minipool.engine.transcript import Transcript
from scripts import run
from workers import getpid

LOGGER = "talkers.worker"


class Listener(logging.Handler):
    """Remembers records; `wait` returns when enough of them have come."""

    def __init__(self, of: Callable[[logging.LogRecord], bool]) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._of = of
        self._changed = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        if self._of(record):
            with self._changed:
                self.records.append(record)
                self._changed.notify_all()

    def wait(self, count: int = 1, timeout: float = 20.0) -> list[logging.LogRecord]:
        with self._changed:
            enough = self._changed.wait_for(lambda: len(self.records) >= count, timeout)
        assert enough, f"{len(self.records)} records came, not {count}: {self.texts}"
        return self.records

    def wait_for(self, text: str, timeout: float = 20.0) -> logging.LogRecord:
        def found() -> list[logging.LogRecord]:
            return [record for record in self.records if record.getMessage() == text]

        with self._changed:
            assert self._changed.wait_for(found, timeout), f"no {text!r}: {self.texts}"
        return found()[0]

    @property
    def texts(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@contextlib.contextmanager
def listening(
    name: str = LOGGER, level: int = logging.DEBUG, of: Callable[..., bool] = lambda record: True
) -> Iterator[Listener]:
    """Listen at a logger; its level is that of the workers' that start from now on."""
    listener, logger = Listener(of), logging.getLogger(name)
    before = logger.level
    logger.addHandler(listener)
    logger.setLevel(level)
    try:
        yield listener
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before)


@pytest.fixture
def logs() -> Iterator[Listener]:
    with listening() as listener:
        yield listener


@pytest.fixture
def output() -> Iterator[Listener]:
    with listening(teller.OUTPUT) as listener:
        yield listener


@pytest.fixture
def pool(logs: Listener) -> Iterator[Pool[None]]:
    with Pool(size=1, forward_logs=True, context=[talkers.trace_id], name="talk") as pool:
        yield pool


# -- log records ---------------------------------------------------------------------------------


def test_log_records_reach_the_handlers_of_the_parent(start_method: str, logs: Listener) -> None:
    with Pool(size=1, forward_logs=True, start_method=start_method, name="talk") as pool:
        pid = pool.call(talkers.say, logging.INFO, "hello %s, %d", "Ada", 3, user="u1")
    (record,) = logs.records  # told before `close` returns, and once
    assert record.getMessage() == "hello Ada, 3"
    assert (record.levelname, record.funcName, record.process) == ("INFO", "say", pid)
    assert record.processName == "minipool-talk-0"
    told: Any = record
    assert (told.pool, told.worker_id, told.generation, told.call_id) == ("talk", 0, 1, 1)
    assert (told.session, told.context, told.user) == (None, {}, "u1")


def test_record_tells_call_session_and_context(pool: Pool[None], logs: Listener) -> None:
    def call() -> None:
        talkers.trace_id.set("abc")
        pool.call(getpid)
        with pool.checkout(session="ada") as w:
            w.call(talkers.say_in_session, "in a session")

    Context().run(call)
    told: Any = logs.wait()[0]
    assert (told.call_id, told.session, told.context) == (2, "ada", {"trace_id": "abc"})


def test_filters_of_the_parent_find_the_context_variables(pool: Pool[None]) -> None:
    seen: list[str | None] = []
    with listening(of=lambda record: bool(seen.append(talkers.trace_id.get(None))) or True) as ear:
        Context().run(lambda: (talkers.trace_id.set("abc"), pool.call(talkers.say_in_thread)))
        Context().run(pool.call, talkers.say_in_thread)
        ear.wait(2)
    assert seen == ["abc", None]


def test_records_outside_calls_have_no_call(logs: Listener) -> None:
    with Pool(talkers.SaysAtStart, size=1, forward_logs=True) as pool:
        pool.call(getpid)
    told: list[Any] = logs.records
    assert [(t.getMessage(), t.call_id) for t in told] == [("made", None), ("closed", None)]


def test_order_is_kept(pool: Pool[None], logs: Listener) -> None:
    pool.call(talkers.say_many, 500)
    assert [record.getMessage() for record in logs.wait(500)] == [str(n) for n in range(500)]


def test_workers_have_the_levels_of_the_parent() -> None:
    with listening(level=logging.ERROR) as logs, Pool(size=1, forward_logs=True) as pool:
        pool.call(talkers.say, logging.WARNING, "not wanted")
        pool.call(talkers.say, logging.ERROR, "wanted")
        logs.wait_for("wanted")
        logging.getLogger(LOGGER).setLevel(logging.CRITICAL)  # heeded at once
        pool.call(talkers.say, logging.ERROR, "no more")
    assert logs.texts == ["wanted"]


def test_arguments_that_cannot_be_pickled_travel_as_text(pool: Pool[None], logs: Listener) -> None:
    pool.call(talkers.say_unpicklable)
    told: Any = logs.wait()[0]
    assert told.getMessage().startswith("<unpicklable> and <unlocked _thread.lock object")
    assert told.thing == "<unpicklable>"


def test_extra_that_does_not_unpickle_costs_itself(pool: Pool[None], logs: Listener) -> None:
    pool.call(talkers.say_unreadable)
    told: Any = logs.wait()[0]
    assert told.thing.startswith("<does not unpickle here: ValueError") and told.other == 3


def test_exception_travels_as_its_traceback(pool: Pool[None], logs: Listener) -> None:
    pool.call(talkers.say_exception)
    text = logging.Formatter("%(message)s").format(logs.wait()[0])
    assert text.startswith("it failed\nTraceback") and text.endswith("KeyError: 'missing'")


def test_huge_record_is_cut_and_told(pool: Pool[None], logs: Listener) -> None:
    pool.call(talkers.say, logging.INFO, "x" * 10_000_000, more="y" * 10_000_000)
    told: Any = logs.wait()[0]
    assert told.getMessage() == "x" * 100_000 + "... (10000000 characters)"
    assert len(told.more) < 101_000


def test_records_of_a_worker_that_dies_right_after_arrive(pool: Pool[None], logs: Listener) -> None:
    with pytest.raises(WorkerDied) as caught:
        pool.call(talkers.say_and_die, 100, signal.SIGKILL)
    assert caught.value.output == tuple(f"WARNING {LOGGER}: {n}" for n in range(80, 100))
    assert len(logs.wait(100)) == 100


def test_wrong_log_call_harms_nothing(pool: Pool[None], logs: Listener) -> None:
    pool.call(talkers.say_wrongly)
    pool.call(talkers.say, logging.INFO, "well")
    assert logs.wait()[0].getMessage() == "well"


def test_records_of_forked_children_do_not_mix(pool: Pool[None], logs: Listener) -> None:
    text = "z" * 90_000
    pid = pool.call(talkers.say_in_child, text)
    assert [record.getMessage() for record in logs.wait(2)] == [text, text]
    assert pid in [record.process for record in logs.records]


def test_worker_that_configures_logging_does_not_write_twice(
    pool: Pool[None], logs: Listener
) -> None:
    pool.call(talkers.redo_logging)
    pool.call(talkers.say, logging.INFO, "once")
    pool.call(talkers.say, logging.INFO, "twice")
    logs.wait_for("twice")
    assert logs.texts == ["once", "twice"]


def test_each_record_is_written_once(tmp_path: Path, start_method: str) -> None:
    """Also by a worker that was forked with the parent's handlers, or has imported their setup."""
    code = """
        import logging, sys
        import talkers
        from minipool import Pool

        logging.basicConfig(filename="log.txt", format="%(message)s", level=logging.INFO)

        if __name__ == "__main__":
            own = logging.FileHandler("own.txt")
            own.setFormatter(logging.Formatter("%(message)s, by %(worker_id)s"))
            talkers.log.addHandler(own)
            talkers.log.propagate = False
            with Pool(size=1, start_method=sys.argv[1], forward_logs=True) as pool:
                pool.call(talkers.say, logging.INFO, "own")
                pool.call(logging.info, "root")
    """
    status, _, err = run(tmp_path, code, start_method)
    assert (status, err) == (0, "")
    assert (tmp_path / "log.txt").read_text() == "root\n"
    assert (tmp_path / "own.txt").read_text() == "own, by 0\n"


def test_worker_is_not_slowed_by_handlers_that_never_return(gate: Gate) -> None:
    """A hundred thousand records, and more: the calls return while the handler still blocks."""
    entered, go_on = threading.Event(), threading.Event()

    def block(record: logging.LogRecord) -> bool:
        entered.set()
        assert go_on.wait(50)
        return True

    def lost(record: logging.LogRecord) -> bool:
        return hasattr(record, "dropped")

    with listening(of=block) as logs, listening(teller.OUTPUT, of=lost) as told:
        with Pool(size=1, forward_logs=True) as pool:
            pool.call(talkers.say_many, 1)
            assert entered.wait(20)
            pool.call(talkers.say_many, 50_000)
            assert not logs.records
            go_on.set()
            pool.call(talkers.say, logging.INFO, "the end")  # or the number might come at the end
            told.wait()
        dropped = sum(record.dropped for record in told.records)  # type: ignore[attr-defined]
    assert dropped > 50_000 - 2 * teller.MOST_ITEMS
    assert dropped + len(logs.records) == 50_002
    numbers = [int(text) for text in logs.texts[1:] if text != "the end"]
    assert numbers == sorted(numbers)


def test_worker_is_not_slowed_by_a_parent_that_does_not_read(
    pool: Pool[None], logs: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the pipe cannot take is dropped in the worker, which tells the number later."""
    reading, go_on = threading.Event(), threading.Event()
    read = Transcript.read

    def read_late(*args: Any, **more: Any) -> bool:
        reading.set()
        assert go_on.wait(50)
        return read(*args, **more)

    monkeypatch.setattr(Transcript, "read", read_late)
    pool.call(talkers.say_many, 1)
    assert reading.wait(20)
    with listening(teller.OUTPUT) as told:
        pool.call(talkers.say_many, 30_000)
        go_on.set()
        logs.wait(2)
        pool.health_check(probe=True)  # or the next record, or the worker's end
        told.wait()
        wait_until(pool, lambda: total(told) + len(logs.records) == 30_001)
    assert total(told) > 0


def total(told: Listener) -> int:
    return sum(record.dropped for record in tuple(told.records))  # type: ignore[attr-defined]


def test_handler_may_use_the_pool_and_close_it() -> None:
    """Not even the close that waits for the handlers waits for the one that closes."""
    results: list[Any] = []
    done = threading.Event()

    def use(record: logging.LogRecord) -> bool:
        results.append(pool.call(getpid))
        pool.close()
        done.set()
        return True

    with listening(of=use):
        pool = Pool(size=2, forward_logs=True)
        pool.open()
        pool.call(talkers.say, logging.WARNING, "use it")
        assert done.wait(20)
        pool.close()
    assert len(results) == 1


@pytest.mark.logs_errors
@pytest.mark.parametrize("kind", [LookupError, SystemExit])
def test_handler_that_raises_is_told_once_and_harms_nothing(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(record: logging.LogRecord) -> bool:
        raise kind("broken handler")

    with listening(of=fail), Pool(size=1, forward_logs=True) as pool:
        pool.call(talkers.say_many, 10)
        assert pool.call(getpid)
        pool.call(talkers.say_many, 1)
    errors = [record for record in caplog.records if record.name == "minipool"]
    assert len(errors) == 1 and "a log handler failed" in errors[0].getMessage()


def test_close_does_not_wait_for_a_handler_that_blocks() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def block(record: logging.LogRecord) -> bool:
        entered.set()
        assert go_on.wait(50)
        return True

    with listening(of=block) as logs:
        with Pool(size=1, forward_logs=True) as pool:
            pool.call(talkers.say_many, 3)
            assert entered.wait(20)
        assert repr(pool).endswith("closed>") and not logs.records
        go_on.set()  # the thread ends with the handler, and tells nothing more
        for thread in threading.enumerate():
            if thread.name.endswith("-teller"):
                thread.join(20)
        assert logs.texts == ["0"]


def test_garbage_in_the_log_pipe_ends_forwarding_and_is_told(
    pool: Pool[None], output: Listener
) -> None:
    pool.call(talkers.write_to_log_pipe)
    assert "not its own" in output.wait()[0].getMessage()
    pool.call(talkers.say_many, 10)


def test_without_the_options_nothing_is_imported_and_no_thread_started(
    tmp_path: Path, start_method: str
) -> None:
    code = """
        import sys, threading
        from minipool import Pool

        if __name__ == "__main__":
            with Pool(size=1, start_method=sys.argv[1]) as pool:
                names = set(pool.call(eval, "list(__import__('sys').modules)")) | {*sys.modules}
                print([name for name in names if name.endswith((".voice", ".scribe", "logging"))])
                print(threading.active_count())
    """
    status, out, err = run(tmp_path, code, start_method)
    assert (status, out) == (0, "[]\n2\n"), err


# -- standard output and standard error ----------------------------------------------------------


def test_output_of_python_c_and_other_programs_becomes_records(
    start_method: str, output: Listener
) -> None:
    with Pool(size=1, capture_output=True, start_method=start_method) as pool:
        pid = pool.call(getpid)
        pool.call(talkers.write_everywhere)
        output.wait(7)
    told: list[Any] = output.records
    assert {(t.worker_id, t.process, t.call_id) for t in told} == {(0, pid, None)}
    lines = [(t.stream, t.levelname, t.getMessage()) for t in told]
    assert [line for line in lines if line[0] == "stderr"] == [("stderr", "WARNING", "error")]
    assert [line for line in lines if line[0] == "stdout"] == [
        ("stdout", "INFO", text)
        for text in ("print", "raw", "program", "C", "umlaut: ä \\udc80", "no utf-8: \\xff")
    ]


def test_last_lines_are_on_the_error(start_method: str, output: Listener) -> None:
    """Up to the very last, and without the end of its line."""
    with Pool(size=1, capture_output=True, start_method=start_method) as pool:
        with pytest.raises(WorkerDied) as caught:
            pool.call(talkers.write_and_abort, 100)
    lines = caught.value.output
    assert len(lines) == 20 and "fatal: no line end" in lines and "line 99" in lines
    assert pool.deaths()[0].output == lines
    output.wait_for("fatal: no line end")
    output.wait_for("line 0")


def test_last_lines_are_empty_without_the_options() -> None:
    with Pool(size=1) as pool, pytest.raises(WorkerDied) as caught:
        pool.call(talkers.kill_now)
    assert caught.value.output == ()


def test_last_lines_are_on_the_error_of_a_start(output: Listener) -> None:
    with pytest.raises(PoolStartError) as caught:
        Pool(talkers.DiesAtStart, size=1, capture_output=True).open()
    cause: Any = caught.value.__cause__
    assert cause.output == ("about to fail",)


def test_worker_may_close_its_output(output: Listener) -> None:
    with Pool(size=1, capture_output=True) as pool:
        pid = pool.call(getpid)
        assert pool.call(talkers.close_output) == "closed"
        assert pool.call(getpid) == pid


def test_prints_wait_for_no_handler(output: Listener) -> None:
    """A flood of lines passes while the handler of the first one still blocks."""
    entered, go_on = threading.Event(), threading.Event()

    def block(record: logging.LogRecord) -> bool:
        entered.set()
        assert go_on.wait(50)
        return True

    with listening(teller.OUTPUT, of=block) as blocked:
        with Pool(size=1, capture_output=True) as pool:
            pool.call(talkers.write, "first")
            assert entered.wait(20)
            pool.call(talkers.write_many, 100_000)
            assert not blocked.records
            go_on.set()
    told: list[Any] = blocked.records
    dropped = sum(getattr(record, "dropped", 0) for record in told)
    lines = sum(not hasattr(record, "dropped") for record in told)
    assert dropped > 0 and dropped + lines == 100_001


def test_line_in_parts_is_one_record(output: Listener) -> None:
    with Pool(size=1, capture_output=True) as pool:
        for part in ("one ", "line", "\r\nand a half"):
            pool.call(talkers.write_part, part)
    assert output.texts == ["one line", "and a half"]


def test_endless_line_is_cut_in_pieces(output: Listener) -> None:
    with Pool(size=1, capture_output=True) as pool:
        pool.call(talkers.write_part, "x" * 1_000_000)
    assert "".join(output.texts) == "x" * 1_000_000
    assert max(map(len, output.texts)) <= 64 * 1024


def test_output_of_start_and_end_is_there(output: Listener) -> None:
    with Pool(talkers.SaysAtStart, size=2, capture_output=True) as pool:
        pool.call(getpid)
    told: list[Any] = output.records
    lines = [record.getMessage() for record in told if record.stream == "stdout"]
    assert sorted(lines) == ["closed", "closed", "made", "made"]


def test_both_options_go_together(output: Listener, logs: Listener) -> None:
    with Pool(talkers.SaysAtStart, size=1, capture_output=True, forward_logs=True) as pool:
        pool.call(getpid)
    assert output.texts == logs.texts == ["made", "closed"]


def test_nothing_is_printed_by_workers_themselves(tmp_path: Path, start_method: str) -> None:
    """Captured output is not on the application's own streams unless a handler puts it there."""
    code = """
        import sys
        import talkers
        from minipool import Pool

        if __name__ == "__main__":
            with Pool(size=1, start_method=sys.argv[1], capture_output=True) as pool:
                pool.call(talkers.write_everywhere)
            print("done")
    """
    status, out, err = run(tmp_path, code, start_method)
    assert (status, out) == (0, "done\n")
    assert err == "error\n"  # by logging's handler of last resort, for warnings


def test_flood_of_one_worker_drops_nothing_of_another() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def block(record: logging.LogRecord) -> bool:
        entered.set()
        assert go_on.wait(50)
        return True

    with listening(of=block) as logs, Pool(size=2, forward_logs=True) as pool:
        with pool.checkout() as loud, pool.checkout() as quiet:
            loud.call(talkers.say_many, 2 * teller.MOST_ITEMS)
            assert entered.wait(20)
            quiet.call(talkers.say, logging.INFO, "still heard")
        go_on.set()
        logs.wait_for("still heard")


def test_without_threads_the_start_fails_and_is_tried_again(
    output: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two threads cannot be had, nothing is left of the other."""
    start, failed = threading.Thread.start, []

    def start_rarely(thread: threading.Thread) -> None:
        ours = thread.name.endswith(("-scribe", "-teller"))
        if ours and thread.name not in failed:
            failed.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_rarely)
    pool = Pool(size=1, capture_output=True, breaker=False, checkout_timeout=20)
    pool.open(wait=False)
    try:
        pool.call(talkers.write, "at last")
        assert pool.stats().start_failures == len(failed) == 2
    finally:
        pool.close()
    assert output.texts == ["at last"]


def test_last_lines_are_on_a_call_timeout(output: Listener, gate: Gate) -> None:
    with Pool(size=1, capture_output=True) as pool, pytest.raises(CallTimeout) as caught:
        pool.options(timeout=0.5).call(talkers.write_and_wait, "waiting", gate.path)
    assert caught.value.output == ("waiting",)


def test_pool_that_is_forgotten_leaves_no_thread(output: Listener) -> None:
    pool = Pool(size=1, capture_output=True, forward_logs=True).open()
    manager = pool._desk.manager  # type: ignore[union-attr]
    del pool
    gc.collect()
    assert manager.wait_done(20)


def test_forked_child_of_the_parent_closes_its_copies(tmp_path: Path) -> None:
    code = """
        import os
        import minipool, talkers

        def pipes():
            links = set()
            for fd in os.listdir("/proc/self/fd"):
                try:
                    links.add(os.readlink(f"/proc/self/fd/{fd}"))
                except OSError:
                    pass  # the one that lists them
            return links

        if __name__ == "__main__":
            with minipool.Pool(size=2, capture_output=True, forward_logs=True) as pool:
                scribe = pool._desk.manager.fleet.scribe
                theirs = {os.readlink(f"/proc/self/fd/{fd}") for t in scribe._open for fd in t.fds}
                print(len(theirs), len(theirs & pipes()))
                pid = os.fork()
                if pid == 0:
                    os._exit(len(theirs & pipes()))
                print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                print(pool.call(len, "abc"))
    """
    status, out, err = run(tmp_path, code)
    assert (status, out) == (0, "6 6\n0\n3\n"), err
