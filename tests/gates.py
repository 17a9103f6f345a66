"""A gate: worker code stops at it until the test lets it pass. No sleeping, on either side."""

from __future__ import annotations

import os
import select


class Gate:
    """Two named pipes: the worker writes to one when it arrives, and reads the other to go on.

    `pass_gate(gate.path)` is what worker code calls; the path travels as a plain string.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        os.mkfifo(path + ".in")
        os.mkfifo(path + ".out")
        # Opened for both directions, so that neither side blocks while opening.
        self._in = os.open(path + ".in", os.O_RDWR | os.O_NONBLOCK)
        self._out = os.open(path + ".out", os.O_RDWR | os.O_NONBLOCK)

    def wait_arrived(self, count: int = 1, timeout: float = 20.0) -> None:
        """Wait until `count` more callers stand at the gate."""
        for _ in range(count):
            assert select.select([self._in], [], [], timeout)[0], "nobody came to the gate"
            os.read(self._in, 1)

    def open(self, count: int = 1) -> None:
        """Let `count` callers pass, now or when they come."""
        os.write(self._out, b"!" * count)

    def close(self) -> None:
        os.close(self._in)
        os.close(self._out)


def pass_gate(path: str) -> int:
    """Tell that we are here, and wait until we may go on; return our pid."""
    with open(path + ".in", "wb", buffering=0) as arrived:
        arrived.write(b"!")
    with open(path + ".out", "rb", buffering=0) as leave:
        leave.read(1)
    return os.getpid()
