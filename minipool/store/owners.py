"""Owners: which open store has a session, and whether it still lives.

An owner of this very process lives while its store is open. One of the same boot and pid namespace
lives while a process of that pid and start time does. Any other one (another host, another
container, a process that cannot be seen) is judged by its last sign of life alone.
"""

from __future__ import annotations

import os
import uuid
import weakref
from typing import Any, NamedTuple

from ..errors import SessionError
from . import host
from .open_files import Connection

LEASE_S = 30.0  # how long an owner that cannot be looked up is believed without a sign of life
COLUMNS = "id, host, pid, started, beat, boot, namespace, beat_boot"

_process = uuid.uuid4().hex  # begins the id of each owner of this process, and of no other
_open: dict[str, weakref.ref[Any]] = {}  # owners of this process -> their stores


def _forked() -> None:
    global _process
    _process = uuid.uuid4().hex
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def begin(store: object) -> str:
    """Return the id of a new owner, which lives until `end`, or until its store is collected."""
    for owner, opened in list(_open.items()):
        if opened() is None:
            _open.pop(owner, None)
    owner = f"{_process}.{uuid.uuid4().hex}"
    _open[owner] = weakref.ref(store)
    return owner


def end(owner: str) -> None:
    """Have an owner of this process be dead from now on."""
    _open.pop(owner, None)


def is_open(owner: str) -> bool:
    """Tell whether an owner of this process lives."""
    store = _open.get(owner)
    return store is not None and store() is not None


class Owner(NamedTuple):
    """A row of the table of owners."""

    id: str
    host: str
    pid: int
    started: str | None
    beat: float  # the last sign of life, by the wall clock ...
    boot: str | None
    namespace: str | None
    beat_boot: float | None  # ... and by the clock of that boot

    def lives(self) -> bool:
        """Tell whether it may still use its sessions."""
        if self.id.startswith(_process):
            return is_open(self.id)
        now = host.moment()
        same_boot = now.boot is not None and self.boot == now.boot
        if same_boot and self.namespace is not None and self.namespace == host.pid_namespace():
            started = host.start_of(self.pid)
            # Of this pid, but not of our own: another copy of minipool in this process, or what
            # this process was before an exec.
            if started is not None and not (self.pid == os.getpid() and started == self.started):
                return started == self.started
        if same_boot and self.beat_boot is not None and now.since_boot is not None:
            return now.since_boot - self.beat_boot < LEASE_S
        # One that is yet to come was given before the clock was set back: by an earlier boot.
        return -LEASE_S < now.wall - self.beat < LEASE_S


def sign(db: Connection, owner: str) -> None:
    """Write down that an owner of this process lives."""
    now, pid = host.moment(), os.getpid()
    started = host.start_of(pid)
    db.execute(
        f"INSERT OR REPLACE INTO owner ({COLUMNS}) VALUES (?,?,?,?,?,?,?,?)",
        (owner, host.host_name(), pid, started if started != host.GONE else None, now.wall,
         now.boot, host.pid_namespace(), now.since_boot),
    )  # fmt: skip


def living(db: Connection, path: str, owner: str | None) -> Owner | None:
    """Return the owner of a session, if there is one and it lives.

    Raises:
        SessionError: what is written of it cannot be read.
    """
    if owner is None:
        return None
    row = db.execute(f"SELECT {COLUMNS} FROM owner WHERE id=?", (owner,)).fetchone()
    found = None if row is None else _checked(row, path)
    return found if found is not None and found.lives() else None


def forget_dead(db: Connection, path: str) -> None:
    """Delete the owners that do not live: their sessions can be had at once."""
    for row in db.execute(f"SELECT {COLUMNS} FROM owner").fetchall():
        if not _checked(row, path).lives():
            db.execute("DELETE FROM owner WHERE id=?", (row[0],))


def _checked(row: tuple[Any, ...], path: str) -> Owner:
    owner = Owner(*row)
    right = (
        isinstance(owner.id, str)
        and isinstance(owner.host, str)
        and isinstance(owner.pid, int)
        and 0 < owner.pid < 1 << 31
        and isinstance(owner.beat, (int, float))
        and isinstance(owner.started, (str, type(None)))
        and isinstance(owner.boot, (str, type(None)))
        and isinstance(owner.namespace, (str, type(None)))
        and isinstance(owner.beat_boot, (int, float, type(None)))
    )
    if not right:
        raise SessionError(
            f"{path!r}: row {owner.id!r} of table owner is damaged: {row!r}; restore a backup, or "
            f"delete that row if no process uses the file"
        )
    return owner
