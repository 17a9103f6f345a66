"""Programs that tests run in a Python of their own, with the start method as first argument."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# CPython 3.12+ warns when a process with threads forks; the fork start method does just that.
WARNINGS = ("-W", "always::ResourceWarning", "-W", "ignore:This process (pid=:DeprecationWarning")


def environment(**more: str) -> dict[str, str]:
    """Return the environment in which a script finds minipool and the tests' modules."""
    path = os.pathsep.join(filter(None, [more.pop("first_path", ""), str(ROOT), str(TESTS)]))
    return {**os.environ, "PYTHONPATH": path, **more}


def start(
    folder: Path, code: str, *args: str, env: dict[str, str] | None = None, **more: Any
) -> subprocess.Popen[str]:
    """Start a script; its output comes through pipes."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(code))
    more.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.Popen(
        [sys.executable, *WARNINGS, str(path), *args],
        env=env or environment(), cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 30.0) -> tuple[int, str, str]:
    """Wait for a script's end; return its exit code, output and errors."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its session: the script and its workers
        out, err = process.communicate()
        raise AssertionError(f"the script did not end in {timeout} s:\n{out}\n{err}") from None
    return process.returncode, out, err


def run(
    folder: Path, code: str, *args: str, timeout: float = 30.0, **more: Any
) -> tuple[int, str, str]:
    """Run a script to its end; return its exit code, output and errors."""
    return finish(start(folder, code, *args, **more), timeout)


def wait_gone(*pids: int, timeout: float = 20.0) -> None:
    """Wait until these processes have ended."""
    deadline = time.monotonic() + timeout
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([fd], [], [], left)[0], f"process {pid} did not end"
        finally:
            os.close(fd)
