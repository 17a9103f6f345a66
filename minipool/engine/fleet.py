"""The fleet: which worker is in which slot. Starts them, buries them, counts both.

Used by the manager's thread alone, but for reading. Slots are filled from the lowest; a dying
worker keeps its slot until its process is gone, because the row has one writer at a time.
"""

from __future__ import annotations

import collections
import functools
import math
import random
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Callable, Iterator

from ..backoff import Backoff
from ..breaker import CLOSED, CircuitBreaker, Permit
from ..errors import WorkerStartError
from ..telemetry import Hooks
from . import shortage
from . import table as t
from .bell import Closing
from .diagnosis import of_start
from .handle import Handle
from .health import SECOND_NS
from .inquest import Death, hold, reason_of
from .launch import Launcher
from .process import reap_outlived, signal_name
from .standstill import Standstills
from .states import WorkerState as S
from .verdict import MANY, Verdict, by_chance

if TYPE_CHECKING:
    from ..config import PoolConfig
    from .scribe import Scribe

MIN_UPTIME_NS = SECOND_NS  # a worker that ends sooner, without a call, never really started
REMEMBERED = 100  # deaths
LIFETIME_JITTER = 0.1  # of max_lifetime, either way: who was born together shall not end so
STRUCK_PAUSE = 0.2  # seconds at most before the next start, after one that was struck down
_LIVE = (S.STARTING, S.IDLE, S.PROBING)
_Parting = tuple["weakref.ref[Handle]", memoryview]


