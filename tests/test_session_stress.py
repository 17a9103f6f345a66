"""Sessions under fire: workers, and whole applications, are killed all the time."""

from __future__ import annotations

import collections
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import scripts
from chatters import add_alone
from ears import wait_until
from minipool import Pool, SessionError, WorkerDied
from minipool.store import SQLiteStore

THREADS, SESSIONS, WORKERS = 32, 200, 4


class Counting:
    """Callers that count in sessions, and what they know of it.

    A call whose worker died told nothing and committed nothing, so what a session has counted is
    exactly the number of replies seen.
    """

    def __init__(self, pool: Pool[Any], folder: Path) -> None:
        self.pool = pool
        self.folder = str(folder)
        self.seen: collections.Counter[str] = collections.Counter()
        self.died = 0
        self.stop = threading.Event()
        self.problems: list[BaseException] = []
        self._owners: dict[str, int] = {}
        self._threads = [threading.Thread(target=self._work, args=(n,)) for n in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def _work(self, number: int) -> None:
        chance = random.Random(number)
        try:
            while not self.stop.is_set():
                self._use(f"s{chance.randrange(SESSIONS)}")
        except BaseException as problem:
            self.problems.append(problem)
            self.stop.set()

    def _use(self, key: str) -> None:
        me = threading.get_ident()
        with self.pool.checkout(session=key, timeout=60) as w:
            assert self._owners.setdefault(key, me) == me, f"two leases of {key}"
            try:
                for _ in range(2):
                    n = w.call(add_alone, self.folder)
                    self.seen[key] += 1  # nobody else does while the lease lasts
                    assert n == self.seen[key] == w.state["n"], f"{key} lost an update"
            except WorkerDied:
                self.died += 1
            finally:
                del self._owners[key]

    def join(self) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a caller hangs"
        if self.problems:
            raise self.problems[0]


def kill_workers(pool: Pool[Any], stop: threading.Event, seconds: float) -> int:
    """Kill a worker, any one, every 50 ms; return how many."""
    chance, killed = random.Random(0), 0
    for _ in range(int(seconds / 0.05)):
        if stop.wait(0.05):
            break
        killed += kill_one(pool, chance)
    return killed


def kill_one(pool: Pool[Any], chance: random.Random) -> bool:
    """Kill a worker, any one that is ready; False if none is."""
    handles = list(pool._handles().values())
    ready = [handle for handle in handles if handle.ready_ns and not handle.ended_ns]
    if ready:
        chance.choice(ready).kill()
    return bool(ready)


@pytest.mark.exhaustive
def test_every_count_is_exact_while_workers_are_killed(tmp_path: Path) -> None:
    """32 threads, 200 sessions, 4 workers, a SIGKILL every 50 ms for 20 s."""
    with Pool(size=WORKERS, call_timeout=60) as pool:
        counting = Counting(pool, tmp_path)
        try:
            killed = kill_workers(pool, counting.stop, 20.0)
        finally:
            counting.join()
        assert killed > 100
        assert counting.died > 10
        assert {key: pool.session_state(key).get("n", 0) for key in counting.seen} == counting.seen
        assert len(counting.seen) == SESSIONS
        wait_until(pool, lambda: pool.stats().idle == WORKERS)
        line = pool._sessions._line
        assert len(line.idle) == len(line.current) == len(pool.sessions()) == SESSIONS
        assert not line.waiters


APPLICATION = """
    import os, sys, threading
    from pathlib import Path
    from minipool import Pool
    from test_session_stress import count_and_tell

    if __name__ == "__main__":
        count_and_tell(sys.argv[1], sys.argv[2], int(sys.argv[3]))
"""


def count_and_tell(store: str, folder: str, log: int) -> None:
    """Count in the sessions of a store until killed; write each reply to the log.

    A worker is killed for every 16 replies: by the clock, a slow machine would see no replies.
    """
    with Pool(size=WORKERS, session_store=store) as pool:
        replied = threading.Semaphore(0)

        def work(number: int) -> None:
            chance = random.Random()
            while True:
                key = f"s{chance.randrange(SESSIONS)}"
                try:
                    n = pool.options(session=key, timeout=60).call(add_alone, folder)
                except WorkerDied:
                    continue
                except BaseException as problem:
                    os.write(log, f"! {number} {problem!r}\n".encode())
                    raise
                os.write(log, f"{key} {n}\n".encode())
                replied.release()

        for number in range(THREADS):
            threading.Thread(target=work, args=(number,), daemon=True).start()
        chance = random.Random()
        while all(replied.acquire(timeout=60) for _ in range(16)):
            kill_one(pool, chance)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no process groups")
def test_what_an_application_was_told_survives_its_death(tmp_path: Path) -> None:
    """The whole application is killed five times: no reply is forgotten, no call counted twice.

    A session's state is at least what the application had been told, and one more at most: the
    call that was under way. Each life of the application starts from there.
    """
    store = tmp_path / "sessions.db"
    kept: dict[str, int] = {}
    for life in range(5):
        folder = tmp_path / f"life {life}"
        folder.mkdir()
        reader, writer = os.pipe()
        process = scripts.start(
            folder, APPLICATION, str(store), str(folder), str(writer), pass_fds=(writer,)
        )
        os.close(writer)
        told: dict[str, int] = {}
        replies = 0
        with open(reader) as log:
            for line in log:
                assert not line.startswith("!"), line
                key, n = line.split()
                # Not in order: between a reply and its line another thread may write its own.
                told[key] = max(told.get(key, 0), int(n))
                replies += 1
                if replies == 600:
                    os.killpg(process.pid, signal.SIGKILL)
        scripts.finish(process)
        assert replies >= 600
        found = stored(store)
        for key, n in kept.items():
            told.setdefault(key, n)
        for key, n in told.items():
            assert n <= found.get(key, 0) <= n + 1, f"{key} in life {life}"
        ahead = sum(found[key] - told[key] for key in told)
        assert ahead <= THREADS
        # Every call counted one: all replies are there, and nothing but calls under way besides.
        total = sum(found.values()) - sum(kept.values())
        assert replies <= total <= replies + THREADS
        kept = found
    assert len(kept) == SESSIONS


def stored(path: Path) -> dict[str, int]:
    """Return the counts in a store, read as a pool does that has taken it over."""
    import pickle

    store = SQLiteStore(str(path))
    try:
        counts = {}
        for number in range(SESSIONS):
            loaded = store.open(f"s{number}")
            if loaded is not None and loaded[1]:
                counts[f"s{number}"] = int(pickle.loads(loaded[1]["n"]))
        return counts
    except SessionError as problem:
        raise AssertionError("a dead owner's sessions cannot be had") from problem
    finally:
        store.close()
