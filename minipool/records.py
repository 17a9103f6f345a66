"""Records: what is kept of each session in the parent, and how its holder sees it.

A record is changed only by who owns its session in the turnstile of `sessions`; reading is free.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import time
from collections.abc import Iterator, MutableMapping
from typing import Any, Mapping, Optional, Tuple

from .engine.conversation import plain_key
from .engine.handle import Handle
from .errors import CallMismatch, LeaseError, LeaseReleased, SessionError, SessionLost

Changes = Mapping[str, Optional[bytes]]  # key -> pickled value, None: the key is gone
Whereabouts = Tuple[int, int, int, int]  # slot, generation, version there, number of the stay
_ITEM = 24  # bytes that a key with its value takes in a pickle, besides the two, at most
_ENVELOPE = 2048  # bytes kept free beside a state: for the rest of the head, a name, an argument
_serials = itertools.count(1)  # tell sessions apart that have the same id, one after the other
_stays = itertools.count(1)  # tell apart what one session left in a worker, each time it was there


class Stake:
    """Lies in the frame of a thread that owns a session without a worker, and goes with it."""

    __slots__ = ("__weakref__",)


class Record:
    """One session in the parent. Changed only by who owns it in the turnstile."""

    __slots__ = (
        "_before", "affinity", "at_generation", "at_slot", "at_version", "begun", "born",
        "claimed", "committing", "doubtful", "fenced", "holder", "key", "known", "lost_at",
        "serial", "sessions", "state", "stay", "strict", "thread", "used", "version", "warm_head",
        "weight",
    )  # fmt: skip

    def __init__(self, sessions: Any, key: str) -> None:
        self.sessions = sessions  # `Sessions`, whose record it is
        self.key = key
        self.state: dict[str, bytes] | None = None  # None while empty: most are, for a while
        self.version = 0
        self.weight = 0  # of the state, when it is sent
        self.at_slot = self.at_generation = self.at_version = -1  # the worker that has it warm
        self.stay = 0  # what that worker keeps besides the state is of this stay there
        self.known: dict[int, int] | None = None  # slot -> generation of those that had it before
        self._before: tuple[int, int, int, Whereabouts] | None = None  # see `not_sent`
        self.born = self.used = time.monotonic()
        self.lost_at = 0.0  # when its worker was found dead, for those who waited for that one
        self.affinity = "new"
        self.strict = False  # the present lease wants the session's own worker or none
        self.serial = next(_serials)
        self.thread = 0  # that owns it, before there is a lease
        self.claimed = False  # True: it may be ours in the store
        self.begun = False  # True: made there by its first owner, who may have to undo it
        self.holder: Handle | None = None  # the worker of the present lease
        self.fenced = False  # True: it is another record's by now; nothing is committed any more
        self.committing = False
        self.doubtful = False  # True: the store must be asked whether the last commit was made
        self.warm_head: bytes | None = None  # of the last call, while nothing changes

    def head(self, handle: Handle) -> bytes:
        """Return what a call must bring along, so that this worker knows the session."""
        here = self.at_slot == handle.slot and self.at_generation == handle.generation
        if here and self.at_version == self.version and self.warm_head is not None:
            return self.warm_head
        self.sessions.settle(self)
        state: dict[str, bytes] | None = None
        if not here or self.at_version != self.version:
            self._note(handle, here)
            state = self.state or {}
        data = pickle.dumps((self.key, self.serial, self.version, state, self.stay), 5)
        self.at_version = self.version
        data = len(data).to_bytes(4, "big") + data
        self.warm_head = data if state is None else None
        return data

    def _note(self, handle: Handle, here: bool) -> None:
        """Note that a worker is sent the state; see `not_sent` for what if it is not."""
        whereabouts = (self.at_slot, self.at_generation, self.at_version, self.stay)
        self._before = (handle.slot, handle.generation, handle.calls_sent, whereabouts)
        if not here:
            self.missing()
            self.stay = next(_stays)
            self.sessions.nearness.bind(self, handle)
        self.sessions.nearness.warmed(self, handle)

    def not_sent(self, handle: Handle) -> str:
        """Hear that a call was too long to be sent: what this worker was noted to have, it has not.

        Returns what is to be told of the state that would have gone along.
        """
        before, self._before = self._before, None
        if before is None or before[:3] != (handle.slot, handle.generation, handle.calls_sent):
            return ""  # nothing was noted for that call
        self.missing()
        slot, generation, version, stay = before[3]
        if (slot, generation) != (self.at_slot, self.at_generation):
            handle.sessions.pop(self.key, None)
            self.at_slot, self.at_generation, self.stay = slot, generation, stay
        self.at_version = version
        return f" with the state of session {self.key!r}, which has {self.weight}"

    def missing(self) -> None:
        """Hear that the worker does not have what it was thought to have."""
        self.at_version = -1
        self.warm_head = None

    def doubt(self) -> None:
        """Have the store asked before the next use: neither memory nor a worker can tell."""
        self.doubtful = True
        self.missing()

    def unbind(self) -> None:
        """Forget where it is warm."""
        self.at_slot = self.at_generation = -1
        self.missing()

    def renewed(self) -> Record | None:
        """Return a copy to go on with; this one accepts no commit any more.

        None: a commit is under way, so it has an owner. That says that it commits, then looks
        whether it is fenced off; here it is the other way round: one of the two sees the other.
        """
        self.fenced = True
        if self.committing:
            self.fenced = False
            return None
        copy = Record(self.sessions, self.key)
        copy.state, copy.version, copy.born = self.state, self.version, self.born
        copy.at_slot, copy.at_generation = self.at_slot, self.at_generation
        copy.serial, copy.lost_at = self.serial, self.lost_at
        copy.stay, copy.known = self.stay, self.known
        copy.doubtful, copy.weight = self.doubtful, self.weight
        return copy

    def load(self, version: int, state: Mapping[str, bytes] | None) -> None:
        """Take over what the store has."""
        self.missing()  # no worker is known to have that
        self.state = dict(state) if state else None
        self.version, self.weight = version, weight_of(state or {})

    def commit(self, changes: Changes, by_worker: bool = True) -> None:
        """Make changes the committed state, in the store first.

        Raises:
            SessionError: the store refused, or the state would outgrow `max_message`; the state is
                what it was, unless the error is `in_doubt`.
        """
        self.committing = True
        try:
            if self.fenced:
                raise SessionLost(
                    f"session {self.key!r} was taken away from this lease, which had ended; "
                    f"nothing was committed; check out again",
                    session_id=self.key,
                )
            self.sessions.settle(self)
            self.missing()  # until it is known that both sides agree
            state = dict(self.state or {})
            weight = apply(changes, state, self.weight)
            if weight > self.weight:
                self._check_weight(weight)
            self.sessions.store_commit(self, changes)
            self.state = state or None
            self.version, self.weight = self.version + 1, weight
            self.doubtful = False  # last: until here the store may have what memory has not
            if by_worker:
                self.at_version = self.version
        except SessionError:
            raise
        except BaseException:  # interrupted: whether it was done, the store knows
            with contextlib.suppress(SessionError):  # else whoever uses the session next asks it
                self.sessions.settle(self)
            raise
        finally:
            self.committing = False

    def _check_weight(self, weight: int) -> None:
        problem = outgrown(self.key, weight, self.sessions.max_message)
        if problem is not None:
            raise problem

    @property
    def size_bytes(self) -> int:
        return sum(map(len, (self.state or {}).values()))


class State(MutableMapping[str, Any]):
    """A session's committed state as the holder of its lease sees it, outside the worker.

    Reading gives copies, each unpickled when it is read; setting or deleting a key commits at
    once. `update()` and `clear()` are one commit each.
    """

    def __init__(self, record: Record, held: list[Handle]) -> None:
        self._record = record
        self._held = held  # the lease's worker, while it is a lease

    def _commit(self, changes: Changes) -> None:
        record = self._record
        record.sessions.check_process()
        handle = self._held[0] if self._held else None
        if handle is None or handle.session is not record:
            raise LeaseReleased(
                f"the lease of session {record.key!r} is released; its state is another's to "
                f"change: take a new lease"
            )
        if handle.in_call and handle.tainted is None:
            raise LeaseError(
                f"a call in session {record.key!r} is under way; change its state after that"
            )
        record.commit(changes, by_worker=False)

    def _packed(self) -> Mapping[str, bytes]:
        packed: Mapping[str, bytes] = self._record.sessions.committed(self._record)
        return packed

    def __getitem__(self, key: str) -> Any:
        return pickle.loads(self._packed()[key])

    def __setitem__(self, key: str, value: Any) -> None:
        self._commit(pack({key: value}))

    def __delitem__(self, key: str) -> None:
        if key not in self._packed():
            raise KeyError(key)
        self._commit({key: None})

    def __contains__(self, key: object) -> bool:
        return key in self._packed()

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._packed()))

    def __len__(self) -> int:
        return len(self._packed())

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several keys in one commit, given as for `dict.update`."""
        changes = pack(dict(*args, **kwargs))
        if changes:
            self._commit(changes)

    def clear(self) -> None:
        """Delete every key in one commit."""
        keys = tuple(self._packed())
        if keys:
            self._commit(dict.fromkeys(keys))

    def __repr__(self) -> str:
        return f"<state of session {self._record.key!r}: {sorted(self)}>"


