"""Descriptors: how they are closed where an exception may strike between any two steps.

What an interrupt raises comes between two steps of the interpreter. A descriptor that was closed
and not yet forgotten would be closed a second time, when its number may be another file's; one
that was forgotten first would be lost. A chain of C functions is one step.
"""

from __future__ import annotations

import functools
import os
from typing import Callable, Iterable


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors in one step."""
    any(map(os.close, fds))


def closer(*fds: int) -> Callable[[], object]:
    """Return what closes descriptors in one step: once, however often it is called."""
    return functools.partial(any, map(os.close, iter(fds)))
