"""README's table of what a worker inherits, row by row and with each start method."""

from __future__ import annotations

import json
import os
import pty
import signal
from pathlib import Path
from typing import Any

import scripts
from gates import Gate
from test_readme import table

TOLD = """
    import json, os, resource, signal, sys
    from minipool import Pool
    from workers import getpid

    def umask():
        mask = os.umask(0)
        os.umask(mask)
        return mask

    def ignored():
        return signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN

    def see():
        try:
            input()
        except EOFError:
            read = "EOFError"
        return {
            "environment": [os.environ["PARENTS"], os.environ["WORKERS"]],
            "current directory": os.path.basename(os.getcwd()),
            "umask": umask(),
            "limits (`ulimit`)": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
            "CPU affinity": sorted(os.sched_getaffinity(0)),
            "blocked signals": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "ignored signals": ignored(),
            "signal handlers": callable(signal.getsignal(signal.SIGHUP)),
            "standard input": read,
            "standard output and error": os.path.basename(os.readlink("/proc/self/fd/1")),
        }

    def change(name, umask, files, core, cpus, ignore):
        output = os.open(name + ".out", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(output, 1)
        os.close(output)
        os.environ["PARENTS"] = name
        os.chdir(name)
        os.umask(umask)
        for kind, limit in ((resource.RLIMIT_NOFILE, files), (resource.RLIMIT_CORE, core)):
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
        os.sched_setaffinity(0, cpus)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN if ignore else signal.SIG_DFL)

    def main(method):
        cpus, told = sorted(os.sched_getaffinity(0)), os.dup(1)
        os.mkdir("before"), os.mkdir("before/after")
        signal.signal(signal.SIGHUP, lambda *_: None)
        signal.pthread_sigmask(
            signal.SIG_BLOCK, (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
        )
        change("before", 0o027, 500, 1 << 20, cpus[:1], ignore=True)
        options = {"worker_env": {"WORKERS": "own"}, "start_method": method, "open_files": 300}
        with Pool(size=1, **options) as pool:
            seen = [pool.call(see)]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR2,))
            change("after", 0o077, 400, 2 << 20, cpus, ignore=False)
            with pool.checkout() as w:
                w.discard("to have another")
            seen.append(pool.call(see))
        with Pool(size=1, **options) as pool:
            seen.append(pool.call(see))
        os.write(told, json.dumps([cpus, *seen]).encode())

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


def _seen(folder: Path, method: str) -> tuple[list[int], list[dict[str, Any]]]:
    code, out, err = scripts.run(folder, TOLD, method)
    assert code == 0, err
    cpus, *seen = json.loads(out)
    return cpus, seen


def test_worker_inherits_what_the_table_says(start_method: str, tmp_path: Path) -> None:
    """The second worker is started after changes by another thread, the third by a new pool."""
    cpus, (first, second, third) = _seen(tmp_path, start_method)
    terminals = [signal.SIGTTIN, signal.SIGTTOU]
    assert first == {
        "environment": ["before", "own"],
        "current directory": "before",
        "umask": 0o027,
        "limits (`ulimit`)": 300,
        "core": 1 << 20,
        "CPU affinity": cpus[:1],
        "blocked signals": [signal.SIGUSR2, *terminals],
        "ignored signals": True,
        "signal handlers": start_method == "fork",
        "standard input": "EOFError",
        "standard output and error": "before.out",
    }
    assert {row[0] for row in table("inherited")} == {*first, "terminal"} - {"core"}
    moved = {**first, "current directory": "after"}
    if start_method == "forkserver":
        assert second == third == moved
        return
    changed = {
        **moved,
        "environment": ["after", "own"],
        "umask": 0o077,
        "core": 2 << 20,
        "ignored signals": False,
        "standard output and error": "after.out",
    }
    assert second == changed
    assert third == {**changed, "CPU affinity": cpus, "blocked signals": terminals}


AT_TERMINAL = """
    import os, signal, sys
    from gates import pass_gate
    from minipool import Pool

    def pass_and_tell(gate):
        pid = pass_gate(gate)
        with open(gate + ".in", "wb", buffering=0) as passed:
            passed.write(b"!")
        return pid

    def main(method, name, gate):
        terminal = os.open(name, os.O_RDWR)  # of this session from now on
        with Pool(size=1, start_method=method) as pool:
            print(pool.call(os.getpid), pool.call(os.getpgrp), os.tcgetpgrp(terminal), flush=True)
            print(pool.call(pass_and_tell, gate) > 0)

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


def test_keys_reach_the_program_alone_and_its_worker_works_on(
    start_method: str, gate: Gate, tmp_path: Path
) -> None:
    """A program that is stopped has its answer when it goes on: the worker has ended the call."""
    ours, theirs = pty.openpty()
    try:
        process = scripts.start(tmp_path, AT_TERMINAL, start_method, os.ttyname(theirs), gate.path)
        assert process.stdout is not None
        worker, group, reached = map(int, process.stdout.readline().split())
        assert worker == group
        assert reached == process.pid
        gate.wait_arrived()
        os.kill(process.pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        gate.open()
        gate.wait_arrived()  # at the end of the call
        os.kill(process.pid, signal.SIGCONT)
        assert scripts.finish(process) == (0, "True\n", "")
    finally:
        os.close(ours)
        os.close(theirs)
