"""Nesting: where opening a pool would start processes that each open it again, without end.

A worker imports what it is made of: the main module, the module of its class, what is preloaded.
If one of these opens a pool as it is imported, so does every worker of that pool. So none may be
opened by an import that a worker needs for its start, nor by one that finds it what it is to call.
A worker that is ready may have a pool of its own, and so may the object in it as it is made.

But its own code may import, late, what opened the pool that it belongs to. So each worker is told
at which *places* the pools were opened that it is below of (see `child.places`), and none is opened
again at the same place by an import, by a thread of the same code, or by a constructor. Whatever
else opens pools below pools is stopped at a depth that no program needs.

What runs is read off the stacks, which costs nothing but where a pool is opened.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing import process
from types import FrameType
from typing import Any, Iterator

from ..errors import PoolStartError
from . import child

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_STDLIB = os.path.dirname(threading.__file__) + os.sep
_IMPORT = "<frozen importlib"  # how the file of the import system's own code is named
_MAIN = ("__main__", "__mp_main__")
_GUARD = "`if __name__ == '__main__':`"
_DEEPEST = 8  # pools, each opened by a worker of the one before


class Opening:
    """The opening of a pool that goes on in this thread: where, and what would do instead.

    It is made of texts, as it is kept, and frames would keep what runs in them.
    """

    def __init__(self) -> None:
        frames = list(_outwards(sys._getframe(1)))
        ours = next((i for i, frame in enumerate(frames) if not _is_ours(frame)), len(frames))
        by, others = frames[ours - 1].f_code.co_name, frames[ours:]
        top = next((frame for frame in frames if _is_module(frame)), None)
        #: the modules, but the main one, that are being imported in this thread
        self.importing = tuple(
            str(frame.f_globals.get("__name__")) for frame in frames if _is_module(frame)
        )
        own_thread = threading.get_ident() != threading.main_thread().ident
        name = None if top is None else str(top.f_globals.get("__name__"))
        making = child.stage == child.MAKING
        #: whether an import opens it, and not that of the main module, a thread, or a constructor
        self.comes_by_itself = own_thread or making if name is None else name not in _MAIN
        #: what is compared, also between processes: a file, or how the thread came here
        self.place = _way(others) if top is None else _file(top)
        if top is not None and name not in _MAIN:
            self.text = f"module {name!r} {_spot(top)} opens a pool as it is imported"
            self.remedy = _remedy(by)
        elif top is not None:
            self.text = f"your main script {_spot(top)} opens a pool as it is imported"
            self.remedy = f"put what opens the pool under {_GUARD}"
        elif own_thread:
            thread = threading.current_thread().name
            self.text = f"thread {thread!r} opens a pool{_spots(others[:1])}"
            self.remedy = (
                f"start that thread in a function that workers do not call, or under {_GUARD} in "
                f"the main script"
            )
        else:
            made = "what makes a worker's object" if making else f"`{by}()`"
            self.text = f"{made} opens a pool{_spots(others[:1])}"
            self.remedy = "open it later, in a call"

    @property
    def comes_again(self) -> bool:
        """Whether it comes by itself where a pool was opened that this process is below of.

        What is in no file may be any code.
        """
        if not self.comes_by_itself or self.place not in child.places:
            return False
        return not self.place.startswith("<") or self.place.startswith("<frozen")


def _remedy(by: str) -> str:
    """Say what to do in a module that opens a pool at its top by calling this method."""
    if by == "open":
        return (
            "make the pool there without `open()`, as its first use opens it, or open it in a "
            "function"
        )
    if by == "__enter__":
        return "put the `with` block into a function, and call that from the main script"
    use = f"`{by}()`" if by.isidentifier() else "what uses it"
    return (
        f"make the pool there, and put {use}, which opens the pool as it is its first use, into a "
        f"function"
    )


def _spots(users: list[FrameType]) -> str:
    return "".join(f" {_spot(user)}" for user in users if not _file(user).startswith(_STDLIB))


def refusal(opening: Opening) -> str | None:
    """Say why no pool may be opened so, and what to do; None if it may."""
    role = _role()
    if role is not None:
        return (
            f"{opening.text}, and this is {role}; {opening.remedy}, or every worker would open one"
        )
    if opening.comes_again:
        return (
            f"{opening.text}, and this is a worker of the pool that was opened there before, or is "
            f"below one: processes would start without end; {opening.remedy}"
        )
    if len(child.places) >= _DEEPEST:
        return (
            f"{opening.text}, and this is a worker below {len(child.places)} pools, each of them "
            f"opened by a worker of the one before; look for a call that leads to itself"
        )
    return None


def silence(why: str, preloaded: str) -> None:
    """Have the fork server end by a refusal without a word: each worker will tell the parent.

    But only one that was started for workers, which is to import the module `preloaded`.
    """
    frames = _of_fork_server()
    if not any(preloaded in frame.f_locals.get("preload", ()) for frame in frames):
        return
    show = sys.excepthook

    def show_others(kind: Any, error: BaseException, trace: Any) -> None:
        if not (isinstance(error, PoolStartError) and str(error) == why):
            show(kind, error, trace)

    sys.excepthook = show_others


def _role() -> str | None:
    """Say what this process is that must not open a pool now; None if it may."""
    if _inherits():
        return "a worker that is still importing what it needs"
    if _of_fork_server():
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


def _of_fork_server() -> list[FrameType]:
    """Return what runs of multiprocessing's fork server, if this is it, and not forked by it."""
    main = threading.main_thread().ident
    frames = [
        frame
        for frame in _outwards(sys._current_frames().get(main or 0))
        if frame.f_globals.get("__name__") == "multiprocessing.forkserver"
    ]
    names = {frame.f_code.co_name for frame in frames}
    return frames if "main" in names and "_serve_one" not in names else []


def _is_module(frame: FrameType) -> bool:
    """Tell whether it is the code of a module. In a worker, `__main__` is what has started it."""
    if frame.f_code.co_name != "<module>":
        return False
    return process.parent_process() is None or frame.f_globals.get("__name__") != "__main__"


def _imports(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_IMPORT)


def _is_ours(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_code.co_filename.startswith(_PACKAGE)


def _file(frame: FrameType) -> str:
    path = frame.f_code.co_filename
    return os.path.realpath(path) if os.path.isabs(path) else path


def _way(frames: list[FrameType]) -> str:
    return " ".join(f"{_file(frame)}:{frame.f_lineno}" for frame in frames)


def _spot(frame: FrameType) -> str:
    return f"({frame.f_code.co_filename}, line {frame.f_lineno})"


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
