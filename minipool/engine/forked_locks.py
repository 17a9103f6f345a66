"""Locks of the standard library that threads of ours take, and that a fork may copy as held.

In the child nobody is there to release them, and whatever needs them waits for ever: so they are
made anew there. Newer Pythons do so themselves with some. Our own are a `Guard`'s, which does, too.

So are those of modules that were being imported, as many of ours and of the standard library are at
the first opening: in the child their import begins again. Those of others are left alone, as nobody
knows whether they may be imported twice.
"""

from __future__ import annotations

import os
import sys
import threading
from importlib import _bootstrap
from typing import Any

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


def _begin_imports_again() -> None:
    locks: dict[str, Any] = getattr(_bootstrap, "_module_locks", {})
    for name, reference in tuple(locks.items()):
        owner = getattr(reference(), "owner", None)
        module = sys.modules.get(name)
        if owner not in (None, threading.get_ident()) and _may_begin_again(name, module):
            locks.pop(name, None)
            if getattr(getattr(module, "__spec__", None), "_initializing", False):
                del sys.modules[name]


def _may_begin_again(name: str, module: Any) -> bool:
    origin = getattr(getattr(module, "__spec__", None), "origin", None) or ""
    library = origin.startswith(_LIBRARY) and "-packages" not in origin[len(_LIBRARY) :]
    return module is None or library or name.startswith(_OURS)


_LIBRARY = os.path.dirname(os.__file__) + os.sep
_OURS = __name__.rpartition("engine.")[0]

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free)
    os.register_at_fork(after_in_child=_begin_imports_again)
