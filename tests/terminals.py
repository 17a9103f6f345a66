"""A terminal for tests: what a program draws through a pseudo-terminal, as text."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from typing import Any, Callable

ROWS, COLUMNS = 24, 100
_PIECE = re.compile(
    rb"\x1b\[([?\d;]*)([A-Za-z])|\x1b[()][A-Z0-9]|\x1b[=>78]|[\x00\x0e\x0f\x07]|[\r\n\b]|[^\x00-\x1f\x1b]+"
)


class Terminal:
    """Runs a program on a vt100 of its own; `text()` is what stands on the screen."""

    def __init__(self, command: list[str], **more: Any) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(ROWS, COLUMNS)
        env = {**(more.pop("env", None) or os.environ), "TERM": "vt100", "LC_ALL": "C.UTF-8"}
        env.pop("LINES", None), env.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env,
            start_new_session=True, **more,
        )  # fmt: skip
        os.close(theirs)
        self._rest = b""
        self._y = self._x = 0
        self._cells = [[" "] * COLUMNS for _ in range(ROWS)]

    def resize(self, rows: int, columns: int) -> None:
        """Change the size the program is told; what it draws is kept as it comes."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self._cells)

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait(self, condition: Callable[[str], Any], timeout: float = 20.0) -> str:
        """Draw what comes until the screen is as wanted; return its text."""
        deadline = time.monotonic() + timeout
        while not condition(self.text()):
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self._ours], [], [], left)[0], f"never so:\n{self.text()}"
            try:
                self._draw(os.read(self._ours, 65536))
            except OSError:  # EIO: the program has ended
                assert condition(self.text()), f"it ended:\n{self.text()}"
        return self.text()

    def end(self, timeout: float = 20.0) -> int:
        """Wait until the program has ended; return its exit status."""
        while True:
            assert select.select([self._ours], [], [], timeout)[0], f"goes on:\n{self.text()}"
            try:
                self._draw(os.read(self._ours, 65536))
            except OSError:
                return self.process.wait(timeout)

    def hang_up(self) -> None:
        """Go away, without the signal that a program gets of its controlling terminal."""
        os.close(self._ours)
        self._ours = -1

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        if self._ours >= 0:
            self.hang_up()

    def _draw(self, data: bytes) -> None:
        data = self._rest + data
        cut = data.rfind(b"\x1b") if b"\x1b" in data[-12:] else len(data)
        last = _PIECE.match(data, cut)
        if cut < len(data) and last:
            cut = last.end() if last.end() < len(data) or last[2] else cut
        done, self._rest = data[:cut], data[cut:]
        for piece in _PIECE.finditer(done):
            if piece[2]:
                self._obey(piece[2].decode(), piece[1].decode())
            elif piece[0] in (b"\r", b"\n", b"\b"):
                self._x = 0 if piece[0] == b"\r" else self._x - (piece[0] == b"\b")
                self._y = min(ROWS - 1, self._y + (piece[0] == b"\n"))
            elif piece[0][0] > 0x1F:
                for char in piece[0].decode(errors="replace"):
                    if self._x < COLUMNS:
                        self._cells[self._y][self._x] = char
                    self._x += 1

    def _obey(self, order: str, numbers: str) -> None:
        given = [int(n) for n in numbers.strip("?").split(";") if n]
        count = given[0] if given else 1
        if order == "H":
            self._y, self._x = (given[0] - 1, given[1] - 1) if len(given) == 2 else (0, 0)
        elif order in "AB":
            self._y += count if order == "B" else -count
        elif order in "CD":
            self._x += count if order == "C" else -count
        elif order == "K":
            whole, before = given == [2], given == [1]
            start = 0 if whole or before else self._x
            end = self._x + 1 if before else COLUMNS
            self._cells[self._y][start:end] = [" "] * (end - start)
        elif order == "J":
            self._cells[self._y][self._x :] = [" "] * (COLUMNS - self._x)
            for y in range(self._y + 1, ROWS):
                self._cells[y] = [" "] * COLUMNS
