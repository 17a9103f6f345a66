"""The turnstile: which caller gets which slot next, without a lock.

Pure threading; knows nothing of processes. It relies on this alone: one C-level dict operation
(`d[k] = v`, `d.pop(k, None)`, `d.popitem()`, `d.setdefault(k, v)`, `d.copy()`, `list(d)`) happens
whole or not at all, between the steps of other threads. `tuple(d.items())` does not: it makes a
tuple for each item, so the collector, and with it any finaliser, may run in the middle.

* `idle` maps each free slot to the generation of its worker. To remove a slot from it *is* to own
  the slot; a slot cannot be in it twice. A token of an old generation is dropped by its finder.
* `waiters` holds every waiter, oldest first. Each stands in a line as well: in the one of the slot
  that it wants, or in the `general` one, where any slot will do. One that wants a slot only for a
  while stands in both, and keeps its place. A crowd in one line costs the others nothing.
* `Waiter.settle` is the only arbiter of hand-over, timeout, interrupt and close. It is one step:
  the first outcome stays. What is left to do then, to wake the waiter and take it out of the
  lines, may be done by anybody who finds it settled, more than once.
* `handed` notes whose a slot is before the waiter is settled, because that may run much later.
  The waiter is kept weakly: when its thread has dropped it, nobody owns the slot.
* Matching is serial, so that callers are served in the order in which they came. `pump()` marks a
  slot in `dirty` and then tries for the matcher's seat, never waiting for it: a signal handler or
  finaliser that gives back a slot in mid-match must not deadlock. Whoever leaves the seat looks at
  `dirty` once more.
* Each side writes, then reads what the other side writes: enqueue against publish, enqueue
  against close, publish against close. That is why no wake-up is lost.

    1. waiter W: line[t] = W           1. releaser R: idle[s] = g
    2. waiter W: idle? -> pump         2. releaser R: lines? -> pump

  In every order of these four steps, the later of the two writers sees the other one.

* An exception may strike a thread between any two steps. What it held then is found nowhere, and
  the manager fences it. A match it cut short, a seat it left taken, and a waiter it settled and
  did not wake are seen by `sweep`, which the manager calls now and then; where there is nobody to
  call it, the waiters look for themselves.

tests/test_turnstile_model.py runs this very text through every order of its steps, and through
mutants of it: whoever takes a step away sees there what it was for.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from typing import Any, Callable, Dict, List, Tuple

Token = Tuple[Any, Any]  # slot; generation: whatever tells its owners apart, such as a handle

_LOOK = 1.0  # seconds after which a waiter looks around, where nothing else wakes it
_CLOSED, _LEFT = "closed", "left"  # outcomes that bring no slot
_UNSETTLED = (None,)


class Closed(Exception):
    """The turnstile is closed: nothing will be handed out any more."""


class Waiter:
    """One place in the line. `wake` is called once it is settled; rarely, it is called again.

    The default `wake` is for a thread that waits in `Turnstile.take`; an event loop can put its
    own callable there instead, which may raise RuntimeError and no other. The turnstile takes a
    waiter that nobody refers to for dead.
    """

    __slots__ = ("__weakref__", "_gate", "_settled", "key", "taken", "ticket", "wake", "wants")

    def __init__(self, ticket: int, wants: Any = None) -> None:
        self.ticket = ticket
        self.key = wants  # whose line it is in
        self.wants = wants  # this slot only; None: any
        self.taken = False  # its thread has got the slot, and runs
        self._settled: Dict[str, Any] = {}
        self._gate = threading.Lock()
        self._gate.acquire()
        self.wake: Callable[[], None] = self._gate.release

    def settle(self, outcome: Any) -> bool:
        """Settle it, unless that was done already. One step: `setdefault` is atomic."""
        mine = [outcome]
        return self._settled.setdefault("is", mine) is mine

    @property
    def outcome(self) -> Any:
        """What it was settled with; None: nothing yet."""
        return self._settled.get("is", _UNSETTLED)[0]

    @property
    def token(self) -> Token | None:
        """What was handed to it."""
        outcome = self._settled.get("is", _UNSETTLED)[0]
        return None if outcome is _CLOSED or outcome is _LEFT else outcome

    @property
    def closed(self) -> bool:
        """Whether it will never get anything."""
        return self.outcome is _CLOSED

    def wait(self, timeout: float | None) -> bool:
        """Wait until settled; False if the time ran out first."""
        return self._gate.acquire(True, -1 if timeout is None else min(timeout, 1e6))


def _looks(look: float | None) -> float | None:
    """Return how long this thread waits at most before it looks around.

    The main thread always does. Signal handlers run in it, and a signal that comes when it is
    about to wait, and has let go of the interpreter for that, does not interrupt the wait.
    """
    main = threading.main_thread().ident
    return _LOOK if threading.get_ident() == main else look


class Turnstile:
    """Hands out slots, each to one owner at a time, first come first served.

    Any thread may call any method, signal handlers and finalisers included. `on_queue` is called
    by each thread that had to queue, before it waits; if it raises, nobody waits. `on_refused` is
    called with each slot that `publish` did not take, because it was fenced or everything is
    closed: it belongs to the listener. `swept` tells that somebody calls `sweep` now and then.
    """

    def __init__(
        self,
        strategy: str = "lifo",
        on_queue: Callable[[Waiter], object] = lambda waiter: None,
        on_refused: Callable[[Any, Any], object] = lambda slot, generation: None,
        swept: bool = False,
    ) -> None:
        self.idle: Dict[Any, Any] = {}
        self.waiters: Dict[int, Waiter] = {}  # all of them
        self.general: Dict[int, Waiter] = {}  # those that any slot serves, or will
        self.lines: Dict[Any, Dict[int, Waiter]] = {}  # for each slot that was ever waited for
        self.current: Dict[Any, Any] = {}  # slot -> valid generation; written by `admit`, `fence`
        self.handed: Dict[Any, Any] = {}  # slot -> the last waiter it was handed to, weakly
        self.closed = False
        self._offer = self.idle.setdefault  # never in the place of another token
        self._lifo = strategy == "lifo"
        self._pop: Callable[[], Token] = self.idle.popitem if self._lifo else self._pop_oldest
        self._on_queue = on_queue
        self._on_refused = on_refused
        self._look = None if swept else _LOOK
        self._tickets = itertools.count()
        self._dirty: Dict[Any, bool] = {}  # slots to be matched; None: all, with the general line
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
        return self._take_unwanted() if self.waiters and not self.general else None

    def _take_unwanted(self) -> Token | None:
        """Take an idle slot in whose line nobody waits, where nobody waits for any."""
        slots = [] if self.closed else list(self.idle)
        if self._lifo:
            slots.reverse()
        for slot in slots:
            token = None if self.lines.get(slot) else self._pop_valid(slot)
            if token is not None:
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
        """Take this very slot if it is idle and nobody waits that could use it; never waits."""
        if self.waiters and (self.general or self.lines.get(wants)):
            return None
        return None if self.closed else self._pop_valid(wants)

    def take(
        self,
        timeout: float | None,
        wants: Any = None,
        widen_after: float | None = None,
        more: Callable[[], float | None] | None = None,
        more_narrowly: Callable[[], float | None] | None = None,
    ) -> Token | None:
        """Take a slot, queueing for it; None when the time ran out. `timeout` 0 does not wait.

        With `wants` only that very slot will do; after `widen_after` seconds any other as well,
        without losing the place in the line. `more` is asked when the time has run out: the wait
        goes on, at the same place, for as many seconds as it returns. `more_narrowly` is the same
        for `widen_after`.

        Raises:
            Closed: nothing was taken.
            BaseException: whatever a signal handler, `on_queue` or `more` raised; nothing was
                taken.
        """
        if self.closed:
            raise Closed
        token = self.try_take() if wants is None else self.try_take_this(wants)
        if token is not None:
            return token
        until = None
        if timeout is not None:
            if timeout <= 0 and not (self.idle and self.waiters):  # they may not want these
                return None
            until = time.monotonic() + timeout
        waiter = Waiter(next(self._tickets), wants)
        try:
            self._join(waiter, widen_after is not None)
            self._on_queue(waiter)
            if widen_after is None or not self._wait_narrowly(
                waiter, until, widen_after, more_narrowly
            ):
                self._wait(waiter, until, more)
            token = self._outcome(waiter)
        except BaseException:
            self.leave(waiter)
            raise
        waiter.taken = True
        return token

    def enqueue(self, wants: Any = None) -> Waiter:
        """Join the line. Settled already on return, if a slot was free or the turnstile closed."""
        waiter = Waiter(next(self._tickets), wants)
        self._join(waiter, False)
        return waiter

    def _join(self, waiter: Waiter, widens: bool) -> None:
        self.waiters[waiter.ticket] = waiter
        if widens or waiter.key is None:
            self.general[waiter.ticket] = waiter
        if waiter.key is not None:
            self._join_line(waiter)
        if self.closed or (waiter.key is not None and waiter.key not in self.current):
            self._settle_closed(waiter)  # else whoever fences that slot dismisses this waiter
        elif self.idle:
            self.pump(waiter.key)

    def _join_line(self, waiter: Waiter) -> None:
        while True:
            line = self.lines.get(waiter.key)
            if line is None:
                line = self.lines.setdefault(waiter.key, {})
            line[waiter.ticket] = waiter
            if self.lines.get(waiter.key) is line:
                return  # else it was dismissed meanwhile, and nobody looks at it any more

    def _leave_lines(self, waiter: Waiter) -> None:
        self.general.pop(waiter.ticket, None)
        line = self.lines.get(waiter.key)
        if line is not None:
            line.pop(waiter.ticket, None)

    def _remove(self, waiter: Waiter) -> None:
        self._leave_lines(waiter)
        self.waiters.pop(waiter.ticket, None)

    def _wait(
        self,
        waiter: Waiter,
        until: float | None,
        more: Callable[[], float | None] | None = None,
    ) -> bool:
        """Wait until the waiter was settled; False if the time ran out first."""
        seat = None
        look = _looks(self._look)
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            looks = look is not None and (left is None or look < left)
            if waiter.wait(look if looks else left):
                return True
            if looks:
                seat = self.sweep(seat)
                continue
            seconds = None if more is None else more()
            if not seconds:
                return False
            until = time.monotonic() + seconds

    def _wait_narrowly(
        self,
        waiter: Waiter,
        until: float | None,
        seconds: float,
        more: Callable[[], float | None] | None,
    ) -> bool:
        """Wait for the one slot wanted, for a while; then let any do. True: it was settled."""
        soon = time.monotonic() + seconds
        if self._wait(waiter, soon if until is None else min(soon, until), more):
            return True
        waiter.wants = None
        self.pump()
        self._on_queue(waiter)  # any slot would do now, so that a new one would help
        return False

    def _outcome(self, waiter: Waiter) -> Token | None:
        if waiter.settle(_LEFT):
            self._remove(waiter)
            return None  # its time is over
        if waiter.closed:
            raise Closed
        return waiter.token

    def leave(self, waiter: Waiter) -> None:
        """Give up a place in the line, and whatever was handed over meanwhile."""
        if waiter.settle(_LEFT):
            self._remove(waiter)
            return
        token = waiter.token
        if token is not None and not waiter.taken:
            waiter.taken = True
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
            self._on_refused(slot, generation)  # had the closer popped it, it would be the closer's
            return False
        if self.waiters and (self.general or self.lines.get(slot)):
            self.pump(slot)
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
        """Make every token of a slot worthless, and dismiss its line. Manager only."""
        self.current.pop(slot, None)
        self.idle.pop(slot, None)
        self.dismiss(slot)

    def receiver(self, slot: Any) -> Waiter | None:
        """Return the waiter that a slot was handed to, while it lives and has not run yet."""
        reference = self.handed.get(slot)
        waiter: Waiter | None = None if reference is None else reference()
        if waiter is None or waiter.taken:
            return None
        token = waiter.token  # None: it was to be handed over, and that came too late
        return waiter if token is not None and token[0] == slot else None

    def general_waiters(self) -> int:
        """Return how many wait for any slot, so that one more slot would serve them."""
        count = 0
        for waiter in self.general.copy().values():
            if waiter.wants is None:
                count = count + 1
        return count

    def oldest(self) -> Token | None:
        """Return the slot that has been idle for the longest time, without taking it."""
        while True:
            try:
                return next(iter(self.idle.items()), None)
            except RuntimeError:
                continue  # another thread changed the dict under `iter`

    def dismiss(self, wants: Any) -> None:
        """Wake those that wait for a slot that is no more, with Closed; None: those for any."""
        self.handed.pop(wants, None)
        line = self.general if wants is None else self.lines.pop(wants, None)
        if line is not None:
            for waiter in line.copy().values():
                if waiter.wants == wants:
                    self._settle_closed(waiter)

    def close(self) -> list[Token]:
        """Settle every waiter as closed, and return the tokens that were idle."""
        self.closed = True
        for waiter in self.waiters.copy().values():
            self._settle_closed(waiter)
        tokens: List[Token] = []
        while True:
            token = self._pop_wanted(None)
            if token is None:
                return tokens
            tokens.append(token)

    def _settle_closed(self, waiter: Waiter) -> None:
        waiter.settle(_CLOSED)
        self._finish(waiter)

    def _finish(self, waiter: Waiter) -> None:
        """Do what is left to do once a waiter is settled, whoever settled it."""
        self._leave_lines(waiter)
        try:  # noqa: SIM105 (it is on the way of each hand-over)
            waiter.wake()
        except RuntimeError:
            pass  # it was woken before, or the event loop it is for is closed
        self.waiters.pop(waiter.ticket, None)  # last: until then a sweep finds it

    # -- matching ----------------------------------------------------------------------------

    def pump(self, slot: Any = None) -> None:
        """Match a slot, or all that are idle, with those that wait for it. Never waits."""
        self._dirty[slot] = True
        while self._dirty:
            me = object()
            try:
                # An exception may strike between any two steps. Because the seat is known by
                # identity, `finally` tells whether it was taken, even if the answer was lost.
                if self._seat.setdefault("taken", me) is not me:
                    return  # its holder looks at `dirty` when it leaves
                self._match()
            finally:
                if self._seat.get("taken") is me:
                    self._seat.pop("taken", None)  # `sweep` may have been faster

    def _match(self) -> None:
        """Match one of the marked slots."""
        try:
            slot, _ = self._dirty.popitem()
        except KeyError:
            return  # another matcher was faster
        while True:
            waiter = self._next_for(slot)
            token = None if waiter is None else self._pop_valid(slot)
            if token is None:
                return
            if slot is None:
                waiter = self._next_for(token[0])  # maybe an older one, which wants just this
            self._hand_over(token, waiter)
            if slot is not None:
                return  # if it comes again, it is marked again

    def _hand_over(self, token: Token, waiter: Waiter | None) -> None:
        """Give a slot to the one that has waited longest for it, or the next, if that has left."""
        while waiter is not None:
            self.handed[token[0]] = weakref.ref(waiter)
            won = waiter.settle(token)
            self._finish(waiter)
            if won:
                return
            waiter = self._next_for(token[0])
        self.publish(*token)

    def _next_for(self, slot: Any) -> Waiter | None:
        """Return the oldest waiter that a slot would serve; None: that any would."""
        general = self._first_for(self.general, slot)
        line = None if slot is None else self.lines.get(slot)
        if line is None:
            return general
        keyed = self._first_for(line, slot)
        if general is None or (keyed is not None and keyed.ticket < general.ticket):
            return keyed
        return general

    def _first_for(self, line: Dict[int, Waiter], slot: Any) -> Waiter | None:
        for waiter in line.copy().values():
            wants = waiter.wants
            if wants is None or wants == slot:
                return waiter
        return None

    def _pop_valid(self, wants: Any) -> Token | None:
        while True:
            token = self._pop_wanted(wants)
            if token is None or self.current.get(token[0]) == token[1]:
                return token

    def sweep(self, seen: object) -> object:
        """Do what threads that exceptions struck have left undone; return what is in the seat.

        That is known by identity. If it is `seen`, what the last sweep returned, it was left taken
        inside the `finally` of `pump`, and is freed. Two matchers at once are harmless (each step
        is arbitrated); none would be a standstill.
        """
        for waiter in self.waiters.copy().values():
            if waiter.outcome is not None:
                self._finish(waiter)
        holder = self._seat.get("taken")
        if holder is not None and holder is seen:
            self._seat.pop("taken", None)
        if self.waiters and self.idle:
            for slot in list(self.lines):
                if slot in self.idle:
                    self._dirty[slot] = True
            self.pump()
        return self._seat.get("taken")
