"""Programs that workers are started from: daemonic ones, embedded Pythons, moved paths, debuggers."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import scripts
from minipool import Pool

NOT_FORKED = ["forkserver", "spawn"]

# -- processes that may have no children, by multiprocessing's rules -----------------------------

DAEMONIC = """
    import multiprocessing, os, sys
    from multiprocessing import process
    from minipool import Pool

    class StrangeKey(bytes):
        '''As billiard's, which Celery's processes have: it pickles for billiard alone.'''
        def __reduce__(self):
            raise TypeError("Pickling an AuthenticationString object is disallowed")

    def is_daemon():
        return process.current_process().daemon

    def has_children():
        child = multiprocessing.get_context("fork").Process(target=int)
        child.start()
        child.join()
        return child.exitcode

    def use(method, key, how):
        config = process.current_process()._config
        if key == "strange":
            config["authkey"] = StrangeKey(config["authkey"])
        pool = Pool(size=1, start_method=method).open()
        assert process.current_process().daemon
        print(pool.call(is_daemon), pool.call(has_children), flush=True)
        pool.call(os.kill, pool.workers()[0].pid, 0)
        assert key != "strange" or type(config["authkey"]) is StrangeKey
        if how == "with":
            pool.close()

    if __name__ == "__main__":
        context = multiprocessing.get_context("fork")
        daemon = context.Process(target=use, args=sys.argv[1:], daemon=True)
        daemon.start()
        daemon.join(20)
        sys.exit(daemon.exitcode)
"""


@pytest.mark.parametrize(("key", "end"), [("ours", "with"), ("strange", "open")])
def test_daemonic_process_may_have_a_pool(
    start_method: str, key: str, end: str, tmp_path: Path
) -> None:
    """Its workers end with it, which is all that the flag is for; they are no daemons."""
    assert scripts.run(tmp_path, DAEMONIC, start_method, key, end) == (0, "False 0\n", "")


KILLED = """
    import multiprocessing, sys, threading
    from minipool import Pool

    def use(method):
        pool = Pool(size=2, start_method=method).open()
        print(*[worker.pid for worker in pool.workers()], flush=True)
        pool.call(threading.Event().wait)

    def wait():
        threading.Event().wait()

    if __name__ == "__main__":
        context = multiprocessing.get_context("fork")
        process = context.Process(target=use, args=sys.argv[1:], daemon=True)
        process.start()
        print("parent", process.pid, flush=True)
        sys.stdin.readline()  # then this program ends, and terminates its daemon
"""


def test_pool_of_a_daemon_ends_with_the_program_that_terminates_it(
    start_method: str, tmp_path: Path
) -> None:
    program = scripts.start(tmp_path, KILLED, start_method, stdin=-1)
    assert program.stdout is not None and program.stdin is not None
    lines = [program.stdout.readline() for _ in range(2)]
    pids = [int(word) for line in lines for word in line.split() if word.isdigit()]
    assert len(pids) == 3
    program.stdin.write("\n")
    assert scripts.finish(program)[0] == 0
    scripts.wait_gone(*pids)


# -- interpreters ----------------------------------------------------------------------------------

EMBEDDED = """
    import multiprocessing, sys
    from minipool import Pool, PoolStartError

    def main(method, executable):
        multiprocessing.set_executable(executable)
        try:
            Pool(size=1, start_method=method, init_timeout=1.0).open()
        except PoolStartError as error:
            print(error)

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


@pytest.mark.parametrize("method", NOT_FORKED)
@pytest.mark.parametrize(
    "does", ["exec sleep 60", "exit 0", "exit 3"], ids=["hangs", "ends", "fails"]
)
def test_executable_that_is_no_python_is_named_with_the_remedy(
    method: str, does: str, tmp_path: Path
) -> None:
    """As where Python is embedded: `sys.executable` is the program that embeds it, if anything."""
    program = tmp_path / "studio"
    tracker = f'case "$*" in *resource_tracker*) exec {sys.executable} "$@";; esac'
    program.write_text(f"#!/bin/sh\n{tracker}\n{does}\n")
    program.chmod(0o755)
    exitcode, out, err = scripts.run(tmp_path, EMBEDDED, method, str(program))
    assert (exitcode, err) == (0, "")
    assert f"sys.executable={str(program)!r}" in out and out.count("\n") == 1
    assert "Python" in out


