"""The main module: workers find it when its script has ended; what is not in it is told truly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import scripts

ENDED = """
    import os, sys, threading
    from minipool import Pool, WorkerDied

    class Model:
        def answer(self): return 42
        def die(self): os._exit(1)

    def twice(x): return 2 * x

    def go_on():
        threading.main_thread().join()
        assert not hasattr(sys.modules["__main__"], "__file__")
        try:
            threading.Thread(target=bool).start()
        except RuntimeError:  # as with some Pythons
            print("no thread", flush=True)
        with pool or Pool(Model, size=1, start_method=sys.argv[1]) as mine:
            try:
                mine.call("die")
            except WorkerDied:
                print(mine.call("answer"), mine.call(twice, 4), flush=True)

    if __name__ == "__main__":
        pool = None
        if sys.argv[2] != "later":
            pool = Pool(Model, size=1, start_method=sys.argv[1])
        if sys.argv[2] == "opened":
            pool.open()
        threading.Thread(target=go_on).start()
"""
PROGRAM = """
from minipool import Pool
class Model:
    def answer(self): return 42
def main():
    with Pool(Model, size=1) as pool:
        print(pool.call("answer"))
if __name__ == "__main__":
    main()
"""


def run_python(folder: Path, *args: str, stdin: str = "") -> str:
    """Run Python beside the module `program`; return the last line of what it says."""
    (folder / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, *args], input=stdin, cwd=folder, capture_output=True, text=True,
        timeout=50, env=scripts.environment(first_path=str(folder)),
    )  # fmt: skip
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    return next((line for line in lines if line == "42" or "Error: worker=" in line), done.stderr)


@pytest.mark.parametrize("since", ["made", "opened", "later"])
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_pool_goes_on_when_the_main_script_has_ended(
    method: str, since: str, tmp_path: Path
) -> None:
    """Other threads do, and the interpreter has taken the file from the main module."""
    exitcode, out, err = scripts.run(tmp_path, ENDED, method, since)

    if out == "no thread\n" and since != "opened":
        assert "open the pool before the main thread has ended" in err
    else:
        assert (exitcode, out.splitlines()[-1:]) == (0, ["42 8"]), err


def test_class_of_a_script_that_has_ended_is_found_from_the_prompt(tmp_path: Path) -> None:
    typed = 'print(Pool(Model, size=1).open().call("answer"))\n'
    (tmp_path / "script.py").write_text(PROGRAM.replace("    main()", "    pass"))

    assert run_python(tmp_path, "-i", "script.py", stdin=typed) == "42"


def test_class_that_was_typed_in_after_a_script_says_so(tmp_path: Path) -> None:
    typed = "class New:\n def answer(self): return 1\n\nPool(New)\n"
    (tmp_path / "script.py").write_text("from minipool import Pool\n")

    said = run_python(tmp_path, "-i", "script.py", stdin=typed)

    assert "it was typed in, in an interactive session; put it into a module" in said


def test_function_that_a_decorator_of_another_module_made_is_found(tmp_path: Path) -> None:
    """Whatever file its code is in: a worker finds it by name."""
    (tmp_path / "decorators.py").write_text(
        "import functools\n"
        "def plus_one(f):\n"
        "    @functools.wraps(f)\n"
        "    def wrapper(x): return f(x) + 1\n"
        "    return wrapper\n"
    )
    script = """
        from decorators import plus_one
        from minipool import Pool
        @plus_one
        def twice(x): return 2 * x
        if __name__ == "__main__":
            with Pool(size=1) as pool:
                print(pool.call(twice, 4))
    """
    env = scripts.environment(first_path=str(tmp_path))
    exitcode, out, err = scripts.run(tmp_path, script, env=env)
    assert (exitcode, out) == (0, "9\n"), err


@pytest.mark.parametrize("runner", ["cProfile", "profile"])
def test_class_of_a_script_that_a_profiler_runs_says_what_is_the_main_module(
    runner: str, tmp_path: Path
) -> None:
    """Or it works, as the profilers of newer Pythons make the script the main module."""
    said = run_python(tmp_path, "-m", runner, "program.py")

    assert said == "42" or (
        f"run by {runner}, which is the main module" in said and "module of its own" in said
    )


def test_class_of_a_module_that_is_run_as_main_says_where_it_is(tmp_path: Path) -> None:
    """`runpy` gives it that name; workers would import what has called `runpy`."""
    run = "import runpy; runpy.run_module('program', run_name='__main__')"
    (tmp_path / "runs.py").write_text(run)

    said, in_file = run_python(tmp_path, "-c", run), run_python(tmp_path, "runs.py")

    assert f"{os.sep}program.py', and that is run by an interactive session, `-c`" in said
    assert f"{os.sep}program.py', and that is run by '" in in_file
    assert "runs.py', and is not the main module that workers would import; put it into" in in_file
