"""The turnstile: who gets which slot next, without a lock.

Pure threading; knows nothing of processes. It relies on this alone: one C-level dict operation
(`d[k] = v`, `d.pop(k, None)`, `d.popitem()`, `d.setdefault(k, v)`, `d.copy()`, `list(d)`) happens
whole or not at all, between the steps of other threads. `tuple(d.items())` does not: it makes a
tuple for each item, so the collector, and with it any finaliser, may run in the middle.

* `idle` maps each free slot to the generation of its worker. To remove a slot from it *is* to own
  the slot; a slot cannot be in it twice. A token of an old generation is dropped by its finder.
* `waiters` holds who is queued, oldest first. `waiters.pop(ticket, None)` is the only arbiter of
  hand-off, timeout, interrupt and close: who pops, settles. A waiter who comes too late for his
  own pop waits for the settlement, and takes it (a late success) or gives it back.
* Matching is serial, so that who came first is served first. `pump()` sets `dirty` and then tries
  for the matcher's seat, never waiting for it: a signal handler or finaliser that gives back a
  slot in mid-match must not deadlock. Who leaves the seat looks at `dirty` once more.
* Each side writes, then reads what the other side writes: enqueue against publish, enqueue
  against close, publish against close. That is why no wake-up is lost.

    1. waiter W: waiters[t] = W        1. releaser R: idle[s] = g
    2. waiter W: idle? -> pump         2. releaser R: waiters? -> pump

  In every order of these four steps, the later of the two writers sees the other one.

* An exception may strike a thread between any two steps. What it held then is found nowhere, and
  the manager fences it; a match it cut short, or a seat it left taken, he sees at his next look
  (`unseat`); a waiter it had popped and not settled looks for himself (`_wait`) and joins again.

tests/test_turnstile_model.py runs this very text through every order of its steps, and through
mutants of it: who takes a step away sees there what it was for.
"""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any, Callable, Dict, List, Tuple

Token = Tuple[Any, Any]  # slot; generation: whatever tells its owners apart, such as a handle

_SETTLEMENT = 1.0  # seconds to wait for one who popped our ticket; he is a few steps from done
_LOOK = 1.0  # seconds after which a sleeping waiter looks: was he forgotten, did a signal come?


class Closed(Exception):
    """The turnstile is closed: nothing will be handed out any more."""


class Waiter:
    """One place in the line. `wake` is called, once, after `token` or `closed` was set.

    The default `wake` is for a thread that waits in `Turnstile.take`; an event loop can put its
    own callable there instead.
    """

    __slots__ = ("_gate", "closed", "ticket", "token", "wake", "wants")

    def __init__(self, ticket: int, wants: Any = None) -> None:
        self.ticket = ticket
        self.wants = wants  # this slot only; None: any
        self.token: Token | None = None
        self.closed = False
        self._gate = threading.Lock()
        self._gate.acquire()
        self.wake: Callable[[], None] = self._gate.release

    def wait(self, timeout: float | None) -> bool:
        """Wait until settled; False if the time ran out first."""
        return self._gate.acquire(True, -1 if timeout is None else min(timeout, 1e6))


