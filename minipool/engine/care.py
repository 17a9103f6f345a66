"""Care: what is done to one worker, from its first word to its end. By the manager's thread.

Nothing here waits for a worker: each method takes the one step that is due, and what the worker
says or does next is heard on a later turn.
"""

from __future__ import annotations

import collections
import threading
import time
from typing import TYPE_CHECKING, Callable

from ..telemetry import DEBUG, INFO, WARNING, Hooks, logger, remark
from . import health, wire
from . import table as t
from .channel import Garbled, PeerGone
from .child import LEFT
from .fleet import Fleet
from .handle import PROBE_ID, Handle
from .health import SENT_SIGTERM
from .inquest import ending_of
from .states import WorkerEvent as E
from .states import WorkerState as S
from .turnstile import Turnstile

if TYPE_CHECKING:
    from ..config import PoolConfig

_EXITCODE_PATIENCE_NS = health.SECOND_NS  # a fork server may tell it late, or never


_UNPACKING = 1.0  # seconds that an exception of the user's may take to become one here
_UNREAD = "takes too long to unpickle here, or no thread could be started for it"


class Care:
    """Hears, probes, retires, condemns and buries the workers of one pool."""

    def __init__(
        self,
        config: PoolConfig,
        hooks: Hooks,
        turnstile: Turnstile,
        fleet: Fleet,
        refused: Callable[[int, Handle], None],
        order: Callable[[Callable[[], None]], None],
    ) -> None:
        self.closing = False  # the pool is being closed
        self.sessions_end = True  # with the pool; False where a store keeps them
        self._config = config
        self._hooks = hooks
        self._turnstile = turnstile
        self._fleet = fleet
        self._refused = refused
        self._order = order
        self._lost_at: collections.deque[float] = collections.deque()  # not yet replaced

    # -- its word ----------------------------------------------------------------------------

    def hear(self, handle: Handle) -> None:
        """Read the word of a booting or probed worker."""
        try:
            frame = handle.receive()
        except PeerGone:
            return self._hung_up(handle)
        except Garbled:
            return self.condemn(handle, "what it sent is garbled")
        if frame is None:
            return None
        call_id, status, body = frame
        if handle.channel.unsent and status != wire.START_FAILED:
            return self.condemn(handle, "it answered before it had read what it was sent")
        if handle.state is S.STARTING:
            if status == wire.READY:
                return self._ready(handle)
            if status == wire.START_FAILED:
                return self._explain(handle, body)
        elif call_id == PROBE_ID and status in (wire.RETURNED, wire.RAISED):
            return self._probed(handle, status == wire.RETURNED)
        self.condemn(handle, "it sent what was not asked for")

    def _explain(self, handle: Handle, body: bytes | memoryview) -> None:
        """Find out why a worker did not start, without waiting for it; then it is condemned.

        To unpickle the exception runs the user's code, which may never return.
        """
        handle.start_error = _in_words(body)
        handle.explaining = True

        def explain() -> None:
            why = _in_time(lambda: _readable(wire.unpack_error(body)))
            handle.start_error = why or handle.start_error
            self._order(lambda: self._explained(handle))

        try:
            threading.Thread(target=explain, name="minipool-explain", daemon=True).start()
        except RuntimeError:  # out of threads
            self._explained(handle)

    def _explained(self, handle: Handle) -> None:
        handle.explaining = False
        if handle.state is not S.VACANT:
            self.condemn(handle, "its object could not be made")

    def send_rest(self, handle: Handle) -> None:
        """Send more of what a worker was not able to take at once."""
        try:
            handle.channel.flush()
        except PeerGone:
            self._hung_up(handle)
        except BaseException:  # no memory; an interrupt
            self.condemn(handle, "a part of what it was sent was lost")
            raise

    def _hung_up(self, handle: Handle) -> None:
        """Give a worker whose pipe has ended a moment to end by itself: its exit code tells why."""
        self._lose(handle)

    def _lose(self, handle: Handle) -> None:
        """Make a worker's tokens worthless, and count on it no more."""
        self._turnstile.fence(handle.slot)
        if handle.state in (S.STOPPING, S.LOST):
            return
        if handle.serving_ns and not handle.condemned:
            self._lost_at.append(time.monotonic())
        handle.move(E.DIED)

    def _ready(self, handle: Handle) -> None:
        self._fleet.ready(handle)
        handle.move(E.SET_ASIDE if handle.reserve else E.READY)
        seconds = (handle.ready_ns - handle.spawned_ns) / 1e9
        facts = {"worker_id": handle.slot, "pid": handle.pid, "generation": handle.generation}
        self._hooks.emit("worker.init", {"seconds": seconds}, **facts)
        if not handle.reserve:
            self._offer(handle)

    def _offer(self, handle: Handle) -> None:
        """Put a worker that is ready into service."""
        self._fleet.serve(handle)
        if self._lost_at:
            lost_for = time.monotonic() - self._lost_at.popleft()
            facts = {"worker_id": handle.slot, "pid": handle.pid, "generation": handle.generation}
            self._hooks.emit("recovery", {"seconds": lost_for}, **facts)
        self._turnstile.admit(handle.slot, handle)
        self._turnstile.publish(handle.slot, handle)

    # -- in service and out of it ------------------------------------------------------------

    def call_up(self, handle: Handle) -> bool:
        """Put a worker of the reserve into service, now or when it is ready; False: it is dead."""
        if handle.state is S.STARTING:
            handle.reserve = False
            return True
        if handle.left:
            self.let_leave(handle, SENT_SIGTERM)
            return False
        if handle.channel.disturbed():
            self.condemn(handle, "dead, or talking, when it was a spare")
            return False
        handle.tainted = None
        handle.move(E.CALLED_UP)
        self._offer(handle)
        return True

    def set_aside(self, handle: Handle) -> None:
        """Take a worker, which the caller owns, out of service; it lives on."""
        self._fleet.spare(handle)
        handle.move(E.SET_ASIDE)

    def _probed(self, handle: Handle, healthy: bool) -> None:
        now = time.monotonic_ns()
        handle.probe_failures = 0 if healthy else handle.probe_failures + 1
        handle.probed()
        seconds, handle.probed_ns = (now - handle.probed_ns) / 1e9, now
        self._tell_probed(handle, seconds, healthy)
        if handle.probe_failures >= self._config.max_health_failures:
            failures = handle.probe_failures
            return self.condemn(handle, f"failed {failures} health checks in a row")
        handle.move(E.ANSWERED)
        if handle.tainted is not None:  # dismissed meanwhile
            return self.take_back(handle)
        if handle.reserve:
            return self.set_aside(handle)
        self._turnstile.publish(handle.slot, handle)
        if handle.sessions_over and healthy:  # the rest, unless somebody has waited for it
            self.probe(handle)

    def count_failure(self, handle: Handle) -> None:
        """Count a probe that got no answer in time; its worker is given the same time again."""
        handle.probe_failures += 1
        handle.since_ns = time.monotonic_ns()
        self._tell_probed(handle, self._config.health_check_timeout, healthy=False)

    def _tell_probed(self, handle: Handle, seconds: float, healthy: bool) -> None:
        remark(DEBUG, "worker %d: health check: %s", handle.slot, "well" if healthy else "failed")
        self._hooks.emit(
            "worker.health_check",
            {"seconds": seconds, "failures": handle.probe_failures},
            worker_id=handle.slot,
            pid=handle.pid,
            generation=handle.generation,
            healthy=healthy,
        )

    # -- ends of workers ---------------------------------------------------------------------

    def condemn(self, handle: Handle, reason: str, last_words: bool = False) -> None:
        """Make a worker's tokens worthless and kill it; its death is dealt with when it comes.

        With `last_words` it may say where it is; who does not die of that is killed a moment later.
        """
        handle.tainted = handle.tainted or reason
        handle.killed_for = handle.killed_for or reason
        if handle.state is S.LOST:
            last_words = False  # it has had its moment
        self._lose(handle)
        if not (last_words and handle.ask_last_words()):
            handle.kill()
        if handle.process.refused:
            self._cut_off(handle)

    def _cut_off(self, handle: Handle) -> None:
        """Go on without a worker that cannot be killed; it keeps its slot until it ends."""
        if not handle.cut:
            handle.cut = True
            remark(
                WARNING,
                "worker %d (pid %s) of %s cannot be killed, and is cut off: %s",
                handle.slot, handle.pid, self._config.name, handle.process.refused,
            )  # fmt: skip
        handle.cut_off()

    def give_up(self, handle: Handle) -> None:
        """Forget a worker that was to be killed and is still there, so that the pool can end.

        It ends with its lifeline, or when the kernel lets go of it.
        """
        if not handle.process.refused:
            remark(
                WARNING,
                "worker %d (pid %s) of %s was sent SIGKILL and does not end; it is given up",
                handle.slot, handle.pid, self._config.name,
            )  # fmt: skip
        handle.channel.hang_up()
        handle.process.give_up("it could not be killed")
        self._fleet.bury(handle, None, handle.start_error)

    def ended(self, handle: Handle) -> None:
        """Deal with a process that has ended, once its exit code is known or given up."""
        if handle.state is S.STARTING and handle.start_error is None:
            self.hear(handle)  # it may have said why
        if handle.explaining:
            return
        if not handle.ended_ns:
            handle.ended_ns = time.monotonic_ns()
            handle.channel.hang_up()
            self._lose(handle)
            self._turnstile.dismiss(handle.slot)
        code = handle.process.exitcode(0)
        if code == LEFT:
            handle.tainted, handle.condemned = handle.tainted or SENT_SIGTERM, True
        patience = handle.ended_ns + _EXITCODE_PATIENCE_NS - time.monotonic_ns()
        patience += int(self._fleet.standstills.counted(handle.ended_ns / 1e9) * health.SECOND_NS)
        if code is None and patience > 0 and handle.process.unknown is None:
            return
        handle.process.give_up()
        if handle.ready_ns and not handle.condemned:
            self._mourn(handle)
        self._fleet.bury(handle, code, handle.start_error)

    def _mourn(self, handle: Handle) -> None:
        """Tell of a worker that ended though nobody wanted it to; the same, whoever saw it first.

        Whoever had it killed was told why.
        """
        ending = ending_of(handle)
        remark(
            INFO if handle.process.killed else WARNING,
            "worker %d (pid %s) of %s died %s and is replaced",
            handle.slot, handle.pid, self._config.name, ending,
        )  # fmt: skip
        self._hooks.emit("error", {}, kind="death", error=ending, worker_id=handle.slot)

    def retire(self, handle: Handle) -> None:
        """Ask a worker, which the caller owns, to end by itself."""
        self._turnstile.fence(handle.slot)
        handle.condemned = True
        handle.move(E.TOLD_TO_STOP)
        handle.send_stop(self.sessions_end and self.closing)

    def let_leave(self, handle: Handle, reason: str) -> None:
        """See off an idle worker or spare that ends by itself, unless somebody has taken it."""
        if handle.state is S.SPARE or self._turnstile.claim(handle.slot, handle):
            handle.tainted = handle.tainted or reason
            self.retire(handle)

    def dismiss(self, handle: Handle, reason: str) -> None:
        """Let go a worker that is out of service."""
        handle.tainted, handle.condemned = reason, True
        if handle.state is S.STARTING:
            self.condemn(handle, reason)
        elif handle.state is S.SPARE:
            self.retire(handle)

    def take_back(self, handle: Handle) -> None:
        """Deal with a slot that was given back and is not to be offered again."""
        if handle.state is not S.IDLE:
            return  # its end is under way already
        if handle.in_call:
            self.condemn(handle, handle.tainted or "left in the middle of a call")
        elif handle.worn_out and not handle.condemned and not self.closing:
            self.set_aside(handle)
        else:
            self.retire(handle)

    def probe(self, handle: Handle) -> None:
        """Ask an idle worker, claimed for that, or a spare whether it is well."""
        if handle.state is S.SPARE or self._turnstile.claim(handle.slot, handle):
            self.ask(handle)

    def ask(self, handle: Handle) -> None:
        """Ask a worker that was not offered to anybody else whether it is well."""
        if handle.state not in (S.IDLE, S.SPARE) or handle.condemned or self.closing:
            return self._refused(handle.slot, handle)
        handle.move(E.CLAIMED)
        handle.probed_ns = handle.since_ns
        try:
            handle.send_probe()
        except PeerGone:
            self.condemn(handle, "dead when it was probed")

    def revoke(self, handle: Handle, reason: str, tenure: health.Tenure | None = None) -> None:
        """Take a worker away from its lease; with `tenure`, only if that is not over.

        Tainting it comes before the last look at the lease, and giving it back looks the other way
        round: the lease is over before it looks for the taint. So whoever gives it back from here
        on does not offer it again, and no later lease is hit. One that is over by now leaves a
        worker that is replaced once it is idle, as it was about to be.
        """
        if tenure is not None:
            if not self._still(handle, tenure):
                return
            handle.tainted = handle.tainted or reason
            if not self._still(handle, tenure):
                return
        handle.revoked = reason
        self.condemn(handle, reason, last_words=not self.closing)

    def _still(self, handle: Handle, tenure: health.Tenure) -> bool:
        return handle.slot not in self._turnstile.idle and tenure_of(handle) == tenure

    def warn_leak(self, handle: Handle, tenure: health.Tenure) -> None:
        """Log a lease that is held for long; nothing if it is over."""
        origin = handle.origin  # of that lease, if it is not over after this
        if tenure_of(handle) != tenure:
            return
        seconds = (time.monotonic_ns() - tenure.since_ns) / 1e9
        handle.leak_warned = tenure.lease
        logger().warning(
            "worker %d of %s has been leased for %.1f s; it was taken here:\n%s",
            handle.slot, self._config.name, seconds, origin,
        )  # fmt: skip
        self._hooks.emit("lease.leaked", {"seconds": seconds}, worker_id=handle.slot)


