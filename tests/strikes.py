"""Exceptions raised in the middle of a function, where the interpreter lets an interrupt in."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Callable, Collection, Iterable, Iterator


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


class Blow:
    """Raises a `Strike` at one step of what is done within it, in the thread that does it.

    Steps are the begin of each function of `files`, and each return of a call to one, which is
    where CPython raises what a signal or another thread wants raised.
    """

    def __init__(self, step: int, files: Collection[Any]) -> None:
        self._left, self._files = step, files
        # Kept: one that strikes a finaliser is forgotten by CPython, which may be about to call it.
        self._profile = self.profile

    @property
    def fell(self) -> bool:
        return self._left < 0

    def __enter__(self) -> Blow:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.setprofile(None)

    def profile(self, frame: Any, event: str, _: Any) -> None:
        if "__del__" in (frame.f_code.co_name, frame.f_back and frame.f_back.f_code.co_name):
            return  # of the standard library: what it had to close would be lost
        if event == "return":
            frame = frame.f_back
        if (
            event in ("call", "return", "c_return")
            and frame
            and frame.f_code.co_filename in self._files
        ):
            self._left -= 1
            if self._left == -1:
                raise Strike


def files_of(modules: Iterable[Any]) -> set[Any]:
    return {module.__file__ for module in modules}


def strike_everywhere(action: Callable[[], Any], *modules: Any) -> int:
    """Do `action` again and again, struck one step later each time, until it is not struck.

    Struck in functions of `modules`. Returns how often it was struck.
    """
    files = files_of(modules)
    for strikes in range(10_000):
        blow = Blow(strikes, files)
        with contextlib.suppress(Strike), blow:
            action()
        if not blow.fell:  # else it was struck, maybe in a finaliser, of which a warning is seen
            return strikes
    raise AssertionError("it never ends")
