"""Sessions as a worker sees them: state by key, committed when a call succeeds, else undone.

Runs in the worker. The parent has the truth: the last committed state, pickled key by key, and
its version. A worker keeps what it was sent and what it committed itself, so that a call of a
session that is warm here travels without any state. Only keys that a call touched are pickled
and compared at its end, which is how a change deep inside a value is noticed; what a call does
not touch costs nothing.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, MutableMapping
from typing import Any, Dict, Optional, Tuple

from ..errors import CallMismatch

Changes = Dict[str, Optional[bytes]]  # key -> pickled value, None: the key is gone
#: What travels before the arguments of a call: id, serial (tells sessions apart that had the same
#: id, one after the other), version, the whole state or None if the worker has it, and the number
#: of the session's stay with this worker: another one than at its last call here, if it was
#: elsewhere in between.
Head = Tuple[str, int, int, Optional[Dict[str, bytes]], int]
Over = Tuple[str, int]  # id and serial of a session that has ended

MAX_WARM = 1000  # sessions whose state a worker keeps at hand; for that of others it asks
_ATOMS = frozenset((int, float, complex, bool, str, bytes, type(None)))  # nobody can change them


def plain_key(key: Any) -> str:
    """Return a key as a `str` itself, for the other side may not know the class of it.

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(key, str):
        raise TypeError(f"session keys are text, not {key!r}")
    return str.__str__(key)


class NotHere(Exception):
    """The worker does not have this session's state in this version. Nothing has run."""


class Session(MutableMapping[str, Any]):
    """The state of the session whose call is running; see `minipool.current_session()`.

    A mapping with str keys. What the call changes, in it or inside its values, is committed when
    the call returns and forgotten when it raises. `local` is a dict for what cannot travel
    (cursors, compiled things): it stays with the worker and is empty after a move, for
    `session_started(session)` to fill.
    """

    def __init__(self, session_id: str, serial: int = 0, stay: int = 0) -> None:
        self.id = session_id
        self.serial = serial
        self.stay = stay
        self.local: dict[str, Any] = {}
        self.version = -1
        self.calls = 0  # that returned, here
        self._committed: dict[str, bytes] = {}
        self._keys: dict[str, None] = {}  # that are there now, in order
        self._values: dict[str, Any] = {}  # unpickled, as far as they were needed
        self._touched: set[str] = set()
        self._deleted: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            if key not in self._keys:
                raise KeyError(key)
            self._values[key] = pickle.loads(self._committed[key])
        self._touched.add(key)
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if type(key) is not str:
            key = plain_key(key)
        self._values[key] = value
        self._keys[key] = None
        self._touched.add(key)
        self._deleted.discard(key)

    def __delitem__(self, key: str) -> None:
        del self._keys[key]
        self._note_deleted(key)

    def _note_deleted(self, key: str) -> None:
        self._values.pop(key, None)
        self._touched.discard(key)
        self._deleted.add(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._keys))

    def __len__(self) -> int:
        return len(self._keys)

    def popitem(self) -> tuple[str, Any]:
        """Remove the key that came last and return it with its value, as a dict does.

        State that comes from a store has its keys in the order of their names.

        Raises:
            KeyError: there is none.
        """
        if not self._keys:
            raise KeyError(f"session {self.id!r} is empty")
        key = next(reversed(self._keys))
        value = self[key]
        self._keys.popitem()  # not `del`, after which the last one is looked for ever longer
        self._note_deleted(key)
        return key, value

    def clear(self) -> None:
        """Remove every key. No value is read for that."""
        self._deleted.update(self._keys)
        self._keys.clear()
        self._values.clear()
        self._touched.clear()

    def __repr__(self) -> str:
        return f"<session {self.id!r}, version {self.version}: {sorted(self)}>"

    # -- for the worker's loop ---------------------------------------------------------------

    def take_over(self, version: int, state: dict[str, bytes]) -> None:
        """Replace everything by what the parent sent."""
        self.version, self._committed = version, state
        self._keys = dict.fromkeys(state)
        self._values.clear()
        self._touched.clear()
        self._deleted.clear()

    def put_away(self) -> None:
        """Keep `local` and nothing of the state."""
        self.take_over(-1, {})

    def changes(self) -> Changes:
        """Return what the call has changed.

        Raises:
            CallMismatch: a value cannot be pickled. Undo the call.
        """
        found: Changes = {}
        for key in self._touched:
            try:
                data = pickle.dumps(self._values[key], 5)
            except Exception as problem:
                raise CallMismatch(
                    f"session {self.id!r}: the value of {key!r}, a "
                    f"{type(self._values[key]).__name__}, cannot be kept: {problem}; nothing of "
                    f"this call was committed; keep plain data, or put it into `local`"
                ) from problem
            if self._committed.get(key) != data:
                found[plain_key(key)] = data
        if self._deleted:
            found.update((plain_key(key), None) for key in self._deleted if key in self._committed)
        return found

    def commit(self, changes: Changes) -> None:
        """Make the changes the committed state.

        Touched values are unpickled anew by the next call that wants them: worker code may have
        kept them, and change them when no call of this session could notice.
        """
        self.version += bool(changes)
        for key, data in changes.items():
            if data is None:
                self._committed.pop(key, None)
            else:
                self._committed[key] = data
        self.calls += 1
        for key in self._touched:
            if type(self._values[key]) not in _ATOMS:
                del self._values[key]
        self._touched.clear()
        self._deleted.clear()

    def undo(self) -> None:
        """Forget what the call has changed."""
        for key in self._touched:
            self._values.pop(key, None)
        if self._deleted or len(self._keys) != len(self._committed):
            self._keys = dict.fromkeys(self._committed)
        self._touched.clear()
        self._deleted.clear()


