"""A worker at a terminal: it is in its background, so to read there fails and stops nothing."""

from __future__ import annotations

import os
import pty
from pathlib import Path
from typing import Iterator

import pytest

import scripts

READS = """
    import fcntl, os, signal, subprocess, sys, termios
    from minipool import Pool

    def own_read():
        try:
            with open("/dev/tty", "rb", 0) as terminal:
                return terminal.read(1)
        except OSError as error:
            return error.strerror

    def unblocked_read():
        signals = signal.SIGTTIN, signal.SIGTTOU
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        try:
            return own_read()
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def read_input():
        try:
            return input()
        except EOFError as error:
            return "EOFError"

    def standard_input():
        try:
            return os.read(0, 1)
        except OSError as error:
            return error.strerror

    def of_cat():
        done = subprocess.run(["cat", "/dev/tty"], capture_output=True, text=True)
        return done.stderr.rpartition(":")[2].strip()

    def of_what_asks_for_a_password():
        return subprocess.run([sys.executable, "-c", os.environ["ASKS"]], capture_output=True, text=True).stdout

    def write():
        with open("/dev/tty", "wb", 0) as terminal:
            return terminal.write(b"said\\n")

    def main(method, name):
        terminal = os.open(name, os.O_RDWR)  # of this session from now on
        modes = termios.tcgetattr(terminal)
        modes[3] |= termios.TOSTOP
        termios.tcsetattr(terminal, termios.TCSANOW, modes)
        os.dup2(terminal, 0)
        assert os.tcgetpgrp(terminal) == os.getpgrp()
        with Pool(size=1, start_method=method, call_timeout=20) as pool:
            pid = pool.call(os.getpid)
            for read in (own_read, unblocked_read, read_input, standard_input, of_cat):
                print(pool.call(read))
            print(pool.call(of_what_asks_for_a_password), end="")
            print(pool.call(write), pool.call(os.getpid) == pid)

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


# As the libraries do that ask for a password.
ASKS = """
import os, signal, termios
came = []
for name in ("SIGTTIN", "SIGTTOU", "SIGTSTP"):
    signal.signal(getattr(signal, name), lambda *seen: came.append(seen[0]))
terminal = os.open("/dev/tty", os.O_RDWR)
modes = termios.tcgetattr(terminal)
termios.tcsetattr(terminal, termios.TCSAFLUSH, modes)
try:
    os.read(terminal, 1)
except OSError as error:
    print(error.strerror, came)
"""


@pytest.fixture
def terminal() -> Iterator[str]:
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    yield name
    os.close(ours)
    os.close(theirs)


def test_reading_the_terminal_fails_at_once(
    start_method: str, terminal: str, tmp_path: Path
) -> None:
    """Of a worker's own code, also where a library has unblocked the signals that a terminal stops
    with; of a program, and of one that handles them."""
    code, out, err = scripts.run(
        tmp_path, READS, start_method, terminal, env=scripts.environment(ASKS=ASKS)
    )
    eio = os.strerror(5)
    assert (code, err) == (0, "")
    assert out.splitlines() == [eio, eio, "EOFError", eio, eio, f"{eio} []", "5 True"]
