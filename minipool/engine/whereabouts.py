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

_TYPED_IN = ("<stdin", "<python-input")  # numbered, from Python 3.13 on


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
    main, words = sys.modules["__main__"].__dict__, mainmodule.how_to_import()
    code = _code_of(target)
    if code is None:
        names, file = main if _first(name) in main else _that_runs(name) or main, None
    else:
        names, file = code.__globals__, code.__code__.co_filename
    if names is not main:
        return f"it is defined in {names.get('__file__') or file!r}, and {_runner(words)}"
    if file is None or (file.startswith("<") and not file.startswith(_TYPED_IN)):
        return None
    if file.startswith("<"):
        return "it was typed in, in an interactive session" if words else None
    if words:
        return None
    return (
        f"it is defined in {file!r}, and the main module, which workers would import, has no "
        f"file any more, as its script has ended"
    )


def _runner(words: dict[str, str]) -> str:
    """Say what is the main module where other code runs under its name."""
    if mainmodule.BY_NAME in words:
        runner = words[mainmodule.BY_NAME]
        return f"this is run by {runner}, which is the main module that workers would import"
    path = words.get(mainmodule.BY_PATH)
    main = "an interactive session, `-c` or standard input" if path is None else repr(path)
    return f"that is run by {main}, and is not the main module that workers would import"


def _code_of(target: Any) -> FunctionType | None:
    """Return a function of code that runs as `__main__`: the target, or a method of a class."""
    members = vars(target).values() if isinstance(target, type) else (target,)
    for each in members:
        if not isinstance(each, FunctionType) or each.__code__.co_filename == "<string>":
            continue  # `dataclass` makes such
        if each.__globals__.get("__name__") == "__main__":
            return each
    return None


def _that_runs(name: str) -> dict[str, Any] | None:
    """Return the names of what runs as `__main__` in this thread and has that one."""
    frame = sys._getframe(1)
    while frame is not None:
        names = frame.f_globals
        if names.get("__name__") == "__main__" and _first(name) in names:
            return names
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _first(name: str) -> str:
    return name.partition(".")[0]
