"""Programs without standard streams: their workers print into nothing, and go on."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from pathlib import Path

import pytest

import scripts

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no such descriptors")

PROGRAM = """
    import os, stat, sys
    from minipool import Pool

    def say(name):
        print("hello " * 100, file=getattr(sys, name), flush=True)
        for fd in (1, 2):
            assert stat.S_ISREG(os.fstat(fd).st_mode) is False, "the table of a pool"
        return os.getpid()

    if __name__ == "__main__":
        told = os.open("told", os.O_WRONLY | os.O_CREAT, 0o600)
        for fd in map(int, sys.argv[2].split(",")):
            os.close(fd)
        with Pool(size=2, start_method=sys.argv[1]) as pool:
            with pool.checkout() as other:
                pids = {pool.call(say, name) for name in ("stdout", "stderr", "stdout")}
                pids.add(other.call(say, "stdout"))
            os.write(told, b"%d %d" % (len(pids), len(pool.workers())))
"""


@pytest.mark.parametrize(
    ("method", "closed", "portable"),
    [
        ("spawn", "1", "1"), ("spawn", "2", "1"), ("spawn", "1,2", "1"), ("fork", "1", "1"),
        ("spawn", "1", "0"), ("fork", "2", "0"),
    ],
)  # fmt: skip
def test_worker_of_a_program_without_standard_streams_prints_into_nothing(
    tmp_path: Path, method: str, closed: str, portable: str
) -> None:
    """The numbers are free in the program, and must not be those of what a worker needs."""
    env = scripts.environment(MINIPOOL_PORTABLE=portable)
    code, _, err = scripts.run(tmp_path, PROGRAM, method, closed, env=env)
    assert (code, (tmp_path / "told").read_text()) == (0, "2 2"), err


BETWEEN = """
    import contextlib, logging, os, signal, subprocess, sys, threading
    from minipool import Pool

    def streams():
        found = []
        for fd in range(3):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0])
        return found

    def say():
        print("printed")
        os.write(1, b"written\\n")
        subprocess.run(["echo", "of a program"], check=True)
        os.write(2, b"told\\n")
        return subprocess.run(["cat"], capture_output=True).stdout

    class Heard(logging.Handler):
        def __init__(self):
            super().__init__()
            self.lines, self.all = [], threading.Event()

        def emit(self, record):
            self.lines.append(record.getMessage())
            if len(self.lines) == 4:
                self.all.set()

    def main(method):
        heard = Heard()
        logging.basicConfig(handlers=[heard], level=logging.INFO)
        options = {"size": 1, "start_method": method}
        seen = []
        with Pool(**options) as pool, Pool(**options, capture_output=True) as captured:
            seen.append(streams())
            for one in pool, captured:
                seen.append(one.call(streams))
                assert one.call(say) == b""
            assert heard.all.wait(20)
            with pool.checkout() as w:
                w.discard("to have another")
            seen.append(pool.call(streams))
            seen.append(streams())
        return [*seen, sorted(heard.lines), streams()]

    if __name__ == "__main__":
        told = os.open("told", os.O_WRONLY | os.O_CREAT, 0o600)
        for fd in range(3):
            os.close(fd)
        os.write(told, repr(main(sys.argv[1])).encode())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("path", ["", "1"], ids=["fast", "portable"])
def test_nothing_of_a_pool_has_the_number_of_a_stream_that_is_closed(
    start_method: str, path: str, tmp_path: Path
) -> None:
    """Neither in the program, nor in a worker, whose output can be captured as ever."""
    env = scripts.environment(MINIPOOL_PORTABLE=path)
    code, _, err = scripts.run(tmp_path, BETWEEN, start_method, env=env)
    nowhere, pipes = ["/dev/null"] * 3, ["/dev/null", "pipe", "pipe"]
    lines = ["of a program", "printed", "told", "written"]
    assert code == 0, err
    assert (tmp_path / "told").read_text() == repr([[], nowhere, pipes, nowhere, [], lines, []])


WATCHED = """
    import contextlib, os
    from minipool import Pool

    if __name__ == "__main__":
        asked, told = os.dup(0), os.dup(1)
        for fd in range(3):
            os.close(fd)
        with Pool(size=1) as pool, pool.dashboard() as dashboard:
            os.write(told, f"{dashboard.url}\\n".encode())
            os.read(asked, 1)
            for fd in range(3):
                with contextlib.suppress(OSError):
                    os.fstat(fd)
                    os.write(told, b"%d " % fd)
"""


def test_nothing_of_a_dashboard_has_it_either(tmp_path: Path) -> None:
    """Nor has a visitor's connection, which would get to see what is printed."""
    process = scripts.start(tmp_path, WATCHED, stdin=subprocess.PIPE)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    with urllib.request.urlopen(f"{url}events", timeout=20) as events:
        assert events.readline()
        out, _ = process.communicate("!", timeout=20)
    assert (process.returncode, out) == (0, "")


WITHOUT = """
    import os, subprocess, sys
    from minipool import Pool

    def use():
        try:
            input()
        except EOFError:
            print("nothing is there", file=sys.stderr)
        print("a line \\udc80", flush=True)
        sys.stdout.write("a text")
        return [subprocess.run(["sh", "-c", "echo a line"]).returncode, sys.stdin.read()]

    if __name__ == "__main__":
        if len(sys.argv) == 2:
            for fd in range(3):
                os.close(fd)
            os.execv(sys.executable, [sys.executable, *sys.argv, "without"])
        told = os.open("told", os.O_RDWR | os.O_CREAT, 0o600)
        assert told == 0
        streams = [sys.stdin, sys.stdout, sys.stderr]
        with Pool(size=1, start_method=sys.argv[1]) as pool:
            answer = repr([streams, pool.call(use)])
        os.write(told, answer.encode())
"""


def test_program_that_was_started_without_streams_has_workers_that_have_them(
    start_method: str, tmp_path: Path
) -> None:
    """Its own are None, and the first number is that of a file that it has opened since."""
    code, out, err = scripts.run(tmp_path, WITHOUT, start_method)
    assert (code, out, err) == (0, "", "")
    assert (tmp_path / "told").read_text() == "[[None, None, None], [0, '']]"
