"""The teller: hands what workers said to the log handlers of this process, in a thread of its own.

Handlers may be slow, raise, or use the pool: all they can hold up is each other, and `close` for
two seconds. What waits for them is bounded; what does not fit is dropped, and the number is told.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import pickle
from typing import TYPE_CHECKING, Any

from ..telemetry import logger
from .jobs import JobThread
from .transcript import GARBLED, LOST, RECORD, Item, Transcript, text_of
from .voice import Packed

if TYPE_CHECKING:
    from .baggage import Baggage

OUTPUT = "minipool.output"
MOST_ITEMS = 10_000  # of one worker that wait, so that who floods spoils it for nobody else
MOST_BYTES = 32 << 20  # of all workers
_LEVELS = {"stdout": logging.INFO, "stderr": logging.WARNING}


class Teller:
    """The thread that calls the log handlers, and what waits for it."""

    def __init__(self, pool: str, baggage: Baggage | None) -> None:
        self._pool = pool
        self._baggage = baggage
        self._bytes_in = self._bytes_out = 0  # one is the scribe's, the other the teller's
        self._losers: collections.deque[Transcript] = collections.deque()
        self._complained = False
        self._thread = JobThread(f"minipool-{pool}-teller")
        self.start = self._thread.start

    @property
    def here(self) -> bool:
        """Whether the calling thread is this one (a log handler runs in it)."""
        return self._thread.here

    def take(self, transcript: Transcript) -> None:
        """Have told what a worker said, after what came before. By the scribe; never waits."""
        dropped = 0
        while transcript.unsaid:
            item = transcript.unsaid.popleft()
            if item[0] == LOST:
                dropped += int(item[1])
            elif (
                transcript.passed_on - transcript.heard >= MOST_ITEMS
                or self._bytes_in - self._bytes_out >= MOST_BYTES
            ):
                dropped += 1
            else:
                transcript.passed_on += 1
                self._bytes_in += len(item[1])
                self._thread.put(functools.partial(self._hear, transcript, item))
        if dropped:
            transcript.dropped += dropped
            self._losers.append(transcript)
            # Said first, then looked: whatever takes the last item looks for losers after that.
            if self._thread.empty:
                self._thread.put(self._tell_losses)

    def close(self, timeout: float) -> None:
        """Tell what is left and end; after so many seconds, leave the rest.

        A handler that does not return keeps its thread, which ends with it.
        """
        self._thread.put(functools.partial(self._tell_losses, at_end=True))
        self._thread.close(timeout)

    # -- the thread --------------------------------------------------------------------------

    def _hear(self, transcript: Transcript, item: Item) -> None:
        self._try(self._tell, transcript, item)
        transcript.heard += 1
        self._bytes_out += len(item[1])
        self._tell_losses()

    def _tell_losses(self, at_end: bool = False) -> None:
        while self._losers and (at_end or self._thread.empty):
            self._try(self._tell_lost, self._losers.popleft())

    def _try(self, tell: Any, *args: Any) -> None:
        if self._thread.silenced:
            return
        try:
            tell(*args)
        except BaseException:  # of a handler, or of a value that was sent along
            if not self._complained:
                self._complained = True
                with contextlib.suppress(Exception):
                    logger().exception("%s: a log handler failed on what a worker said", self._pool)

    def _tell(self, transcript: Transcript, item: Item) -> None:
        kind, data = item
        if kind == RECORD:
            self._tell_record(transcript, data)
        elif kind == GARBLED:
            self._say(
                transcript, logging.WARNING,
                "worker %d of %s wrote to a descriptor that is not its own: its log records are no "
                "longer forwarded", transcript.slot, self._pool,
            )  # fmt: skip
        else:
            self._say(transcript, _LEVELS[kind], "%s", text_of(data), stream=kind)

    def _tell_lost(self, transcript: Transcript) -> None:
        count = transcript.dropped - transcript.told
        transcript.told += count
        if not count:
            return
        self._say(
            transcript, logging.WARNING,
            "worker %d of %s: %d lines or log records were dropped; they came faster than they "
            "were taken", transcript.slot, self._pool, count, dropped=count,
        )  # fmt: skip

    def _say(
        self, transcript: Transcript, level: int, text: str, *args: Any, **fields: Any
    ) -> None:
        record = logging.LogRecord(OUTPUT, level, "", 0, text, args, None)
        record.process = transcript.pid
        self._handle(transcript, record.__dict__, fields, None, None, {})

    def _tell_record(self, transcript: Transcript, data: bytes) -> None:
        packed = Packed(*pickle.loads(data))
        extra = {name: _unpickled(value) for name, value in packed.extra.items()}
        context = {name: _unpickled(value) for name, value in packed.context.items()}
        args = transcript, packed.standard, extra, packed.call_id, packed.session, context
        if self._baggage is None:
            self._handle(*args)
        else:  # filters that look for a trace id find it
            self._baggage.run_with(context, self._handle, *args)

    def _handle(
        self,
        transcript: Transcript,
        standard: dict[str, Any],
        extra: dict[str, Any],
        call_id: int | None,
        session: str | None,
        context: dict[str, Any],
    ) -> None:
        """Give a record to its logger, if that wants it: `Logger.handle` does not ask."""
        record = logging.makeLogRecord(
            {
                "pool": self._pool,
                "worker_id": transcript.slot,
                "generation": transcript.generation,
                "call_id": call_id,
                "session": session,
                "context": context,
                **extra,  # what the log call itself said wins
                **standard,
            }
        )
        its_logger = logging.getLogger(record.name)
        if its_logger.isEnabledFor(record.levelno):
            its_logger.handle(record)


def _unpickled(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except BaseException as problem:
        return f"<does not unpickle here: {type(problem).__name__}: {problem}>"
