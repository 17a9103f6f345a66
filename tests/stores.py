"""A session store in memory for tests, which notes what it is asked, by which thread."""

from __future__ import annotations

import threading
from typing import Any, Callable, Mapping

from minipool import SessionBusy, SessionError

Loaded = "tuple[int, dict[str, bytes] | None]"


class NotingStore:
    """Keeps sessions in a dict. `before` is called as each method begins, with its name and key."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[int, dict[str, bytes]]] = {}
        self.taken: set[str] = set()  # by another process that lives
        self.ours: set[str] = set()  # which no other process could use
        self.asked: list[tuple[str, str]] = []  # method, thread
        self.used: list[dict[str, float]] = []
        self.closed = threading.Event()
        self.doubted: set[str] = set()  # what is done and then refused
        self.before: Callable[[str, str], object] = lambda method, key: None

    def _begin(self, method: str, key: str = "") -> None:
        self.asked.append((method, threading.current_thread().name))
        self.before(method, key)

    def _doubt(self, method: str) -> None:
        if method in self.doubted:
            raise SessionError(f"{method} may have been done", in_doubt=True)

    def _refuse_taken(self, key: str) -> None:
        if key in self.taken:
            raise SessionBusy(f"session {key!r} is another's", session_id=key, owner_pid=1)

    def open(self, key: str) -> Any:
        self._begin("open", key)
        self._refuse_taken(key)
        found = self.kept.get(key)
        self.kept.setdefault(key, (0, {}))
        self.ours.add(key)
        self._doubt("open")
        return None if found is None else (found[0], dict(found[1]))

    def create(self, key: str, state: Mapping[str, bytes]) -> bool:
        self._begin("create", key)
        if key in self.kept:
            return False
        self.kept[key] = (int(bool(state)), dict(state))
        self.ours.add(key)
        return True

    def has(self, key: str) -> bool:
        self._begin("has", key)
        return key in self.kept

    def read(self, key: str) -> Any:
        self._begin("read", key)
        found = self.kept.get(key)
        return None if found is None else (found[0], dict(found[1]))

    def commit(self, key: str, version: int, changes: Mapping[str, bytes | None]) -> None:
        self._begin("commit", key)
        self._refuse_taken(key)
        before, state = self.kept[key]
        assert version == before + 1, f"{key} goes from {before} to {version}"
        changed = {name: changes.get(name, data) for name, data in {**state, **changes}.items()}
        self.kept[key] = (version, {n: data for n, data in changed.items() if data is not None})
        self._doubt("commit")

    def delete(self, key: str) -> None:
        self._begin("delete", key)
        if key not in self.taken:
            self.kept.pop(key, None)
            self.ours.discard(key)
        self._doubt("delete")

    def let_go(self, key: str) -> None:
        self._begin("let_go", key)
        self.ours.discard(key)

    def beat(self, used: Mapping[str, float]) -> None:
        self._begin("beat")
        self.used.append(dict(used))

    def close(self) -> None:
        self._begin("close")
        self.closed.set()


class LockedStore(NotingStore):
    """Answers until it is locked; from then on each method waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.locked = threading.Event()
        self.waited = threading.Event()  # something has waited
        self.unlocked = threading.Event()
        self.before = self._wait

    def _wait(self, method: str, key: str) -> None:
        if self.locked.is_set():
            self.waited.set()
            assert self.unlocked.wait(30), f"{method} was never let go"


class RefusingStore(NotingStore):
    """Refuses what is named in `refused`, as a full disk does."""

    def __init__(self, *refused: str) -> None:
        super().__init__()
        self.refused = set(refused)
        self.before = self._refuse

    def _refuse(self, method: str, key: str) -> None:
        if method in self.refused:
            raise SessionError(f"{method} is refused: the disk is full; nothing was changed")