class Snapshot(Mapping[str, Any]):
    """A session's committed state at one moment. Each value is unpickled when it is read."""

    def __init__(self, packed: Mapping[str, bytes]) -> None:
        self._packed = packed

    def __getitem__(self, key: str) -> Any:
        return pickle.loads(self._packed[key])

    def __contains__(self, key: object) -> bool:
        return key in self._packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def pack(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Pickle a state value by value.

    Raises:
        TypeError: a key is no text. CallMismatch: a value cannot be pickled.
    """
    packed = {}
    for key, value in state.items():
        name = plain_key(key)
        try:
            packed[name] = pickle.dumps(value, 5)
        except Exception as problem:
            raise CallMismatch(
                f"the value of {key!r}, a {type(value).__name__}, cannot be a session's state: "
                f"{problem}; give plain data"
            ) from problem
    return packed


def weight_of(state: Mapping[str, bytes]) -> int:
    """Return how many bytes a state takes when it is sent to a worker, at most."""
    return sum(map(_weight, state, state.values()))


def apply(changes: Changes, state: dict[str, bytes], weight: int) -> int:
    """Make changes in a state of that weight; return what it weighs then. Part of every commit."""
    for key, data in changes.items():
        before = state.get(key)
        if data is None:
            if before is not None:
                del state[key]
                weight -= _weight(key, before)
        elif before is None:
            state[key] = data
            weight += _weight(key, data)
        else:
            state[key] = data
            weight += len(data) - len(before)
    return weight


def _weight(key: str, data: bytes) -> int:
    return len(key.encode("utf-8", "surrogatepass")) + len(data) + _ITEM


def outgrown(session_id: str, weight: int, limit: int) -> SessionError | None:
    """Return the error of a session whose state could not be sent any more; None: it can be."""
    if weight + _weight(session_id, b"") + _ENVELOPE <= limit:
        return None
    return SessionError(
        f"session {session_id!r} would have a state of {weight} bytes, more than can be sent to a "
        f"worker (max_message={limit}); nothing was committed; keep less in it, or raise "
        f"`max_message`",
        session_id=session_id,
    )
