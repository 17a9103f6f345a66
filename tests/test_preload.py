"""Preload: what the fork server imports for all workers, and what becomes of what it cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

import scripts
from minipool.engine import fork_server

OPENS = """
    import json, sys, traceback
    sys.path.insert(0, sys.argv[2])
    from minipool import Pool, PoolStartError

    def main():
        pool = Pool(size=2, preload=[sys.argv[1]])
        failures = []
        pool.hooks["error"].append(lambda *event: failures.append(event))
        try:
            pool.open()
        except PoolStartError as error:
            print(error)
            print(type(error.__cause__).__name__, len(failures) <= 2, pool.closed)
            traceback.print_exception(type(error), error, None, file=sys.stdout)
        with Pool(size=1) as other:
            print("after", other.call(abs, -7))

    if __name__ == "__main__":
        main()
"""
NOTHING = "ModuleNotFoundError: No module named 'there_is_no_such'"


@pytest.mark.parametrize("found_by", ["server", "workers"])
@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise ValueError('no licence')", "ValueError: no licence"),
        ("import there_is_no_such", NOTHING),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
    ids=["raises", "imports-what-is-missing", "exits"],
)
def test_preload_that_raises_fails_the_opening_with_its_own_text(
    code: str, why: str, found_by: str, tmp_path: Path
) -> None:
    """At the first try, with the traceback; and the next pool of the process starts well.

    The server passes over what it does not find. Where it does find it, it may end with it.
    """
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "heavy.py").write_text(code + "\n")
    env = scripts.environment(first_path=str(folder) if found_by == "server" else "")
    exitcode, out, err = scripts.run(tmp_path, OPENS, "heavy", str(folder), env=env)
    first, second, *rest = out.splitlines()
    assert f"preload: cannot import 'heavy': {why}" in first
    assert second == "ImportError True True"
    assert any("heavy.py" in line and "line 1" in line for line in rest), "its traceback"
    assert (exitcode, rest[-1]) == (0, "after 7")
    assert "minipool-pool" not in err, "no worker and no manager has written a traceback"


@pytest.mark.parametrize("name", ["there_is_no_such", "there_is_no_such.part"])
def test_preload_that_cannot_be_found_is_refused_before_anything_is_started(
    name: str, tmp_path: Path
) -> None:
    exitcode, out, err = scripts.run(tmp_path, OPENS, name, str(tmp_path))
    first, second, *_, last = out.splitlines()
    assert (exitcode, err, last) == (0, "", "after 7")
    assert repr(name) in first and "no module 'there_is_no_such' on sys.path" in first
    assert second == "NoneType True False"


def test_preload_that_its_package_lacks_is_told_by_a_worker(tmp_path: Path) -> None:
    """To look for it would import the package into this process."""
    exitcode, out, err = scripts.run(tmp_path, OPENS, "json.no_such_part", str(tmp_path))
    assert (exitcode, err) == (0, "")
    assert "No module named 'json.no_such_part'" in out.splitlines()[0]


CRASHES = """
    from minipool import CircuitBreaker, Pool, PoolStartError

    def main():
        try:
            Pool(size=1, preload=["heavy"], breaker=CircuitBreaker(1)).open()
        except PoolStartError as error:
            print(error)

    if __name__ == "__main__":
        main()
"""


def test_preload_that_crashes_is_told_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text("import os\nos.abort()\n")
    env = scripts.environment(first_path=str(tmp_path))
    exitcode, out, _ = scripts.run(tmp_path, CRASHES, env=env)
    assert exitcode == 0
    assert "by SIGABRT" in out and 'heavy.py", line 2' in out, "a worker has told, not the server"


HANGS = """
    from minipool import Pool, PoolStartError

    def main():
        try:
            Pool(size=1, preload=["heavy"], init_timeout=1.0).open()
        except PoolStartError as error:
            print(error)
        with Pool(size=1) as other:
            print("after", other.call(abs, -7))

    if __name__ == "__main__":
        main()
