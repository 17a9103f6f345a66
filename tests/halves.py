"""A whole run of the suite in two processes: most tests wait more than they compute.

It is divided when nothing was selected by name. The second half is `pytest --half 2`, a process of
this one, whose report follows ours and whose failures are ours.
"""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import tempfile
from typing import IO, Any

import pytest

_PATIENCE = 1800.0  # seconds for the other half to end, once this one has
_SLOW = 6  # how many other tests a slow one is as long as

_other: subprocess.Popen[bytes] | None = None
_said: IO[bytes] | None = None


def divide(config: pytest.Config) -> None:
    """Start the other half, if this is a whole run and there are two cores."""
    global _other, _said
    whole = config.args == config.getini("testpaths") and not config.option.keyword
    alone = config.option.collectonly or config.option.usepdb or config.option.capture == "no"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if not whole or alone or config.option.half or usable < 2 or "coverage" in sys.modules:
        return
    _said = tempfile.TemporaryFile()
    _other = subprocess.Popen(
        [sys.executable, "-m", "pytest", *config.invocation_params.args, "--half", "2"],
        stdin=subprocess.DEVNULL, stdout=_said, stderr=subprocess.STDOUT,
        cwd=config.invocation_params.dir,
    )  # fmt: skip
    config.option.half = "1"


def keep(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of our half: whole files, dealt out so that both take about as long."""
    if not config.option.half:
        return
    lengths: collections.Counter[str] = collections.Counter()
    for item in items:
        lengths[item.nodeid.partition("::")[0]] += _SLOW if item.get_closest_marker("slow") else 1
    halves: list[set[str]] = [set(), set()]
    for name, _ in lengths.most_common():
        min(halves, key=lambda half: sum(lengths[n] for n in half)).add(name)
    ours = halves[int(config.option.half) - 1]
    others = [item for item in items if item.nodeid.partition("::")[0] not in ours]
    items[:] = [item for item in items if item.nodeid.partition("::")[0] in ours]
    config.hook.pytest_deselected(items=others)


def join(session: pytest.Session) -> None:
    """Wait for the other half; its failure is ours."""
    if _other is None:
        return
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
