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

import pickle
import time
import weakref
from collections.abc import Iterator, MutableMapping
from typing import Any, Mapping, NamedTuple, Optional

from .engine.desk import Desk
from .engine.handle import Handle
from .engine.table import SESSION_HITS
from .engine.turnstile import Closed, Turnstile
from .errors import (
    CallMismatch,
    CheckoutTimeout,
    SessionBusy,
    SessionError,
    SessionExists,
    SessionLost,
    SessionNotFound,
)
from .telemetry import logger

Changes = Mapping[str, Optional[bytes]]  # key -> pickled value, None: the key is gone


class SessionInfo(NamedTuple):
    """One session at one moment. Durations are seconds."""

    session_id: str
    age: float
    idle: float  #: since its last lease ended; 0 while it is leased
    size_bytes: int  #: of its pickled state
    worker_id: Optional[int]  #: the worker that has it warm, if there is one
    leased: bool


class Record:
    """One session in the parent. Changed only by who owns it in the turnstile."""

    __slots__ = (
        "affinity", "at_generation", "at_slot", "at_version", "born", "fenced", "key", "lost_at",
        "sessions", "state", "used", "version", "warm_head",
    )  # fmt: skip

    def __init__(self, sessions: Sessions, key: str) -> None:
        self.sessions = sessions
        self.key = key
        self.state: dict[str, bytes] | None = None  # None while empty: most are, for a while
        self.version = 0
        self.at_slot = self.at_generation = self.at_version = -1  # the worker that has it warm
        self.born = self.used = time.monotonic()
        self.lost_at = 0.0  # when its worker was found dead, for those who waited for that one
        self.affinity = "new"
        self.fenced = False
        self.warm_head: bytes | None = None  # of the last call, while nothing changes

    def head(self, handle: Handle) -> bytes:
        """Return what a call must bring along, so that this worker knows the session."""
        here = self.at_slot == handle.slot and self.at_generation == handle.generation
        if here and self.at_version == self.version and self.warm_head is not None:
            return self.warm_head
        state = None if here and self.at_version == self.version else self.state or {}
        data = pickle.dumps((self.key, self.version, state, not here), 5)
        if not here:
            self.sessions.bind(self, handle)
        self.at_version = self.version
        data = len(data).to_bytes(4, "big") + data
        self.warm_head = data if state is None else None
        return data

    def moved(self, handle: Handle) -> None:
        """Go on with another worker, because the one before has died."""
        handle.session = self
        self.affinity = "lost"

    def missing(self) -> None:
        """Hear that the worker does not have what it was thought to have."""
        self.at_slot = self.at_generation = self.at_version = -1

    def renewed(self) -> Record:
        """Return a copy to go on with; this one accepts no commit any more."""
        copy = Record(self.sessions, self.key)
        copy.state, copy.version, copy.born = self.state, self.version, self.born
        self.fenced = True
        return copy

    def commit(self, changes: Changes, by_worker: bool = True) -> None:
        """Make changes the committed state, in the store first.

        Raises:
            SessionError: the store refused; the state is what it was.
        """
        if self.fenced:
            raise SessionLost(
                f"session {self.key!r} has another owner by now; nothing was committed",
                session_id=self.key,
            )
        self.at_version = -1  # until it is known that both sides agree
        self.warm_head = None
        self.sessions.store_commit(self, changes)
        state = dict(self.state or {})
        for key, data in changes.items():
            if data is None:
                state.pop(key, None)
            else:
                state[key] = data
        self.state = state or None
        self.version += 1
        if by_worker:
            self.at_version = self.version

    @property
    def size_bytes(self) -> int:
        return sum(map(len, (self.state or {}).values()))


class State(MutableMapping[str, Any]):
    """A session's committed state as the holder of its lease sees it, outside the worker.

    Reading gives copies; setting or deleting a key commits at once.
    """

    def __init__(self, record: Record) -> None:
        self._record = record

    def __getitem__(self, key: str) -> Any:
        return pickle.loads((self._record.state or {})[key])

    def __setitem__(self, key: str, value: Any) -> None:
        self._record.commit(pack({key: value}), by_worker=False)

    def __delitem__(self, key: str) -> None:
        if key not in (self._record.state or {}):
            raise KeyError(key)
        self._record.commit({key: None}, by_worker=False)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._record.state or ()))

    def __len__(self) -> int:
        return len(self._record.state or ())

    def __repr__(self) -> str:
        return f"<state of session {self._record.key!r}: {sorted(self)}>"


