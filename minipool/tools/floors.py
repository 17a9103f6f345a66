"""Floors: the least a process costs, which is what the bench holds minipool against.

The floor of a call is the strictest one Python allows: pickle the value alone (protocol 5),
`os.write` it to a socketpair, `os.read` it in a bare process of the same start method, unpickle,
and the same way back. No header, no function to look up, no timeout, nobody else who could call,
and no notice of a death. The same over two pipes, which are faster, is shown beside it. A bare
process is this module's `echo` and nothing more; the module imports next to nothing, because each
bare process of the spawn method would have to pay for it.
"""

from __future__ import annotations

import os
import pickle
import socket
from typing import Any, Callable

_MOST = 65536  # bytes one read takes
_READY = b"!"


def identity(value: Any) -> Any:
    """Return the value: the call that costs nothing but its way."""
    return value


def echo(end: Passed, out: Passed | None = None) -> None:
    """Be a bare process: report that it is ready, then send back every value that comes."""
    fd, read, write, dumps, loads = end.fd, os.read, os.write, pickle.dumps, pickle.loads
    to = fd if out is None else out.fd
    write(to, _READY)
    while True:
        data = read(fd, _MOST)
        if not data:
            return
        write(to, dumps(loads(data), 5))


class Passed:
    """A descriptor on its way to a process of any start method."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing import reduction

        return _arrived, (reduction.DupFd(self.fd),)


def _arrived(dup: Any) -> Passed:
    return Passed(dup.detach())


class Bare:
    """One bare process, and the parent's end of its pipe. It is starting when this returns."""

    def __init__(self, context: Any, pipes: bool = False) -> None:
        if pipes:
            requests, replies = os.pipe(), os.pipe()
            theirs = [requests[0], replies[1]]
            self.fd, self._out = replies[0], requests[1]
        else:
            ours, other = socket.socketpair()
            theirs = [other.detach()]
            self.fd = self._out = ours.detach()
        self._process = context.Process(target=echo, args=tuple(map(Passed, theirs)), daemon=True)
        self._process.start()
        for fd in theirs:
            os.close(fd)

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def wait_ready(self) -> None:
        """Wait until the process has reported that it is ready.

        Raises:
            RuntimeError: it ended instead.
        """
        if os.read(self.fd, 1) != _READY:
            raise RuntimeError(f"the bare process {self.pid} ended before it was ready")

    def caller(self) -> Callable[[], Any]:
        """Return the floor of a call: what sends 1 to the process and returns what comes back."""
        fd, read, write, dumps, loads = self.fd, os.read, os.write, pickle.dumps, pickle.loads
        to = self._out

        def call() -> Any:
            write(to, dumps(1, 5))
            return loads(read(fd, _MOST))

        return call

    def wait_ended(self) -> None:
        """Wait until its exit code is known."""
        self._process.join()

    def close(self) -> None:
        """Kill the process and wait for its end."""
        self._process.kill()
        self._process.join()
        self._process.close()
        for fd in {self.fd, self._out}:
            os.close(fd)

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def started(context: Any, count: int = 1) -> list[Bare]:
    """Start bare processes, all at once; return them when each has reported that it is ready."""
    bare = [Bare(context) for _ in range(count)]
    for one in bare:
        one.wait_ready()
    return bare
