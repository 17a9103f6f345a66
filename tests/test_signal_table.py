"""README's table of signals: what each does to the parent, a worker and the fork server.

SIGINT and the order of a close are in test_signals.py, SIGTERM to workers and the fork server in
test_sigterm.py, SIGPIPE in test_sigpipe.py, stopped workers in test_stopped.py and the terminal's
signals in test_worker_terminal.py; here is the rest, and the list of all rows.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
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


IMPORTS = """
    import os, signal, sys, threading
    from minipool import Pool

    class Model:
        def blocked(self):
            return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    if __name__ == "__mp_main__":
        os.kill(os.getpid(), signal.SIGINT)

    if __name__ == "__main__":
        with Pool(Model, size=1, start_method=sys.argv[1]) as pool:
            print(pool.call("blocked"))
"""


def test_sigint_does_nothing_to_a_worker_that_is_importing_the_program(
    start_method: str, tmp_path: Path
) -> None:
    """It is in the program's group still, so a Ctrl-C reaches it."""
    assert scripts.run(tmp_path, IMPORTS, start_method) == (0, "False\n", "")


STARTS = """
    import os, sys
    from minipool import Pool
    from workers import getpid

    if __name__ == "__main__":
        os.environ["INTERRUPTED"] = "1"
        with Pool(size=2, start_method=sys.argv[1]) as pool:
            print(pool.call(getpid) != os.getpid())
"""


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_sigint_does_nothing_to_an_interpreter_that_is_starting(
    start_method: str, tmp_path: Path
) -> None:
    """Be it that of a worker, or of the fork server."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\nif os.environ.get('INTERRUPTED'): os.kill(os.getpid(), signal.SIGINT)\n"
    )
    env = scripts.environment(first_path=str(tmp_path))
    assert scripts.run(tmp_path, STARTS, start_method, env=env) == (0, "True\n", "")


class TermsAtStart:
    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_a_worker_that_is_booting() -> None:
    pool = Pool(TermsAtStart, size=1)
    ear = Ear(pool, "error")
    pool.open(wait=False)
    assert "by SIGTERM" in str(ear.wait("error").metadata["error"])
    pool.terminate()


def test_sigterm_ends_one_that_is_forked_where_the_program_handles_it() -> None:
    """What the program does with it is not what its workers do."""
    came: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda signum, frame: came.append(signum))
    pool = Pool(TermsAtStart, size=1, start_method="fork")
    ear = Ear(pool, "error")
    try:
        pool.open(wait=False)
        assert "by SIGTERM" in str(ear.wait("error").metadata["error"])
    finally:
        pool.terminate()
        signal.signal(signal.SIGTERM, former)
    assert not came


def _interrupt_myself() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_signal_in_a_forked_worker_wakes_no_event_loop_of_the_program() -> None:
    ours, loops = socket.socketpair()
    for end in (ours, loops):
        end.setblocking(False)
    former = signal.set_wakeup_fd(loops.fileno())
    try:
        with Pool(size=1, start_method="fork") as pool:
            pool.call(_interrupt_myself)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
    finally:
        signal.set_wakeup_fd(former)
        ours.close()
        loops.close()


def _read_by_c_while_interrupted() -> int:
    """Return how many bytes a C library reads, which does not try again when it is interrupted."""
    libc = ctypes.CDLL(None, use_errno=True)
    reader, writer = os.pipe()
    main = threading.main_thread().ident or 0

    def interrupt() -> None:
        for _ in range(500):
            signal.pthread_kill(main, signal.SIGINT)
            os.sched_yield()
        os.write(writer, b"!")

    sender = threading.Thread(target=interrupt)
    sender.start()
    count: int = libc.read(reader, ctypes.create_string_buffer(1), 1)
    sender.join()
    os.close(reader)
    os.close(writer)
    return count


def test_sigint_lets_no_call_of_a_c_library_fail(start_method: str) -> None:
    with Pool(size=1, start_method=start_method) as pool:
        assert pool.call(_read_by_c_while_interrupted) == 1


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
