"""A process with two pools on one store, run as a script: it works until its standard input ends.

    application.py FOLDER NAME LIFE SEED PIPE

What it asks for and is told goes into `FOLDER/told/NAME-LIFE`, and a byte for each answer into the
pipe. It may be killed at any time. Ended in good order, it closes its pools, looks whether anything
is left of them, and says so in the journal.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import itertools
import os
import random
import signal
import sys
import threading
import time
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, Callable, Iterator

from deeds import Doer, born_with
from fates import CALL, CHECKOUT, fate_of
from journal import Journal

from minipool import Pool, PoolClosed, SessionBusy, SessionError

CALLERS = 6  # threads of each pool
SESSIONS = 12  # that are in use at a time, by all processes
EPOCH = 60.0  # seconds after which others are
COMPUTING = 40  # threads that hold the interpreter, for a while
PATIENCE = 60.0  # seconds for anything to come to its end; it never takes that long


class Application:
    """Two counters, and what happens to them from the inside."""

    def __init__(self, folder: Path, name: str, seed: str, pipe: int) -> None:
        self.folder, self.name, self.seed = folder, name, seed
        self.told = Journal(folder / "told" / name)
        self.numbers = itertools.count(1)
        self.stop = threading.Event()
        self._pipe = pipe
        self._burst = threading.Event()
        self.counters: list[Counter] = []

    def live(self) -> None:
        """Serve until standard input ends; then leave nothing."""
        self.told.write("life", os.getpid())
        before = set(threading.enumerate()), _descriptors()
        for number in range(2):
            self.counters.append(Counter(self, number))
        computing = [threading.Thread(target=self._compute) for _ in range(COMPUTING)]
        storms = [threading.Thread(target=self._rage, args=(each,)) for each in self.counters]
        for thread in (*computing, *storms):
            thread.start()
        sys.stdin.read()
        self.stop.set()
        self._burst.set()
        for thread in (*storms, *computing):
            self._join(thread)
        for counter in self.counters:
            for thread in counter.threads:
                self._join(thread)
            counter.pool.close()
        self._look_for_leftovers(*before)
        self.told.write("end")

    def accuse(self, what: str) -> None:
        self.told.write("accuse", what)

    def pools(self) -> list[Pool[Doer]]:
        return [counter.pool for counter in self.counters]

    def sign(self, number: int) -> None:
        """Give a sign of life of one counter."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, b"%d" % number)

    def _join(self, thread: threading.Thread) -> None:
        thread.join(PATIENCE)
        if thread.is_alive():
            faulthandler.dump_traceback(all_threads=True)
            self.accuse(f"{thread.name} hangs")

    def _look_for_leftovers(self, threads: set[threading.Thread], opened: dict[int, str]) -> None:
        self.counters.clear()
        gc.collect()
        for thread in set(threading.enumerate()) - threads:
            thread.join(2.0)
            if thread.is_alive():
                self.accuse(f"a thread is left: {thread.name}")
        for fd, to in _descriptors().items():
            if opened.get(fd) != to:
                self.accuse(f"a descriptor is left: {fd}, {to}")

    # -- what happens to it ------------------------------------------------------------------

    def _rage(self, counter: Counter) -> None:
        dice = random.Random(f"{self.seed}/{counter}")
        blows: dict[Callable[[Counter, random.Random], object], int] = {
            self._kill: 8, self._resize: 4, self._hold_interpreter: 3, self._reopen: 1,
            self._look: 4,
        }  # fmt: skip
        self._kill(counter, dice)  # in a short life, too
        while not self.stop.wait(dice.expovariate(1 / 0.5)):
            blow = dice.choices(list(blows), list(blows.values()))[0]
            try:
                blow(counter, dice)
            except Exception as error:
                self.accuse(f"{blow.__name__}: unexpected {type(error).__name__}: {error}")

    def _kill(self, counter: Counter, dice: random.Random) -> None:
        """Kill a worker as a stranger does: minipool's own handle is not asked."""
        pids = counter.pids()
        if not pids:
            return
        victim = dice.choice(pids)
        try:
            fd = os.pidfd_open(victim)
        except ProcessLookupError:
            return
        try:
            if victim in counter.pids():  # it was not reaped, so the descriptor is of that process
                self.told.write("killed", victim)
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(fd)

    def _resize(self, counter: Counter, dice: random.Random) -> None:
        counter.pool.resize(dice.randint(1, 4))

    def _hold_interpreter(self, counter: Counter, dice: random.Random) -> None:
        self._burst.set()
        self.stop.wait(dice.uniform(0.5, 2.0))
        if not self.stop.is_set():
            self._burst.clear()

    def _compute(self) -> None:
        while not self.stop.is_set():
            self._burst.wait()
            sum(range(2000))  # over and over, each as long as the interpreter lets one run

    def _reopen(self, counter: Counter, dice: random.Random) -> None:
        counter.reopen()

    def _look(self, counter: Counter, dice: random.Random) -> None:
        pool = counter.pool
        pool.health_check(), pool.stats(), pool.sessions(), pool.workers(), repr(pool)


