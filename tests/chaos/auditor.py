"""Holds what the store has, what workers began and how they ended against what callers were told."""

from __future__ import annotations

import collections
import math
import pickle
import time
from pathlib import Path
from typing import Any, Iterable

from deeds import deeds_of
from fates import NOT_RUN
from journal import Journals

from minipool import SessionError
from minipool.store import SQLiteStore

#: Why the pool itself may end a worker: it was told to be smaller or to close, or the call that
#: was under way had been given too little time on purpose.
OWN_REASONS = ("made smaller", "pool was closed", "'hurried'", "'hang'")
KILLED = -9


class Lock:
    """When the store was locked, in monotonic seconds: perhaps and for certain."""

    def __init__(self) -> None:
        self.wanted = time.monotonic()
        self.since = self.until = self.given_up = math.inf


class Asked:
    """One deed: what was asked for, and what was said of it so far."""

    def __init__(self, life: str, kind: str, key: str) -> None:
        self.life, self.kind, self.key = life, kind, key
        self.answered = False
        self.answer: Any = None
        self.fate: str | None = None  # what the error said that came instead of an answer

    @property
    def again(self) -> bool:
        return self.kind.endswith("again")

    @property
    def runs(self) -> bool:
        """Whether a worker begins it."""
        return self.kind.split()[0] in ("commit", "plain")


