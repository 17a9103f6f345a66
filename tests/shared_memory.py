"""The shared memory of a model: immutable, so that it can be kept and compared.

A dict is a tuple of its items in their order. `Memory` carries out one step as CPython does, whole
or not at all, and checks with each what must hold at every moment: one owner for a slot, nothing
taken under an old generation, each waiter settled once, first come, first served.
"""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple, Sequence

from stepwise import Label, Line, Raised, Ref, Stopped


class Violation(AssertionError):
    """A promise of the turnstile was broken; the schedule that breaks it is in the message."""


class Info(NamedTuple):
    """What there is to know of a waiter."""

    wants: Any = None
    outcome: Any = None
    taken: bool = False
    awake: bool = False

    @property
    def token(self) -> Any:
        return self.outcome if isinstance(self.outcome, tuple) else None

    @property
    def closed(self) -> bool:
        return bool(self.outcome == "closed")


class Shared(NamedTuple):
    """Everything threads can see of each other; and, below, what only the checker sees."""

    idle: tuple[tuple[int, int], ...]
    waiters: tuple[tuple[int, Ref], ...]
    general: tuple[tuple[int, Ref], ...]
    lines: tuple[tuple[Any, Line], ...]
    queues: tuple[tuple[Line, tuple[tuple[int, Ref], ...]], ...]  # what is in each line
    handed: tuple[tuple[Any, Ref], ...]
    current: tuple[tuple[int, int], ...]
    seat: tuple[tuple[str, Label], ...]
    closed: bool
    dirty: tuple[tuple[Any, bool], ...]
    info: tuple[Info, ...]
    owned: frozenset[tuple[int, int]]
    refused: frozenset[tuple[int, int]]
    fenced: frozenset[tuple[int, int]]


def _without(pairs: Any, key: Any) -> Any:
    return tuple(pair for pair in pairs if pair[0] != key)


def _pairs(shared: Shared, name: Any) -> Any:
    return value_of(shared.queues, name) if isinstance(name, Line) else getattr(shared, name)


def _having(shared: Shared, name: Any, pairs: Any) -> Shared:
    if not isinstance(name, Line):
        return shared._replace(**{name: pairs})
    queues = tuple((line, pairs if line == name else queue) for line, queue in shared.queues)
    return shared._replace(queues=queues)


def value_of(pairs: Any, key: Any) -> Any:
    for each, value in pairs:
        if each == key:
            return value
    return None


