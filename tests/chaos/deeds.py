"""What the workers of the shared store do. Each deed is noted on disk as it begins.

A module of its own, without pytest, because every worker imports it.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Mapping

from journal import Journal

import minipool

PAGE = 50  # deeds that are kept under one key of a session


class Doer:
    """A worker's object: it writes the id of each call into a file of its own, then obeys."""

    def __init__(self, folder: str) -> None:
        name = f"{os.getpid()}-{time.monotonic_ns()}"
        self._journal = Journal(os.path.join(folder, name))

    def plain(self, deed: str, work: int) -> str:
        self._journal.write(deed)
        sum(range(work))
        return deed

    def commit(self, deed: str, work: int) -> int:
        """Add a deed to the session; return how many there are with it."""
        self._journal.write(deed)
        sum(range(work))
        session = minipool.current_session()
        count = session["count"] = session.get("count", 0) + 1
        page = page_of(count)
        session[page] = [*session.get(page, ()), deed]
        return int(count)

    hurried = commit  # under a name of its own: its timeout ends it half of the time

    def hang(self, deed: str) -> None:
        self._journal.write(deed)
        while True:
            signal.pause()


def page_of(count: int) -> str:
    """Return the key under which the deed of that number is."""
    return f"deeds {(count - 1) // PAGE}"


def born_with(deed: str) -> dict[str, Any]:
    """Return the state of a session that is begun by this deed."""
    return {"count": 1, page_of(1): [deed]}


def deeds_of(state: Mapping[str, Any]) -> list[str]:
    """Return all deeds that a session was told of, in their order.

    Raises:
        ValueError: count and pages do not agree: the state is none that was ever committed.
    """
    count = state.get("count", 0)
    pages = [state[page_of(first)] for first in range(1, count + 1, PAGE)]
    deeds = [deed for page in pages for deed in page]
    if len(deeds) != count or sum(key.startswith("deeds") for key in state) != len(pages):
        raise ValueError(f"{count} were counted, and {len(deeds)} are there")
    return deeds
