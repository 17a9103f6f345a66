"""Mutual exclusion and waiting that an exception cannot spoil, wherever it strikes.

What a signal handler or another thread raises comes between two steps of a thread. `with lock` can
be struck when the lock is taken and the block has not begun (CPython 3.9, and 3.14: python/cpython
issue 148874), `lock.acquire()` before a `try` on every version. The lock is then held for ever, by
a thread that does not know of it. `Condition` and `Event` stand on the same statement.

So nothing in this package enters a lock by `with`. A `Guard` calls what is to run alone, and a
`Notice` wakes threads without any lock.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import time
import weakref
from _queue import Empty, SimpleQueue
from typing import Any, Callable, Dict, TypeVar, cast

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Guard:
    """Lets one thread at a time run something.

    The thread that is inside may come in again: a signal handler or a finaliser runs in the midst
    of what it interrupts, and leaves the hold to that. Any thread may call any method. `lock` is an
    RLock that others enter in their own way.

    In a process that was forked while another thread was inside, nobody is: what that thread was
    about to change may be half done there.
    """

    __slots__ = ("__weakref__", "_lock")

    def __init__(self, lock: Any = None) -> None:
        self._lock: Any = threading.RLock() if lock is None else lock
        if lock is None:
            _guards.add(self)

    def run(self, work: Callable[..., T], /, *args: Any) -> T:
        """Return `work(*args)`, called when no other thread is inside."""
        return self._run(-1, work, args)  # type: ignore[return-value]

    def run_within(self, timeout: float, work: Callable[..., T], /, *args: Any) -> T | None:
        """Do the same, if the others leave within `timeout` seconds; else return None."""
        return self._run(timeout, work, args)

    def _run(self, timeout: float, work: Callable[..., T], args: Any) -> T | None:
        lock = self._lock
        if lock._is_owned():
            return work(*args)
        # Struck before the release, the inner block leaves it to the outer one. Neither believes
        # what `acquire` returned, which a strike may have taken away: the lock itself is asked.
        try:
            try:
                return work(*args) if lock.acquire(True, timeout) else None
            finally:
                if lock._is_owned():
                    lock.release()
        finally:
            if lock._is_owned():
                lock.release()


_guards: weakref.WeakSet[Guard] = weakref.WeakSet()


def _free_guards() -> None:
    for guard in tuple(_guards):
        if not guard._lock._is_owned():  # by the thread that has forked, which goes on here
            guard._lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_guards)


def guarded(name: str) -> Callable[[F], F]:
    """Make a method run under the `Guard` that is the attribute `name` of its object."""

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def run(self: Any, *args: Any) -> Any:
            return getattr(self, name).run(method, self, *args)

        return cast(F, run)

    return decorate


class Notice:
    """Wakes threads that wait until something is so.

    Who changes something posts the notice afterwards, which waits for nothing. Who waits hangs up
    a gate first and looks then, so that a change is either seen or heard of.
    """

    __slots__ = ("_gates",)
    _numbers = itertools.count()

    def __init__(self) -> None:
        # Weakly: a strike may keep a thread from taking its gate away.
        self._gates: Dict[int, weakref.ref[SimpleQueue[None]]] = {}

    def post(self) -> None:
        """Have all that wait look again."""
        for number, reference in self._gates.copy().items():
            gate = reference()
            if gate is None:
                self._gates.pop(number, None)
            else:
                gate.put(None)  # may be struck or interrupt itself, and is done or not

    def wait_for(self, condition: Callable[[], Any], timeout: float | None = None) -> bool:
        """Wait until a condition holds; False if `timeout` seconds (None: no limit) ran out first.

        It is looked at in this thread, at each post. What it raises ends the wait.
        """
        if condition():
            return True
        until = None if timeout is None else time.monotonic() + timeout
        gate: SimpleQueue[None] = SimpleQueue()
        number = next(self._numbers)
        try:
            self._gates[number] = weakref.ref(gate)
            while not condition():
                if not _heard(gate, until):
                    return bool(condition())
            return True
        finally:
            self._gates.pop(number, None)


def _heard(gate: SimpleQueue[None], until: float | None) -> bool:
    """Wait for a post, and take all that there are; False: the time is over."""
    try:
        if until is None:
            gate.get()
        else:
            gate.get(True, min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX))
        while not gate.empty():
            gate.get(False)
    except Empty:
        return False
    return True


class Latch:
    """Something that happens once, and that threads wait for."""

    __slots__ = ("_notice", "happened")

    def __init__(self) -> None:
        self.happened = False
        self._notice = Notice()

    def set(self) -> None:
        """Let it have happened. Any thread may call it, more than once; never waits."""
        self.happened = True
        self._notice.post()

    def stir(self) -> None:
        """Have all that wait look again at what else they wait for; never waits."""
        self._notice.post()

    def wait(self, timeout: float | None = None, other: Callable[[], object] = bool) -> bool:
        """Wait until it has happened; False if `timeout` seconds (None: no limit) ran out first.

        Or until `other()` is true, which is looked at whenever somebody calls `stir`.
        """
        return self.happened or self._notice.wait_for(lambda: self.happened or other(), timeout)
