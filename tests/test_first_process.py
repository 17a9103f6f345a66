"""A program that is the first process of its container, to which the kernel sends no defaults."""

from __future__ import annotations

import functools
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import scripts

CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@functools.cache
def _container() -> list[str] | None:
    """Return a command that runs another as the first process of a namespace, if there is one."""
    if shutil.which("unshare") is None:
        return None
    for command in (CONTAINER, [*CONTAINER, "--user", "--map-root-user"]):
        probe = [*command, sys.executable, "-c", "import os; print(os.getpid())"]
        if subprocess.run(probe, capture_output=True, text=True).stdout == "1\n":
            return command
    return None


def _run(folder: Path, code: str, *args: str) -> tuple[int, str, str]:
    container = _container()
    if container is None:
        pytest.skip("this user may make no process namespace (unshare --pid)")
    path = folder / "script.py"
    path.write_text(code)
    process = subprocess.Popen(
        [*container, sys.executable, str(path), *args], env=scripts.environment(), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    return scripts.finish(process)


FIRST = """
import os, signal, sys, threading
from minipool import Pool

if __name__ == "__main__":
    assert os.getpid() == 1
    method, signum, state = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    pool = Pool(size=1, start_method=method)
    if state == "open":
        pool.open()
    pool.install_signal_handlers(signum)
    os.kill(1, signum)
    print("asked", flush=True)
    assert not threading.Event().wait(10)
    print("went on")
"""


@pytest.mark.parametrize("state", ["open", "new"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGRTMIN + 2])
def test_signal_ends_it_with_128_and_the_signal(signum: int, state: str, tmp_path: Path) -> None:
    code, out, err = _run(tmp_path, FIRST, "forkserver", str(int(signum)), state)
    assert code == 128 + signum, err
    assert "went on" not in out
    assert err == ""


HARMLESS = """
import os, signal
from minipool import Pool

if __name__ == "__main__":
    pool = Pool(size=1)
    pool.install_signal_handlers(signal.SIGWINCH)
    os.kill(1, signal.SIGWINCH)
    print(pool.closed)
"""


def test_signal_that_ends_nothing_by_default_ends_nothing_here(tmp_path: Path) -> None:
    assert _run(tmp_path, HARMLESS) == (0, "True\n", "")


COMMAND = """
import os, signal, sys
from minipool.tools import cli

class Terminated:
    def write(self, text):
        if "http://" in text:
            os.kill(1, signal.SIGTERM)

    def flush(self):
        pass

sys.stdout = Terminated()
sys.exit(cli.main(["dashboard"]))
"""


def test_command_can_be_ended_there(tmp_path: Path) -> None:
    assert _run(tmp_path, COMMAND) == (128 + signal.SIGTERM, "", "")


def test_other_processes_end_by_the_signal_itself(tmp_path: Path) -> None:
    code, _, err = scripts.run(
        tmp_path,
        """
        import os, signal
        from minipool import Pool

        if __name__ == "__main__":
            Pool(size=1).install_signal_handlers()
            os.kill(os.getpid(), signal.SIGTERM)
        """,
    )
    assert (code, err) == (-signal.SIGTERM, "")
