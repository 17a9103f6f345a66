"""News: the newest reading of a board, for any number of visitors who wait for it.

The board is read by one thread, once a second; what visitors are sent is drawn from it once for
all who want the same. Nothing is queued for anybody: who comes late finds the newest reading, and
no older one.
"""

from __future__ import annotations

import json
from typing import Any, Dict

from .._sync import Guard, Notice, guarded
from .board import Board


class News:
    """Readings of a board, numbered from 1. Any thread may ask; one takes them."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.over = False
        self._turns = 0
        self._changed = Notice()
        self._drawing = Guard()  # never held while anything is sent
        self._drawn: Dict[tuple[int, str, float], bytes] = {}

    def turn(self) -> None:
        """Take a reading, and wake all who wait for it."""
        self.board.tick()
        self._turns += 1
        self._changed.post()

    def end(self) -> None:
        """Let nobody wait any more."""
        self.over = True
        self._changed.post()
        self._drawn.clear()

    def wait(self, seen: int, timeout: float) -> int:
        """Wait for a reading later than the one seen; return its number, or the same one."""
        self._changed.wait_for(lambda: self.over or self._turns > seen, timeout)
        return self._turns

    @guarded("_drawing")
    def draw(self, turn: int, pool_id: str, window: float) -> bytes:
        """Return the reading of a turn as JSON."""
        key = (turn, pool_id, window)
        if any(drawn[0] != turn for drawn in self._drawn):
            self._drawn.clear()
        if key not in self._drawn:
            self._drawn[key] = as_json(self.board.reading(pool_id, window))
        return self._drawn[key]


def as_json(value: Any) -> bytes:
    """Return a value as JSON on one line."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
