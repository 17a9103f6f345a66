"""A whole run of the suite in two processes: most tests wait more than they compute.

It is done when nothing was selected by name. The second one is `pytest --queue`, a process of this
one, whose report follows ours and whose failures are ours. Both collect the same tests, and then
each takes file after file out of one pipe.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import IO, Any, Iterator

import pytest

_PATIENCE = 1800.0  # seconds for the other half to end, once this one has
_SLOW = 6  # how many other tests a slow one is as long as

_other: subprocess.Popen[bytes] | None = None
_said: IO[bytes] | None = None
_queue: int | None = None  # the end that is filled


def divide(config: pytest.Config) -> None:
    """Start the other half, if this is a whole run and there are two cores."""
    global _other, _said, _queue
    whole = config.args == config.getini("testpaths") and not config.option.keyword
    alone = config.option.collectonly or config.option.usepdb or config.option.capture == "no"
    other = config.option.queue is not None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if not whole or alone or other or usable < 2 or "coverage" in sys.modules:
        return
    _said = tempfile.TemporaryFile()
    config.option.queue, _queue = os.pipe()
    _other = subprocess.Popen(
        [sys.executable, "-m", "pytest", *config.invocation_params.args,
         "--queue", str(config.option.queue)],
        stdin=subprocess.DEVNULL, stdout=_said, stderr=subprocess.STDOUT,
        cwd=config.invocation_params.dir, pass_fds=[config.option.queue],
    )  # fmt: skip


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
        files.setdefault(item.nodeid.partition("::")[0], []).append(item)
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
    """Wait for the other half; its failure is ours."""
    if _other is None:
        return
    _fill(b"")  # it has not been, if our collection failed
    try:
        code = _other.wait(0 if session.shouldstop or session.shouldfail else _PATIENCE)
    except subprocess.TimeoutExpired:
        _other.kill()
        code = _other.wait()
    if code and not session.exitstatus:
        session.exitstatus = code


def report(terminal: Any) -> None:
    """Show what the other half said."""
    if _said is not None:
        _said.seek(0)
        terminal.section("the other half")
        terminal.write(_said.read().decode(errors="replace"))


def other_pid() -> int | None:
    """Return the process of the other half; what it starts is no leftover of our tests."""
    return None if _other is None else _other.pid
