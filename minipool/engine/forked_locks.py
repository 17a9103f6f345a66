"""Locks of the standard library that threads of ours take, and that a fork may copy as held.

In the child nobody is there to release them, and whatever needs them waits for ever: so they are
made anew there. Newer Pythons do so themselves with some. Our own are a `Guard`'s, which does, too.
"""

from __future__ import annotations

import os
import sys
import threading

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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free)
