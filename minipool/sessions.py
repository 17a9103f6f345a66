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
import threading
import time
import weakref
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

from .engine.desk import Desk
from .engine.handle import Handle
from .engine.pace import Budget
from .engine.passage import passage
from .engine.refusal import hold_of
from .engine.standstill import TimeLimit
from .engine.table import LEASED_SINCE_NS, SESSION_HITS
from .engine.turnstile import Closed, Turnstile
from .errors import (
    CheckoutTimeout,
    SessionBusy,
    SessionError,
    SessionExists,
    SessionNotFound,
)
from .housekeeping import Housekeeping
from .nearness import Nearness, checked_key
from .records import Changes, Record, Snapshot, Stake, outgrown, pack, weight_of
from .telemetry import INFO, remark

#: Marks, in the store alone, a session that a `with pool.session()` block began and is to end.
_SCOPE = "minipool:scope"
Loaded = Tuple[int, Optional[Dict[str, bytes]]]  # version and state, as a store has them
_BATCH_S = 0.005  # seconds at a time that the manager spends on what has expired


class Sessions:
    """All sessions of one pool in this process, and who may use which."""

    def __init__(self, desk: Desk, store: Any = None) -> None:
        self._desk = desk
        self._manager = desk.manager
        self._config = desk.config
        self._store = store
        self.nearness = Nearness(desk)
        self._affinity = desk.config.affinity
        #: What is ours in the store has a record here, or else is owed there: to be deleted (True)
        #: or only let go. Housekeeping sees to that if the store refused it at once.
        self._records: dict[str, Record] = {}
        self._owed: dict[str, bool] = {}
        self._line = Turnstile("fifo", swept=True)
        #: Owned by a thread, but without a worker: not astray while the thread's stake is there.
        self._owned: dict[str, tuple[Record, weakref.ref[Stake]]] = {}
        self._astray: dict[str, float] = {}  # owned by nobody at the last sweep, and used when
        self._renewing: dict[str, object] = {}  # who renews a record, by identity
        self._stale: dict[str, object] = {}  # those that did so at the last sweep already
        self.max_message = desk.config.max_message
        # Weakly, because the manager must not keep the pool from being collected.
        self._manager.sweepers.append(weakref.WeakMethod(self._sweep))
        self._manager.lines.append(weakref.ref(self._line))
        self._manager.care.sessions_end = store is None
        if store is not None:
            housekeeping = Housekeeping(
                desk.pool_name, store, desk.config.session_ttl, self, desk.manager.bell.ring
            )
            self._manager.keepers.append(housekeeping)

    def check_process(self) -> None:
        """Raise PoolForked in a process that was forked from the owner."""
        self._desk.check_process()

    # -- beginning and end -------------------------------------------------------------------

    def create(
        self, key: str, state: Mapping[str, Any] | None = None, scoped: bool = False
    ) -> None:
        """Begin a session with a state, in one transaction where there is a store.

        With `scoped` it is marked as one that a block began and is to end; one that such a block
        of a dead process has left is ended, and this one begun in its place.

        Raises:
            SessionExists: there is one of that id; it is as it was. SessionError: there are too
                many, all in use, or the store refused, or the state is too large to be sent.
                SessionBusy: one of that id is just being deleted. CallMismatch: a value cannot be
                pickled. Nothing was begun.
        """
        self._desk.check_open()
        key = checked_key(key)
        packed = pack(state or {})
        problem = outgrown(key, weight_of(packed), self.max_message)
        if problem is not None:
            raise problem
        before, stake = self._owned.get(key), Stake()
        try:
            record = None
            while record is None:
                record = self._new(key, stake, lambda record: self._write(record, packed, scoped))
                if record is None and not self._is_gone(key):
                    raise _exists(key) if key not in self._owed else _being_undone(key)
        except BaseException:
            mine = self._mine(key, before)
            if mine is not None:
                self._unmake(mine)
            raise
        self.give_back(record)

    def _is_gone(self, key: str) -> bool:
        """Tell whether a session that is here is not in the store; then it is forgotten here too.

        So it is if another had to go for one whose begin was interrupted.
        """
        known = self._line.current.get(key)
        if known is None or not known.doubtful:
            return known is None
        before, stake = self._owned.get(key), Stake()
        try:
            token = self._line.try_take_this(key)
            if token is None:
                return False
            self._own(token[1], stake)
            self.settle(token[1])
        except SessionBusy:
            return True
        except BaseException:
            self._let_go(key, before)
            raise
        self._put_back(token[1])
        return False

    def _new(
        self, key: str, stake: Stake, fill: Callable[[Record], object], stays: bool = True
    ) -> Record | None:
        """Make the record of a session, owned by the caller; `fill` asks the store for it.

        Room for it is made last, when nothing else can be in its way; none, if it does not stay.
        None: another thread has it already.
        """
        record = Record(self, key)
        try:
            known: Record = self._line.current.setdefault(key, record)
            if known is not record:
                return None  # others can queue for it from here on
            self._own(record, stake)
            if key in self._owed:
                self._pay(key)
            if stays:
                self._check_room()
            fill(record)
            if stays:
                self._records[key] = record
                self._make_room()
            return record
        except BaseException:
            if self._line.current.get(key) is record:
                self._unmake(record)
            raise

    def _unmake(self, record: Record, later: bool = False) -> None:
        """Forget a record that was not made to its end; in the store is what was there before.

        What may be ours there is given back, or owed if that must be done later: else no other
        process could use it while this one lives, and nothing would end it.
        """
        try:
            if record.claimed:
                self._owed[record.key] = record.begun or self._owed.get(record.key, False)
                if not later:
                    with contextlib.suppress(SessionError):  # as it was the store that refused
                        self._pay(record.key)
        finally:
            self._forget(record)

    def _pay(self, key: str) -> None:
        """Give back in the store what is owed there. By the session's owner here."""
        if self._owed[key]:
            self._store.delete(key)
        elif hasattr(self._store, "let_go"):
            self._store.let_go(key)
        self._owed.pop(key, None)

    def _write(self, record: Record, packed: dict[str, bytes], scoped: bool) -> None:
        """Begin a session with a state, in the store first."""
        state = packed
        if self._store is not None:
            if scoped:
                state = {**packed, _SCOPE: b""}
            # A look first: if the rest is interrupted, what is there is ours to take back.
            if self._store.has(record.key):
                self._write_over(record, state, scoped)
            else:
                self._check_forgets(record.key)
                record.begun = record.claimed = True
                try:
                    made = self._store.create(record.key, state)
                except SessionError as problem:
                    record.claimed = problem.in_doubt
                    raise
                if not made:  # another process was faster
                    record.claimed = False
                    raise _exists(record.key)
        record.load(record.version or int(bool(state)), packed)

    def _write_over(self, record: Record, state: dict[str, bytes], scoped: bool) -> None:
        """Put a new state in the place of what a block of a dead process has left in the store."""
        found = self._store.read(record.key) if scoped else None
        if found is None or _SCOPE not in (found[1] or {}):
            raise _exists(record.key)
        record.begun = True  # what a dead block has left is over in any case
        found = self._open(record)  # raises SessionBusy: that process lives
        version, old = (0, None) if found is None else found
        changes: Changes = {**dict.fromkeys(old or {}), **state}
        self._store.commit(record.key, version + 1, changes)
        record.version = version + 1

    def _read(self, record: Record, create: bool) -> None:
        """Take a session from the store, or begin it without a state."""
        if self._store is None:
            return
        if create and self._is_full() and not self._store.has(record.key):
            self._check_forgets(record.key)
        loaded = self._open(record)
        if loaded is not None:
            version, state = loaded
            if state is not None and _SCOPE in state:  # it is no block's any more
                self._store.commit(record.key, version + 1, {_SCOPE: None})
                loaded = version + 1, state
            record.load(*_unmarked(loaded))
            return
        record.begun = True
        if not create:  # it was there a moment ago
            raise _not_found(record.key)

    def _open(self, record: Record) -> Loaded | None:
        record.claimed = True  # first: from here on it may be ours there
        try:
            loaded: Loaded | None = self._store.open(record.key)
        except SessionError as problem:
            record.claimed = problem.in_doubt
            raise
        return loaded

    def end(self, key: str, timeout: float | None) -> None:
        """End a session, after its present lease; nothing if there is none. See `Pool`."""
        self._desk.check_open()
        key = checked_key(key)
        if key not in self._line.current and (self._store is None or not self._store.has(key)):
            return
        before, stake = self._owned.get(key), Stake()
        try:
            record = self._take(key, timeout, stake, create=False, stays=False)
            handles = self._over(record)
        except SessionNotFound:
            return
        except BaseException:
            self._let_go(key, before)
            raise
        over = (key, record.serial)
        self._manager.wait_for(  # a busy worker hears of it when its lease is over
            lambda: all(
                over not in handle.sessions_over
                or bool(handle.ended_ns)
                or handle.row[LEASED_SINCE_NS] != 0
                for handle in handles
            ),
            self._config.health_check_timeout,
        )

    def _over(self, record: Record, wanted: bool = True) -> list[Handle]:
        """Forget a session that the caller owns; return its workers, which are told.

        If that is interrupted, it is done later; or the session goes on, if it is there still,
        where its end is not `wanted` but makes room, or the store has failed.
        """
        if self._store is not None:
            stake, doubtful = Stake(), record.doubtful
            self._own(record, stake)
            try:
                if wanted:
                    self._owed[record.key] = True
                record.doubt()
                self._store.delete(record.key)  # first: who comes next must not find it there
            except BaseException as problem:
                in_doubt = getattr(problem, "in_doubt", False)
                if isinstance(problem, SessionError) and not in_doubt:
                    record.doubtful = doubtful
                if isinstance(problem, Exception) and not in_doubt:
                    self._owed.pop(record.key, None)
                self._put_back(record)
                raise
        return self._forget(record, over=True)

    def _forget(self, record: Record, over: bool = False) -> list[Handle]:
        """Take a session out of memory; its workers are told, and returned.

        If it is `over`, nothing is owed in the store.
        """
        handles = self.nearness.tell_over(record)
        record.fenced = True
        self._owned.pop(record.key, None)
        self._records.pop(record.key, None)
        if over:
            self._owed.pop(record.key, None)
        self._line.current.pop(record.key, None)  # last: then another may begin it anew
        self._line.dismiss(record.key)  # who waits for it looks again, and finds it gone
        return handles

    def _disown(self, record: Record, reason: str = "taken over by another process") -> None:
        """Forget a session that is not ours in the store any more: the next use opens it anew."""
        me = object()
        if self._renewing.setdefault(record.key, me) is not me:
            return
        try:
            if record.fenced or self._line.current.get(record.key) is not record:
                return
            self._forget(record)
        finally:
            self._renewing.pop(record.key, None)
        self.nearness.tell("session.lost", record, reason=reason)

    def _check_room(self) -> None:
        """Refuse a session for which no room could be made."""
        if self._is_full() and self._line.oldest() is None:
            raise SessionError(
                f"there are {len(self._records)} sessions and all are in use "
                f"(max_sessions={self._config.max_sessions}); raise `max_sessions`"
            )

    def _is_full(self) -> bool:
        return len(self._records) >= self._config.max_sessions

    def _check_forgets(self, key: str) -> None:
        """Refuse a session that the store has not if room for it is needed, and is refused there.

        Once it was begun, a store that deletes no other would not delete it either.
        """
        if self._is_full():
            self._store.delete(key)  # changes nothing

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
                self._over(oldest[1], wanted=False)
                self.nearness.tell("session.lost", oldest[1], reason="evicted")

    # -- using -------------------------------------------------------------------------------

    @passage
    def acquire(
        self,
        key: str,
        affinity: str | None,
        timeout: float | TimeLimit | None,
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
        timeout = self._desk.patience(timeout, budget)
        return self._acquire_slowly(key, record, affinity, self._desk.limit(timeout))

    @passage
    def _acquire_slowly(
        self, key: str, record: Record | None, affinity: str, limit: TimeLimit
    ) -> Handle:
        """Take a session, if the caller does not own it already, and whatever worker suits it."""
        key = checked_key(key)
        before = None if record is not None else self._owned.get(key)
        stake = Stake()
        try:
            if record is not None:
                self._own(record, stake)
            self._desk.check_open()
            if record is None:
                record = self._take(key, limit, stake)
            record.strict = affinity == "strict"
            if record.strict:
                self.nearness.tell_lost(record, limit.since)
            handle = self.nearness.worker_for(record, affinity, limit)
            leased = self._lease(record, handle)
        except BaseException:
            self._let_go(key, before)
            raise
        if not leased:
            return self.acquire(key, affinity, limit)
        self._owned.pop(key, None)
        if record.affinity == "hit":
            handle.row[SESSION_HITS] += 1
        else:
            self._desk.count(f"sessions_{record.affinity}")
        return handle

    @passage
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
            self._put_back(record)

    @passage
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

    def _take(
        self,
        key: str,
        timeout: float | TimeLimit | None,
        stake: Stake,
        create: bool = True,
        stays: bool = True,
    ) -> Record:
        """Own a session, after those who came before; begin it if there is none.

        Without `create` one that is not there is not begun; if it does not stay in memory, no
        other has to go for it.
        """
        if self._manager.here:
            timeout = 0.0  # a hook in the manager's thread waits for nobody
        limit = self._desk.limit(timeout)
        while True:
            if key not in self._line.current:
                made = self._begin(key, stake, create, stays)
                if made is not None:
                    return made
            try:
                token = self._line.take(limit.first_wait(), key, None, limit.next_wait)
            except Closed:
                self._desk.check_open()
                continue  # it was ended while we waited
            if token is not None:
                owned: Record = token[1]
                self._own(owned, stake)
                return owned
            if key in self._line.current:
                raise self._busy(key, limit.seconds)

    def _begin(self, key: str, stake: Stake, create: bool, stays: bool) -> Record | None:
        create = create and not self._config.strict_sessions
        if not create and (self._store is None or not self._store.has(key)):
            raise _not_found(key)
        return self._new(key, stake, lambda record: self._read(record, create), stays)

    def _busy(self, key: str, timeout: float | None) -> SessionError | CheckoutTimeout:
        if timeout == 0:
            return SessionBusy(
                f"session {key!r} is in use; wait for it with a timeout", session_id=key
            )
        timeout = None if timeout is None else float(timeout)
        self._desk.count("timeouts")
        record = self._records.get(key)
        hold = None if record is None or record.holder is None else hold_of(record.holder)
        by = "" if hold is None else f" ({hold[1]})"
        return CheckoutTimeout(
            f"session {key!r} was in use for all of {timeout} s{by}; its lease is held too long, "
            f"or never given back; sessions are serial",
            timeout=timeout, waited=timeout, size=self._manager.staff.target, leased=0, waiting=0,
            held_by_this_thread=0,
        )  # fmt: skip

    def give_back(self, record: Record) -> None:
        """Offer a session to the next in line."""
        record.used = time.monotonic()
        record.holder = None
        if self._owned and self._owned.get(record.key, _NOBODY)[0] is record:
            self._owned.pop(record.key, None)
        self._line.publish(record.key, record)

    def _put_back(self, record: Record) -> None:
        """Offer a session again that was taken, and not used; one that was not to stay goes."""
        if self._owed.get(record.key) and not record.fenced:  # its end was interrupted
            self._forget(record)
            return
        if record.key not in self._records and not record.fenced:
            self._unmake(record)
            return
        used = record.used
        self.give_back(record)
        record.used = used

    def take_away(self, record: Record) -> None:
        """Free a session whose owner may still be at it, or was struck before it could.

        It gets a new record, and the old one is fenced off: that owner may do nothing with it.
        If a commit is under way, a sweep will do it.
        """
        me, key = object(), record.key
        try:
            if self._renewing.setdefault(key, me) is not me:
                return
            renewed = record.renewed() if self._line.current.get(key) is record else None
            if renewed is not None and self._held(record):
                record.fenced = False
            elif renewed is not None:
                self._line.admit(key, renewed)
                self._records[key] = renewed
                self._owned.pop(key, None)
                self._line.publish(key, renewed)
        finally:
            if self._renewing.get(key) is me:
                self._renewing.pop(key, None)

    def store_commit(self, record: Record, changes: Changes) -> None:
        """Put changes into the store, if there is one. In doubt until memory has them as well.

        Raises:
            SessionError: the store refused, and nothing has changed, unless it is `in_doubt`: then
                the next use asks the store. SessionBusy: another process has the session by now,
                and it is forgotten here.
        """
        if self._store is None:
            return
        record.doubtful = True  # first: from here on only the store knows
        try:
            self._store.commit(record.key, record.version + 1, changes)
        except SessionError as problem:
            record.doubtful = problem.in_doubt
            if isinstance(problem, SessionBusy):
                self._disown(record)
            raise

    def settle(self, record: Record) -> None:
        """Ask the store what the last commit has come to, if that was interrupted. By the owner.

        Raises:
            SessionError: it cannot tell now. SessionBusy: the session is another process' by now,
                or is not there any more, and it is forgotten here.
        """
        if not record.doubtful or self._store is None:
            return
        try:
            loaded = self._store.open(record.key) if self._store.has(record.key) else None
        except SessionBusy:
            self._disown(record)
            raise
        if loaded is None or loaded[0] not in (record.version, record.version + 1):
            if loaded is not None:  # another one, of the same id
                self._owed[record.key] = False
            self._disown(record, "gone from the store")
            raise _gone(record.key)
        record.load(*_unmarked(loaded))
        record.doubtful = False

    # -- looking and sweeping ----------------------------------------------------------------

    def state(self, key: str) -> Snapshot:
        """Return the last committed state.

        Raises:
            SessionNotFound: there is no such session.
        """
        record = self._records.get(checked_key(key))
        if record is not None and (not record.doubtful or record.committing):
            return Snapshot(record.state or {})
        loaded = None
        if self._store is not None and not self._owed.get(key):
            loaded = self._store.read(key)
        if loaded is None:
            raise SessionNotFound(f"there is no session {key!r}", session_id=key)
        return Snapshot(_unmarked(loaded)[1] or {})

    def committed(self, record: Record) -> Mapping[str, bytes]:
        """Return the committed state of a session, whoever owns it; it is not changed by that.

        Raises:
            SessionError: its last commit was interrupted, and the store cannot tell now.
                SessionBusy: it is not there any more.
        """
        if record.doubtful and not record.committing and self._store is not None:
            loaded = self._store.read(record.key)
            if loaded is None:
                raise _gone(record.key)
            return _unmarked(loaded)[1] or {}
        return record.state or {}

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
        if self._store is None:
            self._expire_in_pieces()
        self._sweep_astray()

    def _expire_in_pieces(self) -> None:
        """End what has expired, and between the pieces let the manager do what else there is."""
        if not self._manager.closing and self.expire(_BATCH_S):
            self._manager.order(self._expire_in_pieces)

    def expire(self, seconds: float) -> bool:
        """End sessions that have expired, for so long, after what is owed; True: there are more.

        By the manager, and where there is a store by its housekeeping.
        """
        until = time.monotonic() + seconds
        refused = self.pay_owed(until)
        oldest = self._line.oldest()
        while oldest is not None and self._is_expired(oldest[1]):
            if self._line.claim(*oldest):
                self._over(oldest[1])
                self.nearness.tell("session.lost", oldest[1], reason="expired")
            if time.monotonic() >= until:
                return True
            oldest = self._line.oldest()
        if refused is not None:
            raise refused
        return False

    def pay_owed(self, until: float) -> SessionError | None:
        """Give back in the store what it refused; return why, if it still refuses one of them.

        Not what somebody here is at now: that is settled there.
        """
        refused = None
        for key in tuple(self._owed):
            try:
                record = self._new(key, Stake(), lambda record: None, stays=False)
                if record is not None:
                    self._forget(record)
            except SessionError as problem:
                refused = problem
            if time.monotonic() >= until:
                break
        return refused

    def has_expired(self) -> bool:
        """Tell whether `expire` would find something."""
        oldest = self._line.oldest()
        return bool(self._owed) or (oldest is not None and self._is_expired(oldest[1]))

    def _is_expired(self, record: Record) -> bool:
        return record.used < time.monotonic() - self._config.session_ttl

    def used_since(self, moment: float) -> dict[str, float]:
        """Return how many seconds ago each session was used that was used after a moment.

        The moment is on the monotonic clock. What is leased is used now. One that has expired is
        among them in any case: if the store refuses that, it would not delete it either.
        """
        now = time.monotonic()
        used = {}
        oldest = self._line.oldest()
        if oldest is not None and self._is_expired(oldest[1]):
            used[oldest[1].key] = now - oldest[1].used
        for record in self.records():
            if record.holder is not None:
                used[record.key] = 0.0
            elif record.used >= moment:
                used[record.key] = max(0.0, now - record.used)
        return used

    def _sweep_astray(self) -> None:
        """Free a session whose owner was struck by an exception before it could."""
        stale, self._stale = self._stale, self._renewing.copy()
        for key, seat in stale.items():
            if self._renewing.get(key) is seat:
                self._renewing.pop(key, None)
        for key, owned in self._owned.copy().items():
            if owned[1]() is None:  # it was struck on its way to a lease
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
            if record is None or self._held(record) or self._line.receiver(key) is not None:
                continue
            self._astray[key] = record.used
            if before.get(key) != record.used or key in self._line.idle:
                continue
            remark(INFO, "session %r had lost its owner and is free again", key)
            if key in self._records and not self._owed.get(key):
                self.take_away(record)
            else:
                self._unmake(record, later=True)

    def _held(self, record: Record) -> bool:
        """Tell whether a session has a lease, or will have one in a moment."""
        holder = record.holder
        if holder is None or holder.session is not record or holder.revoked is not None:
            return False
        return holder.live_lease is not None or holder in self._manager.fleet.live()


_NOBODY: tuple[Record | None, None] = (None, None)


def _unmarked(loaded: Loaded) -> Loaded:
    """Return version and state as from the store, without the mark of a block."""
    version, state = loaded
    if state is None or _SCOPE not in state:
        return loaded
    return version, {key: data for key, data in state.items() if key != _SCOPE}


def _exists(key: str) -> SessionExists:
    return SessionExists(
        f"there is a session {key!r} already; end it first, or use `checkout(session=...)`",
        session_id=key,
    )


def _being_undone(key: str) -> SessionBusy:
    return SessionBusy(
        f"session {key!r} is just being deleted, as it came to nothing before; try again",
        session_id=key,
    )


def _gone(key: str) -> SessionBusy:
    return SessionBusy(
        f"session {key!r} is not in the store any more, or another one is in its place; nothing "
        f"was committed; check out again to go on with what is there",
        session_id=key,
    )


def _not_found(key: str) -> SessionNotFound:
    return SessionNotFound(
        f"there is no session {key!r}; begin it with create_session(), or set "
        f"strict_sessions=False to have it begun by its first use",
        session_id=key,
    )