def tenure_of(handle: Handle) -> health.Tenure:
    """Return whose a worker is now: which lease's, or nobody's since when.

    The number is read before the lease is, and is written before the lease is there: what was
    found of an older lease is never said of a newer one.
    """
    lease, since_ns = handle.row[t.LEASES], handle.row[t.LEASED_SINCE_NS]
    if handle.live_lease is None:
        since_ns = handle.idle_since_ns
    return health.Tenure(lease, since_ns)


def _readable(error: BaseException) -> BaseException:
    """Ask an exception for its text here, where that may take its time; return it."""
    wire.named(error)
    return error


def _in_words(body: bytes | memoryview) -> BaseException:
    """Return what stands for the exception that a start failed with, until it is unpickled."""
    try:
        return wire.error_in_words(body, _UNREAD)
    except Exception as problem:  # there is none
        return problem


def _in_time(unpack: Callable[[], BaseException]) -> BaseException | None:
    """Return the exception that a start failed with; None if it takes too long to unpickle."""
    made: list[BaseException] = []

    def make() -> None:
        try:
            made.append(unpack())
        except BaseException as problem:
            made.append(problem)

    thread = threading.Thread(target=make, name="minipool-unpack", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # out of threads
        return None
    thread.join(_UNPACKING)
    return made[0] if made else None
