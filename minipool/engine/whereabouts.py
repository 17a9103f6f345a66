"""Whereabouts: where this process found a module that a worker does not find.

A program may take a directory off `sys.path` once it has imported what is there. A worker gets the
path as it is when the worker is started, and "No module named ..." alone would say nothing of that.

And what calls itself `__main__` need not be in the main module: a profiler, a debugger or `runpy`
may run a file under that name. Or the main module is that no more which a worker could import.
"""

from __future__ import annotations

import os
import sys
from types import FunctionType
from typing import Any

from . import mainmodule


def add_whereabouts(error: ModuleNotFoundError) -> None:
    """Say in the text of a worker's error where the module is, if that explains it."""
    folder = _left_behind(error.name or "")
    if folder is not None:
        error.msg = (
            f"{error.msg}; the parent has imported it from {folder!r}, which is not (any more) on "
            f"sys.path, as workers get it: put it there, or into PYTHONPATH, or install the module"
        )
        error.args = (error.msg,)


def _left_behind(name: str) -> str | None:
    """Return the directory that a module was found through; None: on the path, or not known."""
    path = getattr(sys.modules.get(name), "__file__", None)
    if not path:
        return None
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.basename(path).startswith("__init__."):
        folder = os.path.dirname(folder)
    for _ in range(name.count(".")):
        folder = os.path.dirname(folder)
    return None if any(_same(folder, entry) for entry in sys.path) else folder


def _same(folder: str, entry: str) -> bool:
    try:
        return os.path.realpath(folder) == os.path.realpath(entry)
    except (TypeError, ValueError):  # what is no path
        return False


def why_not_in_main(target: Any) -> str | None:
    """Say why a worker that imports the main module would not find there what is said to be in it.

    None: nothing is known against it.
    """
    name = getattr(target, "__qualname__", None)
    if not isinstance(name, str):
        return None
    words, file = mainmodule.how_to_import(), _file_of(target)
    if file is not None and file.startswith("<"):
        typed_in = file == "<stdin>" or file.startswith("<python-input")
        return "it was typed in, in an interactive session" if typed_in and words else None
    if _is_in_main(target, name):
        if words or file is None:
            return None
        return (
            f"it is defined in {file!r}, and the main module, which workers would import, has no "
            f"file any more, as its script has ended"
        )
    file = file or _file_that_runs(name)
    path, runner = words.get(mainmodule.BY_PATH), words.get(mainmodule.BY_NAME)
    if file is None or (path is not None and _same(file, path)):
        return None
    if runner is not None:
        own = getattr(sys.modules["__main__"], "__file__", None)
        return (
            None
            if own is not None and _same(file, own)
            else f"it is defined in {file!r}, and this is run by {runner}, which is the main "
            f"module that workers would import"
        )
    main = "an interactive session, `-c` or standard input" if path is None else repr(path)
    return f"it is defined in {file!r}, which is run by {main} and is not the main module"


def _is_in_main(target: Any, name: str) -> bool:
    found: Any = sys.modules["__main__"]
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is target


def _file_of(target: Any) -> str | None:
    """Return the file of a function's code, or of a class's first method."""
    members = vars(target).values() if isinstance(target, type) else (target,)
    files = [each.__code__.co_filename for each in members if isinstance(each, FunctionType)]
    written = [file for file in files if file != "<string>"]  # what no dataclass has made
    return written[0] if written else None


def _file_that_runs(name: str) -> str | None:
    """Return the file of other code that runs as `__main__` in this thread and has that name."""
    main, frame = sys.modules["__main__"].__dict__, sys._getframe(1)
    while frame is not None:
        names = frame.f_globals
        if names is not main and names.get("__name__") == "__main__" and name in names:
            return names.get("__file__") or frame.f_code.co_filename
        frame = frame.f_back  # type: ignore[assignment]
    return None