class WarmSessions:
    """The sessions a worker has at hand; the state of the least recently used goes first.

    What goes then is state, which the parent has as well. `local` is here alone: it stays until
    the session ends, or comes back from another worker.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner  # the worker's object, for `session_started` and `session_ended`
        self._warm: dict[str, Session] = {}
        self._put_away: dict[str, Session] = {}  # without their state
        self._last_data, self._last, self._last_version = b"", Session(""), 0

    def enter(self, data: bytes | memoryview) -> Session:
        """Make the session of a call ready.

        Raises:
            NotHere: the parent must send the state.
            Exception: whatever `session_started` raised; the session is not here afterwards.
        """
        if data == self._last_data and self._last.version == self._last_version:
            return self._last  # the same session again, and nothing changed
        head: Head = pickle.loads(data)
        session_id, serial, version, state, stay = head
        self._last_data = b""
        session = self._warm.pop(session_id, None)
        if session is None:
            session = self._put_away.pop(session_id, None)
        if session is not None and (session.serial, session.stay) != (serial, stay):
            self._say_ended(session)  # here; what comes is another one, or was elsewhere meanwhile
            session = None
        if session is None:
            if state is None:
                raise NotHere
            session = Session(session_id, serial, stay)
            session.take_over(version, state)
            started = getattr(self._owner, "session_started", None)
            if started is not None:
                started(session)
        elif state is not None:
            session.take_over(version, state)
        self._warm[session_id] = session
        if session.version != version:
            raise NotHere
        if len(self._warm) > MAX_WARM:
            self._evict(self._warm.pop(next(iter(self._warm))))
        if state is None:
            self._last_data, self._last, self._last_version = bytes(data), session, version
        return session

    def _evict(self, session: Session) -> None:
        if session.local or hasattr(self._owner, "session_ended"):
            session.put_away()
            self._put_away[session.id] = session

    def undo(self, session: Session) -> None:
        """Undo a call. If the session had just come, it comes again with the next one."""
        session.undo()
        if session.calls == 0:
            self._last_data = b""
            self._warm.pop(session.id, None)
            self._say_ended(session)

    def end(self, over: list[Over] | None) -> None:
        """Forget sessions that are over, or all, after `session_ended` has seen them."""
        self._last_data = b""
        if over is None:
            here = (*self._warm.values(), *self._put_away.values())
            over = [(session.id, session.serial) for session in here]
        for session_id, serial in over:
            for sessions in (self._warm, self._put_away):
                session = sessions.get(session_id)
                if session is not None and session.serial == serial:
                    del sessions[session_id]
                    self._say_ended(session)

    def _say_ended(self, session: Session) -> None:
        """Let the worker's object see the end. What it raises is printed and ends nothing."""
        ended = getattr(self._owner, "session_ended", None)
        if ended is None:
            return
        try:
            ended(session)
        except Exception:
            sys.excepthook(*sys.exc_info())
