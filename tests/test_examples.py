"""The examples, run as a newcomer runs them: as programs, from elsewhere, nothing installed."""

from __future__ import annotations

import importlib.util
import os
import pty
import re
import select
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import environment, finish, run

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICKSTART = EXAMPLES / "quickstart.py"


def start_quickstart(cwd: Path, *args: str, **more: Any) -> subprocess.Popen[str]:
    """Start it in a Python that finds nothing but its own library: -I and -S, so do workers."""
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(QUICKSTART), *args],
        cwd=cwd, stdin=subprocess.DEVNULL, text=True, start_new_session=True, **more,
    )  # fmt: skip


def quickstart(cwd: Path, *args: str) -> tuple[int, str, str]:
    return finish(start_quickstart(cwd, *args))


@pytest.fixture
def indexer(tmp_path: Path) -> Any:
    """An Indexer of an empty directory, in this process."""
    spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Indexer(str(tmp_path))


def test_hello_greets_twice_from_one_worker() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "hello.py")],
        env=environment(), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "Hello, Ada! You are number 1.\nHello, Grace! You are number 2.\n"
    )  # fmt: skip


def test_answer_under_chaos_equals_the_serial_one(tmp_path: Path, start_method: str) -> None:
    """Workers are killed from the first moment on; every part of the report is there."""
    code, out, err = quickstart(
        tmp_path, "--limit", "40", "--chaos", "--start-method", start_method, "--workers", "2"
    )
    assert code == 0, out + err
    for part in ("Indexing 40 files", "ten longest functions", "most imported modules"):
        assert part in out
    assert re.search(r"calls +40 answered, [0-9]+ begun by a worker that died", out), out
    assert re.search(r"one call +p50 [0-9.]+ ms, p99 [0-9.]+ ms", out), out
    assert re.search(r"utilisation +[0-9]+ %", out), out
    assert re.search(r"answer +equal: [0-9a-f]{16}", out), out
    killed = re.search(r"chaos +([0-9]+) killed", out)
    workers = re.search(r"workers +([0-9]+) started, ([0-9]+) replaced", out)
    assert killed and int(killed[1]) >= 1, out
    assert workers and workers[2] == killed[1] and int(workers[1]) == 2 + int(killed[1]), out
    assert err.count("died by SIGKILL") == int(killed[1]), err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_wrong_answer_is_noticed(tmp_path: Path) -> None:
    """A worker that loses a single row makes the example fail with exit code 1."""
    code, out, err = run(
        tmp_path,
        """
        import sys
        import quickstart

        class LosesOneRow(quickstart.Indexer):
            def index(self, file):
                rows = super().index(file)
                if file == "__future__.py":
                    rows["functions"].pop()
                return rows

        if __name__ == "__main__":
            sys.exit(quickstart.main(["--limit", "40"], worker=LosesOneRow))
        """,
        env=environment(first_path=str(EXAMPLES)),
    )
    assert "answer       DIFFERENT" in out, out + err
    assert code == 1


@pytest.mark.parametrize("more", [(), ("--chaos",)], ids=["quiet", "chaos"])
def test_ctrl_c_ends_everything_with_130(tmp_path: Path, more: tuple[str, ...]) -> None:
    """As a terminal sends it, to the whole group: no traceback, no process is left."""
    process = start_quickstart(tmp_path, *more)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Indexing")
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finish(process, timeout=15)
    assert code == 130, err
    assert err.endswith("\ninterrupted\n")
    assert "Traceback" not in err
    for pid in processes_of_session(process.pid):
        wait_for_end(pid)
    assert processes_of_session(process.pid) == []


def test_bar_is_drawn_on_a_terminal_and_log_lines_do_not_tear_it(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = start_quickstart(tmp_path, "--limit", "40", "--no-check", "--chaos", stderr=theirs)
    os.close(theirs)
    written = b""
    try:
        while select.select([ours], [], [], 20)[0]:
            written += os.read(ours, 65536)
    except OSError:
        pass  # EIO: the last process with that terminal has ended
    finally:
        os.close(ours)
    assert finish(process)[0] == 0
    text = written.decode()
    assert f"\r\x1b[K[{'#' * 40}] 40 of 40 files" in text
    assert re.search(r"\r\x1b\[Kworker [0-9]+ .* died by SIGKILL .* is replaced\r\n", text), text
    assert text.endswith("\r\x1b[K")


def test_no_bar_is_drawn_into_a_file(tmp_path: Path) -> None:
    code, _, err = quickstart(tmp_path, "--limit", "3", "--no-check", "--workers", "1")
    assert (code, err) == (0, "")


def test_index_is_kept_where_it_was_asked_for(tmp_path: Path) -> None:
    """A file that is there already is left alone."""
    path = tmp_path / "index.sqlite"
    args = ("--limit", "40", "--no-check", "--workers", "1", "--database", str(path))
    code, out, err = quickstart(tmp_path, *args)
    assert code == 0, err
    db = sqlite3.connect(str(path))
    longest = db.execute("SELECT max(length) FROM functions").fetchone()[0]
    assert db.execute("SELECT count(*) FROM imports").fetchone()[0] > 40
    db.close()
    assert f"{longest:5} lines  " in out
    before = path.read_bytes()
    code, _, err = quickstart(tmp_path, *args)
    assert code == 2 and "name a new file" in err
    assert path.read_bytes() == before


def test_wrong_number_of_workers_is_refused_in_a_line(tmp_path: Path) -> None:
    code, out, err = quickstart(tmp_path, "--limit", "3", "--workers", "0")
    assert (code, out) == (2, "")
    assert err == "size=0: give a whole number, 1 or more, or None\n"


def test_file_that_does_not_parse_is_named(indexer: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "null.py").write_bytes(b"x = 1\0")
    assert indexer.index("bad.py")["unparsed"] == [("bad.py", "SyntaxError")]
    assert indexer.index("gone.py")["unparsed"] == [("gone.py", "FileNotFoundError")]
    assert [name for name, _ in indexer.index("null.py")["unparsed"]] == ["null.py"]


def test_functions_and_imports_have_their_full_names(indexer: Any, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text(
        "import os.path as p\nfrom . import b, c\nfrom ..other import d\nfrom .b import e\n"
        "class K:\n    async def m(self):\n        def inner():\n            pass\n"
    )
    indexer.known = frozenset(["package.b"])
    rows = indexer.index(os.path.join("package", "a.py"))
    assert sorted(module for _, module in rows["imports"]) == [
        "os.path", "other", "package", "package.b",
    ]  # fmt: skip
    assert sorted(row[1:] for row in rows["functions"]) == [(6, 3, "K.m"), (7, 2, "K.m.inner")]


def processes_of_session(session: int) -> list[int]:
    """Return the processes that are in a session and have not ended."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # no process, or one that has just ended
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry))
    return found


def wait_for_end(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    select.select([fd], [], [], 10)
    os.close(fd)


def test_chat_survives_its_worker_and_its_program(tmp_path: Path) -> None:
    """Every line is remembered: after a kill -9 of the worker, then of the whole program."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(EXAMPLES / "sticky_sessions.py")],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == "  remembered: ['hello', 'my name is Ada', 'do you remember me', 'and now']"
    assert done.stdout.count("kill -9") == 2
