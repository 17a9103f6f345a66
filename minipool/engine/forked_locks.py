"""Locks of the standard library that threads of ours take, and that a fork may copy as held.

In the child nobody is there to release them, and whatever needs them waits for ever: so they are
made anew there. Newer Pythons do so themselves with some. Our own are a `Guard`'s, which does, too.

The import system has one for each module that is being imported. In the child such an import begins
again, as it does after one that has failed. In a child that the program forks, only that of our
modules and of the standard library's, which are imported at the first opening: of others nobody
knows whether they may be imported twice. A forked worker needs them all. But a module that opened
the pool as it is imported stays there as far as it has come: it would do so again.
"""

from __future__ import annotations

import os
import sys
import threading
from importlib import _bootstrap
from typing import Any, Iterable

_LOCKS = (  # by module: what has it, None for the module itself, and its name
    ("multiprocessing.resource_tracker", "_resource_tracker", "_lock"),
    ("multiprocessing.forkserver", "_forkserver", "_lock"),
    ("tempfile", None, "_once_lock"),
)


def _free() -> None:
    for module, name, attribute in _LOCKS:
        owner = sys.modules.get(module)
        if name is not None:
            owner = getattr(owner, name, None)
        lock = getattr(owner, attribute, None)
        if lock is None:
            continue
        if lock.acquire(False):  # free, or held by the thread that has forked, which is here
            lock.release()
        else:
            again = threading.RLock() if hasattr(lock, "_is_owned") else threading.Lock()
            setattr(owner, attribute, again)


def disown(kept: Iterable[str] | None = None) -> None:
    """Drop each module lock that another thread held at the fork, and what that was importing.

    By a worker before it imports anything: not the modules that are `kept`. Else only what may
    begin again in any process.
    """
    locks: dict[str, Any] = getattr(_bootstrap, "_module_locks", {})
    for name, reference in tuple(locks.items()):
        owner = getattr(reference(), "owner", None)
        module = sys.modules.get(name)
        if owner in (None, threading.get_ident()):
            continue
        if kept is None and not _may_begin_again(name, module):
            continue
        locks.pop(name, None)
        spec = getattr(module, "__spec__", None)
        if name not in (kept or ()) and getattr(spec, "_initializing", False):
            del sys.modules[name]
    if kept is not None:  # a new thread here may have the number of one that waited there
        getattr(_bootstrap, "_blocking_on", {}).clear()


def _may_begin_again(name: str, module: Any) -> bool:
    origin = getattr(getattr(module, "__spec__", None), "origin", None) or ""
    library = origin.startswith(_LIBRARY) and "-packages" not in origin[len(_LIBRARY) :]
    return module is None or library or name.startswith(_OURS)


_LIBRARY = os.path.dirname(os.__file__) + os.sep
_OURS = __name__.rpartition("engine.")[0]

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free)
    os.register_at_fork(after_in_child=disown)
