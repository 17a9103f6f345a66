"""32 threads that use a pool in every way there is, and hold each answer against the ledger."""

from __future__ import annotations

import ctypes
import random
import signal
import threading
from typing import Any, Callable

import subjects
from ledger import Ledger

import rogues
from minipool import (
    CallTimeout,
    CheckoutTimeout,
    CircuitOpen,
    LeaseRevoked,
    Pool,
    PoolClosed,
    ProtocolError,
    RemoteError,
    WorkerDied,
)

THREADS, SESSIONS = 32, 40
#: What a call may end in while its worker is shot at. Whatever else comes is a violation.
SHOT = (WorkerDied, CallTimeout, ProtocolError, CheckoutTimeout, CircuitOpen, LeaseRevoked)


class Strike(BaseException):
    """Raised in a thread by the storm, between any two bytecodes."""


class Callers:
    """The threads of one episode. They go on until `stop` is set or the pool is closed."""

    def __init__(self, pool: Pool[Any], number: int, ledger: Ledger, seed: str, keys: str) -> None:
        self.stop = threading.Event()
        self._pool, self._number, self._ledger, self._keys = pool, number, ledger, keys
        self._at_risk: set[int] = set()
        self._leaving = threading.Event()
        self._threads = [
            threading.Thread(target=self._live, args=(me, random.Random(f"{seed}/{me}")))
            for me in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def strike(self, dice: random.Random) -> None:
        """Raise an exception in one of the threads, wherever it is."""
        me = dice.randrange(THREADS)
        if me in self._at_risk:
            ident = ctypes.c_ulong(self._threads[me].ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Strike))
            self._ledger.count("strikes")

    def join(self, timeout: float) -> None:
        """Let every thread end its turn; accuse those that do not."""
        self.stop.set()
        self._at_risk.clear()
        self._leaving.set()  # a last strike may still have been on its way
        for thread in self._threads:
            thread.join(timeout)
            if thread.is_alive():
                self._ledger.accuse(f"{thread.name} hangs")

    # -- a thread ----------------------------------------------------------------------------

    def _live(self, me: int, dice: random.Random) -> None:
        self._at_risk.add(me)
        while True:
            try:  # twice: a strike may fall between the handler of one and the next `try`
                return self._live_on(dice)
            except Strike:
                pass

    def _live_on(self, dice: random.Random) -> None:
        while True:
            try:
                while not self.stop.is_set():
                    self._turn(dice)
                self._leaving.wait()
                return
            except Strike:
                self._ledger.count("struck")
            except PoolClosed:
                self._ledger.count("PoolClosed")
                self.stop.set()
            except BaseException as problem:
                self._ledger.accuse(f"unexpected {type(problem).__name__}: {problem}")
                self.stop.set()

    def _turn(self, dice: random.Random) -> None:
        turns: list[Callable[[random.Random], str]] = [
            self._converse, self._one_call, self._several_calls, self._idempotent, self._trouble,
        ]  # fmt: skip
        turn = dice.choices(turns, weights=[50, 25, 10, 10, 5])[0]
        try:
            self._ledger.count(turn(dice))
        except SHOT as error:
            self._ledger.count(type(error).__name__)

    def _one_call(self, dice: random.Random) -> str:
        number = dice.randrange(1 << 40)
        self._expect(number * number, self._pool.call("square", number))
        return "answered"

    def _several_calls(self, dice: random.Random) -> str:
        token = next(self._ledger.tokens)
        with self._pool.checkout(timeout=20) as w:
            with self._ledger.holding(self._number, w):
                w.call("begin", token)
                for _ in range(dice.randrange(5)):
                    self._expect(True, w.call("goes_on", token))
        return "answered"

    def _idempotent(self, dice: random.Random) -> str:
        number = dice.randrange(1 << 40)
        caller = self._pool.options(timeout=30, idempotent=True)
        try:
            self._expect(number * number, caller.call("square", number))
        except WorkerDied as error:  # the storm may have struck all three
            if error.tries < 3 and error.__cause__ is None:  # else there was no other worker
                self._ledger.accuse(f"an idempotent call was not made again: {error}")
        return "answered"

    def _converse(self, dice: random.Random) -> str:
        key = f"{self._keys}{dice.randrange(SESSIONS)}"
        with self._pool.checkout(session=key, timeout=20) as w:
            for _ in range(dice.randrange(1, 4)):
                token = next(self._ledger.tokens)
                known = self._ledger.perhaps(key, token)
                try:
                    answer = w.call("add", token)
                except SHOT:
                    self._ledger.refused(key, known)
                    raise
                self._ledger.committed(key, token, known, answer)
        return "committed"

    def _trouble(self, dice: random.Random) -> str:
        """Make a call that goes wrong in one way; what comes of it is typed."""
        target, args, expected = dice.choice(TROUBLE)
        try:
            self._pool.options(timeout=dice.choice([0.03, 0.1])).call(target, *args)
        except (*expected, *SHOT) as error:
            return f"{target.__name__}: {type(error).__name__}"
        if expected:
            self._ledger.accuse(f"{target.__name__} returned")
        return f"{target.__name__}: returned"

    def _expect(self, wanted: Any, got: Any) -> None:
        if wanted != got:
            self._ledger.accuse(f"a call was answered {got!r}, and should be {wanted!r}")


TROUBLE: list[tuple[Callable[..., Any], tuple[Any, ...], tuple[type[Exception], ...]]] = [
    (subjects.leave, (0,), (WorkerDied,)),
    (subjects.leave, (7,), (WorkerDied,)),
    (subjects.crash, (signal.SIGSEGV,), (WorkerDied,)),
    (subjects.crash, (signal.SIGKILL,), (WorkerDied,)),
    (subjects.hang, (), (CallTimeout,)),
    (subjects.spin, (), (CallTimeout,)),
    (rogues.write_to_pipe, (b"x",), (ProtocolError,)),
    (rogues.write_to_pipe, (b"\0\0\0\x0d" + bytes(13),), (ProtocolError,)),
    (rogues.write_to_pipe, (b"\x7f\xff\xff\xff",), (ProtocolError,)),
    (subjects.hang_up, (), (WorkerDied,)),
    (subjects.fail, ("as it should",), (ArithmeticError,)),
    (subjects.quit_python, (), (RemoteError,)),
    (subjects.return_a_lock, (), (RemoteError,)),
]
