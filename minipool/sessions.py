"""Sessions: named conversations whose state outlives any worker. The parent's side.

A session's truth is here: its last committed state, pickled value by value, and a version that
counts the commits. Workers keep copies (see `engine.conversation`); a worker that has the current
version is sent no state at all. With a store, each commit is in it before the caller sees the
reply, so sessions outlive this process as well.

Sessions are serial. Who may use one is decided by a turnstile whose slots are the sessions, so
they wait for one session in the order they came, and by the same proved protocol as for workers.
Its idle set is in the order of last use, which is the order in which sessions expire.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import weakref
from typing import Any, Mapping

from .engine.desk import Desk
from .engine.handle import Handle
from .engine.pace import Budget
from .engine.table import LEASED_SINCE_NS, SESSION_HITS
from .engine.turnstile import Closed, Turnstile
from .errors import (
    CheckoutTimeout,
    SessionBusy,
    SessionError,
    SessionExists,
    SessionNotFound,
)
from .nearness import Nearness, checked_key
from .records import Changes, Record, Stake, pack
from .telemetry import INFO, logger, remark


class Sessions:
    """All sessions of one pool in this process, and who may use which."""

    def __init__(self, desk: Desk, store: Any = None) -> None:
        self._desk = desk
        self._manager = desk.manager
        self._config = desk.config
        self._store = store
        self.nearness = Nearness(desk)
        self._affinity = desk.config.affinity
        self._records: dict[str, Record] = {}
        self._line = Turnstile("fifo")
        #: Owned by a thread, but without a worker: not astray while the thread's stake is there.
        self._owned: dict[str, tuple[Record, weakref.ref[Stake]]] = {}
        self._astray: dict[str, float] = {}  # owned by nobody at the last sweep, and used when
        self._renewing: dict[str, object] = {}  # who renews a record, by identity
        self._last_expiry = 0.0
        # Weakly, because the manager must not keep the pool from being collected.
        self._manager.sweepers.append(weakref.WeakMethod(self._sweep))
        self._manager.lines.append(weakref.ref(self._line))
        self._manager.care.sessions_end = store is None
        if store is not None:
            self._manager.closers.append(store.close)

    def check_process(self) -> None:
        """Raise PoolForked in a process that was forked from the owner."""
        self._desk.check_process()

    # -- beginning and end -------------------------------------------------------------------

    def create(self, key: str, state: Mapping[str, Any] | None = None) -> None:
        """Begin a session with a state.

        Raises:
            SessionExists: there is one of that id. SessionError: there are too many, all in use,
                or the store refused. CallMismatch: a value cannot be pickled. Nothing was begun.
        """
        self._desk.check_open()
        packed = pack(state or {})
        before, stake = self._owned.get(checked_key(key)), Stake()
        try:
            made = self._new(key, stake)
            if made is not None and not made[1] and packed:
                made[0].commit(packed, by_worker=False)
        except BaseException:
            record = self._mine(key, before)
            if record is not None:
                self._forget(record)
                if self._store is not None:
                    with contextlib.suppress(SessionError):  # as it was the store that refused
                        self._store.delete(key)
            raise
        if made is not None:
            self.give_back(made[0])
        if made is None or made[1]:
            raise SessionExists(
                f"there is a session {key!r} already; end it first, or use `checkout(session=...)`",
                session_id=key,
            )

    def _new(self, key: str, stake: Stake) -> tuple[Record, bool] | None:
        """Make the record of a session, owned by the caller, and tell whether the store had it.

        None: another thread has it already.
        """
        record = Record(self, key)
        if self._line.current.setdefault(key, record) is not record:
            return None  # others can queue for it from here on
        try:
            self._own(record, stake)
            self._records[key] = record
            self._make_room()
            loaded = None if self._store is None else self._store.open(key)
            if loaded is not None:
                record.version, record.state = loaded
            record.opened = True
        except BaseException:
            self._forget(record)
            raise
        return record, loaded is not None

    def end(self, key: str, timeout: float | None) -> None:
        """End a session, after its present lease; nothing if there is none. See `Pool`."""
        self._desk.check_open()
        if key not in self._records and (self._store is None or not self._store.has(key)):
            return
        before, stake = self._owned.get(key), Stake()
        try:
            record = self._take(key, timeout, stake, create=False)
            self._over(record)
        except SessionNotFound:
            return
        except BaseException:
            self._let_go(key, before)
            raise
        handle = self.nearness.worker_of(record)
        if handle is not None:
            over, row = (key, record.serial), handle.row
            self._manager.wait_for(  # a busy worker hears of it when its lease is over
                lambda: (
                    over not in handle.sessions_over
                    or bool(handle.ended_ns)
                    or row[LEASED_SINCE_NS] != 0
                ),
                self._config.health_check_timeout,
            )

    def _over(self, record: Record) -> None:
        """Forget a session that the caller owns, and have its worker told."""
        if self._store is not None:
            stake = Stake()
            self._own(record, stake)
            try:
                self._store.delete(record.key)  # first: who comes next must not find it there
            except BaseException:
                self.give_back(record)
                raise
        handle = self.nearness.worker_of(record)
        self._forget(record)
        if handle is not None:
            handle.sessions.pop(record.key, None)
            handle.sessions_over.append((record.key, record.serial))
            self._manager.order(lambda: self._manager.care.probe(handle))

    def _forget(self, record: Record) -> None:
        record.fenced = True
        self._owned.pop(record.key, None)
        self._records.pop(record.key, None)
        self._line.current.pop(record.key, None)  # last: then another may begin it anew
        self._line.dismiss(record.key)  # who waits for it looks again, and finds it gone

    def _make_room(self) -> None:
        """End the session that was not used for the longest time, if there are too many."""
        while len(self._records) > self._config.max_sessions:
            oldest = self._line.oldest()
            if oldest is None:
                raise SessionError(
                    f"there are {len(self._records) - 1} sessions and all are in use "
                    f"(max_sessions={self._config.max_sessions}); raise `max_sessions`"
                )
            if self._line.claim(*oldest):
                self._over(oldest[1])
                self.nearness.tell("session.lost", oldest[1], reason="evicted")

    # -- using -------------------------------------------------------------------------------

    def acquire(
        self,
        key: str,
        affinity: str | None,
        timeout: float | None,
        budget: Budget | None = None,
    ) -> Handle:
        """Take a session and a worker for it; both are the caller's until `give_back`.

        With `budget` the caller leaves either line while there is time for its call.

        Raises:
            SessionBusy, SessionLost, SessionNotFound, CheckoutTimeout: nothing was taken.
        """
        if affinity is None:
            affinity = self._affinity
        token = self._line.try_take_this(key)
        record: Record | None = None if token is None else token[1]
        if record is not None and affinity != "any":
            handle = self._desk.try_acquire_this(record.at_slot, record.at_generation)
            if handle is not None:
                record.affinity, record.strict = "hit", affinity == "strict"
                if self._lease(record, handle):
                    handle.row[SESSION_HITS] += 1
                    return handle
                record = None
        if budget is not None:
            timeout = self._desk.pace.patience(timeout, budget)
        return self._acquire_slowly(key, record, affinity, timeout)

    def _acquire_slowly(
        self, key: str, record: Record | None, affinity: str, timeout: float | None
    ) -> Handle:
        """Take a session, if the caller does not own it already, and whatever worker suits it."""
        start = time.monotonic()
        before = None if record is not None else self._owned.get(checked_key(key))
        stake = Stake()
        try:
            if record is not None:
                self._own(record, stake)
            self._desk.check_open()
            if record is None:
                record = self._take(key, timeout, stake)
            record.strict = affinity == "strict"
            if record.strict:
                self.nearness.tell_lost(record, start)
            left = None if timeout is None else max(0.0, timeout - (time.monotonic() - start))
            handle = self.nearness.worker_for(record, affinity, left)
            leased = self._lease(record, handle)
        except BaseException:
            self._let_go(key, before)
            raise
        if not leased:
            left = None if timeout is None else max(0.0, timeout - (time.monotonic() - start))
            return self.acquire(key, affinity, left)
        self._owned.pop(key, None)
        if record.affinity == "hit":
            handle.row[SESSION_HITS] += 1
        else:
            self._desk.count(f"sessions_{record.affinity}")
        return handle

    def _lease(self, record: Record, handle: Handle) -> bool:
        """Give a session the worker that it goes with; False if a sweep took it for astray.

        Here the holder is written, then `fenced` is read; in `take_away` it is the other way
        round. So one of the two sees the other, and a false alarm costs the caller nothing.
        """
        record.holder, handle.session = handle, record
        if not record.fenced:
            return True
        handle.session = None
        self._desk.give_back(handle)
        self.give_back(record)
        return False

    def _own(self, record: Record, stake: Stake) -> None:
        record.thread = threading.get_ident()
        self._owned[record.key] = record, weakref.ref(stake)

    def _mine(self, key: str, before: object) -> Record | None:
        """Return what this thread owns of late, after an exception that came between two steps."""
        owned = self._owned.get(key)
        if owned is None or owned is before or owned[0].thread != threading.get_ident():
            return None
        return owned[0]

    def _let_go(self, key: str, before: object) -> None:
        record = self._mine(key, before)
        if record is not None:
            self.give_back(record)

    def exchange(self, record: Record, dead: Handle, timeout: float | None) -> Handle:
        """Take another worker for a session that goes on: the first one died.

        Raises:
            CheckoutTimeout, TooManyWaiters, PoolClosed: the session was given back.
        """
        stake = Stake()
        try:
            self._own(record, stake)
            self._desk.give_back(dead)
            handle = self._desk.acquire(timeout)
            record.holder, handle.session = handle, record
        except BaseException:
            self.give_back(record)
            raise
        self._owned.pop(record.key, None)
        if record.affinity == "hit":
            record.affinity = "lost"
            self._desk.count("sessions_lost")
        return handle

    def _take(self, key: str, timeout: float | None, stake: Stake, create: bool = True) -> Record:
        """Own a session, after those who came before; begin it if there is none."""
        if self._manager.here:
            timeout = 0.0  # a hook in the manager's thread waits for nobody
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if key not in self._records:
                made = self._begin(key, stake, create)
                if made is not None:
                    return made[0]
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                token = self._line.take(left, wants=key)
            except Closed:
                self._desk.check_open()
                continue  # it was ended while we waited
            if token is not None:
                owned: Record = token[1]
                self._own(owned, stake)
                return owned
            if key in self._records:
                raise self._busy(key, timeout)

    def _begin(self, key: str, stake: Stake, create: bool) -> tuple[Record, bool] | None:
        create = create and not self._config.strict_sessions
        if not create and (self._store is None or not self._store.has(key)):
            raise SessionNotFound(
                f"there is no session {key!r}; begin it with create_session(), or set "
                f"strict_sessions=False to have it begun by its first use",
                session_id=key,
            )
        return self._new(key, stake)

    def _busy(self, key: str, timeout: float | None) -> SessionError | CheckoutTimeout:
        if timeout == 0:
            return SessionBusy(
                f"session {key!r} is in use; wait for it with a timeout", session_id=key
            )
        self._desk.count("timeouts")
        return CheckoutTimeout(
            f"session {key!r} was in use for all of {timeout} s; its lease is held too long, or "
            f"never given back; sessions are serial",
            timeout=timeout, waited=timeout, size=self._manager.staff.target, leased=0, waiting=0,
            held_by_this_thread=0,
        )  # fmt: skip

    def give_back(self, record: Record) -> None:
        """Offer a session to the next in line."""
        record.used = time.monotonic()
        record.holder = None
        self._owned.pop(record.key, None)
        self._line.publish(record.key, record)

    def take_away(self, record: Record) -> None:
        """Free a session whose owner may still be at it, or was struck before he could.

        It gets a new record, and the old one is fenced off: whatever he does with it is refused.
        If a commit is under way, a sweep will do it.
        """
        me = object()
        if self._renewing.setdefault(record.key, me) is not me:
            return
        try:
            renewed = record.renewed() if self._records.get(record.key) is record else None
            if renewed is not None and self._held(record):
                record.fenced = False
            elif renewed is not None:
                self._records[record.key] = renewed
                self._owned.pop(record.key, None)
                self._line.admit(record.key, renewed)
                self._line.publish(record.key, renewed)
        finally:
            self._renewing.pop(record.key, None)

    def store_commit(self, record: Record, changes: Changes) -> None:
        """Put changes into the store, if there is one."""
        if self._store is None:
            return
        try:
            self._store.commit(record.key, record.version + 1, changes)
        except SessionError:
            raise
        except BaseException:  # interrupted: whether it was done, the store knows
            record.doubtful = True
            with contextlib.suppress(SessionError):  # else who uses the session next asks it
                self.settle(record)
            raise

    def settle(self, record: Record) -> None:
        """Ask the store what the last commit has come to, if that was interrupted.

        Raises:
            SessionError: it cannot tell now.
        """
        if record.doubtful and self._store is not None:
            loaded = self._store.open(record.key)
            if loaded is not None:
                record.version, record.state = loaded
            record.doubtful = False

    # -- looking and sweeping ----------------------------------------------------------------

    def state(self, key: str) -> dict[str, Any]:
        """Return a copy of the last committed state.

        Raises:
            SessionNotFound: there is no such session.
        """
        record = self._records.get(key)
        if record is not None:
            self.settle(record)
            packed = record.state or {}
        else:
            loaded = None if self._store is None else self._store.read(key)
            if loaded is None:
                raise SessionNotFound(f"there is no session {key!r}", session_id=key)
            packed = loaded[1] or {}
        return {name: pickle.loads(data) for name, data in packed.items()}

    def records(self) -> list[Record]:
        """Return the records of this moment."""
        return list(self._records.values())

    def record_of(self, key: str) -> Record | None:
        """Return a session's record, or None."""
        return self._records.get(key)

    def __len__(self) -> int:
        return len(self._records)

    def _sweep(self) -> None:
        """End what has expired; find what nobody owns. By the manager, once a tick."""
        if self._manager.closing:
            return
        try:
            self._expire()
            if self._store is not None:
                self._store.beat()
        except SessionError as problem:  # a full disk, a lock; the next sweep tries again
            # As text: a handler that keeps records would keep the frames, and in them a worker.
            logger().warning("%s: %s", self._config.name, str(problem))
        self._sweep_astray()

    def _expire(self) -> None:
        ttl = self._config.session_ttl
        expired = time.monotonic() - ttl
        oldest = self._line.oldest()
        while oldest is not None and oldest[1].used < expired:
            if self._line.claim(*oldest):
                self._over(oldest[1])
                self.nearness.tell("session.lost", oldest[1], reason="expired")
            oldest = self._line.oldest()
        now = time.monotonic()
        if hasattr(self._store, "expire") and now - self._last_expiry > min(ttl / 4, 60.0):
            self._last_expiry = now
            self._store.expire(ttl)  # those that no living process has

    def _sweep_astray(self) -> None:
        """Free a session whose owner was struck by an exception before he could."""
        for key, owned in self._owned.copy().items():
            if owned[1]() is None:  # he was struck on his way to a lease
                popped = self._owned.pop(key, owned)
                if popped is not owned:
                    self._owned.setdefault(key, popped)  # the next owner was faster
        handles = tuple(self._manager.fleet.handles.values())
        leased = sum(handle.session is not None for handle in handles)
        if len(self._line.idle) + len(self._owned) + leased == len(self._line.current):
            self._astray.clear()
            return
        before, self._astray = self._astray, {}
        for key in set(self._line.current) - set(self._line.idle) - set(self._owned):
            record: Record | None = self._line.current.get(key)
            if record is None or self._held(record):
                continue
            self._astray[key] = record.used
            if before.get(key) != record.used or key in self._line.idle:
                continue
            remark(INFO, "session %r had lost its owner and is free again", key)
            if record.opened:
                self.take_away(record)
            else:
                self._forget(record)

    def _held(self, record: Record) -> bool:
        """Tell whether a session has a lease, or will have one in a moment."""
        holder = record.holder
        if holder is None or holder.session is not record or holder.revoked is not None:
            return False
        return holder.live_lease is not None or holder in self._manager.fleet.live()
