"""No room for one more worker: the pool serves with what it has, says so, and recovers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import scripts

SCRIPT = """
    import fcntl, gc, os, resource, signal, sys  # fcntl: workers import it
    from ears import Ear, wait_until
    from minipool import Pool
    from multiprocessing import forkserver
    from rogues import Stateful
    from vandals import NeedsMemory

    def limit(kind, soft):
        resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))

    def server_limit(kind, soft):
        pid = forkserver._forkserver._forkserver_pid
        resource.prlimit(pid, kind, (soft, resource.prlimit(pid, kind)[1]))

    def taken():
        return len(os.listdir("/proc/self/fd"))

    def main(what, method):
        worker = NeedsMemory if what == "memory" else Stateful
        if what == "processes" and os.getuid() == 0:
            with Pool(worker, size=2, start_method=method) as first:
                with first.checkout() as w, first.checkout() as other:
                    os.kill(other.pid, signal.SIGKILL)
                    wait_until(first, lambda: first.deaths() and first.stats().idle == 1)
                    w.call("add", 1), first.health_check()  # imported, whoever may read what
            os.setuid(54321)  # the superuser has no such limit
        pool = Pool(worker, size=2, start_method=method, breaker=False)
        ear = Ear(pool, "error", "worker.init")
        with pool:
            fds = taken()
            if what == "descriptors":
                kind, change = resource.RLIMIT_NOFILE, limit
                few = fds + 1
            elif what == "processes":
                kind, change, few = resource.RLIMIT_NPROC, limit, 1
            else:
                kind, change, few = resource.RLIMIT_AS, server_limit, 60 << 20
            before = resource.getrlimit(kind)[0]
            change(kind, few)
            with pool.checkout() as w:
                with pool.checkout() as other:
                    pid = other.pid
                    os.kill(pid, signal.SIGKILL)
                    ear.wait("error", 3, fits=lambda event: event.metadata["kind"] == "start")
                    print("serves", w.call("add", 1), flush=True)
                report = pool.health_check()
                print(report.status, flush=True)
                print(report.reasons, flush=True)
            for _ in range(50):
                assert pool.call("pid") > 0
            change(kind, before)
            wait_until(pool, lambda: pool.stats().idle == 2)
            wait_until(pool, lambda: pool.stats().start_failures >= 3)
            with pool.checkout() as one, pool.checkout() as two:
                print("recovered", one.call("add", 1) + two.call("add", 1) > 0, flush=True)
            gc.collect()
            print("descriptors", taken() - fds, flush=True)

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


def _run(what: str, method: str, folder: Path, said: str) -> None:
    code, out, err = scripts.run(folder, SCRIPT, what, method, timeout=50)
    lines = out.splitlines()
    assert code == 0, err
    assert lines[0].startswith("serves"), out
    assert lines[1] == "degraded", out
    assert "1 of 2 workers" in lines[2]
    assert "last start failed" in lines[2]
    assert said in lines[2]
    assert lines[3:] == ["recovered True", "descriptors 0"], out


def test_out_of_descriptors(start_method: str, tmp_path: Path) -> None:
    _run("descriptors", start_method, tmp_path, "Too many open files")


def test_out_of_processes(tmp_path: Path) -> None:
    """`fork` alone: to whom the superuser becomes here, no other method may read its files."""
    _run("processes", "fork", tmp_path, "Resource temporarily unavailable")


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs prlimit")
def test_out_of_memory(tmp_path: Path) -> None:
    """The workers, not the program, lack it."""
    _run("memory", "forkserver", tmp_path, "MemoryError")


FULL_DISK = """
    import os, sys
    os.__dict__.pop("memfd_create", None)  # the table is an unlinked file then
    from minipool import Pool
    from ears import Ear, wait_until
    from rogues import Stateful

    if __name__ == "__main__":
        with Pool(Stateful, size=2, max_size=40, start_method="fork", breaker=False) as pool:
            ear = Ear(pool, "error")
            filler = os.open(os.environ["TMPDIR"] + "/filler", os.O_CREAT | os.O_WRONLY)
            try:
                while True:
                    os.write(filler, bytes(4096))
            except OSError:
                pass
            pool.resize(3)
            ear.wait("error", 2)
            print("serves", pool.call("add", 1))
            print(pool.health_check().status, pool.health_check().reasons)
            os.ftruncate(filler, 0)
            os.unlink(os.environ["TMPDIR"] + "/filler")
            os.close(filler)
            wait_until(pool, lambda: pool.stats().idle == 3)
            print("recovered")
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs a mount of its own")
@pytest.mark.skipif("MINIPOOL_PORTABLE" in os.environ, reason="there is no file then")
def test_full_disk(tmp_path: Path) -> None:
    """Where the status table is a file on a file system that is full."""
    small, script = tmp_path / "small", tmp_path / "script.py"
    small.mkdir()
    mounted = f"mount -t tmpfs -o size=64k none {small}"
    alone = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-r", "-m"]
    if subprocess.run([*alone, "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("this user may not mount anything")
    import textwrap

    script.write_text(textwrap.dedent(FULL_DISK))
    done = subprocess.run(
        [*alone, "sh", "-c", f'{mounted} && exec "$0" -W ignore "$1"', sys.executable, str(script)],
        capture_output=True, text=True, timeout=50,
        env=scripts.environment(TMPDIR=str(small)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("serves")
    assert lines[1].startswith("degraded") and "No space left" in lines[1]
    assert lines[2] == "recovered"
