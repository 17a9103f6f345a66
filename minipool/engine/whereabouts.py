"""Whereabouts: where this process found a module that a worker does not find.

A program may take a directory off `sys.path` once it has imported what is there. A worker gets the
path as it is when the worker is started, and "No module named ..." alone would say nothing of that.
"""

from __future__ import annotations

import os
import sys


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