class Counter:
    """One pool on the store, and the threads that count with it."""

    def __init__(self, application: Application, number: int) -> None:
        self.application, self._number = application, number
        self._told = application.told
        self._known: dict[str, None] = {}  # sessions that this pool has
        self._reopened = threading.Event()  # for those that have found the pool closed
        self.pool = self._opened()
        self.threads = [
            threading.Thread(target=self._live, args=(random.Random(f"{application.seed}/{self}/{n}"),))
            for n in range(CALLERS)
        ]  # fmt: skip
        for thread in self.threads:
            thread.start()

    def __str__(self) -> str:
        return f"{self.application.name}/{self._number}"

    def _opened(self) -> Pool[Doer]:
        """Open a pool, again while the store is locked for longer than it is waited for."""
        folder = self.application.folder
        while True:
            pool = Pool(
                Doer, args=(str(folder / "begun"),), size=2,
                session_store=folder / "store" / "sessions.db",
                call_timeout=60.0, checkout_timeout=30.0, close_timeout=5.0,
                overflow_idle=0.4,  # for what follows from it: the manager looks every 0.1 s
            )  # fmt: skip
            began = time.monotonic()
            pool.hooks["worker.terminate"].append(functools.partial(self._note_end, pool))
            try:
                return pool.open()
            except SessionError as error:
                self._told.write("not opened", str(error), began, time.monotonic())

    def _note_end(self, pool: Pool[Doer], event: str, _: Any, facts: dict[str, Any]) -> None:
        self._told.write("ended", facts["pid"], facts["exitcode"], facts["reason"], pool.closed)

    def pids(self) -> list[int]:
        """Return the processes of the workers that are there."""
        return [worker.pid for worker in self.pool.workers() if worker.pid]

    def reopen(self) -> None:
        """Close the pool in order and go on with another: its sessions are anybody's then."""
        self._reopened.clear()
        self.pool.close(timeout=2.0)
        self._known.clear()
        self.pool = self._opened()
        self._reopened.set()

    # -- a thread ----------------------------------------------------------------------------

    def _live(self, dice: random.Random) -> None:
        turns = {
            self._converse: 60, self._again: 12, self._plain: 10, self._plain_again: 5,
            self._hurried: 4, self._hang: 1, self._mark: 6, self._brief: 4,
        }  # fmt: skip
        stop = self.application.stop
        while not stop.wait(dice.expovariate(1 / 0.05)):
            turn = dice.choices(list(turns), list(turns.values()))[0]
            try:
                turn(self.pool, dice)
            except BaseException as error:
                self.application.accuse(f"{turn.__name__}: {type(error).__name__}: {error}")

    @contextlib.contextmanager
    def _deed(
        self, pool: Pool[Doer], kind: str, key: str = "", again: bool = False
    ) -> Iterator[Deed]:
        """Note what is about to be asked for; then, if it is not answered, what is said of it."""
        deed = Deed(self, kind, key)
        try:
            yield deed
        except Exception as error:
            if deed.done:
                raise
            fate = fate_of(error, deed.where, pool.closed, again)
            if fate is None:
                raise
            facts = [type(error).__name__, str(error), deed.began, time.monotonic(), pool.closed]
            self._told.write("refused", deed.id, fate, *facts)
            if isinstance(error, SessionBusy) and deed.where == CHECKOUT:
                self._doubt(error, key)
            elif isinstance(error, PoolClosed):
                self._reopened.wait(PATIENCE)

    def answered(self, deed: Deed, answer: Any) -> None:
        """Note an answer, before anything else is done with it."""
        self._told.write("answered", deed.id, answer, deed.began, time.monotonic())
        deed.done = True
        self.application.sign(self._number)

    def deed_id(self) -> str:
        return f"{self.application.name}.{next(self.application.numbers)}"

    def _some_session(self, dice: random.Random) -> str:
        """Return a session of this time, mostly one that this pool has already."""
        epoch = f"epoch {int(time.monotonic() / EPOCH)}: "
        known = [key for key in list(self._known) if key.startswith(epoch)]
        if known and dice.random() < 0.8:
            return dice.choice(known)
        return f"{epoch}{dice.randrange(SESSIONS)}"

    def _converse(self, pool: Pool[Doer], dice: random.Random) -> None:
        """Make a few calls with one lease."""
        key = self._some_session(dice)
        with self._deed(pool, "commit", key) as deed:
            with pool.checkout(session=key) as w:
                self._known[key] = None
                deed.where = CALL
                self.answered(deed, w.call("commit", deed.id, _work(dice)))
                for _ in range(dice.randrange(3)):
                    with self._deed(pool, "commit", key) as deed:
                        deed.where = CALL
                        self.answered(deed, w.call("commit", deed.id, _work(dice)))
                    if not deed.done:
                        return

    def _again(self, pool: Pool[Doer], dice: random.Random) -> None:
        key = self._some_session(dice)
        caller = pool.options(session=key, idempotent=True, retries=2, timeout=60.0)
        with self._deed(pool, "commit again", key, again=True) as deed:
            self.answered(deed, caller.call("commit", deed.id, _work(dice)))

    def _hurried(self, pool: Pool[Doer], dice: random.Random) -> None:
        key = self._some_session(dice)
        with self._deed(pool, "commit", key) as deed:
            with pool.checkout(session=key) as w:
                deed.where = CALL
                hurried = w.options(timeout=dice.uniform(0.0, 0.0006))
                self.answered(deed, hurried.call("hurried", deed.id, 0))

    def _plain(self, pool: Pool[Doer], dice: random.Random) -> None:
        with self._deed(pool, "plain") as deed:
            with pool.checkout() as w:
                deed.where = CALL
                self.answered(deed, w.call("plain", deed.id, _work(dice)))

    def _plain_again(self, pool: Pool[Doer], dice: random.Random) -> None:
        caller = pool.options(idempotent=True, retries=2, timeout=60.0)
        with self._deed(pool, "plain again", again=True) as deed:
            self.answered(deed, caller.call("plain", deed.id, _work(dice)))

    def _hang(self, pool: Pool[Doer], dice: random.Random) -> None:
        with self._deed(pool, "plain") as deed:
            with pool.checkout() as w:
                deed.where = CALL
                w.options(timeout=0.1).call("hang", deed.id)
                self.application.accuse("a call that never returns was answered")

    def _mark(self, pool: Pool[Doer], dice: random.Random) -> None:
        """Commit from the parent, without a call."""
        key = self._some_session(dice)
        with self._deed(pool, "mark", key) as deed:
            with pool.checkout(session=key) as w:
                deed.where = CALL
                w.state[f"mark {deed.id}"] = True
                self.answered(deed, None)

    def _brief(self, pool: Pool[Doer], dice: random.Random) -> None:
        """Begin a session with a state, use it, and mostly end it."""
        with self._deed(pool, "create") as deed:
            key = f"brief {deed.id}"
            pool.create_session(key, born_with(deed.id))
            self.answered(deed, None)
        if not deed.done:
            return
        with self._deed(pool, "commit", key) as deed:
            with pool.checkout(session=key) as w:
                deed.where = CALL
                self.answered(deed, w.call("commit", deed.id, _work(dice)))
        if dice.random() < 0.8:
            with self._deed(pool, "end", key) as deed:
                pool.end_session(key)
                self.answered(deed, None)

    # -- a session that is said to be another's --------------------------------------------------

    def _doubt(self, error: SessionBusy, key: str) -> None:
        """Accuse if a session is kept for an owner that is no more, asked for once again."""
        self._known.pop(key, None)
        owner, pools = error.owner_pid, self.application.pools()
        if owner is None or self._may_have(owner, key):
            return
        try:
            self.pool.checkout(session=key).release()
        except SessionBusy as again:
            same = again.owner_pid == owner and self.application.pools() == pools
            if same and not self._may_have(owner, key):
                self.application.accuse(f"{key} is kept for an owner that is no more: {again}")
        except Exception:
            pass  # what may rightly come here is another deed's matter

    def _may_have(self, owner: int, key: str) -> bool:
        """Tell whether a process may have a session: another that lives, or a pool of this one."""
        if owner != os.getpid():
            return _alive(owner)
        return any(
            key == session.session_id
            for pool in self.application.pools()
            for session in pool.sessions()
        )


class Deed:
    """One thing that is asked for: its id, and how far it has come."""

    def __init__(self, counter: Counter, kind: str, key: str) -> None:
        self.id, self.where, self.began = counter.deed_id(), CHECKOUT, time.monotonic()
        self.done = False
        counter.application.told.write("asked", self.id, kind, key)


def _work(dice: random.Random) -> int:
    """Draw how long a call takes: mostly no time, sometimes tens of ms."""
    return 1_000_000 if dice.random() < 0.1 else 0


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them is closed by now
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


if __name__ == "__main__":
    faulthandler.enable()
    folder, name, life, seed, pipe = sys.argv[1:]
    os.set_inheritable(int(pipe), False)
    os.set_blocking(int(pipe), False)
    forkserver.ensure_running()  # multiprocessing's own helpers stay until the end
    resource_tracker.ensure_running()
    Application(Path(folder), f"{name}{life}", f"{seed}/{name}{life}", int(pipe)).live()
