"""Absence: what a worker does not have though its parent has it, and what helps.

A function goes to a worker by its name, and so does the class of its object. The worker finds it
in its own memory, which is not that of the parent: what was defined under the main script's guard
is not there, nor what was defined, or found through `sys.path`, after the worker was started.
Imported where something is absent.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from ..errors import CallMismatch, PoolStartError

_ANEW = "the worker was started before: `pool.drain()` replaces it, or make a new pool"


def of_function(name: str, error: BaseException, forked: bool) -> CallMismatch | None:
    """Return the error for a function that this worker does not find; None if it is another's.

    `error` is what looking it up raised: the code of a module may raise the same of its own.
    """
    module, _, path = name.partition(":")
    if isinstance(error, ModuleNotFoundError):
        missing = error.name or ""
        if not f"{module}.".startswith(f"{missing}."):
            return None  # which the module itself imports
        text = f"the worker has no function {path!r}: {error}"
        return CallMismatch(text, target=name, lacks=missing)
    if not isinstance(error, AttributeError) or module not in sys.modules:
        return None
    if _has(sys.modules[module], path):
        return None
    return CallMismatch(
        f"the worker has no function {path!r} in {_shown(module)}: {_remedy(module, forked)}; "
        f"nothing has run",
        target=name,
    )


def with_remedy(error: CallMismatch) -> CallMismatch:
    """Complete, in the parent, an error about a module that a worker lacks: it knows the place."""
    from .whereabouts import add_whereabouts

    known = ModuleNotFoundError(str(error), name=error.__dict__.pop("lacks"))
    add_whereabouts(known)
    more = "" if str(known) != str(error) else f"; if `sys.path` was changed since, {_ANEW}"
    error.args = (f"{known}{more}; nothing of the call has run",)
    return error


def of_class(error: AttributeError) -> PoolStartError | None:
    """Return the error for a class that is not in its module here; None if it is of another kind.

    `error` is what unpickling it has raised. Only pickle's own has no code below that; it tells
    module and name in its text, differently in each Python.
    """
    trace = error.__traceback__
    if trace is None or trace.tb_next is not None:
        return None
    named = re.findall(r"'([\w.]+)'", str(error))
    module = next((part for part in named if part in sys.modules), None)
    name = next((part for part in named if part != module), None)
    if module is None or name is None:
        return None
    return PoolStartError(f"the worker has no {name!r} in {_shown(module)}: {_place(module)}")


def of_method(owner: Any, target: Any, name: str) -> CallMismatch:
    """Build the error for an attribute that was to be called as a method, or function."""
    kind = type(owner).__name__
    what = f"`{name}` is not a function" if ":" in name else f"{kind}.{name} is not a method"
    return CallMismatch(
        f"{what}, but an object of type {type(target).__name__!r}, which cannot be called; nothing "
        f"has run; call a method that returns it",
        target=name,
    )


def _remedy(module: str, forked: bool) -> str:
    half = half_imported(module)
    if half:
        return half
    if forked:
        return (
            "it was forked before that was defined: `pool.drain()` replaces it, or make a new pool"
        )
    return f"{_place(module)}; if it is there and was added since, {_ANEW}"


def half_imported(module: str) -> str:
    """Say that a module has not all of its names yet, if so it is; else return ""."""
    if not getattr(getattr(sys.modules[module], "__spec__", None), "_initializing", False):
        return ""
    return (
        f"{module!r} has not been imported to its end: a worker that is forked meanwhile has what "
        f"was there by then, so open the pool below that, or in a function"
    )


def _place(module: str) -> str:
    """Say where something must be defined for workers to find it."""
    if module in ("__main__", "__mp_main__"):
        return (
            "define it above the guard `if __name__ == '__main__':`, at the top of the main "
            "script, not under it"
        )
    return "define it at the top of that module, on no condition"


def _shown(module: str) -> str:
    return "`__main__`" if module == "__mp_main__" else f"`{module}`"


def _has(start: Any, path: str) -> bool:
    try:
        for part in path.split("."):
            start = getattr(start, part)
    except AttributeError:
        return False
    return True