class Turnstile:
    """Hands out slots, each to one owner at a time, first come first served.

    Any thread may call any method, signal handlers and finalisers included. `on_queue` is called
    by each thread that had to queue, before it waits; if it raises, nobody waits. `on_refused` is
    called with each slot that `publish` did not take, because it was fenced or everything is
    closed: it belongs to who listens.
    """

    def __init__(
        self,
        strategy: str = "lifo",
        on_queue: Callable[[Waiter], object] = lambda waiter: None,
        on_refused: Callable[[Any, Any], object] = lambda slot, generation: None,
    ) -> None:
        self.idle: Dict[Any, Any] = {}
        self.waiters: Dict[int, Waiter] = {}
        self.current: Dict[Any, Any] = {}  # slot -> valid generation; written by `admit`, `fence`
        self.closed = False
        self._offer = self.idle.setdefault  # never in the place of another token
        self._pop: Callable[[], Token] = (
            self.idle.popitem if strategy == "lifo" else self._pop_oldest
        )
        self._on_queue = on_queue
        self._on_refused = on_refused
        self._tickets = itertools.count()
        self._dirty = False
        self._seat: Dict[str, object] = {}  # the matcher's seat: held by identity, never waited for

    # -- taking ------------------------------------------------------------------------------

    def try_take(self) -> Token | None:
        """Take an idle slot if there is one and nobody waits for it; never waits."""
        pop = self._pop  # CPython 3.11 is slow to call an attribute that is no method
        while not self.waiters and not self.closed:
            try:
                token = pop()
            except KeyError:
                return None
            if self.current.get(token[0]) is token[1]:
                return token
        return None

    def _pop_oldest(self) -> Token:
        while True:
            try:
                slot = next(iter(self.idle))
            except StopIteration:
                raise KeyError("nothing is idle") from None
            except RuntimeError:
                continue  # another thread changed the dict under `iter`
            generation = self.idle.pop(slot, None)
            if generation is not None:  # else another thread was faster
                return slot, generation

    def _pop_wanted(self, wants: Any) -> Token | None:
        if wants is not None:
            generation = self.idle.pop(wants, None)
            return None if generation is None else (wants, generation)
        try:
            return self._pop()
        except KeyError:
            return None

    def try_take_this(self, wants: Any) -> Token | None:
        """Take this very slot if it is idle and nobody waits; never waits."""
        return None if self.waiters or self.closed else self._pop_valid(wants)

    def take(
        self, timeout: float | None, wants: Any = None, widen_after: float | None = None
    ) -> Token | None:
        """Take a slot, queueing for it; None when the time ran out. `timeout` 0 does not wait.

        With `wants` only that very slot will do; after `widen_after` seconds any other as well,
        without losing the place in the line.

        Raises:
            Closed: nothing was taken.
            BaseException: whatever a signal handler or `on_queue` raised; nothing was taken.
        """
        if self.closed:
            raise Closed
        token = self.try_take() if wants is None else self.try_take_this(wants)
        if token is not None:
            return token
        until = None
        if timeout is not None:
            if timeout <= 0 and not (self.idle and self.waiters):  # who waits may not want these
                return None
            until = time.monotonic() + timeout
        waiter = Waiter(next(self._tickets), wants)
        try:
            self._join(waiter)
            self._on_queue(waiter)
            in_time = widen_after is not None and self._wait_narrowly(waiter, until, widen_after)
            in_time = in_time or self._wait(waiter, until)
            token = self._outcome(waiter)
        except BaseException:
            self.leave(waiter)
            raise
        if token is None and in_time:  # struck by an exception, he who popped us never settled
            return self.take(None if until is None else until - time.monotonic(), wants)
        return token

    def enqueue(self, wants: Any = None) -> Waiter:
        """Join the line. Settled already on return, if a slot was free or the turnstile closed."""
        waiter = Waiter(next(self._tickets), wants)
        self._join(waiter)
        return waiter

    def _join(self, waiter: Waiter) -> None:
        self.waiters[waiter.ticket] = waiter
        if self.closed or (waiter.wants is not None and waiter.wants not in self.current):
            self._settle_closed(waiter.ticket)  # else who fences that slot dismisses this waiter
        elif self.idle:
            self.pump()

    def _wait(self, waiter: Waiter, until: float | None) -> bool:
        """Wait until the waiter was popped by who settles it; False if the time ran out first."""
        while True:
            left = _LOOK if until is None else max(0.0, until - time.monotonic())
            if waiter.wait(min(left, _LOOK)):
                return True
            if waiter.ticket not in self.waiters:
                return True  # not woken yet; or never, if an exception struck who should
            if left < _LOOK:
                return False

    def _wait_narrowly(self, waiter: Waiter, until: float | None, seconds: float) -> bool:
        """Wait for the one slot wanted, for a while; then let any do. True: it was settled."""
        soon = time.monotonic() + seconds
        if self._wait(waiter, soon if until is None else min(soon, until)):
            return True
        waiter.wants = None
        self.pump()
        self._on_queue(waiter)  # any slot would do now, so that a new one would help
        return False

    def _outcome(self, waiter: Waiter) -> Token | None:
        if self.waiters.pop(waiter.ticket, None) is not None:
            return None  # timed out, and nobody else will settle it
        if waiter.token is None and not waiter.closed:
            waiter.wait(_SETTLEMENT)  # popped by another thread, which is about to settle it
        if waiter.closed:
            raise Closed
        return waiter.token

    def leave(self, waiter: Waiter) -> None:
        """Give up a place in the line, and whatever was handed over meanwhile."""
        if self.waiters.pop(waiter.ticket, None) is None:
            if waiter.token is None and not waiter.closed:
                waiter.wait(_SETTLEMENT)
            if waiter.token is not None:
                token, waiter.token = waiter.token, None
                self.publish(*token)

    # -- giving back -------------------------------------------------------------------------

    def admit(self, slot: Any, generation: Any) -> None:
        """Make `generation` the valid one of a slot; `publish` offers it then. Manager only."""
        self.current[slot] = generation

    def publish(self, slot: Any, generation: Any) -> bool:
        """Offer a slot: the one way into `idle`. False if it was refused."""
        if self.current.get(slot) is not generation:
            self._on_refused(slot, generation)  # fenced
            return False
        offer = self._offer  # see `try_take`
        if offer(slot, generation) is not generation:
            return self._publish_again(slot, generation)
        if self.closed and self.idle.pop(slot, None) is not None:
            self._on_refused(slot, generation)  # had the closer popped it, it would be his
            return False
        if self.waiters:
            self.pump()
        return True

    def _publish_again(self, slot: Any, generation: Any) -> bool:
        """Offer a slot that has a token in `idle` already: one of the two is of an old worker.

        A releaser may sleep between its look at `current` and its offer until its worker is dead
        and the next one offered. It must not put its token in the place of the valid one.
        """
        found = self.idle.pop(slot, None)
        if found is None or self.current.get(slot) != found:
            return self.publish(slot, generation)
        self._on_refused(slot, generation)
        self.publish(slot, found)
        return False

    def claim(self, slot: Any, generation: Any) -> bool:
        """Take this very slot out of `idle`, for a probe or to retire it; never waits."""
        found = self.idle.pop(slot, None)
        if found is not None and found != generation:
            if self.current.get(slot) == found:
                self.publish(slot, found)  # it is the caller who is behind
            return False  # else a leftover of an older generation, dropped
        return found is not None and self.current.get(slot) == generation

    def fence(self, slot: Any) -> None:
        """Make every token of a slot worthless, whoever holds one. Manager only."""
        self.current.pop(slot, None)
        self.idle.pop(slot, None)

    def oldest(self) -> Token | None:
        """Return the slot that has been idle for the longest time, without taking it."""
        while True:
            try:
                return next(iter(self.idle.items()), None)
            except RuntimeError:
                continue  # another thread changed the dict under `iter`

    def general_waiters(self) -> int:
        """Count the waiters that any slot would do for."""
        found: List[int] = []
        for ticket, waiter in self.waiters.copy().items():
            if waiter.wants is None:
                found.append(ticket)
        return len(found)

    def dismiss(self, wants: Any) -> None:
        """Wake who waits for a slot that is no more, with Closed."""
        for ticket, waiter in self.waiters.copy().items():
            if waiter.wants == wants:
                self._settle_closed(ticket)

    def close(self) -> list[Token]:
        """Settle every waiter as closed, and return the tokens that were idle."""
        self.closed = True
        for ticket in list(self.waiters):
            self._settle_closed(ticket)
        tokens: List[Token] = []
        while True:
            token = self._pop_wanted(None)
            if token is None:
                return tokens
            tokens.append(token)

    def _settle_closed(self, ticket: int) -> None:
        waiter = self.waiters.pop(ticket, None)
        if waiter is not None:
            waiter.closed = True
            waiter.wake()

    # -- matching ----------------------------------------------------------------------------

    def pump(self) -> None:
        """Match waiters with idle slots until nothing is left to match. Never waits."""
        self._dirty = True
        while self._dirty:
            me = object()
            try:
                # An exception may strike between any two steps. Because the seat is known by
                # identity, `finally` tells whether it was taken, even if the answer was lost.
                if self._seat.setdefault("taken", me) is not me:
                    return  # its holder looks at `dirty` when he leaves
                self._dirty = False
                self._match()
            finally:
                if self._seat.get("taken") is me:
                    self._seat.pop("taken", None)  # `unseat` may have been faster

    def _match(self) -> None:
        wanted: List[int] = []  # by those whom we found nothing for
        for ticket, waiter in self.waiters.copy().items():
            token = self._pop_valid(waiter.wants)
            if token is None:
                if waiter.wants is None:
                    return
                wanted.append(waiter.wants)
                continue
            if token[0] in wanted:  # it came since we looked: `publish` makes us begin again
                self.publish(*token)
                return
            if self.waiters.pop(ticket, None) is None:
                self.publish(*token)  # he timed out or was interrupted meanwhile
                continue
            waiter.token = token
            waiter.wake()

    def _pop_valid(self, wants: Any) -> Token | None:
        while True:
            token = self._pop_wanted(wants)
            if token is None or self.current.get(token[0]) == token[1]:
                return token

    def unseat(self, seen: object) -> object:
        """Free the matcher's seat if `seen` still sits there; return who does. Manager only.

        An exception thrown into a matching thread cuts the match short, and inside the `finally`
        of `pump` it can leave the seat taken. Two matchers at once are harmless (each step is
        arbitrated); none would be a standstill.
        """
        holder = self._seat.get("taken")
        if holder is not None and holder is seen:
            self._seat.pop("taken", None)
        if self.waiters and self.idle:
            self.pump()
        return self._seat.get("taken")
