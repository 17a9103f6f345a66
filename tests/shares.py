"""A whole run of the suite in several processes: most tests wait more than they compute.

It is done when nothing was selected by name. The others are `pytest --queue`, processes of this
one, whose reports follow ours and whose failures are ours. All collect the same tests, and then
each takes file after file out of one pipe.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import IO, Any, Iterator, NamedTuple

import pytest

_PATIENCE = 1800.0  # seconds for the others to end, once this one has
_SLOW = 6  # how many other tests a slow one is as long as
_SUMMARY = " short test summary info "


class Other(NamedTuple):
    """Another process that runs tests, and what it says."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]


_others: list[Other] = []
_queue: int | None = None  # the end that is filled


def whole(config: pytest.Config) -> bool:
    """Tell whether nothing was selected by name."""
    return config.args == config.getini("testpaths") and not config.option.keyword


def divide(config: pytest.Config) -> None:
    """Start the other processes, if this is a whole run and there are two cores."""
    global _queue
    alone = config.option.collectonly or config.option.usepdb or config.option.capture == "no"
    other = config.option.queue is not None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    processes = config.option.processes if usable > 1 else 1
    if not whole(config) or alone or other or processes < 2 or "coverage" in sys.modules:
        return
    config.option.queue, _queue = os.pipe()
    _others.extend(_start(config) for _ in range(processes - 1))


def _start(config: pytest.Config) -> Other:
    said = tempfile.TemporaryFile()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *config.invocation_params.args,
         "--queue", str(config.option.queue)],
        stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
        cwd=config.invocation_params.dir, pass_fds=[config.option.queue],
    )  # fmt: skip
    return Other(process, said)


def run(session: pytest.Session) -> bool | None:
    """Run the tests that fall to us; None if all do, as usual."""
    if session.config.option.queue is None or session.testsfailed:
        return None
    tests = _taken(session)
    item = next(tests, None)
    while item is not None:
        following = next(tests, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True


def _taken(session: pytest.Session) -> Iterator[pytest.Item]:
    """Yield the tests of one file after the other, as long as there are any; the longest first."""
    files: dict[str, list[pytest.Item]] = {}
    for item in session.items:
        # What takes longest is taken one by one: else a file of such ends long after the others.
        alone = item.get_closest_marker("exhaustive")
        files.setdefault(item.nodeid if alone else item.nodeid.partition("::")[0], []).append(item)
    order = sorted(files.values(), key=_length, reverse=True)
    _fill(bytes(range(len(order))))
    while True:
        number = os.read(session.config.option.queue, 1)
        if not number:
            return
        yield from order[number[0]]


def _fill(numbers: bytes) -> None:
    """Put into the pipe what is to be taken out of it, once; nothing if that is not our part."""
    global _queue
    if _queue is not None:
        os.write(_queue, numbers)
        os.close(_queue)
        _queue = None


def _length(items: list[pytest.Item]) -> int:
    return sum(_SLOW if item.get_closest_marker("slow") else 1 for item in items)


def join(session: pytest.Session) -> None:
    """Wait for the others; their failures are ours."""
    _fill(b"")  # it has not been, if our collection failed
    patience = 0 if session.shouldstop or session.shouldfail else _PATIENCE
    last = time.monotonic() + patience
    for other in _others:
        try:
            code = other.process.wait(max(0.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            other.process.kill()
            code = other.process.wait()
        if code and not session.exitstatus:
            session.exitstatus = code


def report(terminal: Any) -> None:
    """Show what the others said: all if it failed, else how it ended and what it left out."""
    for other in sorted(_others, key=lambda other: other.process.returncode != 0):
        other.said.seek(0)
        said = other.said.read().decode(errors="replace")
        if other.process.returncode == 0:
            lines = said.splitlines(keepends=True)
            first = [number for number, line in enumerate(lines) if _SUMMARY in line]
            said = "".join(lines[first[-1] if first else -1 :])
        terminal.section("another share of the tests")
        terminal.write(said)


def other_pids() -> set[int]:
    """Return the processes of the others; what they start is no leftover of our tests."""
    return {other.process.pid for other in _others}
