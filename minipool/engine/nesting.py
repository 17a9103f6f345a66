"""Nesting: where opening a pool would start processes that each open it again, without end.

A worker imports what it is made of: the main module, the module of its class, what is preloaded.
If one of these opens a pool as it is imported, so does every worker of that pool. So none may be
opened by an import that a worker needs for its start, nor by one that finds it what it is to call.
A worker that is ready may have a pool of its own, and so may the object in it as it is made.

What runs is read off the stacks, which costs nothing but where a pool is opened.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing import process
from types import FrameType
from typing import Iterator

from . import child

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_IMPORT = "<frozen importlib"  # how the file of the import system's own code is named
_MAIN = ("__main__", "__mp_main__")
_REMEDY = (
    "make the pool there without `open()`, as its first use opens it, or open it in a function"
)


def refusal() -> str | None:
    """Say why no pool may be opened in this thread now, and what to do; None if it may."""
    role = _role()
    if role is None:
        return None
    place = importing()
    if place is not None:
        return f"{place} opens a pool as it is imported, and this is {role}; {_REMEDY}"
    if _inherits():
        return (
            "this process is itself a worker that is still importing your main script; put what "
            "opens the pool under `if __name__ == '__main__':`, or every worker would open one"
        )
    return f"this is {role}; open the pool later, or every worker would open one"


def importing() -> str | None:
    """Name the module, other than the main one, that this thread is importing, and the place."""
    for frame in _outwards(sys._getframe(1)):
        name = frame.f_globals.get("__name__")
        if frame.f_code.co_name == "<module>":
            if name in _MAIN:
                return None
            return f"module {name!r} ({frame.f_code.co_filename}, line {frame.f_lineno})"
    return None


def _role() -> str | None:
    """Say what this process is that must not open a pool now; None if it may."""
    if _inherits():
        return "a worker that is still importing what it needs"
    if _is_fork_server():
        return "the fork server, which imports it for all workers"
    if child.stage == child.FETCHING:
        return "a worker that is still importing what it needs"
    if child.current_worker() is not None:
        outermost = [frame for frame in _outwards(sys._getframe(1)) if _imports(frame)][-1:]
        if outermost and child.stage == child.MAKING:
            return "a worker that imports it as it starts"
        if outermost and _is_ours(outermost[0].f_back):
            return "a worker that imports it to find what it is to call"
    return None


def _inherits() -> bool:
    """Tell whether this process is one that is still importing its parent's main module."""
    return bool(getattr(process.current_process(), "_inheriting", False))


def _is_fork_server() -> bool:
    """Tell whether this is multiprocessing's fork server itself, and not one that it has forked."""
    main = threading.main_thread().ident
    names = {
        frame.f_code.co_name
        for frame in _outwards(sys._current_frames().get(main or 0))
        if frame.f_globals.get("__name__") == "multiprocessing.forkserver"
    }
    return "main" in names and "_serve_one" not in names


def _imports(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_IMPORT)


def _is_ours(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_code.co_filename.startswith(_PACKAGE)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
