"""Descriptors: how they are closed where an exception may strike between any two steps.

What an interrupt raises comes between two steps of the interpreter. A descriptor that was closed
and not yet forgotten would be closed a second time, when its number may be another file's; one
that was forgotten first would be lost. A chain of C functions is one step.

The owner of a descriptor may keep such a chain from the moment on in which it has it:
`partial(any, map(os.close, iter((fd,))))` closes it once, however often it is called. No function
here makes that chain, because the begin of a function is a step.
"""

from __future__ import annotations

import os
from typing import Iterable


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors in one step."""
    any(map(os.close, fds))
