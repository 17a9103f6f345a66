"""Passage: which threads are on their way between the idle set and a lease.

A slot leaves the idle set in one step and is noted as a lease's in a later one, and the other way
round when it is given back. In between nothing but the local variables of one thread tells whose
it is. A thread may stand there for seconds while others compute. So the manager looks at the
stacks of all threads before it takes a slot for lost: a frame of a function that is registered
here may hold one.

Reading the stacks costs about 50 ns a frame, and is done only when a slot is found neither idle
nor leased. The functions themselves run as they are: registering notes their code and no more.
"""

from __future__ import annotations

import os
import sys
import threading
from types import CodeType, FrameType
from typing import Any, Callable, NamedTuple, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_passing: set[CodeType] = set()  # may hold a slot that is noted nowhere
_waiting: set[CodeType] = set()  # waits for one, and is called by those above
_SURE = 5  # sweeps


def passage(function: F) -> F:
    """Register a function in which a thread may hold a slot that is noted nowhere."""
    _passing.add(function.__code__)
    return function


def passages(room: type) -> None:
    """Register every function of a class."""
    for function in vars(room).values():
        if hasattr(function, "__code__"):
            passage(function)


def waits(*functions: Callable[..., Any]) -> None:
    """Register functions in which a thread waits, so that it holds nothing of this kind yet."""
    _waiting.update(function.__code__ for function in functions)


def passers() -> frozenset[int]:
    """Return the threads, the calling one left out, that may hold a slot that is noted nowhere."""
    frames: dict[int, FrameType] = getattr(sys, "_current_frames", dict)()
    frames.pop(threading.get_ident(), None)
    return frozenset(thread for thread, frame in frames.items() if _may_hold(frame))


def _may_hold(frame: FrameType | None) -> bool:
    """Walk a stack outwards. A thread that waits holds nothing in the frames that led there.

    Any other code of the program ends that: a signal handler may wait in the middle of a passage.
    """
    waiting = False
    while frame is not None:
        code = frame.f_code
        if code in _waiting:
            waiting = True
        elif waiting:
            waiting = code.co_filename.startswith(_PACKAGE)
        elif code in _passing:
            return True
        frame = frame.f_back
    return False


class _Suspect(NamedTuple):
    mark: Any  # what each lease changes
    sweeps: int  # how many in a row have found it so
    passers: frozenset[int]  # the threads that were on their way at each of them


class Suspects:
    """Slots that were found neither idle nor leased, and the threads that may hold them.

    A slot's mark changes with each lease and each hand-over. Whoever holds a slot from one sweep to
    the next, under one mark, is on its way at both; so it is lost when no thread was. While others,
    that came later, are on their way, it is given some sweeps more: it may have been given back in
    between by somebody who made no lease of it.
    """

    def __init__(self) -> None:
        self._suspects: dict[Any, _Suspect] = {}

    def end(self, found: dict[Any, Any]) -> None:
        """End a sweep; `found` is what it found neither idle nor leased: slots and their marks."""
        now = passers() if found else frozenset()  # after the look: whoever had it then is there
        suspects = {}
        for slot, mark in found.items():
            known = self._suspects.get(slot)
            if known is None or known.mark != mark:
                suspects[slot] = _Suspect(mark, 1, now)
            else:
                suspects[slot] = _Suspect(mark, known.sweeps + 1, known.passers & now)
        self._suspects = suspects

    def lost(self, slot: Any, mark: Any) -> bool:
        """Tell whether no living thread can have held the slot since the last sweep."""
        known = self._suspects.get(slot)
        if known is None or known.mark != mark:
            return False
        now = passers()
        return not known.passers & now and (not now or known.sweeps >= _SURE)
