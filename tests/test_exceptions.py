"""Exceptions whose own code makes trouble, or that are very long, cost their worker nothing."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

import answers
from ears import Ear
from gates import Gate
from minipool import Pool, PoolStartError, RemoteError
from minipool.engine import channel, traces, wire
from minipool.engine.workerend import FastWorkerEnd
from workers import getpid


@pytest.fixture
def pool() -> Iterator[Pool[Any]]:
    with Pool(size=1) as opened:
        yield opened


@pytest.fixture(params=["fast", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "portable":
        monkeypatch.setenv("MINIPOOL_PORTABLE", "1")


# -- their own code ------------------------------------------------------------------------------

STAND_INS = [
    "ExitsWhenPickled", "InterruptsWhenPickled", "ExitsWhenUnpickled", "ExitsWhenRead",
    "HasNoName", "TakesNoCause", "SaysItInAText", "ExitsInTheParent",
]  # fmt: skip


def test_exception_that_exits_on_its_way_costs_no_worker(pool: Pool[Any]) -> None:
    """It arrives as itself or as a RemoteError, and ends neither the worker nor the caller."""
    pid = pool.call(getpid)
    arrived = {}
    for name in STAND_INS:
        with pytest.raises(Exception) as caught:
            pool.call(answers.raise_one, name)
        arrived[name] = caught.value
        assert pool.call(getpid) == pid, name
        assert isinstance(caught.value.__cause__, wire.RemoteTraceback), name
    as_themselves = {"TakesNoCause", "SaysItInAText", "ExitsWhenRead"}
    for name, error in arrived.items():
        kind = type.__getattribute__(type(error), "__name__")
        assert kind == (name if name in as_themselves else "RemoteError")
    assert pool.stats().faults == 0


def test_exception_that_exits_in_the_parent_says_so(pool: Pool[Any]) -> None:
    with pytest.raises(RemoteError, match="does not unpickle here: SystemExit") as caught:
        pool.call(answers.raise_one, "ExitsInTheParent")
    assert caught.value.type_name == "answers.ExitsInTheParent"


@pytest.mark.parametrize("name", ["ResultExitsWhenPickled", "ResultExitsWhenUnpickled"])
def test_result_that_exits_on_its_way_is_told(pool: Pool[Any], name: str) -> None:
    pid = pool.call(getpid)
    with pytest.raises(RemoteError, match=r"SystemExit|ResultExits"):
        pool.call(answers.return_one, name)
    with pool.checkout(session="ada") as lease, pytest.raises(RemoteError):
        lease.call(answers.return_one_in_session, name)
    assert pool.call(getpid) == pid


def test_exit_of_the_caller_is_not_taken_for_the_result_s() -> None:
    """A signal handler that ends the program may strike while a result is unpickled."""
    exits = iter([SystemExit(0)])

    def loads(data: Any) -> Any:
        for exit_ in exits:
            raise exit_

    with pytest.raises(SystemExit) as caught:
        loads(b"")
    assert wire.unreadable(caught.value, loads, b"") is caught.value


@pytest.mark.parametrize("name", ["ExitsWhenRead", "TakesNoCause", "ExitsInTheParent"])
def test_constructor_that_raises_such_a_one_costs_no_manager(name: str) -> None:
    pool = Pool(answers.raise_one, args=(name,), size=1)
    with pytest.raises(PoolStartError, match=name) as caught:
        pool.open()
    expected = "RemoteError" if name == "ExitsInTheParent" else name
    assert type(caught.value.__cause__).__name__ == expected


def test_text_of_another_class_arrives_as_plain_text() -> None:
    error = wire.error_in_words(wire.pack_error(answers.SaysItInAText()), "takes too long")
    assert isinstance(error, RemoteError)
    assert type(error.message) is str and error.message == "said"


# -- their length --------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", [False, True])
def test_very_long_traceback_arrives_within_the_timeout(pool: Pool[Any], cause: bool) -> None:
    """All of its 100,000 frames took five seconds to format."""
    kind = KeyError if cause else ValueError
    with pytest.raises(kind) as caught:
        pool.call(answers.raise_from_deep, 100_000, cause)
    text = str(caught.value.__cause__)
    assert "frames are left out here" in text and len(text) < 100_000
    assert "from the deep" in text
    assert (str(caught.value) in text) and ("direct cause" in text) == cause


def error_of(frames: int) -> BaseException:
    """Return an exception with so many frames in its traceback."""
    names = {}
    source = "".join(f"def f{i}(): f{i + 1}()\n" for i in range(frames - 2))
    exec(f"{source}def f{frames - 2}(): 1 / 0\n", names)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + frames)
    try:
        names["f0"]()
    except ZeroDivisionError as error:
        return error
    finally:
        sys.setrecursionlimit(limit)
    raise AssertionError


def shown(text: str) -> list[str]:
    return [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith('  File "')]


@pytest.mark.parametrize(
    "frames, cut", [(99, 0), (100, 0), (101, 0), (200, 0), (201, 1), (300, 100)]
)
def test_first_and_last_hundred_frames_are_shown(frames: int, cut: int) -> None:
    text = traces.text_of(error_of(frames))
    names = ["error_of", *(f"f{i}" for i in range(frames - 1))]
    assert shown(text) == (names[:100] + names[-100:] if cut else names)
    assert (f"  ... {cut} frames are left out here ..." in text.splitlines()) == bool(cut)
    assert text.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert os.path.dirname(traces.__file__) not in text


def test_each_exception_of_a_chain_is_cut_by_itself() -> None:
    deep = error_of(300)
    try:
        raise KeyError("above") from deep
    except KeyError as caught:
        error: BaseException = caught
    text = traces.text_of(error)
    assert len(shown(text)) == 200 + 1
    assert text.count("frames are left out here") == 1
    assert text.index("ZeroDivisionError") < text.index("direct cause") < text.index("'above'")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no groups of exceptions")
def test_each_exception_of_a_group_is_cut_by_itself() -> None:
    group: Any = eval("ExceptionGroup")
    text = traces.text_of(group("several", [error_of(300), error_of(250), ValueError("short")]))
    assert "... 100 frames are left out here ..." in text
    assert "... 50 frames are left out here ..." in text
    assert "several (3 sub-exceptions)" in text and "ValueError: short" in text


@pytest.mark.parametrize("length", [101, 20_000])
def test_very_long_chain_is_told_of_by_its_end(pool: Pool[Any], length: int) -> None:
    with pytest.raises(ValueError) as caught:
        pool.call(answers.raise_long_chain, length)
    text = str(caught.value.__cause__)
    assert f"ValueError: {length - 1}" in text and "more than 100 causes" in text
    assert len(text) < 10_000


def test_chain_that_bites_its_tail_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    assert "first" in traces.text_of(first)


def test_forwarded_log_record_has_a_short_traceback_too(caplog: Any) -> None:
    with caplog.at_level(logging.ERROR), Pool(size=1, forward_logs=True) as pool:
        pool.call(answers.log_from_deep, 100_000)
    (record,) = (record for record in caplog.records if record.name == "answers")
    assert record.exc_text is not None
    assert "frames are left out here" in record.exc_text
    assert record.exc_text.endswith("ValueError: from the deep")


# -- signal handlers -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raises an OSError", "reads a closed pipe"])
def test_handler_that_raises_what_a_pipe_raises_does_not_end_an_idle_worker(
    path: None, how: str, gate: Gate, caplog: Any
) -> None:
    with caplog.at_level(logging.INFO), Pool(size=1, capture_output=True) as pool:
        ear = Ear(pool, "error", "worker.terminate")
        pid = pool.call(answers.leave_a_handler, how, gate.path)
        gate.wait_arrived()
        assert [pool.call(getpid) for _ in range(3)] == [pid] * 3
        assert not ear.heard
    told = [record.getMessage() for record in caplog.records if record.name == "minipool.output"]
    assert any("a signal handler raised between two calls" in line for line in told)


@pytest.mark.parametrize("by", ["parent", "worker"])
def test_pipe_that_has_ended_says_so(by: str) -> None:
    """Whatever was raised: the kernel knows."""
    ours, theirs = channel.pair(None, portable=False)
    worker = FastWorkerEnd(theirs, 1 << 20)
    try:
        assert not worker.has_ended(EOFError()) and not worker.has_ended(OSError(9, "no"))
        if by == "worker":
            worker.let_go()
        else:
            ours.close()
        assert worker.has_ended(EOFError()) and worker.has_ended(ValueError())
        assert not worker.has_ended(SystemExit()) and not worker.has_ended(KeyboardInterrupt())
    finally:
        ours.close()
        worker.let_go()


def test_reading_that_fails_by_itself_is_not_taken_up_again(tmp_path: Path) -> None:
    """The descriptor is that of a folder by now: to read it once more would fail for ever."""
    ours, theirs = channel.pair(None, portable=False)
    worker = FastWorkerEnd(theirs, 1 << 20)
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        os.dup2(folder, theirs.reader.fd)
        with pytest.raises(IsADirectoryError) as caught:
            worker.receive()
        assert not worker.has_ended(caught.value)
        assert not worker.was_waiting(caught.value.__traceback__)
    finally:
        os.close(folder)
        ours.close()
        worker.let_go()