class Fleet:
    """All workers of one pool, by slot."""

    def __init__(
        self,
        launcher: Launcher,
        config: PoolConfig,
        hooks: Hooks,
        jitter: Callable[[], float] = random.random,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self.handles: dict[int, Handle] = {}
        #: Those of which something may be due before the next sweep. The others are in service,
        #: and stay: see `settle`.
        self.unsettled: dict[int, Handle] = {}
        self.closing = Closing()  # of the pool: no start waits for long any more
        self.next_expiry_ns = 0  # of those others; 0: none
        self.standstills = Standstills(config.init_timeout)
        self.table = t.Table(config.name or "", portable=launcher.portable)
        if self.table.fd is None:
            launcher.portable = True  # the end that takes the worker's words out of its replies
        self.started = 0  # workers that became ready
        self.lost = 0  # workers that ended without being told to
        self.create_times = [0] * t.BUCKETS  # how many became ready within such a time
        self.deaths: collections.deque[Death] = collections.deque(maxlen=REMEMBERED)
        self.retired = 0  # workers that ended because they were told to
        self.start_failures = 0  # in all
        self.backoff = Backoff(random=jitter)
        self.breaker = breaker or _breaker(config)
        self.last_failure: BaseException | None = None
        self.verdict: Verdict | None = None
        self.not_before = 0.0  # monotonic: no start sooner than this
        self._launcher = launcher
        self._config = config
        self._hooks = hooks
        self._jitter = jitter
        self._generation = 0
        self.baggage = launcher.baggage
        self.scribe: Scribe | None = None
        if config.forward_logs or config.capture_output:
            from .scribe import Scribe  # with logging, by those who use it

            self.scribe = Scribe(config, self.baggage)
        self._make_handle: Callable[..., Handle] = Handle
        if self.baggage is not None:
            from .laden import LadenHandle

            self._make_handle = functools.partial(LadenHandle, self.baggage)
        self._failed_ns = 0
        self._pause = 0.0  # after the last failure
        self._served_ns = 0
        self._senders: tuple[threading.Thread, ...] = ()  # that may still send to the dead
        # What workers that ended have counted, and the rows of the last ones: whoever held such a
        # worker may be about to count its last reply. Replaced as one, and never changed: else a
        # row that moves from the one to the other would be counted twice, or not at all.
        self._past: tuple[memoryview, tuple[_Parting, ...]]
        self._past = memoryview(bytearray(t.ROW_BYTES)).cast("q"), ()

    # -- looking -----------------------------------------------------------------------------

    def live(self) -> list[Handle]:
        """Return the workers that are in service, or booting for it; also those on their way out.

        One that is on its way out may still be leased.
        """
        handles = tuple(self.handles.values())
        return [handle for handle in handles if handle.state in _LIVE and not handle.reserve]

    def staying(self) -> list[Handle]:
        """Return the workers that are in service, or booting for it, and not on their way out.

        These are the ones that count: what a pool lacks is the difference to its target.
        """
        return [handle for handle in self.live() if not handle.condemned]

    def count_staying(self) -> int:
        """Return how many `staying` finds, without a look at each. By the manager's thread."""
        unsettled = self.unsettled.values()
        staying = [1 for h in unsettled if h.state in _LIVE and not (h.reserve or h.condemned)]
        return len(self.handles) - len(unsettled) + len(staying)

    def usable(self) -> list[Handle]:
        """Return the workers that are in service, fit for the next caller and not on their way out.

        Leased ones are among them.
        """
        booting = S.STARTING
        return [
            handle
            for handle in self.staying()
            if handle.state is not booting and (handle.tainted is None or handle.worn_out)
        ]

    def reserve(self) -> list[Handle]:
        """Return the workers that are out of service, ready or booting, and to stay."""
        ends = (S.STOPPING, S.LOST)
        handles = [handle for handle in tuple(self.handles.values()) if handle.reserve]
        return [h for h in handles if h.state not in ends and not h.condemned]

    def count(self, *states: S) -> int:
        """Return how many workers are in one of these states (IDLE includes leased ones)."""
        return sum(handle.state in states for handle in tuple(self.handles.values()))

    def known_deaths(self) -> list[Death]:
        """Return how the last workers ended, with those who are not buried yet, oldest first."""
        unburied = [handle.death for handle in tuple(self.handles.values())]
        deaths = {death.generation: death for death in (*unburied, *tuple(self.deaths)) if death}
        return sorted(deaths.values(), key=lambda death: death.time)[-REMEMBERED:]

    def dying(self) -> int:
        """Return how many workers were killed so lately that their slots will soon be free."""
        since = time.monotonic_ns() - SECOND_NS
        handles = tuple(self.unsettled.values())
        return sum(handle.state is S.LOST and handle.since_ns > since for handle in handles)

    @property
    def prepared(self) -> int:
        """How many workers it was begun to start."""
        return self._generation

    @property
    def starting_alone(self) -> bool:
        """Whether no worker serves and one is starting. By the manager's thread.

        Those that are settled are in service, so that one look at the others tells it.
        """
        unsettled = self.unsettled.values()
        booting = [h for h in unsettled if h.state is S.STARTING and not (h.reserve or h.condemned)]
        if not booting or len(self.handles) > len(self.unsettled):
            return False
        return not self.usable()

    @property
    def failures_in_a_row(self) -> int:
        return self.backoff.failures

    @property
    def hopeless(self) -> bool:
        """Whether no worker is there, and none will be until the breaker allows a trial."""
        breaker = self.breaker
        nobody = not self.staying() and not self.reserve()
        return nobody and breaker is not None and breaker.retry_in > 0

    def served_ns(self, now: int) -> int:
        """Return how long all workers together, past and present, have been in service."""
        handles = tuple(self.handles.values())
        since = (handle.serving_ns for handle in handles if handle.serving_ns)
        return self._served_ns + sum(now - begun for begun in since)

    def counted_rows(self) -> list[memoryview]:
        """Return every row in which something has been counted since the pool was opened."""
        past, parting = self._past
        return [*self.table.used_rows(), past, *(row for _, row in parting)]

    def settle(self, restless: set[int]) -> None:
        """Note that only these are not simply in service, as a look at all has found.

        A worker whose state changes is unsettled from then on, until the next such look.
        """
        for slot in restless:
            self.unsettled[slot] = self.handles[slot]
        for slot in [slot for slot in self.unsettled if slot not in restless]:
            del self.unsettled[slot]
        handles = self.handles.values()
        expiries = [h.expires_ns for h in handles if h.expires_ns and h.slot not in restless]
        self.next_expiry_ns = min(expiries, default=0)

    # -- starting ----------------------------------------------------------------------------

    def spawn(self, count: int, reserve: bool = False) -> list[Handle]:
        """Start workers in the lowest free slots, no more than the breaker allows.

        The first failure ends it, and is counted.

        All are prepared before the first is started, and noted after the last: whatever is touched
        between two forks, the kernel must copy.
        """
        count = shortage.workers_that_fit(self._config, count)
        prepared: list[Handle] = []
        started: list[Handle] = []
        failure: tuple[int, Exception, Permit | None] | None = None
        for permit in self._permits(count):
            try:
                prepared.append(self._prepared(permit))
                prepared[-1].reserve = reserve
            except Exception as error:
                failure = self._free_slot(), error, permit
                break
        for handle in prepared:
            try:
                handle.start(self.closing)
                started.append(handle)
            except Exception as error:
                failure = handle.slot, error, handle.permit
                break
        for handle in started:
            try:
                handle.started()
                if handle.transcript is not None and self.scribe is not None:
                    self.scribe.begin(handle.transcript, handle.pid)
            except Exception as error:  # its own: those after it must hear that they were started
                handle.not_started(error)
        for handle in prepared[len(started) :]:
            self._forget(handle)
        if failure is not None:
            slot, problem, permit = failure
            if self.closing.happened:  # it says nothing of the next, and there will be none
                if permit is not None:
                    permit.give_up()
                return started
            self._start_failed(slot, None, problem, permit=permit)
            del failure, problem  # this frame is in its traceback, which holds rows
        return started

    def _permits(self, count: int) -> Iterator[Permit | None]:
        """Return leave to start up to so many; each is None where there is no breaker."""
        for _ in range(count):
            permit = None if self.breaker is None else self.breaker.permit()
            if permit is None and self.breaker is not None:
                return
            yield permit

    def _prepared(self, permit: Permit | None) -> Handle:
        slot = self._free_slot()
        self._generation += 1
        row = self.table.row(slot)
        handle = self._make_handle(slot, self._generation, row, self._config.codec)
        handle.permit = permit
        handle.unsettled, self.unsettled[slot] = self.unsettled, handle
        self.handles[slot] = handle  # at once: a process forked from now on must close its pipe
        try:
            setup = self._launcher.setup(slot, self._generation, self.table.fd)
            if self.scribe is not None:
                handle.transcript = self.scribe.listen(slot, self._generation)
                setup.voice = handle.transcript.voice
            handle.prepare(self._launcher.context, setup, self._launcher.assignment)
        except BaseException:
            self._forget(handle)
            raise
        return handle

    def _free_slot(self) -> int:
        return next(slot for slot in range(t.MAX_ROWS) if slot not in self.handles)

    def _forget(self, handle: Handle) -> None:
        handle.abandon()
        if handle.permit is not None:
            handle.permit.give_up()
        self._hush(handle)
        self._vacate(handle)

    def _vacate(self, handle: Handle) -> None:
        del self.handles[handle.slot]
        self.unsettled.pop(handle.slot, None)
        handle.unsettled = None

    def _hush(self, handle: Handle) -> None:
        if handle.transcript is not None and self.scribe is not None:
            self.scribe.end(handle.transcript)

    def ready(self, handle: Handle) -> None:
        """Count a worker that has become ready."""
        self.started += 1
        now = time.monotonic_ns()
        handle.ready_ns = handle.probed_ns = now
        self.create_times[t.bucket(now - handle.spawned_ns)] += 1
        if self._config.max_lifetime is not None:
            spread = 1 + LIFETIME_JITTER * (2 * self._jitter() - 1)
            handle.expires_ns = now + int(self._config.max_lifetime * spread * SECOND_NS)

    def serve(self, handle: Handle) -> None:
        """Note that a worker is in service from now on."""
        handle.reserve = False
        handle.channel.lost, handle.channel.witness = (
            self.standstills.lost,
            self.standstills.witness,
        )
        handle.serving_ns = handle.idle_since_ns = time.monotonic_ns()

    def spare(self, handle: Handle) -> None:
        """Note that a worker is out of service from now on."""
        handle.reserve = True
        self._end_service(handle)

    def _end_service(self, handle: Handle) -> None:
        if handle.serving_ns:
            self._served_ns += time.monotonic_ns() - handle.serving_ns
            handle.serving_ns = 0

    def forgive(self, now: int) -> None:
        """End the back-off once a worker has shown that starting works again."""
        if self.backoff.failures or (self.breaker is not None and self.breaker.state != CLOSED):
            for handle in [*self.live(), *self.reserve()]:
                self._vouch(handle, now)

    def _vouch(self, handle: Handle, now: int) -> None:
        """Take a worker's calls, and the seconds it lived, as proof that starting works again.

        One that is older than the last failure proves nothing.
        """
        if handle.ready_ns <= self._failed_ns or not self._proved(handle, now):
            return
        self.backoff.reset()
        self.last_failure = None
        proofs = t.calls_done(handle.row) + (now - handle.ready_ns) // MIN_UPTIME_NS
        if handle.permit is not None and proofs > handle.permit.successes:
            handle.permit.succeeded(proofs - handle.permit.successes)

    def start_anew(self) -> None:
        """Forget what failed: the next start may be made now."""
        self.backoff.reset()
        self.not_before = 0.0

    def _proved(self, handle: Handle, now: int) -> bool:
        return now - handle.ready_ns > MIN_UPTIME_NS or t.calls_done(handle.row) > 0

    # -- burying -----------------------------------------------------------------------------

    def bury(self, handle: Handle, exitcode: int | None, cause: BaseException | None) -> None:
        """Forget a worker whose process has ended, and count how it ended."""
        now = time.monotonic_ns()
        booting = handle.ready_ns == 0
        self._vouch(handle, now)
        if handle.condemned:
            self.retired += 1
        else:
            self.lost += 1
            self.deaths.append(hold(handle))
            used = handle.row[t.CALL_ID] > 0 or handle.revoked is not None
            # A worker that was sent a call and killed by us: its caller may have left before the
            # call began. On a private table the caller may not have heard yet that it has begun.
            if handle.process.killed or self._launcher.portable:
                used = used or handle.calls_sent > 0
            if booting or not (used or self._proved(handle, now)):
                self._start_failed(handle.slot, exitcode, cause, handle, handle.permit)
        if handle.permit is not None:
            handle.permit.give_up()
        self._end_service(handle)
        lifetime = (now - handle.ready_ns) / 1e9 if handle.ready_ns else 0.0
        calls = t.calls_done(handle.row)
        reason = (handle.condemned and handle.tainted) or reason_of(handle)
        handle.reap()
        self._hush(handle)
        self._vacate(handle)
        self._part(handle)
        if handle.channel.sender is not None:
            senders = (*self._senders, handle.channel.sender)
            self._senders = tuple(sender for sender in senders if sender.is_alive())
        self._hooks.emit(
            "worker.terminate",
            {"calls": calls, "lifetime": lifetime},
            worker_id=handle.slot,
            pid=handle.pid,
            generation=handle.generation,
            exitcode=exitcode,
            reason=reason,
        )

    def _part(self, handle: Handle) -> None:
        """Keep the row of a worker that ended until nobody has the worker any more."""
        past, parting = self._past
        kept = [(weakref.ref(handle), handle.row)]
        past = memoryview(bytearray(past)).cast("q")
        for old, row in parting:
            if old() is None:
                t.add_counts(past, row)
            else:
                kept.append((old, row))
        self._past = past, tuple(kept)

    def _start_failed(
        self,
        slot: int,
        exitcode: int | None,
        cause: BaseException | None,
        handle: Handle | None = None,
        permit: Permit | None = None,
    ) -> None:
        """Count a failed start and put off the next, longer each time.

        Workers that were started together and fail together are one failure in a row. One that
        somebody else has killed says little about the next, so nobody waits long for that, and
        the breaker does not hear of it.
        """
        now = time.monotonic_ns()
        struck = handle is not None and _struck(handle, exitcode)
        self.forgive(now)  # what succeeded since the last look has ended that row
        alone = handle is None or handle.spawned_ns > self._failed_ns
        if alone or not self.backoff.failures:
            pause = self.backoff.next()
            self._pause = min(pause, STRUCK_PAUSE) if struck else pause
        self.start_failures += 1
        self._failed_ns = now
        self.not_before = time.monotonic() + self._pause
        failure = self.last_failure = _start_error(self._launcher, slot, exitcode, cause, handle)
        self._hooks.emit("error", {}, kind="start", error=failure, worker_id=slot)
        if permit is not None and shortage.of_descriptors(cause):
            permit.give_up()  # with more of them, or fewer workers, starting works
        elif permit is not None and alone and not struck:
            permit.failed(failure)
        self._judge(handle, exitcode, cause, failure)

    def _judge(
        self,
        handle: Handle | None,
        exitcode: int | None,
        cause: BaseException | None,
        failure: WorkerStartError,
    ) -> None:
        """Note whether a failed start says what will come of the next one."""
        given_up = self.backoff.failures >= MANY
        if self.breaker is not None and self.breaker.retry_in > 0:
            given_up = True
        if given_up or not by_chance(handle, exitcode, cause):
            staying = () if given_up else self.staying()
            left = tuple(0 if worker.ready_ns else worker.generation for worker in staying)
            tried = math.inf if given_up else self._generation
            self.verdict = Verdict(time.monotonic(), failure, left, tried)

    # -- end ---------------------------------------------------------------------------------

    def givings_back(self) -> tuple[Callable[[], object], ...]:
        """Return what gives back the shared memory. What was counted stays readable."""
        scribe = () if self.scribe is None else (self.scribe.close,)
        return (self._forget_frames, *scribe, self.table.close)

    def _forget_frames(self) -> None:
        """Forget where failures came from: such a frame holds a row, and that the memory."""
        cause = None if self.breaker is None else self.breaker.cause
        verdict = None if self.verdict is None else self.verdict.failure
        for failure in (self.last_failure, cause, verdict):
            while failure is not None:
                # Unlike an assignment, this runs no code of its class.
                BaseException.with_traceback(failure, None)
                failure = failure.__cause__

    def join(self, timeout: float) -> None:
        """Wait for what is about to end with its worker, or with the lifeline.

        Threads that still send to one that has ended, and workers that could not be killed.
        """
        until = time.monotonic() + timeout
        for sender in self._senders:
            sender.join(max(0.0, until - time.monotonic()))
        reap_outlived(max(0.0, until - time.monotonic()))

    def abandon(self) -> None:
        """Let go of everything in a process that was forked from the owner."""
        for handle in tuple(self.handles.values()):
            handle.abandon()
        if self.scribe is not None:
            self.scribe.abandon()


def _breaker(config: PoolConfig) -> CircuitBreaker | None:
    if isinstance(config.breaker, CircuitBreaker):
        return config.breaker
    return CircuitBreaker() if config.breaker else None


def _struck(handle: Handle, exitcode: int | None) -> bool:
    """Tell whether somebody killed a worker who is neither the pool nor the kernel."""
    ours = handle.process.killed or handle.process.starved
    return not ours and signal_name(exitcode) in ("SIGKILL", "SIGTERM")


def _start_error(
    launcher: Launcher,
    slot: int,
    exitcode: int | None,
    cause: BaseException | None,
    handle: Handle | None,
) -> WorkerStartError:
    what = of_start(launcher, exitcode, cause, handle)
    error = WorkerStartError(
        f"worker {slot} {what}",
        worker_id=slot,
        pid=handle.pid if handle else None,
        exitcode=exitcode,
        signal=signal_name(exitcode),
        stack=handle.box.last() if handle and handle.box else "",
        output=handle.transcript.last_lines() if handle and handle.transcript else (),
    )
    error.__cause__ = cause
    return error


def retry_in(fleet: Any, now: float) -> float | None:
    """Return the seconds until the next start is allowed; None if it is allowed now."""
    pause = fleet.not_before - now
    if fleet.breaker is not None:
        pause = max(pause, fleet.breaker.retry_in)
    return pause if pause > 0 else None
