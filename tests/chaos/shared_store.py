"""Two applications on one store, seen from the outside: what is done to them, and what they owe.

Each has two pools (see `application`). Every few seconds one is killed with SIGKILL and started
again, and for a third of each minute another process keeps the store locked. All is drawn from a
seed.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

from auditor import Auditor, Lock

import scripts

PATIENCE = 60.0  # seconds for anything to come to its end; it never takes that long
KILL_EVERY = 6.0  # seconds, on average
MINUTE = 60.0

LOCKER = """
import sqlite3, sys
for line in sys.stdin:
    db = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
    db.execute("BEGIN " + line)
    print("locked", flush=True)
    sys.stdin.readline()
    db.close()
    print("free", flush=True)
"""


class Life:
    """One application from its start to its end."""

    def __init__(self, folder: Path, name: str, number: int, seed: str) -> None:
        self.name = f"{name}{number}"
        self.temporary = folder / f"tmp {self.name}"
        self.temporary.mkdir()
        self._errors = folder / f"{self.name}.stderr"
        self.reader, writer = os.pipe()
        script = Path(__file__).with_name("application.py")
        with open(self._errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *scripts.WARNINGS, script, folder, name, str(number), seed,
                 str(writer)],
                env=scripts.environment(TMPDIR=str(self.temporary)), start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors,
                pass_fds=(writer,),
            )  # fmt: skip
        os.close(writer)
        self.signs = dict.fromkeys(b"01", time.monotonic())  # of each pool, when it last answered
        self.served = set[int]()

    def kill(self) -> None:
        self.process.kill()

    def finish(self) -> int:
        """Ask it to end in good order, and wait for that."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            return self.process.wait(2 * PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # it tells where its threads are
            return self.process.wait(PATIENCE)

    def wait_gone(self) -> None:
        """Wait until it, and whatever it has started, is no more."""
        self.process.wait(PATIENCE)
        scripts.wait_gone(*_members(self.process.pid), timeout=PATIENCE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pid in _members(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        os.close(self.reader)

    def said(self) -> str:
        return self._errors.read_text(errors="replace")[-3000:]


class Locker:
    """Another program that locks the store, as a backup does."""

    def __init__(self, path: Path, auditor: Auditor) -> None:
        self._auditor = auditor
        self.locked = False
        self._process = subprocess.Popen(
            [sys.executable, "-c", LOCKER, path], text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def lock(self, mode: str) -> None:
        lock = Lock()
        self._auditor.locks.append(lock)
        self.locked = True
        self._say(mode, "locked\n")
        lock.since = time.monotonic()

    def unlock(self) -> None:
        if self.locked:
            lock = self._auditor.locks[-1]
            lock.until = time.monotonic()
            self._say("", "free\n")
            lock.given_up = time.monotonic()
            self.locked = False

    def _say(self, word: str, expected: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(word + "\n")
        assert select.select([self._process.stdout], [], [], PATIENCE)[0], "the locker hangs"
        assert self._process.stdout.readline() == expected

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class SharedStore:
    """The whole run; `violations` of its auditor are what came of it."""

    def __init__(self, folder: Path, seed: int, seconds: float) -> None:
        for part in ("store", "told", "begun"):
            (folder / part).mkdir()
        self.folder, self.seed, self.seconds = folder, str(seed), seconds
        self.auditor = Auditor(folder)
        self._dice = random.Random(f"{seed}/outside")
        self._lives: dict[str, Life] = {}
        self._count = dict.fromkeys("ab", 0)
        self._killed: list[str] = []
        self._path = folder / "store" / "sessions.db"
        self._locker = Locker(self._path, self.auditor)
        self._due: list[tuple[float, Callable[[], object]]] = []

    def run(self) -> None:
        """Do it all. Stops early when something is wrong."""
        try:
            for name in self._count:
                self._start(name)
            self._serve_until(math.inf, lambda: all(life.served for life in self._lives.values()))
            until = time.monotonic() + self.seconds
            self._plan(until)
            self._serve_until(until)
            self._locker.unlock()
            if not self.auditor.violations:
                self._settle()
        finally:
            self._locker.close()
            for life in self._lives.values():
                life.close()

    # -- what happens --------------------------------------------------------------------------

    def _start(self, name: str) -> None:
        self._count[name] += 1
        self._lives[name] = Life(self.folder, name, self._count[name], self.seed)

    def _plan(self, until: float) -> None:
        """Draw when the store is locked, and when an application is killed.

        While it is locked only one of the two is killed, in turn: the other one waits for it.
        """
        start, minute = time.monotonic(), min(MINUTE, self.seconds)
        for begin in _steps(start + minute / 3, minute, until):
            mode = self._dice.choice(["IMMEDIATE", "EXCLUSIVE"])
            self._due.append((begin, lambda mode=mode: self._locker.lock(mode)))
            self._due.append((begin + minute / 3, self._locker.unlock))
        at = start
        while at < until:
            at += min(self._dice.expovariate(1 / KILL_EVERY), 2 * KILL_EVERY, self.seconds / 2)
            name = self._dice.choice(sorted(self._lives))
            turn, part = divmod(at - start, minute)
            if minute / 3 <= part < 2 * minute / 3:
                name = sorted(self._lives)[int(turn) % 2]
            self._due.append((at, lambda name=name: self._kill(name)))
        self._due.sort(key=lambda due: due[0])

    def _kill(self, name: str) -> None:
        """Kill an application, see what it has left, and start it again."""
        life = self._lives.pop(name)
        life.kill()
        life.wait_gone()
        life.close()
        self._killed.append(life.name)
        if self._locker.locked:
            self.auditor.read()
        else:
            self.auditor.audit()
        self._start(name)

    def _serve_until(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Let the applications work, and do to them what is due, until something is wrong."""
        while time.monotonic() < until and not done() and not self.auditor.violations:
            if self._due and self._due[0][0] <= time.monotonic():
                self._due.pop(0)[1]()
                continue
            next_due = min(self._due[0][0] if self._due else math.inf, until)
            self._hear(min(1.0, max(0.0, next_due - time.monotonic())))
            self.auditor.read()

    def _hear(self, timeout: float) -> None:
        """Wait for signs of life; accuse an application that has ended or stands still."""
        lives = {life.reader: life for life in self._lives.values()}
        now = time.monotonic()
        for reader in select.select(list(lives), [], [], timeout)[0]:
            life, data = lives[reader], os.read(reader, 65536)
            if not data:
                code = life.process.wait(PATIENCE)
                self.auditor.accuse(f"{life.name} ended by itself, with {code}: {life.said()}")
            life.served.update(data)
            life.signs.update(dict.fromkeys(data, now))
        for life in self._lives.values():
            for number, last in life.signs.items():
                if now - last > PATIENCE:
                    life.process.send_signal(signal.SIGABRT)
                    life.process.wait(PATIENCE)
                    self.auditor.accuse(
                        f"pool {number - 48} of {life.name} has answered nothing for {PATIENCE} s:"
                        f"\n{life.said()}"
                    )

    # -- the end -------------------------------------------------------------------------------

    def _settle(self) -> None:
        """End the applications in good order; then nothing may be left, and nothing lost."""
        for life in self._lives.values():
            code = life.finish()
            if code:
                self.auditor.accuse(f"{life.name} ended with {code}: {life.said()}")
            life.wait_gone()
            self.auditor.read()
            if code == 0 and not self.auditor.ended_well(life.name):
                self.auditor.accuse(f"{life.name} did not get to its end: {life.said()}")
            for path in life.temporary.iterdir():
                self.auditor.accuse(f"{life.name} has left a temporary file: {path}")
        self.auditor.audit(everything=True)
        self.auditor.judge_all(self._killed)
        left = sorted(os.listdir(self._path.parent))
        if left != [self._path.name]:
            self.auditor.accuse(f"beside the store there is left: {left}")


def _steps(start: float, step: float, until: float) -> Iterator[float]:
    at = start
    while at < until:
        yield at
        at += step


def _members(session: int) -> list[int]:
    """Return the processes of a session that are not dead."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                words: list[Any] = (
                    Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                )
                if int(words[3]) == session and words[0] not in "ZX":
                    found.append(int(entry))
    return found
