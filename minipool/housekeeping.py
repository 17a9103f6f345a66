"""Housekeeping: what a session store needs done all the time, in a thread of its own.

One thread for each pool that has a store. It gives signs of life, notes in the store which
sessions were used, deletes those that have expired, undoes there what the store refused to undo
before, and closes the store when the pool has ended.
So neither the manager, which must never wait for the outside, nor a caller does any of that, and
no number of committing threads keeps it from being done.

It holds the pool weakly, and survives whatever the store or a listener raises: the same trouble is
logged once, until it is over. A store that does not answer holds up nobody else, not even the end
of the pool, which waits for it for a limited time only.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Callable, Mapping, Protocol

from .engine.manager import Keeper
from .errors import SessionError
from .telemetry import INFO, logger, remark

if TYPE_CHECKING:

    class Tended(Protocol):
        """What is known of the sessions here."""

        def used_since(self, moment: float) -> Mapping[str, float]: ...

        def has_expired(self) -> bool: ...

        def expire(self, seconds: float) -> bool: ...

        def pay_owed(self, until: float) -> SessionError | None: ...


_BEAT_S = 2.0  # seconds between two signs of life, and notes of what was used
_EXPIRY_S = 60.0  # seconds between two looks for what nobody in this process has, at most
# What may be in trouble, in the words of the log.
_SIGN, _DELETE = "the sign of life could not be given", "sessions could not be deleted"
_DELETE_OLD, _PASS = "old sessions could not be deleted", "housekeeping failed"
_BATCH_S = 0.05  # seconds at a time for what has expired: signs of life have to be punctual
_LAST_S = 1.0  # seconds at the end for what the store has refused before
_BREATH_S = 0.005  # seconds between two batches, for those who commit


class Housekeeping(Keeper):
    """The thread that looks after the session store of one pool, and closes it."""

    def __init__(
        self,
        pool: str | None,
        store: Any,
        ttl: float,
        sessions: Tended,
        on_end: Callable[[], object],
    ) -> None:
        self.ended = False  # the store was closed, or refused to be
        self._pool, self._store, self._ttl = pool, store, ttl
        self._sessions = weakref.ref(sessions)
        self._on_end = on_end
        self._ending = False
        self._gate = threading.Lock()  # released to wake the thread; a lock, as `wait` is one step
        self._gate.acquire()
        self._noted = time.monotonic()  # uses before that are in the store
        self._beat_at = self._expire_at = self._noted
        self._store_expires_at = self._noted
        self._troubles: set[str] = set()  # that were logged and are not over
        self._thread = threading.Thread(
            target=self._run, name=f"minipool-{pool}-housekeeping", daemon=True
        )

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: there can be no more threads; the store was closed.
        """
        try:
            self._thread.start()
        except BaseException:
            self._close()
            raise

    def end(self) -> None:
        """Have the store closed, soon. Any thread may call it, more than once; never waits."""
        self._ending = True
        with contextlib.suppress(RuntimeError):  # it was told before
            self._gate.release()

    def join(self, timeout: float) -> None:
        """Wait for the thread itself to end."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def keeps(self, thing: object) -> bool:
        return thing is self._store

    @property
    def here(self) -> bool:
        """Whether the calling thread is this one (a listener runs in it)."""
        return threading.current_thread() is self._thread

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.ended:
            try:
                self._go_on()
                if _SIGN not in self._troubles and self._give_sign():  # else it only takes longer
                    self._tried(_DELETE, self._pay_owed)
                self._close()
            except BaseException:
                continue  # struck on its way from one thing to the next, and none is left out

    def _go_on(self) -> None:
        while not self._ending:
            try:
                pause = self._pass()
                self._troubles.discard(_PASS)
            except BaseException as problem:  # a listener may raise SystemExit
                self._note_trouble(_PASS, problem)
                pause = _BEAT_S
            self._gate.acquire(True, pause)

    def _pass(self) -> float:
        """Do what is due; return after how many seconds more will be."""
        now = time.monotonic()
        if now >= self._beat_at:
            self._give_sign()
        more = False
        if now >= self._store_expires_at:
            more = self._tried(_DELETE_OLD, self._expire_in_store)
            self._store_expires_at = now if more else now + min(self._ttl / 4, _EXPIRY_S)
        if now >= self._expire_at:
            left = self._expire_here()
            self._expire_at = now if left else now + min(self._ttl / 4, _BEAT_S)
            more = more or left
        if more:
            return _BREATH_S
        due = min(self._beat_at, self._expire_at, self._store_expires_at)
        return max(_BREATH_S, due - time.monotonic())

    def _expire_here(self) -> bool:
        """End sessions that have expired in this process; True: there are more.

        The sign of life comes first, as a trial: a store that is locked refuses it soon. Each
        deletion would wait for it as long as a caller does, and `close()` for this thread.
        """
        sessions = self._sessions()
        if sessions is None or not sessions.has_expired():
            return False
        del sessions  # it keeps the pool
        return self._give_sign() and self._tried(_DELETE, self._expire)

    def _give_sign(self) -> bool:
        """Say that this process lives, and what it has used; False if the store refused."""
        self._beat_at = time.monotonic() + _BEAT_S
        self._tried(_SIGN, self._beat)
        return _SIGN not in self._troubles

    def _beat(self) -> bool:
        if not hasattr(self._store, "beat"):
            return False
        sessions, now = self._sessions(), time.monotonic()
        used = {} if sessions is None else sessions.used_since(self._noted)
        del sessions  # it keeps the pool
        self._store.beat(used)
        self._noted = now  # only now: what the store refused is told again
        return False

    def _expire_in_store(self) -> bool:
        if not hasattr(self._store, "expire"):
            return False
        return bool(self._store.expire(self._ttl))

    def _expire(self) -> bool:
        sessions = self._sessions()
        return sessions is not None and sessions.expire(_BATCH_S)

    def _pay_owed(self) -> bool:
        sessions = self._sessions()
        refused = None if sessions is None else sessions.pay_owed(time.monotonic() + _LAST_S)
        if refused is not None:
            raise refused
        return False

    def _tried(self, what: str, step: Callable[[], bool]) -> bool:
        """Do one thing and return what it does; False if it failed, which is logged."""
        try:
            more = step()
        except Exception as problem:
            self._note_trouble(what, problem)
            return False
        if what in self._troubles:
            self._troubles.discard(what)
            remark(INFO, "the session store of %s is well again", self._pool)
        return more

    def _note_trouble(self, what: str, problem: BaseException) -> None:
        if what in self._troubles:
            return
        self._troubles.add(what)
        # As text: a handler that keeps records would keep the frames, and in them a worker.
        text = str(problem) if isinstance(problem, SessionError) else f"{what}: {problem!r}"
        logger().warning("%s: %s; it is tried again", self._pool, text)

    def _close(self) -> None:
        try:
            if self.lets_go:
                self._store.close()
        except Exception as problem:
            logger().warning("%s: the session store did not close: %r", self._pool, problem)
        self.ended = True
        self._on_end()