@pytest.mark.parametrize("method", NOT_FORKED)
@pytest.mark.parametrize("path", ["", "/nowhere/python"])
def test_executable_that_is_not_there_is_refused_at_once(
    method: str, path: str, tmp_path: Path
) -> None:
    exitcode, out, err = scripts.run(tmp_path, EMBEDDED, method, path)
    assert (exitcode, err) == (0, "")
    assert f"would start {path!r}" in out and "sys.executable" in out
    assert "multiprocessing.set_executable()" in out


# -- programs ----------------------------------------------------------------------------------------

MOVED = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from beside import Beside
    from beside.package.deep import Deep, reach
    sys.path.remove(sys.argv[2])
    from minipool import CallMismatch, Pool, PoolStartError

    def main(method, folder):
        for worker in (Beside, Deep):
            try:
                with Pool(worker, size=1, start_method=method) as pool:
                    print(pool.call("answer"))
            except PoolStartError as error:
                print(error)
        with Pool(size=1, start_method=method) as pool:
            try:
                print(pool.call(reach))
            except CallMismatch as error:
                print(error)

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


def test_class_or_function_whose_directory_has_left_the_path_is_told_so(
    start_method: str, tmp_path: Path
) -> None:
    """As by programs that take it off once they have imported what is there."""
    package = tmp_path / "apart" / "beside" / "package"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("class Beside:\n    def answer(self): return 42\n")
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text(
        "class Deep:\n    def answer(self): return 42\ndef reach(): return 42\n"
    )
    folder = str(tmp_path / "apart")
    script = MOVED
    if start_method != "fork":  # workers import the script too, and find what they need meanwhile
        script = script.replace(
            "    from beside", "    if __name__ == '__main__':\n     from beside"
        )
    exitcode, out, err = scripts.run(tmp_path, script, start_method, folder)
    assert (exitcode, err) == (0, "")
    if start_method == "fork":
        assert out == "42\n42\n42\n"
        return
    for line in out.splitlines():
        assert ": No module named 'beside'" in line
        assert f"has imported it from {folder!r}, which is not (any more) on sys.path" in line
        assert "PYTHONPATH" in line
    assert out.count("\n") == 3


DEBUGGED = """
    import sys
    from minipool import Pool

    class Local:
        def answer(self): return 42

    def main():
        with Pool(Local, size=1, start_method=sys.argv[1]) as pool:
            print("answer", pool.call("answer"))

    if __name__ == "__main__":
        main()
"""


def test_program_may_run_under_the_debugger(start_method: str, tmp_path: Path) -> None:
    """Before CPython 3.13, pdb leaves the main module without what multiprocessing asks for."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(DEBUGGED))
    command = [sys.executable, *scripts.WARNINGS, "-m", "pdb", "-c", "continue", "-c", "quit"]
    done = subprocess.run(
        [*command, str(path), start_method], capture_output=True, text=True, timeout=30,
        env=scripts.environment(), cwd=tmp_path, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "answer 42\n" in done.stdout and "Traceback" not in done.stdout


def test_workers_are_told_apart_where_processes_are_listed(start_method: str) -> None:
    """By pool and slot; the kernel keeps 15 bytes, and of those the slot is never cut off."""
    for name in ("mailer", "a-name-of-great-length", "ünï-çödé-ünï-çödé"):
        with Pool(size=2, name=name, start_method=start_method) as pool:
            for worker in pool.workers():
                comm = Path(f"/proc/{worker.pid}/comm").read_text().rstrip("\n")
                shown, _, slot = comm.rpartition("/")
                assert shown and name.startswith(shown) and slot == str(worker.worker_id)
                assert len(comm.encode()) <= 15 and (shown == name or len(comm.encode()) >= 14)
