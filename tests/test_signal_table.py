"""README's table of signals: what each does to the parent, a worker and the fork server.

SIGINT and the order of a close are in test_signals.py, SIGTERM to workers and the fork server in
test_sigterm.py, SIGPIPE in test_sigpipe.py, stopped workers in test_stopped.py and the terminal's
signals in test_worker_terminal.py; here is the rest, and the list of all rows.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

import scripts
from ears import Ear
from gates import Gate, pass_gate
from minipool import Pool, WorkerDied
from scripts import wait_gone
from test_readme import table
from workers import getpid

ENDING = [
    signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGKILL,
]  # fmt: skip


def test_rows_are_those_that_are_tested() -> None:
    assert [row[0] for row in table("signal")] == [
        "SIGINT, Ctrl-C",
        "SIGTERM",
        "SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2",
        "SIGKILL",
        "SIGSTOP, Ctrl-Z",
        "SIGPIPE",
        "SIGTTIN, SIGTTOU",
    ]


OPEN = """
    import resource, sys, threading
    from minipool import Pool

    if __name__ == "__main__":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with Pool(size=2, start_method=sys.argv[1]) as pool:
            print(*(info.pid for info in pool.workers()), flush=True)
            threading.Event().wait()
"""


@pytest.mark.parametrize("signum", ENDING)
def test_end_of_the_parent_is_the_end_of_its_workers(signum: int, tmp_path: Path) -> None:
    process = scripts.start(tmp_path, OPEN, "forkserver")
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    process.send_signal(signum)
    wait_gone(*pids)
    assert scripts.finish(process)[0] == -signum


@pytest.mark.parametrize("signum", ENDING[1:])
def test_worker_dies_by_it_and_is_replaced(signum: int, gate: Gate) -> None:
    with Pool(size=1) as pool:
        pid = pool.call(getpid)
        killer = threading.Thread(target=lambda: (gate.wait_arrived(), os.kill(pid, signum)))
        killer.start()
        with pytest.raises(WorkerDied) as caught:
            pool.call(pass_gate, gate.path)
        killer.join(20)
        assert (caught.value.signal, caught.value.started) == (signal.Signals(signum).name, True)
        assert pool.call(getpid) != pid


def test_sigint_does_nothing_to_a_worker(start_method: str, gate: Gate) -> None:
    """Neither to one that is idle, nor in a call, whose system calls go on."""
    with Pool(size=1, start_method=start_method) as pool:
        pid = pool.call(getpid)
        os.kill(pid, signal.SIGINT)
        sender = threading.Thread(
            target=lambda: (gate.wait_arrived(), os.kill(pid, signal.SIGINT), gate.open())
        )
        sender.start()
        assert pool.call(pass_gate, gate.path) == pid
        sender.join(20)


class TermsAtStart:
    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_a_worker_that_is_booting() -> None:
    pool = Pool(TermsAtStart, size=1)
    ear = Ear(pool, "error")
    pool.open(wait=False)
    assert "by SIGTERM" in str(ear.wait("error").metadata["error"])
    pool.terminate()


SERVED = """
    import os, select, signal, sys
    from multiprocessing import forkserver
    from minipool import CheckoutTimeout, Pool, WorkerDied

    if __name__ == "__main__":
        with Pool(size=1, start_method="forkserver", checkout_timeout=20) as pool:
            pid = pool.call(os.getpid)
            server = forkserver._forkserver._forkserver_pid
            os.kill(server, signal.SIGSTOP)
            assert pool.call(os.getpid) == pid
            watch = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            assert select.select([watch], [], [], 20)[0]
            try:
                pool.options(timeout=0.3).call(os.getpid)
            except (CheckoutTimeout, WorkerDied):  # the latter, if it was sent to the dead one
                print("none is started")
            os.kill(server, signal.SIGCONT)
            second = pool.call(os.getpid)
            print(second != pid)
            os.kill(server, signal.SIGKILL)
            print(pool.call(os.getpid) == second)
            os.kill(second, signal.SIGKILL)
            print(pool.call(os.getpid) != second, forkserver._forkserver._forkserver_pid != server)
"""


def test_fork_server_that_is_stopped_or_killed(tmp_path: Path) -> None:
    code, out, err = scripts.run(tmp_path, SERVED)
    assert (code, out) == (0, "none is started\nTrue\nTrue\nTrue True\n"), err


DISPOSED = """
    import signal, sys
    from minipool import Pool

    def see():
        return signal.getsignal(signal.SIGPIPE).name

    if __name__ == "__main__":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        with Pool(size=1, start_method=sys.argv[1]) as pool:
            print(pool.call(see))
"""


def test_sigpipe_of_a_worker_is_as_in_any_python(start_method: str, tmp_path: Path) -> None:
    expected = "SIG_DFL" if start_method == "fork" else "SIG_IGN"
    assert scripts.run(tmp_path, DISPOSED, start_method) == (0, f"{expected}\n", "")
