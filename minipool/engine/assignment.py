"""What a worker is told at its start, in two parts.

The `Setup` travels with the process object. It holds nothing of the user's, so it is short: the
manager writes it into a pipe that nobody reads before the new interpreter runs. The `Assignment`
may be of any length. A forked worker inherits it; to others it is sent as the first frame of
their own pipe, whose writing never waits (see `FastEnd.post`).
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from . import wire

if TYPE_CHECKING:
    from .baggage import Baggage  # imported by the workers that are given some
    from .voice import Voice

MAX_ASSIGNMENT = 1 << 62  # bytes; `max_message` is about calls


class Setup:
    """What the process itself must know; travels with the process object."""

    def __init__(self, **words: Any) -> None:
        self.__dict__.update(words)

    slot: int
    generation: int
    niceness: int
    kill_group: bool
    max_message: int
    table: wire.Descriptor | None
    lifeline: wire.Descriptor | None
    box: wire.Descriptor | None
    portable: bool
    main: dict[str, Any] | None  # how to import the main module; None: that is done, or not needed
    voice: Voice | None  # how logs and output get out


class Assignment:
    """What the worker is for: whatever comes from the user. The same for all workers of a pool."""

    def __init__(self, spec: Any, **words: Any) -> None:
        self.spec = spec
        self.__dict__.update(words)

    spec: Any  # (worker, args, kwargs), pickled unless the process is forked
    pool: str
    codec: bytes | None  # packed; None: pickle
    preload: tuple[str, ...]  # modules to import first, unless the fork server did
    warm_up: list[tuple[int, bytes, bytes]]  # kind, name and body of calls to begin with
    env: dict[str, str]
    limits: dict[str, float]
    baggage: Baggage | None  # what travels with each call
    importing: tuple[str, ...]  # modules whose import has opened this pool
    places: tuple[str, ...]  # where this pool was opened, and those that it is below of

    def parts(self, levels: dict[str, int]) -> tuple[bytes, bytes]:
        """Return what is sent to a worker whose loggers have these levels.

        The second part is one object for all workers: arguments may be large.
        """
        words = {name: value for name, value in self.__dict__.items() if name != "spec"}
        data = pickle.dumps((words, levels), 5)
        return len(data).to_bytes(4, "big") + data, self.spec


def unpacked(body: bytes | memoryview) -> tuple[Assignment, dict[str, int]]:
    """Return the assignment that was sent, and the levels."""
    end = 4 + int.from_bytes(body[:4], "big")
    words, levels = pickle.loads(body[4:end])
    return Assignment(body[end:], **words), levels
