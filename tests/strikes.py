"""Exceptions raised in the middle of a function, where the interpreter lets an interrupt in."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Callable, Iterator


class Strike(BaseException):
    """What no code expects."""


@contextlib.contextmanager
def unstruck() -> Iterator[None]:
    """Let a part of an action alone."""
    profile = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(profile)


def strike_everywhere(action: Callable[[], Any], *modules: Any) -> int:
    """Do `action` again and again, struck one step later each time, until it is not struck.

    Struck in functions of `modules`, as they begin and as a call returns to them, which is where
    CPython raises what a signal or another thread wants raised. Returns how often it was struck.
    """
    files = {module.__file__ for module in modules}
    for strikes in range(10_000):
        left = strikes

        def profile(frame: Any, event: str, _: Any) -> None:
            nonlocal left
            if "__del__" in (frame.f_code.co_name, frame.f_back.f_code.co_name):
                return  # of the standard library: what it had to close would be lost
            if event == "return":
                frame = frame.f_back
            if event in ("call", "return", "c_return") and frame.f_code.co_filename in files:
                left -= 1
                if left == -1:
                    raise Strike

        try:
            with contextlib.suppress(Strike):
                sys.setprofile(profile)
                action()
        finally:
            sys.setprofile(None)
        if left >= 0:  # else it was struck, maybe in a finaliser, of which only a warning is seen
            return strikes
    raise AssertionError("it never ends")
