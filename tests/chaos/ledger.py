"""What the callers know for certain, against which every answer and every session is held."""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
import weakref
from typing import Any, Iterator

from subjects import next_entry


class Ledger:
    """Who holds what, what was answered, and what each session's state can be.

    A session is serial, so who leases it may write here. Its state is one of a few *candidates*:
    more than one only while a caller was struck and never learnt whether his call was committed.
    """

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.tokens = itertools.count(1)
        self._candidates: dict[str, set[tuple[int, int]]] = {}
        self._held: dict[tuple[int, int, int], weakref.ref[Any]] = {}
        self._counting = threading.Lock()

    def count(self, outcome: str) -> None:
        with self._counting:
            self.outcomes[outcome] += 1

    def accuse(self, what: str) -> None:
        self.violations.append(what)

    # -- one owner ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def holding(self, pool_number: int, lease: Any) -> Iterator[None]:
        """Note who has a worker; accuse if somebody else has it."""
        key, mine = (pool_number, lease.worker_id, lease.generation), weakref.ref(lease)
        before = self._held.get(key)
        other = None if before is None else before()
        if other is not None and other._held:
            self.accuse(f"worker {key} is leased twice")
        self._held[key] = mine
        yield
        if self._held.get(key) is not mine:
            self.accuse(f"worker {key} was leased to another meanwhile")

    # -- sessions ----------------------------------------------------------------------------

    def perhaps(self, session: str, token: int) -> set[tuple[int, int]]:
        """Note that a token may be committed from now on; return what was known before."""
        known = self._candidates.setdefault(session, {(0, 0)})
        self._candidates[session] = known | {next_entry(entry, token) for entry in known}
        return known

    def committed(
        self, session: str, token: int, known: set[tuple[int, int]], answer: tuple[int, int]
    ) -> None:
        """Hold the answer to a commit against what was known before."""
        if answer not in {next_entry(entry, token) for entry in known}:
            self.accuse(f"session {session}: after {sorted(known)} token {token} made {answer}")
        self._candidates[session] = {answer}

    def refused(self, session: str, known: set[tuple[int, int]]) -> None:
        """Note that a call failed, so that nothing of it may be committed."""
        self._candidates[session] = known

    def judge(self, session: str, entry: tuple[int, int]) -> None:
        """Hold a session's committed state against what it can be."""
        known = self._candidates.get(session, {(0, 0)})
        if entry not in known:
            self.accuse(f"session {session} is {entry}, and should be one of {sorted(known)}")

    def sessions(self) -> list[str]:
        return sorted(self._candidates)
