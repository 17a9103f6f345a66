"""Which files this process has open through SQLite, and which it has inherited by a fork.

SQLite keeps one table of locks for a process and file. A fork copies the table, but not the locks
(https://www.sqlite.org/howtocorrupt.html, section 2.6): the child would believe to have what it
has not, whatever it did, until it ends. So it may not open such a file at all, and the connections
that it has inherited are neither used nor closed in it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import weakref
from typing import Any

from .files import File

_connections: dict[int, weakref.ref[Connection]] = {}
_databases: dict[File, weakref.ref[Any]] = {}
_inherited: dict[File, int] = {}  # -> the process that had it open at the fork
#: Never closed, not even as a child ends: a thread of the parent may have been in SQLite at the
#: fork, and its mutex is never released there. What `os.register_at_fork` has keeps this module.
_kept: list[Connection] = []
_pid = os.getpid()


class Connection:
    """A connection that one thread uses at a time, and that the last one to have it closes.

    Whoever has a reference to it may be using it. So only its user closes it, or else, when an
    exception has struck its user, the interpreter with the last reference, which rolls back what
    was begun. (`sqlite3.Connection` itself is part of a cycle and waits for the collector.)
    """

    __slots__ = ("__weakref__", "execute", "executemany", "file", "path", "raw", "wal")

    def __init__(self, path: str, file: File, uri: str, timeout: float) -> None:
        self.path = path
        self.file = file  # which it reads and writes
        self.wal: File | None = None  # its write-ahead log, if it has one
        _connections[id(self)] = weakref.ref(self)
        self.raw = sqlite3.connect(
            uri, timeout=timeout, isolation_level=None, check_same_thread=False, uri=True
        )
        self.execute = self.raw.execute
        self.executemany = self.raw.executemany

    def close(self) -> None:
        """Roll back what was begun, and close the file. By its user only."""
        self.raw.close()
        _connections.pop(id(self), None)

    def __del__(self) -> None:
        with contextlib.suppress(sqlite3.Error, AttributeError):  # it may never have been opened
            self.close()


def _forked() -> None:
    """Remember, in the child, what the parent had open."""
    global _pid
    parent, _pid = _pid, os.getpid()
    for reference in list(_connections.values()):
        connection = reference()
        if connection is not None:
            _inherited[connection.file] = parent
            _kept.append(connection)
    _connections.clear()
    _databases.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def refuse_inherited(file: File) -> None:
    """Refuse a file that was open when this process was forked.

    Raises:
        ValueError: it was. There is no way to make it safe here.
    """
    parent = _inherited.get(file)
    if parent is not None:
        raise ValueError(
            f"process {parent} had it open when this process ({os.getpid()}) was forked from it, "
            f"and SQLite's locks do not survive a fork, so commits would be lost; open it after "
            f"the fork only, in the parent as well, or start this process by exec (subprocess, or "
            f"multiprocessing's 'spawn' or 'forkserver')"
        )


def database(file: File) -> Any:
    """Return what this process uses a file by, if it has it open."""
    reference = _databases.get(file)
    return None if reference is None else reference()


def databases() -> list[Any]:
    """Return all that this process uses files by."""
    found = [reference() for reference in list(_databases.values())]
    return [database for database in found if database is not None]


def share(file: File, database: Any) -> Any:
    """Have others use a file by this database; return the one that they do."""
    while True:
        reference = _databases.setdefault(file, weakref.ref(database))
        found = reference()
        if found is not None and not found.closed:
            return found
        if _databases.get(file) is reference:
            _databases.pop(file, None)


def withdraw(database: Any) -> None:
    """Have nobody else begin to use this database."""
    file: File = database.file
    reference = _databases.get(file)
    if reference is not None and reference() is database:
        _databases.pop(file, None)