class Memory:
    """Carries out steps. Each method returns the shared memory afterwards and the result."""

    def __init__(self, fair: bool) -> None:
        self._fair = fair

    def run(self, shared: Shared, step: Any) -> tuple[Shared, Any]:
        return getattr(self, "do_" + step[0])(shared, *step[1:])

    # dicts

    def do_pop(self, shared: Shared, name: str, key: Any) -> tuple[Shared, Any]:
        pairs = _pairs(shared, name)
        found = value_of(pairs, key)
        if found is None:
            return shared, None
        if name == "current":
            shared = shared._replace(fenced=shared.fenced | {(key, found)})
        return _having(shared, name, _without(pairs, key)), found

    def do_popitem(self, shared: Shared, name: str) -> tuple[Shared, Any]:
        pairs = _pairs(shared, name)
        if not pairs:
            return shared, Raised(KeyError)
        return _having(shared, name, pairs[:-1]), pairs[-1]

    def do_get(self, shared: Shared, name: str, key: Any) -> tuple[Shared, Any]:
        return shared, value_of(_pairs(shared, name), key)

    def do_setdefault(self, shared: Shared, name: str, key: Any, value: Any) -> Any:
        pairs = _pairs(shared, name)
        found = value_of(pairs, key)
        if found is not None:
            return shared, found
        if name == "lines":
            value = Line(key, sum(line.slot == key for line, _ in shared.queues))
            shared = shared._replace(queues=tuple(sorted((*shared.queues, (value, ())))))
        return self.do_set(shared, name, key, value)[0], value

    def do_set(self, shared: Shared, name: str, key: Any, value: Any) -> tuple[Shared, Any]:
        if name == "idle" and (key, value) in shared.owned:
            raise Violation(f"slot {key} is offered while somebody owns it")
        pairs = _pairs(shared, name)
        if value_of(pairs, key) is None:
            pairs += ((key, value),)
        else:
            pairs = tuple((k, value if k == key else v) for k, v in pairs)
        if name in ("current", "lines", "handed"):
            pairs = tuple(sorted(pairs))
        return _having(shared, name, pairs), None

    def do_delete(self, shared: Shared, name: str, key: Any) -> tuple[Shared, Any]:
        pairs = _pairs(shared, name)
        if value_of(pairs, key) is None:
            return shared, Raised(KeyError)
        return _having(shared, name, _without(pairs, key)), None

    def do_truth(self, shared: Shared, name: str) -> tuple[Shared, Any]:
        return shared, bool(_pairs(shared, name))

    def do_contains(self, shared: Shared, name: str, key: Any) -> tuple[Shared, Any]:
        return shared, value_of(_pairs(shared, name), key) is not None

    def do_copy(self, shared: Shared, name: str) -> tuple[Shared, Any]:
        return shared, _pairs(shared, name)

    def do_size(self, shared: Shared, name: Any) -> tuple[Shared, Any]:
        return shared, len(_pairs(shared, name))

    def do_first(self, shared: Shared, name: str, size: int) -> tuple[Shared, Any]:
        pairs = _pairs(shared, name)
        if len(pairs) != size:
            return shared, Raised(RuntimeError)
        return shared, pairs[0][0] if pairs else Raised(Stopped)

    # flags

    def do_read(self, shared: Shared, flag: str) -> tuple[Shared, Any]:
        return shared, getattr(shared, flag)

    def do_write(self, shared: Shared, flag: str, value: Any) -> tuple[Shared, Any]:
        return shared._replace(**{flag: value}), None

    # waiters

    def do_ticket(self, shared: Shared) -> tuple[Shared, Any]:
        return shared._replace(info=shared.info + (Info(),)), len(shared.info)

    def do_waiter(self, shared: Shared, ticket: int, wants: Any) -> tuple[Shared, Any]:
        return self._tell(shared, ticket, wants=wants), None

    def do_wread(self, shared: Shared, ticket: int, flag: str) -> tuple[Shared, Any]:
        return shared, getattr(shared.info[ticket], flag)

    def do_wwrite(self, shared: Shared, ticket: int, flag: str, value: Any) -> tuple[Shared, Any]:
        return self._tell(shared, ticket, **{flag: value}), None

    def do_settle(self, shared: Shared, ticket: int, outcome: Any) -> tuple[Shared, Any]:
        if shared.info[ticket].outcome is not None:
            return shared, False
        return self._tell(shared, ticket, outcome=outcome), True

    def do_acquire(self, shared: Shared, ticket: int, timeout: float) -> tuple[Shared, Any]:
        return self._tell(shared, ticket, awake=False), True

    def do_release(self, shared: Shared, ticket: int) -> tuple[Shared, Any]:
        if shared.info[ticket].awake:
            return shared, Raised(RuntimeError)
        return self._tell(shared, ticket, awake=True), None

    def _tell(self, shared: Shared, ticket: int, **words: Any) -> Shared:
        info = list(shared.info)
        info[ticket] = info[ticket]._replace(**words)
        return shared._replace(info=tuple(info))

    # what only the checker sees

    def do_begin(self, shared: Shared) -> tuple[Shared, Any]:
        return shared, None

    def do_end(self, shared: Shared, token: Any) -> tuple[Shared, Any]:
        if token is None:
            return shared, None
        if token in shared.owned:
            raise Violation(f"slot {token[0]} has two owners")
        return shared._replace(owned=shared.owned | {token}), None

    def do_disown(self, shared: Shared, token: Any) -> tuple[Shared, Any]:
        return shared._replace(owned=shared.owned - {token}), None

    def do_refused(self, shared: Shared, slot: int, generation: int) -> tuple[Shared, Any]:
        return self.do_returned(shared, ((slot, generation),))

    def do_returned(self, shared: Shared, tokens: Any) -> tuple[Shared, Any]:
        for token in tokens:
            if token in shared.refused or token in shared.owned:
                raise Violation(f"slot {token[0]} is handed to the manager and to another")
        return shared._replace(refused=shared.refused.union(tokens)), None

    def do_lost(self, shared: Shared) -> tuple[Shared, Any]:
        return shared, (shared.closed, tuple(lost_tokens(shared)))


def lost_tokens(shared: Shared) -> Iterator[tuple[int, int]]:
    """Yield each valid token that is neither idle nor owned nor the manager's."""
    for token in shared.current:
        if token not in shared.idle and token not in shared.owned | shared.refused:
            yield token


def waiting(shared: Shared) -> tuple[tuple[int, Ref], ...]:
    """Return those that stand in a line and have not been settled."""
    lines = [shared.general, *(value_of(shared.queues, line) for _, line in shared.lines)]
    both = sorted({pair for line in lines for pair in line})
    return tuple((ticket, ref) for ticket, ref in both if shared.info[ticket].outcome is None)


def check_order(shared: Shared, older: Sequence[int], slot: int) -> None:
    """Check that nobody of `older`, who are still in the line, could have used the slot."""
    for ticket, ref in waiting(shared):
        if ticket in older and ref.wants in (None, slot):
            raise Violation(f"waiter {ticket} is overtaken: slot {slot} goes to one who came later")


def check_noted(shared: Shared, ticket: int) -> None:
    """Check that a slot that was handed to a waiter which has not run yet is noted as its own."""
    token = shared.info[ticket].token
    if token is not None and token in shared.current:
        note = value_of(shared.handed, token[0])
        if note is None or note.ticket != ticket:
            raise Violation(f"slot {token[0]} is handed to waiter {ticket}, and noted nowhere")
