"""Import locks in a forked worker: those that threads hold which are not there.

The import system has a lock for each module that is being imported. A forked process copies them
as they are, and nobody in it releases those of the other threads: an import of such a module would
wait for ever. CPython mends only its lock for all imports.

A module that some thread was importing is imported anew, as it is after an import that has failed.
But one that opened the pool as it is imported stays as far as it has come: it would do so again.
"""

from __future__ import annotations

import _thread
import sys
from typing import Any, Iterable


def disown(kept: Iterable[str]) -> None:
    """Drop each module lock that another thread held at the fork, and what that was importing.

    Not the modules that are `kept`. To be called in the child, before it imports anything.
    """
    system: Any = sys.modules["_frozen_importlib"]
    locks, waits = getattr(system, "_module_locks", {}), getattr(system, "_blocking_on", {})
    me = _thread.get_ident()
    for name, ref in tuple(locks.items()):
        lock = ref()
        if lock is None or getattr(lock, "owner", None) in (None, me):
            continue
        locks.pop(name, None)
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if name not in kept and getattr(spec, "_initializing", False):
            del sys.modules[name]
    waits.clear()  # a new thread here may have the number of one that waited there
