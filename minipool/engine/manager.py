"""The manager: one thread that starts, watches, probes, replaces and ends the workers.

It waits in one place, for: its bell, the death of any process, a word from a booting or probed
worker, and the next due time. It is never on the way of a call and never blocks on a worker:
booting, probing and stopping are states, not calls. On every turn it compares what there is with
what there should be, so a lost message delays a repair by one tick and loses nothing. It knows
the pool not at all, so a forgotten pool can be collected, and survives its own failures.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import time
import weakref
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Callable

from ..errors import PoolStartError
from ..telemetry import Hooks, logger
from . import health, wire
from . import table as t
from .channel import Garbled, PeerGone
from .fleet import Fleet, retry_in
from .handle import PROBE_ID, Handle, describe_exit
from .launch import Launcher
from .states import WorkerEvent as E
from .states import WorkerState as S
from .turnstile import Turnstile

if TYPE_CHECKING:
    from ..config import PoolConfig

_COMMAND_TIMEOUT = 1.0  # seconds; a hook may hold the manager up, and wait for us in turn
_LAST_GRACE = 2.0  # seconds workers have to stop in, after a close that ran out of time
_EXITCODE_PATIENCE_NS = health.SECOND_NS  # a fork server may tell it late, or never


class Bell:
    """Wakes the manager, from any thread, a signal handler or a finaliser. Never waits."""

    def __init__(self) -> None:
        self.reader, self._writer = connection.Pipe(duplex=False)
        self._rung = False

    def ring(self) -> None:
        if not self._rung:  # one byte is enough: the manager looks at everything
            self._rung = True
            with contextlib.suppress(OSError, ValueError):  # closed: nobody needs waking any more
                self._writer.send_bytes(b"!")

    def silence(self) -> None:
        """Take the byte, then forget that it came: what is written later rings again."""
        if self.reader.poll(0):
            self.reader.recv_bytes()
        self._rung = False

    def close(self) -> None:
        self.reader.close()
        self._writer.close()


class Manager:
    """The thread, and what it is asked to do by others: `resize`, `drain`, `probe`, `close`."""

    def __init__(self, launcher: Launcher, config: PoolConfig, hooks: Hooks) -> None:
        self.config = config
        self.hooks = hooks
        self.bell = Bell()
        self.turnstile = Turnstile(config.strategy, self._queued, self.refused)
        self.fleet = Fleet(launcher, config, hooks)
        self.target = config.initial_size
        self.floor, self.ceiling = config.min_size or 0, config.max_size or 0
        self.may_grow = True
        self.sweepers: list[weakref.WeakMethod[Callable[[], None]]] = []  # called once a tick
        #: Closed with the pool; weakly, because what waits there may know the pool.
        self.lines: list[weakref.ref[Turnstile]] = []
        self.closers: list[Callable[[], None]] = []  # called when the last worker is gone
        self.sessions_end = True  # with the pool; False where a store keeps them
        self._wished = False
        self.done = False  # everything has ended
        self.at_end: Callable[[], object] = bool  # called once, when it has
        self.pid = os.getpid()
        self.opened_ns = time.monotonic_ns()
        self.closed_ns: int | None = None
        self._launcher = launcher
        self._limits = _limits(config)
        self._changed = threading.Condition()
        self._refused: collections.deque[Handle] = collections.deque()
        self._orders: collections.deque[Callable[[], None]] = collections.deque()
        self._close_by: float | None = None  # monotonic; None: not closing
        self._lost_at: collections.deque[float] = collections.deque()  # not yet replaced
        self._last_shrink_ns = self.opened_ns
        self._last_look = 0.0
        self._seat: object = None
        self._thread = threading.Thread(
            target=self._run, name=f"minipool-{config.name}", daemon=True
        )
        _managers.add(self)

    # -- asked by others (any thread) --------------------------------------------------------

    def start(self) -> None:
        """Start the thread, which starts the workers."""
        self._thread.start()

    @property
    def here(self) -> bool:
        """Whether the calling thread is the manager's own (a hook runs in it)."""
        return threading.current_thread() is self._thread

    @property
    def closing(self) -> bool:
        return self._close_by is not None

    def _queued(self) -> None:
        """Hear that somebody queues; nothing to do while no worker could be added."""
        if self.may_grow:
            self.bell.ring()

    def wish(self) -> None:
        """Hear of somebody who wanted a worker and did not wait: a lazy pool starts one."""
        self._wished = True
        self.bell.ring()

    def refused(self, slot: int, handle: Handle) -> None:
        """Take a slot that must not be offered again: closed, fenced, tainted or worn out."""
        if handle.state is S.VACANT:
            handle.hang_up_for_good()  # buried while it was leased, and its lease is over now
            return
        self._refused.append(handle)
        self.bell.ring()

    def order(self, action: Callable[[], None]) -> None:
        """Have `action` done in the manager's thread, soon."""
        self._orders.append(action)
        self.bell.ring()

    def command(self, action: Callable[[], None]) -> None:
        """Have `action` done in the manager's thread; return when it is, or in a second."""
        done: list[bool] = []

        def act() -> None:
            try:
                action()
            finally:
                done.append(True)

        self.order(act)
        if not self.here:  # else it is done when the hook that asks for it has returned
            self.wait_for(lambda: bool(done), _COMMAND_TIMEOUT)

    def wait_for(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until something that the manager changes is so; False if time ran out first."""
        if self.here:
            return condition()  # nothing will change while its thread waits here
        if timeout is not None:
            timeout = min(timeout, threading.TIMEOUT_MAX)
        with self._changed:
            return self._changed.wait_for(lambda: condition() or self.done, timeout)

    def wait_done(self, timeout: float) -> bool:
        """Wait until everything has ended."""
        return self.wait_for(lambda: self.done, timeout)

    def close(self, lease_timeout: float, kill: bool = False) -> None:
        """Begin to end everything; `lease_timeout` seconds from now leases are revoked."""
        by = time.monotonic() + lease_timeout
        if self._close_by is None or by < self._close_by:
            self._close_by = by
        if kill:
            self._close_by = min(self._close_by, by - _LAST_GRACE - 1)
        self.turnstile.closed = True  # before anybody can be told so
        self.bell.ring()

    def join(self, timeout: float) -> None:
        """Wait for the thread itself to end."""
        if not self.here and self._thread.ident is not None:
            self._thread.join(timeout)

    def abandon(self) -> None:
        """Let go of everything in a process that was forked from the owner. Takes no lock."""
        self.turnstile.closed = True
        self.turnstile.idle.clear()
        for handle in tuple(self.fleet.handles.values()):
            handle.abandon()
        if self._launcher.lifeline is not None:
            self._launcher.lifeline.abandon()
        self.bell.close()

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        _leave_signals_to_others()
        self.bell.ring()  # there are workers to start
        while not self.done:
            try:
                self._turn(self._wait())
            except Exception:
                logger().exception("the manager of %s failed and goes on", self.config.name)
                connection.wait([self.bell.reader], self.config.tick)  # not at full speed
        with self._changed:
            self._changed.notify_all()

    def _wait(self) -> set[Any]:
        sources: list[Any] = [self.bell.reader]
        for handle in self.fleet.handles.values():
            if handle.ended_ns:  # only its exit code is missing
                sources.append(handle.process.sentinel)
                continue
            sources.append(handle.death_fd)
            if handle.state in (S.STARTING, S.PROBING):
                sources.append(handle.channel.fd)
        return set(connection.wait(sources, self._patience()))

    def _patience(self) -> float:
        """Return how long the manager may wait if nothing happens."""
        if self._orders or self._refused:
            return 0.0
        now, now_ns = time.monotonic(), time.monotonic_ns()
        dues = [self.config.tick]
        due = health.due_in(self._rows(), now_ns, self._limits)
        if due is not None:
            dues.append(due / 1e9)
        backoff = retry_in(self.fleet, now)
        if backoff is not None:
            dues.append(backoff)
        if self._close_by is not None:
            dues.append(self._close_by - now)
            dues.append(self._close_by + _LAST_GRACE - now)
        positive = [due for due in dues if due > 0]
        return min(positive) + 0.001 if positive else self.config.tick

    def _turn(self, ready: set[Any]) -> None:
        self.bell.silence()
        for handle in tuple(self.fleet.handles.values()):
            if handle.state in (S.STARTING, S.PROBING) and handle.channel.fd in ready:
                self._hear(handle)
            if handle.ended_ns or handle.death_fd in ready:
                self._ended(handle)
        while self._orders:
            self._orders.popleft()()
        while self._refused:
            self._take_back(self._refused.popleft())
        self._look()
        if self._close_by is None:
            self._reconcile()
        else:
            self._finish()
        with self._changed:
            self._changed.notify_all()

    # -- what workers say --------------------------------------------------------------------

    def _hear(self, handle: Handle) -> None:
        """Read the word of a booting or probed worker."""
        try:
            frame = handle.receive()
        except PeerGone:
            return self._hung_up(handle)
        except Garbled:
            return self._condemn(handle, "what it sent is garbled")
        if frame is None:
            return None
        call_id, status, body = frame
        if handle.state is S.STARTING:
            if status == wire.READY:
                return self._ready(handle)
            if status == wire.START_FAILED:
                handle.start_error = wire.unpack_error(body)
                return self._condemn(handle, "its object could not be made")
        elif call_id == PROBE_ID and status in (wire.RETURNED, wire.RAISED):
            return self._probed(handle, status == wire.RETURNED)
        self._condemn(handle, "it sent what was not asked for")

    def _hung_up(self, handle: Handle) -> None:
        """Give a worker whose pipe has ended a moment to end by itself: its exit code tells why."""
        self.turnstile.fence(handle.slot)
        if handle.state is not S.LOST:
            handle.move(E.DIED)

    def _ready(self, handle: Handle) -> None:
        self.fleet.ready(handle)
        handle.move(E.READY)
        seconds = (handle.ready_ns - handle.spawned_ns) / 1e9
        facts = {"worker_id": handle.slot, "pid": handle.pid, "generation": handle.generation}
        self.hooks.emit("worker.init", {"seconds": seconds}, **facts)
        if self._lost_at:
            lost_for = time.monotonic() - self._lost_at.popleft()
            self.hooks.emit("recovery", {"seconds": lost_for}, **facts)
        self.turnstile.admit(handle.slot, handle)
        self.turnstile.publish(handle.slot, handle)

    def _probed(self, handle: Handle, healthy: bool) -> None:
        now = time.monotonic_ns()
        handle.probe_failures = 0 if healthy else handle.probe_failures + 1
        handle.probed()
        seconds, handle.probed_ns = (now - handle.probed_ns) / 1e9, now
        self._tell_probed(handle, seconds, healthy)
        if handle.probe_failures >= self.config.max_health_failures:
            failures = handle.probe_failures
            return self._condemn(handle, f"failed {failures} health checks in a row")
        handle.move(E.ANSWERED)
        if handle.tainted is not None:  # dismissed meanwhile
            return self._retire(handle)
        self.turnstile.publish(handle.slot, handle)

    def _tell_probed(self, handle: Handle, seconds: float, healthy: bool) -> None:
        logger().debug("worker %d: health check: %s", handle.slot, "well" if healthy else "failed")
        self.hooks.emit(
            "worker.health_check",
            {"seconds": seconds, "failures": handle.probe_failures},
            worker_id=handle.slot,
            pid=handle.pid,
            generation=handle.generation,
            healthy=healthy,
        )

    # -- ends of workers ---------------------------------------------------------------------

    def _condemn(self, handle: Handle, reason: str) -> None:
        """Make a worker's tokens worthless and kill it; its death is dealt with when it comes."""
        handle.tainted = handle.tainted or reason
        self.turnstile.fence(handle.slot)
        if handle.state is not S.LOST:
            handle.move(E.DIED)
        handle.kill()

    def _ended(self, handle: Handle) -> None:
        """Deal with a process that has ended, once its exit code is known or given up."""
        if handle.state is S.STARTING and handle.start_error is None:
            self._hear(handle)  # it may have said why
        if not handle.ended_ns:
            handle.ended_ns = time.monotonic_ns()
            handle.channel.hang_up()
            self.turnstile.fence(handle.slot)
            self.turnstile.dismiss(handle.slot)
            if handle.state not in (S.STOPPING, S.LOST):
                handle.move(E.DIED)
        code = handle.exitcode(0)
        patience = handle.ended_ns + _EXITCODE_PATIENCE_NS - time.monotonic_ns()
        if code is None and patience > 0:
            return
        if handle.ready_ns and not handle.condemned:
            self._mourn(handle, code)
        self.fleet.bury(handle, code, handle.start_error)

    def _mourn(self, handle: Handle, code: int | None) -> None:
        """Tell of a worker that ended though nobody wanted it to."""
        self._lost_at.append(handle.ended_ns / 1e9)
        why = handle.tainted or "by itself"
        log = logger().info if handle.tainted else logger().warning  # who tainted it was told
        log(
            "worker %d (pid %s) of %s died %s (%s) and is replaced",
            handle.slot, handle.pid, self.config.name, describe_exit(code), why,
        )  # fmt: skip
        self.hooks.emit("error", {}, kind="death", error=why, worker_id=handle.slot)

    def _retire(self, handle: Handle) -> None:
        """Ask a worker, which the caller owns, to end by itself."""
        self.turnstile.fence(handle.slot)
        handle.condemned = True
        handle.move(E.TOLD_TO_STOP)
        handle.send_stop(self.sessions_end and self._close_by is not None)

    def _take_back(self, handle: Handle) -> None:
        """Deal with a slot that was given back and is not to be offered again."""
        if handle.state is not S.IDLE:
            return  # its end is under way already
        if handle.in_call:
            self._condemn(handle, "left in the middle of a call")
        else:
            self._retire(handle)

    # -- looking and acting ------------------------------------------------------------------

    def _rows(self, sweep: bool = False) -> list[health.Row]:
        idle = self.turnstile.idle
        handles = [handle for handle in self.fleet.handles.values() if not handle.ended_ns]
        return [_row(handle, handle.slot in idle, sweep) for handle in handles]

    def _look(self) -> None:
        """Make the plan and carry it out.

        Losses are counted, and acted on, by sweeps only: looks that are a tick apart. One look
        may well find a busy worker on its way from one lease to the next, and a later one on
        another such way; lost is who has not even been given back in between.
        """
        now, now_ns = time.monotonic(), time.monotonic_ns()
        sweep = now - self._last_look >= self.config.tick
        actions = health.plan(
            self._rows(sweep), now_ns, self._limits, self.target, self.floor, self._last_shrink_ns
        )
        for action in actions:
            handle = self.fleet.handles[action.slot]
            if isinstance(action, health.Lost):
                if sweep:
                    handle.sweeps_lost, handle.lost_since_ns = 1, handle.idle_since_ns
            else:
                self._act(action, handle)
        if sweep:
            self._last_look = now
            self._sweep(actions, now_ns)

    def _sweep(self, actions: list[health.Action], now_ns: int) -> None:
        lost = {action.slot for action in actions if isinstance(action, health.Lost)}
        for handle in self.fleet.handles.values():
            if handle.slot not in lost:
                handle.sweeps_lost = 0
        self.fleet.forgive(now_ns)
        for reference in self.sweepers:
            sweep = reference()
            if sweep is not None:
                sweep()
            del sweep  # it keeps the pool
        for handle in tuple(self.fleet.handles.values()):
            if handle.sessions_over:
                self.probe(handle)
        self._seat = self.turnstile.unseat(self._seat)
        if self.hooks["utilization"]:
            live = self.fleet.live()
            leased = sum(handle.live_lease is not None for handle in live)
            ratio = leased / len(live) if live else 0.0
            self.hooks.emit("utilization", {"leased": leased, "workers": len(live), "ratio": ratio})

    def _act(self, action: health.Action, handle: Handle) -> None:
        if isinstance(action, health.Probe):
            self.probe(handle)
        elif isinstance(action, health.CountFailure):
            handle.probe_failures += 1
            handle.since_ns = time.monotonic_ns()
            self._tell_probed(handle, self.config.health_check_timeout, healthy=False)
        elif isinstance(action, health.Replace):
            self._condemn(handle, action.reason)
        elif isinstance(action, health.Terminate):
            handle.terminated = True
            handle.kill(15)
        elif isinstance(action, health.Retire):
            if self.turnstile.claim(handle.slot, handle):
                self.target -= action.shrink
                self._last_shrink_ns = time.monotonic_ns()
                handle.tainted = action.reason
                self._retire(handle)
        elif isinstance(action, health.Revoke):
            self._revoke(handle, action.reason)
        elif isinstance(action, health.WarnLeak):
            self._warn_leak(handle)

    def probe(self, handle: Handle) -> None:
        """Claim an idle worker and ask whether it is well."""
        if self.turnstile.claim(handle.slot, handle):
            self.ask(handle)

    def ask(self, handle: Handle) -> None:
        """Ask a worker that was not offered to anybody else whether it is well."""
        if handle.state is not S.IDLE or handle.condemned or self.closing:
            return self.refused(handle.slot, handle)
        handle.move(E.CLAIMED)
        handle.probed_ns = handle.since_ns
        try:
            handle.send_probe()
        except PeerGone:
            self._condemn(handle, "dead when it was probed")

    def _revoke(self, handle: Handle, reason: str) -> None:
        handle.revoked = reason
        self._condemn(handle, reason)

    def _warn_leak(self, handle: Handle) -> None:
        seconds = (time.monotonic_ns() - handle.row[t.LEASED_SINCE_NS]) / 1e9
        handle.leak_warned = True
        logger().warning(
            "worker %d of %s has been leased for %.1f s; it was taken here:\n%s",
            handle.slot, self.config.name, seconds, handle.origin,
        )  # fmt: skip
        self.hooks.emit("lease.leaked", {"seconds": seconds}, worker_id=handle.slot)

    # -- as many workers as there should be --------------------------------------------------

    def _reconcile(self) -> None:
        """Start what is missing, and what the queue asks for."""
        for handle in self.fleet.live():  # dismissed in the moment it was given back?
            if handle.tainted is not None and self.turnstile.claim(handle.slot, handle):
                self._retire(handle)
        live = self.fleet.live()
        starting = sum(handle.state is S.STARTING for handle in live)
        dying = self.fleet.dying()  # each is replaced in its own slot, a moment from now
        self.may_grow = len(live) < self.ceiling + self.config.max_overflow
        waiting = len(self.turnstile.waiters)  # after that: who queues sees it, or is seen
        wanted = self.target
        wished, self._wished = max(waiting, self._wished), False
        if wished > starting and self.target < (self.config.size or 0):
            wanted = self.target = min(self.config.size or 0, self.target + wished - starting)
        elif waiting > starting and starting == 0 and dying == 0:
            wanted = self._grown(len(live))
        if time.monotonic() < self.fleet.not_before:
            return
        missing = min(wanted - len(live) - dying, self.config.startup_batch - starting)
        for _ in range(missing):
            if self.fleet.spawn() is None:
                return

    def _grown(self, live: int) -> int:
        """Return one more than now, if the limits allow: a spike is over before it is there."""
        if live < self.target:
            return self.target
        if live < self.ceiling:
            self.target = live + 1
            self._last_shrink_ns = time.monotonic_ns()
            return self.target
        return min(live + 1, self.ceiling + self.config.max_overflow)

    def resize(self, size: int) -> None:
        """Want `size` workers from now on; what is too much goes. Manager's thread only."""
        if self.floor == self.ceiling:
            self.floor = self.ceiling = size
        self.target = size
        live = self.fleet.live()
        order = {S.STARTING: 1, S.IDLE: 3, S.PROBING: 4}
        idle = self.turnstile.idle
        live.sort(key=lambda h: 0 if h.condemned else 2 if h.slot in idle else order[h.state])
        for handle in live[: max(0, len(live) - size)]:
            self.dismiss(handle, "the pool was made smaller")

    def dismiss(self, handle: Handle, reason: str) -> None:
        """Let a worker go: at once if it is idle or booting, else when it is given back."""
        handle.tainted, handle.condemned = handle.tainted or reason, True
        if handle.state is S.STARTING:
            self._condemn(handle, reason)
        elif handle.state is S.IDLE and self.turnstile.claim(handle.slot, handle):
            self._retire(handle)

    def drain(self) -> None:
        """Let every worker that is in service now go, one way or the other."""
        for handle in self.fleet.live():
            if handle.state is not S.STARTING:
                self.dismiss(handle, "the pool was drained")

    # -- the end -----------------------------------------------------------------------------

    def _finish(self) -> None:
        """Take every worker one step further towards its end; then end."""
        assert self._close_by is not None
        for _, handle in self.turnstile.close():
            self._take_back(handle)
        for reference in self.lines:
            line = reference()
            if line is not None:
                line.close()
        now = time.monotonic()
        for handle in tuple(self.fleet.handles.values()):
            handle.condemned = True
            if (
                handle.state is S.STARTING
                or now >= self._close_by + _LAST_GRACE
                or (handle.state is S.IDLE and now >= self._close_by)
            ):
                self._revoke(handle, "the pool was closed")
        if not self.fleet.handles:
            self._end()

    def _end(self) -> None:
        self.closed_ns = time.monotonic_ns()
        self.fleet.close()
        for close in self.closers:
            try:
                close()
            except Exception:
                logger().exception("%s: the session store did not close", self.config.name)
        if self._launcher.lifeline is not None:
            self._launcher.lifeline.close()
        self.bell.close()
        self.at_end()
        self.done = True
        uptime = (self.closed_ns - self.opened_ns) / 1e9
        self.hooks.emit("pool.terminate", {"uptime": uptime})

    def start_error(self) -> PoolStartError | None:
        """Return the error that tells why no worker is there, if starting them has failed."""
        failure = self.fleet.last_failure
        if failure is None:
            return None
        error = PoolStartError(
            f"{self.config.name} could not start: {failure}; correct that and open a new pool"
        )
        error.__cause__ = failure.__cause__ or failure
        return error


def _row(handle: Handle, idle: bool, sweep: bool) -> health.Row:
    lease = handle.live_lease
    same_loss = sweep and handle.lost_since_ns == handle.idle_since_ns
    since_ns = handle.row[t.LEASED_SINCE_NS] or time.monotonic_ns()  # 0: this moment begun or over
    return health.Row(
        slot=handle.slot,
        generation=handle.generation,
        state=handle.state,
        since_ns=handle.idle_since_ns if handle.state is S.IDLE else handle.since_ns,
        idle=idle,
        leased_since_ns=None if lease is None else since_ns,
        probed_ns=handle.probed_ns,
        probe_failures=handle.probe_failures,
        sweeps_lost=handle.sweeps_lost if same_loss else 0,
        leak_warned=handle.leak_warned,
        terminated=handle.terminated,
    )


def _limits(config: PoolConfig) -> health.Limits:
    def ns(seconds: float | None) -> int | None:
        return None if seconds is None else int(seconds * health.SECOND_NS)

    return health.Limits(
        init_ns=ns(config.init_timeout),
        probe_every_ns=ns(config.health_check_interval),
        probe_timeout_ns=ns(config.health_check_timeout) or 1,
        max_probe_failures=config.max_health_failures,
        stop_ns=ns(config.close_timeout) or 0,
        lease_ns=ns(config.lease_timeout),
        leak_ns=ns(config.leak_warn_after),
        overflow_idle_ns=ns(config.overflow_idle) or 0,
        max_idle_ns=ns(config.max_idle),
    )


def _leave_signals_to_others() -> None:
    """Block SIGINT in this thread: processes it starts inherit that until they ignore it."""
    import signal

    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


# -- all managers of this process ----------------------------------------------------------------

_managers: weakref.WeakSet[Manager] = weakref.WeakSet()


def live_managers() -> list[Manager]:
    """Return the managers that were started in this process and have not ended."""
    mine = os.getpid()
    return [manager for manager in tuple(_managers) if manager.pid == mine and not manager.done]


def _abandon_all() -> None:
    for manager in tuple(_managers):
        if not manager.done:
            manager.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
