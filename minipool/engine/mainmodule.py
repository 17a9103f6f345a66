"""The main module: how a worker imports it, also once its script has ended.

The interpreter takes `__file__` from the main module as its script ends. Other threads, exit
handlers and the prompt of `python -i` go on, and so do their pools. What workers are told is
therefore noted while it is known: as this package is imported, and whenever it is asked for.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from multiprocessing import process
from types import ModuleType
from typing import Any, Callable

BY_NAME, BY_PATH = "init_main_from_name", "init_main_from_path"  # as multiprocessing calls them
_noted: tuple[Callable[[], ModuleType | None], dict[str, str]] = (lambda: None, {})


def how_to_import() -> dict[str, str]:
    """Return the word by which multiprocessing has a process import the main module, if it can."""
    global _noted
    main: Any = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    path = getattr(main, "__file__", None)
    if name is not None:
        words = {BY_NAME: name}
    elif path is not None:
        folder = getattr(process, "ORIGINAL_DIR", None) or ""
        words = {BY_PATH: os.path.normpath(os.path.join(folder, path))}
    else:
        if not _runs(main) and _noted[0]() is main:
            return _noted[1]
        words = {}
    if _noted[1] != words or _noted[0]() is not main:
        _noted = weakref.ref(main), words
    return words


def file() -> str | None:
    """Return the file of a main module that workers import by its path."""
    return how_to_import().get(BY_PATH)


def _runs(main: ModuleType) -> bool:
    """Tell whether the script runs: what has no file then has none by its own will."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        code = frame.f_code
        if frame.f_globals is main.__dict__ and code.co_name == "<module>":
            return not code.co_filename.startswith("<")  # else it is a prompt
        frame = frame.f_back
    return False


how_to_import()
