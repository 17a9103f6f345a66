"""The fleet: which worker is in which slot. Starts them, buries them, counts both.

Used by the manager's thread alone, but for reading. Slots are filled from the lowest; a dying
worker keeps its slot until its process is gone, because the row has one writer at a time.
"""

from __future__ import annotations

import functools
import random
import time
import weakref
from typing import TYPE_CHECKING, Any, Callable

from ..errors import WorkerStartError
from ..telemetry import Hooks
from . import table as t
from .handle import Handle
from .health import SECOND_NS
from .laden import LadenHandle
from .launch import Launcher
from .process import describe_exit, signal_name
from .states import WorkerState as S

if TYPE_CHECKING:
    from ..config import PoolConfig

MIN_UPTIME_NS = SECOND_NS  # a worker that ends sooner, without a call, never really started
BACKOFF_BASE, BACKOFF_CAP, BACKOFF_JITTER = 0.1, 30.0, 0.25
_LIVE = (S.STARTING, S.IDLE, S.PROBING)


class Fleet:
    """All workers of one pool, by slot."""

    def __init__(
        self,
        launcher: Launcher,
        config: PoolConfig,
        hooks: Hooks,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.handles: dict[int, Handle] = {}
        self.table = t.Table(config.name or "", portable=launcher.portable)
        if self.table.fd is None:
            launcher.portable = True  # the end that takes the worker's words out of its replies
        self.started = 0  # workers that became ready
        self.lost = 0  # workers that ended without being told to
        self.create_times = [0] * t.BUCKETS  # how many became ready within such a time
        self.retired = 0  # workers that ended because they were told to
        self.start_failures = 0  # in all
        self.failures_in_a_row = 0
        self.last_failure: BaseException | None = None
        self.not_before = 0.0  # monotonic: no start sooner than this
        self._launcher = launcher
        self._config = config
        self._hooks = hooks
        self._jitter = jitter
        self._generation = 0
        self.baggage = launcher.baggage
        self._make_handle: Callable[..., Handle] = Handle
        if self.baggage is not None:
            self._make_handle = functools.partial(LadenHandle, self.baggage)
        self._failed_ns = 0
        self._served_ns = 0
        # Whoever held a worker when it ended may be about to count its last reply.
        self._parting: list[tuple[weakref.ref[Handle], memoryview]] = []
        self._past = memoryview(bytearray(t.ROW_BYTES)).cast("q")

    # -- looking -----------------------------------------------------------------------------

    def live(self) -> list[Handle]:
        """Return the workers that are booting or in service."""
        return [handle for handle in tuple(self.handles.values()) if handle.state in _LIVE]

    def count(self, *states: S) -> int:
        """Return how many workers are in one of these states (IDLE includes leased ones)."""
        return sum(handle.state in states for handle in tuple(self.handles.values()))

    def dying(self) -> int:
        """Return how many workers were killed so lately that their slots will soon be free."""
        since = time.monotonic_ns() - SECOND_NS
        handles = tuple(self.handles.values())
        return sum(handle.state is S.LOST and handle.since_ns > since for handle in handles)

    def served_ns(self, now: int) -> int:
        """Return how long all workers together, past and present, have been in service."""
        handles = tuple(self.handles.values())
        return self._served_ns + sum(now - handle.ready_ns for handle in handles if handle.ready_ns)

    def counted_rows(self) -> list[memoryview]:
        """Return every row in which something has been counted since the pool was opened."""
        return [*self.table.used_rows(), self._past, *(row for _, row in tuple(self._parting))]

    # -- starting ----------------------------------------------------------------------------

    def spawn(self, count: int) -> list[Handle]:
        """Start workers in the lowest free slots; the first failure ends it, and is counted.

        All are prepared before the first is started, and noted after the last: whatever is touched
        between two forks, the kernel must copy.
        """
        prepared: list[Handle] = []
        started: list[Handle] = []
        failure: tuple[int, Exception] | None = None
        try:
            for _ in range(count):
                prepared.append(self._prepared())
        except Exception as error:
            failure = self._free_slot(), error
        for handle in prepared:
            try:
                handle.start()
                started.append(handle)
            except Exception as error:
                failure = handle.slot, error
                break
        for handle in started:
            handle.started()
        for handle in prepared[len(started) :]:
            self._forget(handle)
        if failure is not None:
            self._start_failed(failure[0], None, failure[1])
        return started

    def _prepared(self) -> Handle:
        slot = self._free_slot()
        self._generation += 1
        row = self.table.row(slot)
        handle = self._make_handle(slot, self._generation, row, self._config.codec)
        self.handles[slot] = handle  # at once: a process forked from now on must close its pipe
        try:
            setup = self._launcher.setup(slot, self._generation, self.table.fd)
            handle.prepare(self._launcher.context, setup)
        except BaseException:
            self._forget(handle)
            raise
        return handle

    def _free_slot(self) -> int:
        return next(slot for slot in range(t.MAX_ROWS) if slot not in self.handles)

    def _forget(self, handle: Handle) -> None:
        handle.abandon()
        del self.handles[handle.slot]

    def ready(self, handle: Handle) -> None:
        """Count a worker that has become ready."""
        self.started += 1
        now = time.monotonic_ns()
        handle.ready_ns = handle.probed_ns = handle.idle_since_ns = now
        self.create_times[t.bucket(now - handle.spawned_ns)] += 1

    def forgive(self, now: int) -> None:
        """End the back-off once a worker has shown that starting works again."""
        for handle in self.live():  # one that is older than the last failure proves nothing
            if handle.ready_ns > self._failed_ns and self._proved(handle, now):
                self.failures_in_a_row, self.last_failure = 0, None
                return

    def _proved(self, handle: Handle, now: int) -> bool:
        return now - handle.ready_ns > MIN_UPTIME_NS or t.calls_done(handle.row) > 0

    # -- burying -----------------------------------------------------------------------------

    def bury(self, handle: Handle, exitcode: int | None, cause: BaseException | None) -> None:
        """Forget a worker whose process has ended, and count how it ended."""
        now = time.monotonic_ns()
        booting = handle.ready_ns == 0
        if handle.condemned:
            self.retired += 1
        else:
            self.lost += 1
            used = handle.row[t.CALL_ID] > 0 or handle.revoked is not None
            if booting or not (used or self._proved(handle, now)):
                self._start_failed(handle.slot, exitcode, cause, handle)
        self._served_ns += now - handle.ready_ns if handle.ready_ns else 0
        lifetime = (now - handle.ready_ns) / 1e9 if handle.ready_ns else 0.0
        calls = t.calls_done(handle.row)
        handle.reap()
        del self.handles[handle.slot]
        self._part(handle)
        self._hooks.emit(
            "worker.terminate",
            {"calls": calls, "lifetime": lifetime},
            worker_id=handle.slot,
            pid=handle.pid,
            generation=handle.generation,
            exitcode=exitcode,
            reason=handle.tainted or describe_exit(exitcode),
        )

    def _part(self, handle: Handle) -> None:
        """Keep the row of a worker that ended until nobody has the worker any more."""
        for old, row in tuple(self._parting):
            if old() is None:
                t.add_counts(self._past, row)
                self._parting.remove((old, row))
        self._parting.append((weakref.ref(handle), handle.row))

    def _start_failed(
        self,
        slot: int,
        exitcode: int | None,
        cause: BaseException | None,
        handle: Handle | None = None,
    ) -> None:
        """Count a failed start and put off the next: 0.1 s, doubling to 30 s, with jitter.

        Workers that were started together and fail together are one failure in a row.
        """
        self.start_failures += 1
        if handle is None or handle.spawned_ns > self._failed_ns:
            self.failures_in_a_row += 1
        self._failed_ns = time.monotonic_ns()
        delay = min(BACKOFF_CAP, BACKOFF_BASE * 2 ** min(self.failures_in_a_row - 1, 20))
        delay *= 1 + BACKOFF_JITTER * (2 * self._jitter() - 1)
        self.not_before = time.monotonic() + delay
        self.last_failure = _start_error(slot, exitcode, cause, handle)
        self._hooks.emit("error", {}, kind="start", error=self.last_failure, worker_id=slot)

    # -- end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back the shared memory. What was counted stays readable."""
        failure = self.last_failure
        while failure is not None:
            failure.__traceback__ = None  # its frames hold a row, and that the memory
            failure = failure.__cause__
        self.table.close()


def _start_error(
    slot: int, exitcode: int | None, cause: BaseException | None, handle: Handle | None
) -> WorkerStartError:
    if cause is not None:
        what = f"did not start: {type(cause).__name__}: {cause}"
    elif handle is not None and handle.ready_ns:
        what = f"ended {describe_exit(exitcode)} as soon as it was ready"
    elif handle is not None and handle.tainted:
        what = f"did not start: {handle.tainted}"
    else:
        what = (
            f"ended {describe_exit(exitcode)} before it could say anything; its standard error "
            f"tells why; if your main script opens the pool without an "
            f"`if __name__ == '__main__':` guard, add one"
        )
    error = WorkerStartError(
        f"worker {slot} {what}",
        worker_id=slot,
        pid=handle.pid if handle else None,
        exitcode=exitcode,
        signal=signal_name(exitcode),
    )
    error.__cause__ = cause
    return error


def retry_in(fleet: Any, now: float) -> float | None:
    """Return the seconds until the next start is allowed; None if it is allowed now."""
    return fleet.not_before - now if fleet.not_before > now else None
