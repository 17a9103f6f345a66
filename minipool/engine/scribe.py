"""The scribe: the one thread that reads what all workers of a pool say. It runs no user code.

It exists only where an option asks for it, from the first worker to the last. What it has read
goes to the teller, which may be slow; so a worker that prints waits for the scribe at most.
"""

from __future__ import annotations

import collections
import logging
import selectors
import threading
from typing import TYPE_CHECKING

from ..telemetry import logger
from .bell import Bell
from .teller import Teller
from .transcript import STREAMS, Transcript

if TYPE_CHECKING:
    from ..config import PoolConfig
    from .baggage import Baggage

_LAST_WORDS = 2.0  # seconds that handlers have, at the end, for what is left to tell


class Scribe:
    """Reads the transcripts of one pool's workers. Used by the manager's thread."""

    def __init__(self, config: PoolConfig, baggage: Baggage | None) -> None:
        self._config = config
        self._teller = Teller(config.name or "", baggage)
        self._bell: Bell | None = None
        self._selector: selectors.BaseSelector | None = None
        self._began: collections.deque[Transcript] = collections.deque()
        self._ended: collections.deque[Transcript] = collections.deque()
        self._open: set[Transcript] = set()
        self._ending = False
        self._thread = threading.Thread(
            target=self._run, name=f"minipool-{config.name}-scribe", daemon=True
        )

    @property
    def here(self) -> bool:
        """Whether a log handler is running in the calling thread."""
        return self._teller.here

    def listen(self, slot: int, generation: int) -> Transcript:
        """Make the pipes of a worker that is about to be started.

        Raises:
            OSError, RuntimeError: out of descriptors or threads; nothing is left.
        """
        if self._bell is None:
            self._begin()
        transcript = Transcript(
            slot,
            generation,
            STREAMS if self._config.capture_output else (),
            _levels() if self._config.forward_logs else None,
        )
        self._open.add(transcript)  # at once: a process forked from now on must close it
        return transcript

    def _begin(self) -> None:
        bell = Bell()
        try:
            self._selector = selectors.DefaultSelector()
            self._selector.register(bell.reader, selectors.EVENT_READ)
            self._bell = bell
            self._teller.start()
            self._thread.start()
        except BaseException:
            self._bell = None
            self.abandon()
            bell.close()
            raise

    def begin(self, transcript: Transcript, pid: int | None) -> None:
        """Read what that worker says from now on: it was started."""
        transcript.pid = pid
        self._began.append(transcript)
        self._ring()

    def end(self, transcript: Transcript) -> None:
        """Take the rest of what a dead worker said, if it was ever started; close its pipes."""
        transcript.finish()
        self._ended.append(transcript)
        self._ring()

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    def close(self) -> None:
        """End, when all that was said has been told, or after two seconds."""
        if self._bell is None:
            return
        self._ending = True
        self._bell.ring()
        self._thread.join(_LAST_WORDS)
        self._teller.close(_LAST_WORDS)
        self.abandon()

    def abandon(self) -> None:
        """Close all that is open, in a process that was forked from the owner as well."""
        for transcript in tuple(self._open):
            transcript.abandon()
        if self._selector is not None:
            self._selector.close()
        if self._bell is not None:
            self._bell.close()

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        assert self._selector is not None and self._bell is not None
        while not self._ending or self._began or self._ended:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._hear(key.fd, key.data)
            self._bell.silence()
            while self._began:
                self._watch(self._began.popleft())
            while self._ended:
                self._close(self._ended.popleft())

    def _hear(self, fd: int, transcript: Transcript) -> None:
        """Read a piece of what one worker says. What goes wrong with it concerns no other."""
        assert self._selector is not None
        try:
            goes_on = transcript.read(fd)
            self._teller.take(transcript)
        except Exception:
            logger().exception("worker %d: reading its output failed", transcript.slot)
            goes_on = False
        if not goes_on:
            self._selector.unregister(fd)

    def _watch(self, transcript: Transcript) -> None:
        assert self._selector is not None
        for fd in transcript.fds:
            self._selector.register(fd, selectors.EVENT_READ, transcript)

    def _close(self, transcript: Transcript) -> None:
        """Stop watching, then close: a number that is watched must not become another's."""
        assert self._selector is not None
        for fd in transcript.fds:
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        self._teller.take(transcript)
        if transcript.close():
            self._open.discard(transcript)
        else:
            self.end(transcript)


def _levels() -> dict[str, int]:
    """Return the levels that loggers of this process have, for the workers' to be the same."""
    found = {"": logging.getLogger().level}
    for name, its_logger in tuple(logging.getLogger().manager.loggerDict.items()):
        if isinstance(its_logger, logging.Logger) and its_logger.level:
            found[name] = its_logger.level
    return found
