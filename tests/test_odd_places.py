"""What a program's surroundings may lack, or hold: workers start all the same, or say what it was."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

import scripts
from minipool.engine import popen, shortage

NOWHERE = """
    import os, sys, tempfile
    from ears import wait_until
    from minipool import Pool, WorkerDied

    def where():
        try:
            return os.getcwd()
        except FileNotFoundError:
            return "nowhere"

    def replaced(pool, pid):
        try:
            pool.call(os._exit, 3)
        except WorkerDied:
            return pool.call(os.getpid) != pid

    if __name__ == "__main__":
        method, when = sys.argv[1:]
        gone = tempfile.mkdtemp()
        os.chdir(gone)
        if when == "before":
            os.rmdir(gone)
        with Pool(size=1, start_method=method) as pool:
            pid = pool.call(os.getpid)
            if when == "while it runs":
                os.rmdir(gone)
            print(replaced(pool, pid), pool.call(where), pool.stats().start_failures)
        with Pool(size=1, start_method=method) as pool:
            print(pool.call(where))
"""


@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_worker_is_started_where_the_directory_is_gone(
    when: str, start_method: str, tmp_path: Path
) -> None:
    """A deploy has removed it; nothing of ours is in it."""
    if start_method != "fork" and not imports_nowhere(tmp_path):
        pytest.skip("this Python itself imports nothing there")
    code, out, err = scripts.run(tmp_path, NOWHERE, start_method, when)
    assert code == 0, err
    assert out.splitlines() == ["True nowhere 0", "nowhere"], out + err


def imports_nowhere(folder: Path) -> bool:
    """Tell whether a process is able to import what it needs in a directory that is gone.

    With CPython 3.13.0 to 3.13.2 it is not: https://github.com/python/cpython/issues/130932.
    """
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$0" -c "import socket"'
    return not subprocess.run(
        ["sh", "-c", script, sys.executable], cwd=folder, capture_output=True, timeout=50
    ).returncode


ODD_PATH = """
    import os, pathlib, sys
    from minipool import Pool

    class Folder(str):
        def __repr__(self):
            return f"Folder({str(self)})"

    if __name__ == "__main__":
        sys.path.insert(0, pathlib.Path("/nowhere"))
        sys.path.append(Folder(sys.argv[2]))
        before = list(sys.path)
        with Pool("odd_module:Odd", size=1, start_method=sys.argv[1]) as pool:
            print(pool.call("answer"), sys.path == before)
"""


def test_path_may_hold_what_is_no_plain_string(start_method: str, tmp_path: Path) -> None:
    """A `pathlib.Path` is ignored by the import system, and by us; a kind of string is not."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "odd_module.py").write_text("class Odd:\n    def answer(self): return 42\n")
    code, out, err = scripts.run(tmp_path, ODD_PATH, start_method, str(folder))
    assert code == 0, err
    assert out.split() == ["42", "True"], out + err


CLEANED = """
    import os, shutil, sys
    from multiprocessing import forkserver
    from minipool import Pool, WorkerDied

    if __name__ == "__main__":
        with Pool(size=1, start_method="forkserver") as pool:
            pid = pool.call(os.getpid)
            shutil.rmtree(os.path.dirname(forkserver._forkserver._forkserver_address))
            pool.resize(2)
            pool.wait_ready(2, timeout=20)
            assert pool.stats().start_failures == 0
            with pool.checkout() as one, pool.checkout() as two:
                old = one if one.pid == pid else two
                try:
                    old.call(os._exit, 3)
                except WorkerDied as died:
                    print(died.exitcode)
            pool.wait_ready(2, timeout=20)
            print(pool.stats().start_failures)
"""


def test_fork_server_whose_socket_is_gone_is_replaced(tmp_path: Path) -> None:
    """Something has cleaned the temporary directory. The old one still tells of its workers."""
    code, out, err = scripts.run(tmp_path, CLEANED)
    assert code == 0, err
    assert out.split() == ["3", "0"], out + err


REMOVED = """
    import os, sys
    from ears import Ear
    from minipool import Pool, WorkerDied
    from workers import identity

    if __name__ == "__main__":
        with Pool(size=1, start_method=sys.argv[1], breaker=False) as pool:
            ear = Ear(pool, "error")
            with open(__file__) as file:
                program = file.read()
            os.remove(__file__)
            pool.resize(2)
            ear.wait("error", 1)
            error = str(ear.heard[0].metadata["error"])
            print(f"file {__file__!r} does not exist" in error, pool.call(identity, 1))
            with open(__file__, "w") as file:
                file.write(program)
            pool.wait_ready(2, timeout=20)
            print("recovered")
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_program_that_was_removed_is_named(method: str, tmp_path: Path) -> None:
    """Every worker would import it; a deploy brings it back."""
    code, out, err = scripts.run(tmp_path, REMOVED, method)
    assert code == 0, err
    assert out.split() == ["True", "1", "recovered"], out + err


def test_folder_in_which_no_server_can_be_started_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "no" / "folder")
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", folder)  # type: ignore[attr-defined]
    monkeypatch.setattr(popen, "_server", forkserver.ForkServer)
    with pytest.raises(FileNotFoundError) as caught:
        popen.ensure_server()
    assert shortage.in_words(caught.value).endswith(f"No such file or directory: {folder!r}")


RELATIVE = """
    import os, sys, tempfile
    from minipool import Pool, PoolStartError

    if __name__ == "__main__":
        gone = tempfile.mkdtemp(dir=os.path.dirname(os.getcwd()))  # it leads to the same places
        os.chdir(gone)
        os.rmdir(gone)
        try:
            Pool(size=1, start_method=sys.argv[1]).open()
        except PoolStartError as error:
            print(error)
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_directory_that_is_gone_is_named_where_no_python_starts(
    method: str, tmp_path: Path
) -> None:
    """With a relative entry in PYTHONPATH it has to ask where it is."""
    path = os.pathsep.join(
        os.path.relpath(each, tmp_path) for each in (scripts.ROOT, scripts.TESTS)
    )
    env = scripts.environment()
    code, out, err = scripts.run(tmp_path, RELATIVE, method, env={**env, "PYTHONPATH": path})
    assert code == 0, err
    assert f"current directory does not exist any more and PYTHONPATH={path!r} is relative" in out
    assert "`os.chdir()`" in out and "guard" not in out and "ulimit" not in out