"""


def test_preload_that_never_ends_does_not_hold_up_the_opening_for_ever(tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text("import threading\nthreading.Event().wait()\n")
    env = scripts.environment(first_path=str(tmp_path))
    exitcode, out, err = scripts.run(tmp_path, HANGS, env=env)
    assert exitcode == 0, err
    told, after = out.splitlines()
    assert "did not answer within 1 s" in told and "`preload`" in told and "init_timeout" in told
    assert (exitcode, after) == (0, "after 7")


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="nothing tells of the end of a process")
def test_server_that_was_killed_for_its_silence_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its sockets end before it does: the next start would take it for alive."""
    server = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    open_pidfd = os.pidfd_open

    def end_meanwhile(pid: int) -> int:
        fd = open_pidfd(pid)
        os.kill(pid, signal.SIGKILL)
        return fd

    try:
        monkeypatch.setattr(fork_server.os, "pidfd_open", end_meanwhile)
        monkeypatch.setattr(forkserver._forkserver, "_forkserver_pid", server.pid)
        monkeypatch.setattr(forkserver._forkserver, "_preload_modules", [])
        monkeypatch.setattr(fork_server._Known, "silent", server.pid)
        monkeypatch.setattr(fork_server._Known, "patience", 5.0)
        told, again = fork_server._explained()
        assert server.poll() == -signal.SIGKILL
        assert "did not answer within 5 s" in str(told) and not again
    finally:
        server.communicate()


IMPORTED = """
    import sys, tempfile
    sys.path.insert(0, sys.argv[2])
    if sys.argv[1] == "spawn":  # is taken where there is no temporary directory
        tempfile._candidate_tempdir_list = lambda: []
        tempfile.tempdir = None
    from minipool import Pool
    from troublemakers import imported

    def main():
        with Pool(size=1, preload=["light"]) as pool:
            print(pool._launcher.method, pool.call(imported, "light"), "light" in sys.modules)

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_worker_imports_by_itself_what_no_server_has(method: str, tmp_path: Path) -> None:
    """Found through `sys.path` as it is now, which older servers do not know."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "light.py").write_text("")
    exitcode, out, err = scripts.run(tmp_path, IMPORTED, method, str(folder))
    assert (exitcode, out, err) == (0, f"{method} True False\n", "")


CLOSED = """
    import os, sys
    from multiprocessing import forkserver
    from gates import Gate
    from minipool import Pool

    def main():
        gate = Gate(os.environ["GATE"])
        errors = []
        pool = Pool(size=2, preload=["heavy"], init_timeout=None)
        pool.hooks["error"].append(lambda *event: errors.append(event))
        pool.open(wait=False)
        gate.wait_arrived()
        first = forkserver._forkserver._forkserver_pid
        other = Pool(size=1).open(wait=False)
        pool.close(1)
        print(pool._desk.manager.done, errors)
        print(other.call(abs, -7), forkserver._forkserver._forkserver_pid != first)
        other.close()

    if __name__ == "__main__":
        main()
"""


def test_close_does_not_wait_for_a_preload_and_spares_other_pools(tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text(
        "import os\n"
        "from gates import pass_gate\n"
        "if not os.path.exists('once'):\n"
        "    open('once', 'w').close()\n"
        "    pass_gate(os.environ['GATE'])\n"
    )
    env = scripts.environment(first_path=str(tmp_path), GATE=str(tmp_path / "gate"))
    exitcode, out, err = scripts.run(tmp_path, CLOSED, env=env)
    assert (exitcode, out, err) == (0, "True []\n7 True\n", "")


STOPS = """
    import os, signal
    from multiprocessing import forkserver
    from minipool import Pool

    def main():
        with Pool(size=1, init_timeout=0.5, checkout_timeout=20, start_method="forkserver") as pool:
            pid = pool.call(os.getpid)
            server = forkserver._forkserver._forkserver_pid
            os.kill(server, signal.SIGSTOP)
            with pool.checkout() as w:
                w.discard("of no use")
            print(pool.call(os.getpid) != pid, forkserver._forkserver._forkserver_pid != server)

    if __name__ == "__main__":
        main()
"""


def test_fork_server_that_stops_answering_is_replaced(tmp_path: Path) -> None:
    """Though it had answered before: nothing else would ever end the wait."""
    exitcode, out, err = scripts.run(tmp_path, STOPS)
    assert (exitcode, out) == (0, "True True\n"), err
