"""A session store in one SQLite file: sessions that outlive the application.

Each commit is one transaction (WAL, synchronous NORMAL: safe against the death of the process,
though the last commits may be lost with the power). Several processes of one host may share the
file: a session belongs to one at a time, which says so in the file and renews that while it lives;
the sessions of a dead owner are taken over. Stores of one process share its connections.

Any object with the same methods can be a store: `open`, `create`, `has`, `read`, `commit`,
`delete`, `close` (and `let_go`, `beat` and `expire`, if it wants to). Any thread may call them.
When they cannot do what they are asked, they raise a SessionError, and nothing has changed, or its
`in_doubt` is True. To delete, or let go, what is not there or not ours changes nothing, and is no
error.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any, Callable, Mapping, TypeVar

from ..errors import SessionError
from ..telemetry import logger
from . import files, owners, rows
from .database import Database
from .rows import Loaded

T = TypeVar("T")

_BEAT_S = 2.0  # seconds from one sign of life to the next, at least
_HOUSEKEEPING_S = 1.0  # how long housekeeping waits for others that write; it comes again
_LETTING_GO_S = 60.0  # how long a store that was closed goes on trying, if its file is locked
_QUEUE_S = 0.4  # and how long of that in line: then it asks SQLite, beside the threads that commit
_USES = 500  # noted in one transaction
_LOOKED_AT = 500  # sessions in one batch of `expire`
_GRACE_S = 600.0  # after opening, before what was last used before this boot expires


class SQLiteStore:
    """Keeps sessions in the SQLite file at `path`. Any thread may call any method.

    Raises:
        SessionError: the file cannot be opened, is no session store, or is of another version; it
            was open when this process was forked; others can write to it. It is left as it was.
        TypeError: `path` is no path.
    """

    def __init__(self, path: str) -> None:
        try:
            self.path = files.checked_path(path)
        except ValueError as problem:
            raise SessionError(f"session_store={path!r} cannot be used: {problem}") from None
        self._pid = os.getpid()
        self._closed = False
        self._beaten = -_BEAT_S
        self._opened = time.monotonic()
        self._looked_up_to = ""  # where `expire` goes on
        self._owner = owners.begin(self)
        self._left_behind: Database | None = None  # where the path does not lead any more
        try:
            self._database = self._joined()
        except BaseException:
            owners.end(self._owner)
            raise

    def _joined(self) -> Database:
        """Come to the file that is at the path now, and enter this owner there."""
        database = Database.at(self.path, self)
        try:
            database.transact(None, owners.sign, self._owner)
            database.transact(None, owners.forget_dead, database.path)
        except BaseException:
            database.leave(self)
            raise
        self._beaten = time.monotonic()
        return database

    # -- what a store does -------------------------------------------------------------------

    def open(self, key: str) -> Loaded | None:
        """Make a session ours; return version and state, or None if it is new.

        Raises:
            SessionBusy: a living process has it.
        """
        rows.checked_id(key)
        what = f"session {key!r} could not be opened"
        return self._transact(what, rows.open_session, self._owner, key)

    def create(self, key: str, state: Mapping[str, bytes]) -> bool:
        """Begin a session with its state, ours from then on; False if there is one, untouched.

        Its version is 1 if there is state, else 0.
        """
        rows.checked_id(key)
        what = f"session {key!r} could not be created"
        return self._transact(
            what, rows.create_session, self._owner, key, rows.checked_changes(state)
        )

    def has(self, key: str) -> bool:
        """Tell whether there is such a session, whoever has it."""
        rows.checked_id(key)
        return self._look(f"session {key!r} could not be looked up", rows.has_session, key)

    def read(self, key: str) -> Loaded | None:
        """Return version and state of a session, whoever has it; None if there is none."""
        rows.checked_id(key)
        return self._look(f"session {key!r} could not be read", rows.read_session, key)

    def commit(self, key: str, version: int, changes: Mapping[str, bytes | None]) -> None:
        """Keep the changes, all or none, as the version that follows the present one.

        On return they are in the file at the path. If that was deleted or replaced meanwhile, this
        is an error; the next use goes on with the file that is there then, or with a new one.

        Raises:
            SessionError: the file could not be written; if it is `in_doubt`, it was not at the
                path any more afterwards. SessionBusy: the session is not ours, or not of the
                version before.
        """
        rows.checked_id(key)
        what = f"session {key!r} could not be committed"
        changed = rows.checked_changes(changes)
        self._transact(what, rows.commit_session, self._owner, key, version, changed)

    def delete(self, key: str) -> None:
        """Forget a session, if it is there and ours; nothing otherwise."""
        rows.checked_id(key)
        what = f"session {key!r} could not be deleted"
        self._transact(what, rows.delete_session, self._owner, key)

    def let_go(self, key: str) -> None:
        """Leave a session, if it is ours, to whichever process opens it next, as it is."""
        rows.checked_id(key)
        what = f"session {key!r} could not be let go"
        self._transact(what, rows.let_one_go, self._owner, key)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called; a store does not reopen."""
        return self._closed

    def close(self) -> None:
        """Let go of our sessions and the file.

        A locked file is waited for a second; then a thread goes on trying for a minute, for other
        processes take us for alive until that is done, or this process has ended.
        """
        if self._pid != os.getpid():
            return  # a fork must not touch the owner's connection
        self._closed = True
        owners.end(self._owner)  # whatever the file says
        later = False
        try:
            later = self._lets_go_later(self._database)
        finally:
            if not later:
                self._database.leave(self)

    def _lets_go_later(self, database: Database) -> bool:
        """Let go of our sessions in a file, at once or, which is True, by a thread that leaves."""
        return not self._let_go(database, _HOUSEKEEPING_S) and self._start_letting_go(database)

    def _let_go(self, database: Database, patience: float) -> bool:
        """Let go of our sessions; False if the file is locked for longer, or cannot be written."""
        try:
            database.transact(
                "sessions could not be let go", rows.let_all_go, self._owner,
                patience=patience, queue=_QUEUE_S,
            )  # fmt: skip
        except SessionError:
            return False
        return True

    def _start_letting_go(self, database: Database) -> bool:
        """Start a thread that lets go, and leaves the file; False if there can be none."""

        def go_on() -> None:
            try:
                any(self._uses_again(database) or self._let_go(database, _LETTING_GO_S / 6)
                    for _ in range(6))  # fmt: skip
            finally:
                if not self._uses_again(database):
                    database.leave(self)

        with contextlib.suppress(RuntimeError):
            threading.Thread(target=go_on, name="minipool-store-close", daemon=True).start()
            return True
        return False

    def _uses_again(self, database: Database) -> bool:
        """Tell whether a file that was left is used again: the path has led back to it."""
        return database is self._database and not self._closed

    # -- housekeeping ------------------------------------------------------------------------

    def beat(self, used: Mapping[str, float] | None = None) -> None:
        """Give a sign of life if one is due; note how many seconds ago our sessions were used.

        Waits a second for others that write, also if nothing is due: so a caller that has more to
        do hears soon that the file is locked. After an error some of the uses may be noted.
        """
        uses = list((used or {}).items())
        if time.monotonic() - self._beaten >= _BEAT_S:
            self._keep_house("the sign of life could not be given", owners.sign, self._owner)
            self._beaten = time.monotonic()
        elif not uses:
            self._keep_house("nothing could be written", rows.nothing)
        for first in range(0, len(uses), _USES):
            part = uses[first : first + _USES]
            self._keep_house("uses could not be noted", rows.note_use, self._owner, part)
        self._present("the log could not be put away").put_away_log()

    def expire(self, seconds: float) -> bool:
        """Forget sessions that no living process has, unused for so long; True: there is more.

        Looks at some, for a few milliseconds, and goes on there the next time. Where sessions were
        last used before this boot, or the system has no clock that counts from it, the wall clock
        tells, which may be wrong when a system comes up: they have a while of grace.
        """
        what = "old sessions could not be deleted"
        by_wall = time.monotonic() - self._opened > min(seconds, _GRACE_S)
        old, last = self._look(
            what, rows.find_old, self._owner, self._looked_up_to, _LOOKED_AT, seconds, by_wall
        )
        if old:
            done = self._keep_house(what, rows.delete_old, old)
            if done != old[-1].key:
                last = done
        self._looked_up_to = last or ""
        return last is not None

    # -- how ---------------------------------------------------------------------------------

    def _transact(self, what: str, work: Callable[..., T], *args: Any, **waiting: Any) -> T:
        database = self._present(what)
        linked = database.path != self.path
        if linked:
            self._refuse_left(what, database, written=False)
        result = database.transact(what, work, *args, **waiting)
        if linked:
            self._refuse_left(what, database, written=waiting.get("mode") != "DEFERRED")
        return result

    def _refuse_left(self, what: str, database: Database, written: bool) -> None:
        """Refuse to go on with a file that the path does not lead to any more: a link was turned.

        A program that is started now begins with the file that is there now.
        """
        if not files.leads_elsewhere(self.path, database.file):
            return
        so = "what was just written may be lost" if written else "nothing was changed"
        real = os.path.realpath(self.path)
        if real == database.path:
            return  # it is the file that was deleted or replaced: `transact` sees to that
        gone = real == self.path and not os.path.exists(real)
        if os.path.isdir(os.path.dirname(real)) and not gone:  # else it is just being turned
            self._left_behind = database
        text = (
            f"{what} in {self.path!r}: a link was turned while the store was in use, and leads to "
            f"{real!r} instead of {database.path!r}; {so}; the next use begins with the file that "
            f"is there then, or with a new one; keep a store outside of what a deployment "
            f"replaces, or stop all that use it first"
        )
        logger().warning("%s", text)
        raise SessionError(text, in_doubt=written)

    def _look(self, what: str, work: Callable[..., T], *args: Any) -> T:
        """Read, beside those that write."""
        return self._transact(what, work, *args, mode="DEFERRED", queue=0.05)

    def _keep_house(self, what: str, work: Callable[..., T], *args: Any) -> T:
        return self._transact(what, work, *args, patience=_HOUSEKEEPING_S, queue=_QUEUE_S)

    def _present(self, what: str) -> Database:
        """Return the database; of the file that is at the path now, if another one was there.

        Raises:
            SessionError: the store is closed, or another process'.
        """
        if self._pid != os.getpid():
            raise SessionError(
                f"{what}: the store was opened by process {self._pid}, from which this one was "
                f"forked; open one here whose file was not open at the fork"
            )
        if self._closed:
            raise SessionError(f"{what}: the store is closed")
        old = self._database
        if old.closed or old is self._left_behind:
            self._database = self._joined()
            self._left_behind = None
            # The path may have led back meanwhile; else others may have our sessions there.
            if not self._uses_again(old) and (old.closed or not self._lets_go_later(old)):
                old.leave(self)
        return self._database
