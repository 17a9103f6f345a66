"""A program with SIGPIPE at its default, as command-line tools have it, outlives its workers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Iterator

import pytest

import scripts
from minipool.engine import channel, sigpipe

TOOL = """
    import os, select, signal, sys
    from minipool import Pool, WorkerDied
    from rogues import size_of
    from workers import Counter, getpid

    def kill(pid):
        watch = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert select.select([watch], [], [], 20)[0]
        os.close(watch)

    def died(call, *args):
        try:
            call(*args)
        except WorkerDied as error:
            return error.signal

    def main(method):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        with Pool(Counter, size=2, start_method=method) as pool:
            for session, calls in ((None, 0), ("s", 1)):
                for target, argument in ((abs, -1), (size_of, bytes(10_000_000))):
                    with pool.checkout(session=session) as w:
                        for _ in range(calls):
                            w.call(getpid)
                        kill(w.pid)
                        print(died(w.call, target, argument), end=" ", flush=True)
            pool.wait_ready()
            pids = [info.pid for info in pool.workers() if info.pid]
            for pid in pids:  # probed, called and stopped when they are dead
                os.kill(pid, signal.SIGKILL)
            pool.health_check(probe=True)
            print(pool.call(abs, -5))
            pool.wait_ready()
            for pid in [info.pid for info in pool.workers() if info.pid]:
                os.kill(pid, signal.SIGKILL)
        print("lives", signal.getsignal(signal.SIGPIPE).name)

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


@pytest.mark.parametrize("path", ["", "1"], ids=["fast", "portable"])
def test_death_of_a_worker_does_not_end_the_program(
    start_method: str, path: str, tmp_path: Path
) -> None:
    env = scripts.environment(MINIPOOL_PORTABLE=path)
    code, out, err = scripts.run(tmp_path, TOOL, start_method, env=env)
    assert code == 0, (code, err)
    # The first call of a lease is made on another worker, if it had not begun.
    fresh, used = "None None", "SIGKILL SIGKILL"
    assert out == f"{fresh} {used} 5\nlives SIG_DFL\n", err


@pytest.fixture
def at_default() -> Iterator[None]:
    former = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGPIPE, former)


def _without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise FileNotFoundError("/proc/self/fd")

    monkeypatch.setattr(sigpipe.os, "open", refuse)


@pytest.mark.parametrize(("proc", "descriptors"), [(True, 2), (False, 3)])
def test_pipe_has_a_reader_as_long_as_its_write_end(
    proc: bool, descriptors: int, monkeypatch: pytest.MonkeyPatch, at_default: None
) -> None:
    """And its end comes with it; with /proc that takes no descriptor more."""
    if not proc:
        _without_proc(monkeypatch)
    before = set(os.listdir("/proc/self/fd"))
    ours, theirs = channel.pair(None, portable=False)
    assert len(set(os.listdir("/proc/self/fd")) - before) == descriptors + 2
    reader = os.dup(theirs.reader.fd)
    theirs.close()
    assert os.write(ours.writer, b"read") == 4
    assert os.read(reader, 10) == b"read"
    os.close(reader)
    assert os.write(ours.writer, b"never read") == 10, "nobody else reads it any more"
    with pytest.raises(BlockingIOError):
        while True:
            os.write(ours.writer, bytes(65536))
    ours.close()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("proc", [True, False])
def test_end_of_the_pipe_comes_with_the_parents(
    proc: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not proc:
        _without_proc(monkeypatch)
    ours, theirs = channel.pair(None, portable=False)
    reader = os.dup(theirs.reader.fd)
    theirs.close()
    os.write(ours.writer, b"last words")
    ours.close()
    assert (os.read(reader, 100), os.read(reader, 100)) == (b"last words", b"")
    os.close(reader)


def test_nothing_is_left_of_a_pipe_that_found_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(24, "Too many open files")

    _without_proc(monkeypatch)
    monkeypatch.setattr(sigpipe.os, "dup", refuse)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Too many"):
        channel.pair(None, portable=False)
    assert set(os.listdir("/proc/self/fd")) == before


def _broken_pipe() -> Any:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        os.write(writer, b"x")
    finally:
        os.close(writer)


def test_broken_pipe_is_an_error_and_no_signal(at_default: None) -> None:
    with pytest.raises(BrokenPipeError):
        sigpipe.unsignalled(_broken_pipe)
    assert signal.SIGPIPE not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert not signal.sigpending()
    former = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGPIPE,))
    try:
        with pytest.raises(BrokenPipeError):
            sigpipe.unsignalled(_broken_pipe)
        assert signal.SIGPIPE in signal.sigpending(), "it was blocked before, and stays so"
    finally:
        with contextlib.suppress(ValueError):
            signal.sigwait((signal.SIGPIPE,))
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


SHOWN = """
    import signal, socket, struct, sys, urllib.request
    from minipool import Pool
    from rogues import size_of

    RESET = struct.pack("ii", 1, 0)  # at the close, nothing is sent any more

    def main():
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        with Pool(size=1) as pool, pool.dashboard() as board:
            host, port = board.url.partition("//")[2].rstrip("/").split(":")
            for _ in range(30):
                with socket.create_connection((host, int(port))) as visitor:
                    visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    visitor.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            urllib.request.urlopen(board.url).read()  # all those are over by then, or soon
            threads = [t for t in __import__("threading").enumerate() if "dashboard" in t.name]
            print(*(pipe_blocked(thread.native_id) for thread in threads))
        print("lives")

    def pipe_blocked(thread):
        with open(f"/proc/self/task/{thread}/status") as file:
            (mask,) = (line.split()[1] for line in file if line.startswith("SigBlk"))
        return bool(int(mask, 16) & 1 << signal.SIGPIPE - 1)

    if __name__ == "__main__":
        main()
"""


def test_visitors_that_hang_up_do_not_end_the_program(tmp_path: Path) -> None:
    code, out, err = scripts.run(tmp_path, SHOWN)
    assert (code, out) == (0, "True\nlives\n"), err


def _end_of_a_program() -> int:
    """Return how a program ends whose output nobody reads."""
    program = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    assert program.stdout is not None
    program.stdout.close()
    return program.wait(20)


def test_what_a_worker_starts_may_get_it(start_method: str, tmp_path: Path) -> None:
    code, out, err = scripts.run(
        tmp_path,
        """
        import signal, sys
        from minipool import Pool
        from test_sigpipe import _end_of_a_program

        if __name__ == "__main__":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            with Pool(size=1, start_method=sys.argv[1]) as pool:
                print(pool.call(_end_of_a_program))
        """,
        start_method,
    )
    assert (code, out) == (0, f"{-signal.SIGPIPE}\n"), err