def pack(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Pickle a state value by value.

    Raises:
        TypeError: a key is no text. CallMismatch: a value cannot be pickled.
    """
    packed = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(f"session keys are text, not {key!r}")
        try:
            packed[key] = pickle.dumps(value, 5)
        except Exception as problem:
            raise CallMismatch(
                f"the value of {key!r}, a {type(value).__name__}, cannot be a session's state: "
                f"{problem}; give plain data"
            ) from problem
    return packed


class SessionScope:
    """A session for the length of a `with` block: begun at its start, ended at its end."""

    def __init__(self, pool: Any, key: str, state: Mapping[str, Any] | None) -> None:
        self.id = key
        self._pool = pool
        self._state = state

    def __enter__(self) -> SessionScope:
        self._pool.create_session(self.id, self._state)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.end_session(self.id)

    def checkout(self, **options: Any) -> Any:
        """As `Pool.checkout`, for this session."""
        return self._pool.checkout(session=self.id, **options)

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As `Pool.call`, in this session."""
        with self.checkout() as lease:
            return lease.call(target, *args, **kwargs)

    @property
    def state(self) -> dict[str, Any]:
        """A copy of the committed state."""
        copy: dict[str, Any] = self._pool.session_state(self.id)
        return copy


class Sessions:
    """All sessions of one pool in this process, and who may use which."""

    def __init__(self, desk: Desk, store: Any = None) -> None:
        self._desk = desk
        self._manager = desk.manager
        self._config = desk.config
        self._store = store
        self._affinity = desk.config.affinity
        self._records: dict[str, Record] = {}
        self._line = Turnstile("fifo")
        self._acquiring: dict[str, Record] = {}  # owned, but no worker yet
        self._astray: set[str] = set()  # owned by nobody at the last sweep
        self._hints: dict[str, tuple[int, int]] = {}  # hint -> slot, generation used last
        # Weakly, because the manager must not keep the pool from being collected.
        self._manager.sweepers.append(weakref.WeakMethod(self._sweep))
        self._manager.lines.append(weakref.ref(self._line))
        self._manager.sessions_end = store is None
        if store is not None:
            self._manager.closers.append(store.close)

    # -- beginning and end -------------------------------------------------------------------

    def create(self, key: str, state: Mapping[str, Any] | None = None) -> Record:
        """Begin a session with a state.

        Raises:
            SessionExists: there is one of that id. SessionError: there are too many, all in use.
        """
        packed = pack(state or {})
        record = self._new(_checked_key(key))
        if record is None or record.version:
            if record is not None:
                self._line.publish(key, record)
            raise SessionExists(
                f"there is a session {key!r} already; end it first, or use `checkout(session=...)`",
                session_id=key,
            )
        try:
            if packed:
                record.commit(packed, by_worker=False)
        except BaseException:
            self._forget(record)
            raise
        self._line.publish(key, record)
        return record

    def _new(self, key: str) -> Record | None:
        """Make, or read from the store, the record of a session, owned by the caller.

        None: another thread has it already.
        """
        record = Record(self, key)
        if self._records.setdefault(key, record) is not record:
            return None
        try:
            self._make_room()
            if self._store is not None:
                loaded = self._store.open(key)
                if loaded is not None:
                    record.version, record.state = loaded
            self._line.admit(key, record)
        except BaseException:
            self._records.pop(key, None)
            self._line.dismiss(key)
            raise
        return record

    def end(self, key: str, timeout: float | None) -> None:
        """End a session, after its present lease; nothing if there is none. See `Pool`."""
        record = self._records.get(key)
        if record is None:
            if self._store is not None:
                self._store.open(key)  # SessionBusy, if another process has it
                self._store.delete(key)
            return
        try:
            record = self._take(key, timeout)
        except SessionNotFound:
            return
        self._over(record)
        handle = self._worker_of(record)
        if handle is not None and handle.slot in self._manager.turnstile.idle:
            self._manager.wait_for(
                lambda: key not in handle.sessions_over, self._config.health_check_timeout
            )

    def _over(self, record: Record) -> None:
        """Forget a session that the caller owns, and have its worker told."""
        self._forget(record)
        if self._store is not None:
            self._store.delete(record.key)
        handle = self._worker_of(record)
        if handle is not None:
            handle.sessions_over.append(record.key)
            self._manager.order(lambda: self._manager.probe(handle))

    def _forget(self, record: Record) -> None:
        self._line.fence(record.key)
        self._records.pop(record.key, None)
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
                self._tell("session.lost", oldest[1], reason="evicted")

    # -- using -------------------------------------------------------------------------------

    def acquire(self, key: str, affinity: str | None, timeout: float | None) -> Handle:
        """Take a session and a worker for it; both are the caller's until `give_back`.

        Raises:
            SessionBusy, SessionLost, SessionNotFound, CheckoutTimeout: nothing was taken.
        """
        if affinity is None:
            affinity = self._affinity
        if affinity != "any":
            handle = self._acquire_warm(key)
            if handle is not None:
                return handle
        self._desk.check_open()
        start = time.monotonic()
        record = self._take(_checked_key(key), timeout)
        try:
            self._acquiring[key] = record
            if affinity == "strict":
                self._tell_lost(record, start)
            left = None if timeout is None else max(0.0, timeout - (time.monotonic() - start))
            handle = self._worker_for(record, affinity, left)
            handle.session = record
        except BaseException:
            self.give_back(record)
            raise
        finally:
            self._acquiring.pop(key, None)
        if record.affinity == "hit":
            handle.row[SESSION_HITS] += 1
        else:
            self._desk.count(f"sessions_{record.affinity}")
        return handle

    def _acquire_warm(self, key: str) -> Handle | None:
        """Take a session and the worker that has it, if both are free this moment."""
        token = self._line.try_take_this(key)
        if token is None:
            return None
        record: Record = token[1]
        handle = self._desk.try_acquire_this(record.at_slot, record.at_generation)
        if handle is None:
            self.give_back(record)
            return None
        handle.session = record
        record.affinity = "hit"
        handle.row[SESSION_HITS] += 1
        return handle

    def acquire_near(self, hint: str, timeout: float | None) -> Handle:
        """Take the worker that served this hint last, if it is idle; else any."""
        slot, generation = self._hints.pop(hint, (-1, -1))
        near = self._manager.fleet.handles.get(slot)
        handle: Handle | None = None
        if near is not None and near.generation == generation:
            handle = self._desk.acquire_this(near, timeout, 0.0)
        if handle is None:
            handle = self._desk.acquire(timeout)
        self._hints[hint] = (handle.slot, handle.generation)
        if len(self._hints) > self._config.max_sessions:
            self._hints.pop(next(iter(self._hints)), None)
        return handle

    def _take(self, key: str, timeout: float | None) -> Record:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if key not in self._records:
                record = self._create_on_use(key)
                if record is not None:
                    return record
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                token = self._line.take(left, wants=key)
            except Closed:
                self._desk.check_open()
                continue  # it was ended while we waited
            if token is not None:
                owned: Record = token[1]
                return owned
            if key in self._records:
                raise self._busy(key, timeout)

    def _create_on_use(self, key: str) -> Record | None:
        stored = self._store is not None and self._store.has(key)
        if self._config.strict_sessions and not stored:
            raise SessionNotFound(
                f"there is no session {key!r}; begin it with create_session(), or set "
                f"strict_sessions=False to have it begun by its first use",
                session_id=key,
            )
        return self._new(key)

    def _busy(self, key: str, timeout: float | None) -> SessionError | CheckoutTimeout:
        if timeout == 0:
            return SessionBusy(
                f"session {key!r} is in use; wait for it with a timeout", session_id=key
            )
        self._desk.count("timeouts")
        return CheckoutTimeout(
            f"session {key!r} was in use for all of {timeout} s; its lease is held too long, or "
            f"never given back; sessions are serial",
            timeout=timeout, waited=timeout, size=self._manager.target, leased=0, waiting=0,
            held_by_this_thread=0,
        )  # fmt: skip

    def _tell_lost(self, record: Record, start: float) -> None:
        """With strict affinity, tell everyone who waited for a worker that is dead, once."""
        if start == 0.0 or (record.at_slot >= 0 and self._worker_of(record) is None):
            record.missing()
            record.lost_at = time.monotonic()
            self._tell("session.lost", record, reason="its worker died")
            self._desk.count("sessions_lost")
        elif not start <= record.lost_at:
            return
        raise SessionLost(
            f"the worker that had session {record.key!r} is gone, and with it what could not "
            f"travel; its committed state is kept; check out again for a fresh start",
            session_id=record.key,
        )

    def _worker_for(self, record: Record, affinity: str, timeout: float | None) -> Handle:
        """Take the worker that suits the affinity, and note how that went."""
        known = record.at_slot >= 0
        warm = self._worker_of(record)
        handle: Handle | None = None
        if warm is not None and affinity != "any":
            wait = None if affinity == "strict" else self._config.affinity_wait
            handle = self._desk.acquire_this(warm, timeout, wait)
            if handle is None and affinity == "strict":
                self._tell_lost(record, 0.0)
        if handle is None:
            handle = self._desk.acquire(timeout)
        if warm is handle:
            record.affinity = "hit"
        elif not known:
            record.affinity = "new"
        else:
            record.affinity = "moved" if warm is not None else "lost"
        return handle

    def _worker_of(self, record: Record) -> Handle | None:
        handle = self._manager.fleet.handles.get(record.at_slot)
        fits = handle is not None and handle.generation == record.at_generation
        return handle if fits and handle is not None and not handle.ended_ns else None

    def bind(self, record: Record, handle: Handle) -> None:
        """Note that a worker has the session from now on."""
        event = "session.bound" if record.affinity == "new" else "session.moved"
        old = self._worker_of(record)
        if old is not None:
            old.sessions.pop(record.key, None)
        record.at_slot, record.at_generation = handle.slot, handle.generation
        handle.sessions[record.key] = None
        self._tell(event, record, worker_id=handle.slot)

    def give_back(self, record: Record) -> None:
        """Offer a session to the next in line."""
        record.used = time.monotonic()
        self._line.publish(record.key, record)

    def store_commit(self, record: Record, changes: Changes) -> None:
        """Put changes into the store, if there is one."""
        if self._store is not None:
            self._store.commit(record.key, record.version + 1, changes)

    # -- looking and sweeping ----------------------------------------------------------------

    def state(self, key: str) -> dict[str, Any]:
        """Return a copy of the last committed state.

        Raises:
            SessionNotFound: there is no such session.
        """
        record = self._records.get(key)
        if record is not None:
            packed = record.state or {}
        else:
            loaded = None if self._store is None else self._store.read(key)
            if loaded is None:
                raise SessionNotFound(f"there is no session {key!r}", session_id=key)
            packed = loaded[1] or {}
        return {name: pickle.loads(data) for name, data in packed.items()}

    def infos(self) -> list[SessionInfo]:
        """Return what is known of each session, the longest unused first."""
        now = time.monotonic()
        return [self._info(record, now) for record in tuple(self._records.values())]

    def _info(self, record: Record, now: float) -> SessionInfo:
        leased = record.key not in self._line.idle
        worker = self._worker_of(record)
        return SessionInfo(
            session_id=record.key,
            age=now - record.born,
            idle=0.0 if leased else now - record.used,
            size_bytes=record.size_bytes,
            worker_id=None if worker is None else worker.slot,
            leased=leased,
        )

    def __len__(self) -> int:
        return len(self._records)

    def _sweep(self) -> None:
        """End what has expired; find what nobody owns. By the manager, once a tick."""
        expired = time.monotonic() - self._config.session_ttl
        oldest = self._line.oldest()
        while oldest is not None and oldest[1].used < expired:
            if self._line.claim(*oldest):
                self._over(oldest[1])
                self._tell("session.lost", oldest[1], reason="expired")
            oldest = self._line.oldest()
        self._sweep_astray()
        if self._store is not None:
            self._store.beat()

    def _sweep_astray(self) -> None:
        """Free a session whose owner was struck by an exception before he could.

        It gets a new record, and the old one is fenced off: should its owner be alive after all,
        whatever he does with it is refused.
        """
        if len(self._line.idle) == len(self._records):
            self._astray.clear()
            return
        held = {handle.session.key for handle in self._manager.fleet.live() if handle.session}
        held |= set(self._acquiring) | set(self._line.idle)
        astray = set(self._records) - held
        for key in astray & self._astray:
            record = self._records.get(key)
            if record is not None and key not in self._line.idle:
                logger().info("session %r had lost its owner and is free again", key)
                self._records[key] = renewed = record.renewed()
                self._line.admit(key, renewed)
                self._line.publish(key, renewed)
        self._astray = astray

    def _tell(self, event: str, record: Record, **facts: Any) -> None:
        if self._desk.hooks[event]:
            self._desk.hooks.emit(event, {"version": record.version}, session=record.key, **facts)


def _checked_key(key: Any) -> str:
    if not isinstance(key, str) or not key:
        raise TypeError(f"session={key!r}: a session's id is a text that is not empty")
    return key