class Auditor:
    """Reads the journals of all processes, dead and alive, and judges."""

    def __init__(self, folder: Path) -> None:
        self.violations: list[str] = []
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.locks: list[Lock] = []
        self.begun: collections.Counter[str] = collections.Counter()
        self._store = str(folder / "store" / "sessions.db")
        self._told, self._begun = Journals(folder / "told"), Journals(folder / "begun")
        self._asked: dict[str, Asked] = {}
        self._sessions: dict[str, dict[str, Asked]] = collections.defaultdict(dict)
        self._touched: set[str] = set()
        self._killed: set[tuple[str, int]] = set()  # life, pid
        self._ended: set[str] = set()  # lives that ended in good order

    def accuse(self, what: str) -> None:
        self.violations.append(what)

    # -- reading -----------------------------------------------------------------------------

    def read(self) -> None:
        """Take in what the journals have got since the last time."""
        for life, (word, *facts) in self._told.new_lines():
            getattr(self, "_on_" + word.replace(" ", "_"))(life, *facts)
        for _, (deed,) in self._begun.new_lines():
            self.begun[deed] += 1
            if self.begun[deed] == 2 and not self._asked[deed].again:
                self.accuse(f"{deed} was not to run again, and has begun twice")

    def _on_life(self, life: str, pid: int) -> None:
        self.outcomes["lives"] += 1

    def _on_end(self, life: str) -> None:
        self._ended.add(life)

    def _on_accuse(self, life: str, what: str) -> None:
        self.accuse(f"{life}: {what}")

    def _on_asked(self, life: str, deed: str, kind: str, key: str) -> None:
        asked = self._asked[deed] = Asked(life, kind, f"brief {deed}" if kind == "create" else key)
        if asked.key:
            self._sessions[asked.key][deed] = asked
            self._touched.add(asked.key)

    def _on_answered(self, life: str, deed: str, answer: Any, began: float, ended: float) -> None:
        asked = self._asked[deed]
        if asked.key and any(lock.since < began and ended < lock.until for lock in self.locks):
            self.accuse(f"{deed}, a {asked.kind}, was answered while the store was locked")
        asked.answered, asked.answer = True, answer
        self.outcomes[f"{asked.kind}: answered"] += 1
        self._touched.add(asked.key)

    def _on_refused(
        self, life: str, deed: str, fate: str, kind: str, text: str, began: float, ended: float,
        closing: bool,
    ) -> None:  # fmt: skip
        asked = self._asked[deed]
        asked.fate = fate
        self.outcomes[f"{asked.kind}: {kind}, {fate}"] += 1
        self._touched.add(asked.key)
        if kind == "SessionError" and not closing:
            self._needs_lock(f"{deed}, a {asked.kind}", text, began, ended)

    def _on_not_opened(self, life: str, text: str, began: float, ended: float) -> None:
        self.outcomes["a store was not opened"] += 1
        self._needs_lock(f"{life}: the store could not be opened", text, began, ended)

    def _needs_lock(self, what: str, text: str, began: float, ended: float) -> None:
        if not any(lock.wanted < ended and began < lock.given_up for lock in self.locks):
            self.accuse(f"{what} in {ended - began:.1f} s, and nobody had locked it: {text}")

    def _on_killed(self, life: str, pid: int) -> None:
        self._killed.add((life, pid))
        self.outcomes["workers killed"] += 1

    def _on_ended(self, life: str, pid: int, code: int | None, reason: str, closing: bool) -> None:
        """Judge the end of a worker. One that was told to stop, or was killed by us, may end."""
        self.outcomes["workers ended"] += 1
        if (life, pid) in self._killed:
            if code not in (None, 0, -15, KILLED):
                self.accuse(f"{life}: worker {pid} was killed, and is told to have ended by {code}")
        elif code != 0 and not closing and not any(own in reason for own in OWN_REASONS):
            self.accuse(f"{life}: a healthy worker, {pid}, was ended ({code}): {reason}")

    # -- judging -----------------------------------------------------------------------------

    def audit(self, everything: bool = False) -> None:
        """Hold the store against the journals: the sessions that were used lately, or all."""
        self.read()
        keys = sorted(self._sessions if everything else self._touched)
        self._touched.clear()
        required = {key: _answered(self._sessions[key]) for key in keys}
        began = time.monotonic()
        try:
            store = SQLiteStore(self._store)
        except SessionError as problem:
            return self._needs_lock("the store could not be opened", str(problem), began, math.inf)
        try:
            for key in keys:
                loaded = store.open(key) if everything else store.read(key)
                self.read()  # whatever was committed had been asked for before
                self._judge(key, loaded, required[key])
        except SessionError as problem:
            self.accuse(f"a session of dead owners cannot be had: {problem}")
        finally:
            store.close()
        self.outcomes["audits"] += 1

    def _judge(self, key: str, loaded: Any, required: dict[str, Asked]) -> None:
        """Hold one session, as it was read, against all that was said of it."""
        packed = (loaded[1] if loaded is not None else None) or {}
        state = {name: pickle.loads(data) for name, data in packed.items()}
        if key.startswith("brief"):
            return self._judge_brief(key, loaded is not None, state, required)
        self._judge_deeds(key, state, required)

    def _judge_brief(
        self, key: str, there: bool, state: dict[str, Any], required: dict[str, Asked]
    ) -> None:
        """Hold a session against its own begin and end: whole, or not there."""
        asked = self._sessions[key]
        ends = [each for each in asked.values() if each.kind == "end"]
        if any(each.kind == "end" for each in required.values()):
            if there:
                self.accuse(f"{key} was ended, and is there")
            return
        created = any(each.kind == "create" for each in required.values())
        if created and not there and all(each.fate is not None for each in ends):
            self.accuse(f"{key} was begun, and is not there")
        elif there:
            birth = next(deed for deed, each in asked.items() if each.kind == "create")
            if asked[birth].fate is not None:
                self.accuse(f"{key} was not begun, and is there")
            elif state.get("deeds 0", [None])[0] != birth:
                self.accuse(f"{key} is there without the state it was begun with: {state}")
            self._judge_deeds(key, state, required)

    def _judge_deeds(self, key: str, state: dict[str, Any], required: dict[str, Asked]) -> None:
        try:
            deeds = deeds_of(state)
        except (ValueError, KeyError) as problem:
            return self.accuse(f"{key}: {problem!r}")
        deeds += [name[5:] for name in state if name.startswith("mark ")]
        asked = self._sessions[key]
        for deed, times in collections.Counter(deeds).items():
            if times > 1:
                self.accuse(f"{key}: {deed} was committed {times} times")
            if deed not in asked:
                self.accuse(f"{key}: {deed} is there, and was never asked for")
            elif asked[deed].fate is not None:
                self.accuse(f"{key}: {deed} was refused, and is there")
        for deed, each in required.items():
            if each.kind.startswith("commit") and deeds[each.answer - 1 : each.answer] != [deed]:
                there = deeds.index(deed) + 1 if deed in deeds else "not there"
                self.accuse(
                    f"{key}: {deed} of {each.life} was answered {each.answer}, and is {there} "
                    f"(of {len(deeds)})"
                )
            elif each.kind == "mark" and deed not in deeds:
                self.accuse(f"{key}: the mark {deed} of {each.life} was made, and is not there")

    def judge_all(self, killed: Iterable[str]) -> None:
        """Judge what can only be judged when everything has ended."""
        self.read()
        silent = set(killed)
        for deed, asked in self._asked.items():
            if asked.answered and asked.fate is not None:
                self.accuse(f"{deed} was answered and refused")
            if not asked.answered and asked.fate is None and asked.life not in silent:
                self.accuse(f"{deed} was neither answered nor refused")
            if asked.runs and asked.answered and not self.begun[deed]:
                self.accuse(f"{deed} was answered, and has never begun")
            if asked.fate == NOT_RUN and self.begun[deed]:
                self.accuse(f"{deed}, a {asked.kind}, was said not to have run, and has")

    def ended_well(self, life: str) -> bool:
        """Tell whether an application has found nothing left of its pools, and said so."""
        return life in self._ended


def _answered(session: dict[str, Asked]) -> dict[str, Asked]:
    return {deed: asked for deed, asked in session.items() if asked.answered}
