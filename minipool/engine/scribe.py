"""The scribe: the one thread that reads what all workers of a pool say. It runs no user code.

It exists only where an option asks for it, from the first worker to the last. What it has read
goes to the teller, which may be slow; so a worker that prints waits for the scribe at most.
"""

from __future__ import annotations

import collections
import logging
import selectors
import threading
from typing import TYPE_CHECKING, Any, Callable

from ..telemetry import logger
from .bell import Bell
from .descriptors import beyond_streams
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
        self._baggage = baggage
        self._teller: Teller | None = None  # None: there was no worker yet
        self._bell: Bell | None = None
        self._selector: selectors.BaseSelector | None = None
        self._began: collections.deque[Transcript] = collections.deque()
        self._ended: collections.deque[Transcript] = collections.deque()
        self._open: set[Transcript] = set()
        self._ending = False

    @property
    def here(self) -> bool:
        """Whether a log handler is running in the calling thread."""
        return self._teller is not None and self._teller.here

    def listen(self, slot: int, generation: int) -> Transcript:
        """Make the pipes of a worker that is about to be started.

        Raises:
            OSError, RuntimeError: out of descriptors or threads; nothing is left.
        """
        if self._teller is None:
            self._start()
        transcript = Transcript(
            slot,
            generation,
            STREAMS if self._config.capture_output else (),
            _levels() if self._config.forward_logs else None,
        )
        self._open.add(transcript)  # at once: a process forked from now on must close it
        return transcript

    def _start(self) -> None:
        """Start both threads, or none."""
        name = self._config.name or ""
        teller = Teller(name, self._baggage)
        self._thread = threading.Thread(
            target=self._run, args=(teller,), name=f"minipool-{name}-scribe", daemon=True
        )
        try:
            self._bell = Bell()
            self._selector = beyond_streams(selectors.DefaultSelector)
            self._selector.register(self._bell.reader, selectors.EVENT_READ)
            teller.start()
            try:
                self._thread.start()
            except BaseException:
                teller.close(_LAST_WORDS)
                raise
        except BaseException:
            self.abandon()
            raise
        self._teller = teller

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
        if self._teller is None:
            return
        self._ending = True
        self._ring()
        self._thread.join(_LAST_WORDS)
        self._teller.close(_LAST_WORDS)
        self.abandon()

    def abandon(self) -> None:
        """Close all that is open, in a process that was forked from the owner as well."""
        for transcript in tuple(self._open):
            transcript.abandon()
        for opened in (self._selector, self._bell):
            if opened is not None:
                opened.close()
        self._selector = self._bell = None

    # -- the thread --------------------------------------------------------------------------

    def _run(self, teller: Teller) -> None:
        selector, bell = self._selector, self._bell
        assert selector is not None and bell is not None
        while not self._ending or self._began or self._ended:
            for key, _ in selector.select():
                if key.data is not None and not self._try(key.data.read, key.fd):
                    selector.unregister(key.fd)
                if key.data is not None:
                    teller.take(key.data)
            bell.silence()
            while self._began:
                self._try(self._watch, self._began.popleft(), selector)
            while self._ended:
                self._try(self._close, self._ended.popleft(), selector, teller)

    def _try(self, step: Callable[..., object], *args: Any) -> object:
        """Take one step. What goes wrong with one worker concerns no other."""
        try:
            return step(*args)
        except Exception:
            logger().exception("%s: reading what a worker says failed", self._config.name)
            return None

    @staticmethod
    def _watch(transcript: Transcript, selector: selectors.BaseSelector) -> None:
        for fd in transcript.fds:
            selector.register(fd, selectors.EVENT_READ, transcript)

    def _close(
        self, transcript: Transcript, selector: selectors.BaseSelector, teller: Teller
    ) -> None:
        """Stop watching, then close: a number that is watched must not become another's."""
        for fd in transcript.fds:
            if fd in selector.get_map():
                selector.unregister(fd)
        teller.take(transcript)
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
