"""The manager: one thread that starts, watches, probes, replaces and ends the workers.

It waits in one place, for: its bell, the death of any process, a word from a booting or probed
worker, and the next due time. It is never on the way of a call and never blocks on a worker:
booting, probing and stopping are states, not calls. On every turn it compares what there is with
what there should be, so a lost message delays a repair by one tick and loses nothing; only while
no lease begins and nothing is due it trusts its last comparison, for some seconds. It knows the
pool not at all, so a forgotten pool can be collected, and survives its own failures.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Callable

from .._sync import Notice
from ..breaker import CLOSED, CircuitBreaker
from ..telemetry import Hooks, log_through, logger
from . import health
from . import table as t
from .bell import Bell, ready
from .care import Care, tenure_of
from .fleet import Fleet, retry_in
from .handle import Handle
from .holdups import Holdups
from .launch import Launcher
from .logrelay import LogRelay
from .oom import OOM_KILLS
from .passage import Suspects
from .poller import Poller
from .resources import resident_bytes
from .staff import Staff
from .states import WorkerState as S
from .turnstile import Turnstile, Waiter

if TYPE_CHECKING:
    from ..config import PoolConfig

_AT_REST = (S.IDLE, S.SPARE)
_BELL = -1  # in place of a slot
_TICKS_AT_REST = 3  # so that onlookers hear of the manager before they take it for silent
_COMMAND_TIMEOUT = 1.0  # seconds; a hook may hold the manager up, and wait for us in turn
_KEEPERS_GRACE = 2.5  # seconds that what waits for the outside may take to end, after the workers
_LOG_PATIENCE = 0.9  # seconds that log handlers have at the end; `close` waits a little longer
_GIVE_UP_NS = 3 * health.SECOND_NS  # from SIGKILL to the end: the kernel frees all memory first
_LAST_GRACE = 2.0  # seconds workers have to stop in, after a close that ran out of time


class Keeper:
    """What waits for the outside in a thread of its own, so that the manager need not.

    It ends with the pool: it is told to when the last worker is gone, and rings the bell then.
    """

    ended = False
    lets_go = True  # at its end it closes what it looks after

    def start(self) -> None:
        """Start the thread."""
        raise NotImplementedError

    def end(self) -> None:
        """Have the thread end, soon. Waits for nothing."""
        raise NotImplementedError

    def join(self, timeout: float) -> None:
        """Wait for the thread itself to end."""
        raise NotImplementedError

    def keeps(self, thing: object) -> bool:
        """Whether that very thing is what it looks after."""
        raise NotImplementedError

    @property
    def here(self) -> bool:
        """Whether the calling thread is this one (a listener runs in it)."""
        raise NotImplementedError


class Crowded(Exception):
    """The line is as long as it may be; nobody else can queue."""


class Manager:
    """The thread, and what others ask of it: to do an order, to be waited for, to close."""

    def __init__(
        self,
        launcher: Launcher,
        config: PoolConfig,
        hooks: Hooks,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self.config = config
        self.hooks = hooks
        self.bell = Bell()
        self.turnstile = Turnstile(config.strategy, self._queued, self.refused, swept=True)
        try:
            self.fleet = Fleet(launcher, config, hooks, breaker=breaker)
        except BaseException:  # its traceback may keep this object alive
            self.bell.close()
            raise
        self.fleet.closing.bell = self.bell
        self.standstills = self.fleet.standstills
        self.care = Care(config, hooks, self.turnstile, self.fleet, self.refused, self.order)
        self.staff = Staff(config, self.turnstile, self.fleet, self.care)
        if self.fleet.breaker is not None:
            self.fleet.breaker.listeners.append(self._circuit_changed)
        self.sweepers: list[weakref.WeakMethod[Callable[[], None]]] = []  # called once a tick
        #: Swept and closed with the pool; weakly, because what waits there may know the pool.
        self.lines: list[weakref.ref[Turnstile]] = []
        self.closers: list[Callable[[], None]] = []  # called when the last worker is gone
        self.keepers: list[Keeper] = []
        self._keepers_since: float | None = None  # monotonic; None: they were not told to end yet
        self.done = False  # everything has ended
        self.failure: BaseException | None = None  # why it was given up: no worker could be started
        self.for_good = True  # its end is the pool's; False: the pool may be opened again
        self.at_end: Callable[[], object] = bool  # called once, when it has
        self._last_steps: collections.deque[Callable[[], object]] = collections.deque()
        self.pid = os.getpid()
        self.opened_ns = time.monotonic_ns()
        self.closed_ns: int | None = None
        self._launcher = launcher
        self._limits = health.limits_of(config)
        self._changed = Notice()
        self._refused: collections.deque[Handle] = collections.deque()
        self._orders: collections.deque[Callable[[], None]] = collections.deque()
        #: Each close, as when it was asked for and when its leases are over; monotonic. Callers
        #: append at any time and take nothing back, so the end that is to come first is never lost.
        self._closes: list[tuple[float, float]] = []
        self.holdups = Holdups(config.name or "")  # of its close
        self._outside = (0, 0)  # what may have held up the last turn
        self._suspects = Suspects()  # workers that nobody seems to have
        self._poller = Poller()
        self._whole = True  # the turn has looked, or is to look, at all workers
        self._last_look = 0.0
        self._acted = True  # the last look found something to do
        # Looks are skipped until then, in monotonic ns, while `_seen` is the same.
        self._quiet_until, self._quiet_seen = 0, (0, 0)
        #: Who was in the matcher's seat of each turnstile at the last sweep.
        self._seats: weakref.WeakKeyDictionary[Turnstile, object] = weakref.WeakKeyDictionary()
        self._relay = LogRelay(config.name or "")
        self._thread = threading.Thread(
            target=self._run, name=f"minipool-{config.name}", daemon=True
        )
        _managers.add(self)

    # -- asked by others (any thread) --------------------------------------------------------

    def start(self) -> None:
        """Start the thread, which starts the workers.

        Raises:
            RuntimeError: there can be no more threads; nothing was started, all is given back.
        """
        try:
            for keeper in self.keepers:
                keeper.start()
            self._thread.start()
        except BaseException as problem:
            for keeper in self.keepers:
                keeper.end()
            if isinstance(problem, (RuntimeError, MemoryError)):  # else the thread may be running
                for keeper in self.keepers:
                    keeper.join(_KEEPERS_GRACE)  # the caller is told when nothing is kept
                # One that fails holds up no other, nor hides what happened.
                with contextlib.suppress(Exception), contextlib.ExitStack() as steps:
                    for give_back in (self.at_end, self.bell.close, *self._givings_back()[::-1]):
                        steps.callback(give_back)
                self.done = True
            raise

    @property
    def here(self) -> bool:
        """Whether the calling thread is one of the pool's own, which must not wait (for a hook)."""
        here = threading.current_thread() is self._thread
        return here or any(keeper.here for keeper in self.keepers)

    @property
    def closing(self) -> bool:
        return bool(self._closes)

    @property
    def _close_by(self) -> float:
        """When leases are revoked, monotonic; a stop has put that off. inf: not closing."""
        counted = self.standstills.counted
        return min((by + counted(since) for since, by in self._closes), default=math.inf)

    def _queued(self, waiter: Waiter) -> None:
        """Hear that somebody queues; nothing to do while no worker could be added.

        Raises:
            Crowded: of those who came at once, the others were first.
        """
        if self.config.max_waiting is not None:
            line = list(self.turnstile.waiters)  # in the order in which they joined it
            if waiter.ticket in line[self.config.max_waiting :]:
                raise Crowded
        if self.staff.may_grow and waiter.wants is None:  # else no new worker could serve it
            self.bell.ring()

    def wish(self) -> None:
        """Hear of somebody who wanted a worker and did not wait: a lazy pool starts one."""
        self.staff.wished = True
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

    def look_at_all(self) -> None:
        """Have every worker looked at, soon: something was changed that no turn hears of."""
        self.order(_nothing)

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
        limit = self.standstills.limit(timeout)
        left = limit.first_wait()
        while not self._changed.wait_for(lambda: condition() or self.done, left):
            left = limit.next_wait()
            if not left:
                return condition() or self.done
        return True

    @property
    def tells(self) -> bool:
        """Whether the calling thread is one that passes on what is logged."""
        return self._relay.here or (self.fleet.scribe is not None and self.fleet.scribe.here)

    def wait_done(self, timeout: float) -> bool:
        """Wait until everything has ended. Not in a log handler, for which the end would wait."""
        if self.tells:
            return self.done
        return self.wait_for(lambda: self.done, timeout)

    def close(self, lease_timeout: float, kill: bool = False) -> None:
        """Begin to end everything; `lease_timeout` seconds from now leases are revoked."""
        self.holdups.begin()
        now = time.monotonic()
        by = now + lease_timeout - (_LAST_GRACE + 1 if kill else 0.0)
        if by < self._close_by:
            self._closes.append((now, by))
        self.care.closing = True
        self.fleet.closing.set()
        self.turnstile.closed = True  # before anybody can be told so
        self.bell.ring()

    def join(self, timeout: float) -> None:
        """Wait for the thread itself to end, and for the others that have done all they had to."""
        if not self.here and self._thread.ident is not None:
            self._thread.join(timeout)
            for keeper in self.keepers:
                if keeper.ended:
                    keeper.join(timeout)
            self.fleet.join(timeout)

    def abandon(self) -> None:
        """Let go of everything in a process that was forked from the owner. Takes no lock."""
        self.turnstile.closed = True
        self.turnstile.idle.clear()
        self.standstills.end()
        self.fleet.abandon()
        self.bell.close()

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        _leave_signals_to_others()
        log_through(self._relay.put)
        OOM_KILLS.begin()
        self.bell.ring()  # there are workers to start
        failed = False
        while not self.done:
            try:
                self._turn(self._wait())
                failed = False
            except BaseException:  # a listener may raise SystemExit
                logger().exception("the manager of %s failed and goes on", self.config.name)
                self._acted = True  # or what it did not get to would wait for the next thing to do
                self._whole, self._poller = True, Poller()
                self._orders.append(_nothing)
                # Not at full speed; a bell that no turn gets to silence would have it so.
                self.standstills.rest(self.config.tick, self.config.tick, counts=False)
                ready([] if failed else [self.bell.reader], self.config.tick)
                failed = True
        self._changed.post()
        self.standstills.end()
        self.bell.close()
        OOM_KILLS.end()
        self._relay.close(_LOG_PATIENCE)

    def _wait(self) -> dict[Any, int]:
        """Return what was heard, each with the slot of its worker."""
        handles = self.fleet.handles if self._whole else self.fleet.unsettled
        self._poller.watch(_BELL, (self.bell.reader,))
        if self._whole:
            for slot in self._poller.owners:
                if slot not in handles and slot != _BELL:
                    self._poller.drop(slot)
        for handle in handles.values():
            self._watch(handle)
        patience, outside = self._patience(), self._outside
        self._outside = self.hooks.emitted, self.fleet.prepared
        self.standstills.note_starting(self.fleet.starting_alone)
        self.standstills.rest(patience, self.config.tick, counts=self._outside == outside)
        heard = self._poller.wait(patience)
        self._outside = self.hooks.emitted, self.fleet.prepared
        self.standstills.turn()
        return heard

    def _watch(self, handle: Handle) -> None:
        channel = handle.channel
        full = (channel.out,) if channel.unsent else ()
        if handle.explaining:
            sources: tuple[Any, ...] = ()  # an order comes when that is over
        elif handle.ended_ns:  # only its exit code is missing
            sources = (handle.process.exitcode_fd,)
        elif handle.state in (S.STARTING, S.PROBING):
            sources = handle.process.death_fd, channel.fd
        else:
            sources = (handle.process.death_fd,)
        self._poller.watch(handle.slot, sources, full)

    def _patience(self) -> float:
        """Return how long the manager may wait if nothing happens."""
        if self._orders or self._refused:
            return 0.0
        now, now_ns = time.monotonic(), time.monotonic_ns()
        if self._still():
            return min(self._tick_at_rest(), (self._quiet_until - now_ns) / 1e9) + 0.001
        dues = [self.config.tick, self.staff.raise_at - now]
        if self.fleet.next_expiry_ns:
            dues.append((self.fleet.next_expiry_ns + 1 - now_ns) / 1e9)
        due = health.due_in(self._rows(at_rest=False), now_ns, self._limits)
        if due is not None:
            dues.append(due / 1e9)
        backoff = retry_in(self.fleet, now)
        if backoff is not None:
            dues.append(backoff)
        if self.closing:
            close_by = self._close_by
            dues.extend((close_by - now, close_by + _LAST_GRACE - now))
            dues.append(self.holdups.tell_in(now))
        busy = self._acted or backoff or self.closing or self.staff.raise_at > now
        if not busy and self.fleet.count_staying() >= self.staff.target:
            self._quiet_seen = self._seen()  # before the rows: a lease that begins now is noticed
            self._quiet_until = health.quiet_until(
                self._rows(), now_ns, self._limits, self.staff.last_shrink_ns
            )
        positive = [due for due in dues if due > 0]
        return min(positive) + 0.001 if positive else self.config.tick

    def _still(self) -> bool:
        """Whether a look would find what the last one found, which was nothing to do."""
        return time.monotonic_ns() < self._quiet_until and self._seen() == self._quiet_seen

    def _tick_at_rest(self) -> float:
        """Return how long a pool at rest is left alone: a lease that begins has no hurry."""
        limits = self._limits
        hurry = limits.lease_ns is not None or limits.leak_ns is not None
        return self.config.tick * (1 if hurry or self.hooks["utilization"] else _TICKS_AT_REST)

    def _seen(self) -> tuple[int, int]:
        """Return what every lease changes at its begin, and one that was lost in it."""
        leases = sum(handle.row[t.LEASES] for handle in self.fleet.handles.values())
        return leases, len(self.turnstile.idle)

    def _turn(self, heard: dict[Any, int]) -> None:
        self._whole = True
        if not (heard or self._orders or self._refused) and self._still():
            self._sweep([], time.monotonic_ns())
        else:
            self._deal_with(heard)
        self._changed.post()

    def _deal_with(self, heard: dict[Any, int]) -> None:
        """Do what there is to do: a turn.

        It looks at all workers if it is the time for a sweep, or if there is a reason that
        concerns more than the workers that were heard or given back, such as an order. Else it
        looks at those, and at the others that are unsettled. That is all which one death or one
        word can be a reason for, and what such a turn may miss is found by the sweep.
        """
        self._quiet_until = 0
        if self.bell.reader in heard:
            self.bell.silence()
        swept = self._last_look
        whole = not heard or bool(self._orders) or self.closing
        heard = {source: slot for source, slot in heard.items() if slot != _BELL}
        whole = whole or time.monotonic() - swept >= self.config.tick
        for handle in self._concerned(heard, whole):
            if handle.channel.unsent and handle.channel.out in heard:
                self.care.send_rest(handle)
            if handle.state in (S.STARTING, S.PROBING) and handle.channel.fd in heard:
                self.care.hear(handle)
            if handle.ended_ns or handle.process.death_fd in heard:
                self.care.ended(handle)
                if handle.slot not in self.fleet.handles:
                    self._poller.drop(handle.slot)
        whole = whole or bool(self._orders)
        for _ in range(len(self._orders)):  # not what they order in turn: that is for later
            self._orders.popleft()()
        while self._refused:
            self.care.take_back(self._refused.popleft())
        self._look(whole)
        self._whole = whole or self.closing or self._last_look != swept
        if not self.closing:
            self._acted = self.staff.reconcile(self._whole) or self._acted
            if self.turnstile.waiters and self.fleet.hopeless:
                self.turnstile.dismiss(None)
        else:
            self._finish()

    def _concerned(self, heard: dict[Any, int], whole: bool) -> list[Handle]:
        """Return the workers that are to be dealt with, because of what was heard or anyway."""
        handles, unsettled = self.fleet.handles, self.fleet.unsettled
        if whole:
            return list(handles.values())
        for slot in heard.values():
            unsettled[slot] = handles[slot]
        slots = set(heard.values())
        return [one for one in unsettled.values() if one.ended_ns or one.slot in slots]

    def _circuit_changed(self, breaker: CircuitBreaker) -> None:
        if breaker.state == CLOSED:
            self.order(self.fleet.start_anew)
        facts = {"state": breaker.state, "cause": breaker.cause}
        self.hooks.emit("breaker.changed", {"failures": breaker.failures}, **facts)

    # -- looking and acting ------------------------------------------------------------------

    def _rows(self, sweep: bool = False, at_rest: bool = True) -> list[health.Row]:
        """Return the rows of all workers, or of those only that are on their way to a state."""
        idle = self.turnstile.idle
        among = self.fleet.handles if at_rest else self.fleet.unsettled
        handles = [handle for handle in among.values() if not handle.ended_ns]
        if not at_rest:
            handles = [one for one in handles if one.state not in _AT_REST or one.expires_ns]
        weigh = self.config.kill_rss is not None
        lost = self._lost if sweep else lambda handle: False
        rows = [_row(handle, handle.slot in idle, lost, weigh) for handle in handles]
        return [self._spared(row) for row in rows] if self.standstills.stopped else rows

    def _spared(self, row: health.Row) -> health.Row:
        """Return a row whose worker is as young as if the process had never been stopped.

        But not what is due at rest, such as the next probe: that is no deadline.
        """
        if row.state in _AT_REST:
            since = row.leased_since_ns
            if since is None:
                return row
            return row._replace(leased_since_ns=self._without_stops(since))
        return row._replace(since_ns=self._without_stops(row.since_ns))

    def _without_stops(self, since_ns: int) -> int:
        return since_ns + int(self.standstills.counted(since_ns / 1e9) * health.SECOND_NS)

    def _lost(self, handle: Handle) -> bool:
        """Tell whether a worker that is neither idle nor leased is nobody's."""
        lost = self._suspects.lost(handle.slot, self._mark(handle))
        return lost and self.turnstile.receiver(handle.slot) is None

    def _mark(self, handle: Handle) -> Any:
        """Return what each lease of a worker changes, and each hand-over."""
        return tenure_of(handle), self.turnstile.handed.get(handle.slot)

    def _look(self, whole: bool = True) -> None:
        """Make the plan and carry it out; but for a sweep, maybe for workers in motion only.

        What is due of a worker at rest is due by the clock, and a tick more or less does not
        matter: a word or the death of one worker is no reason to look at all others.

        Losses are looked for, and acted on, by sweeps only: looks that are a tick apart. One look
        may well find a busy worker on its way from one lease to the next, and a later one on
        another such way. A worker is lost only if it was not returned in between, and if nobody
        can be holding it: see `passage`.
        """
        now, now_ns = time.monotonic(), time.monotonic_ns()
        sweep = now - self._last_look >= self.config.tick
        rows = self._rows(sweep, at_rest=whole or sweep)
        actions = health.plan(rows, now_ns, self._limits)
        for action in actions:
            if not isinstance(action, health.Lost):
                self._act(action, self.fleet.handles[action.slot])
        self._acted = bool(actions) or not (whole or sweep)
        if sweep:
            self._sweep(actions, now_ns)

    def _sweep(self, actions: list[health.Action], now_ns: int) -> None:
        self._last_look = now_ns / 1e9
        lost = {action.slot for action in actions if isinstance(action, health.Lost)}
        handles = [handle for handle in self.fleet.handles.values() if handle.slot in lost]
        nowhere = [handle for handle in handles if self.turnstile.receiver(handle.slot) is None]
        self._suspects.end({handle.slot: self._mark(handle) for handle in nowhere})
        self.fleet.forgive(now_ns)
        OOM_KILLS.look()
        for reference in self.sweepers:
            sweep = reference()
            if sweep is not None:
                sweep()
            del sweep  # it keeps the pool
        for handle in tuple(self.fleet.handles.values()):
            if handle.sessions_over:
                self.care.probe(handle)
        for turnstile in (self.turnstile, *(line() for line in self.lines)):
            if turnstile is not None:
                self._seats[turnstile] = turnstile.sweep(self._seats.get(turnstile))
            del turnstile
        self._tell()
        if self.hooks["utilization"]:
            live = self.fleet.live()
            leased = sum(handle.live_lease is not None for handle in live)
            ratio = leased / len(live) if live else 0.0
            self.hooks.emit("utilization", {"leased": leased, "workers": len(live), "ratio": ratio})

    def _tell(self) -> None:
        """Put into the table what onlookers from other processes cannot know else."""
        fleet = self.fleet
        fleet.table.tell(
            self.staff.target,
            len(self.turnstile.waiters),
            self.closing,
            fleet.started,
            fleet.lost,
            fleet.retired,
            fleet.start_failures,
        )

    def _act(self, action: health.Action, handle: Handle) -> None:
        if isinstance(action, health.Probe):
            self.care.probe(handle)
        elif isinstance(action, health.CountFailure):
            self.care.count_failure(handle)
        elif isinstance(action, health.Replace):
            self.care.condemn(handle, action.reason, last_words=True)
        elif isinstance(action, health.Recycle):
            handle.worn = action.reason
        elif isinstance(action, health.Retire):
            self.care.let_leave(handle, action.reason)
        elif isinstance(action, health.Revoke):
            self.care.revoke(handle, action.reason, action.tenure)
        elif isinstance(action, health.WarnLeak) and action.tenure is not None:
            self.care.warn_leak(handle, action.tenure)

    # -- the end -----------------------------------------------------------------------------

    def _finish(self) -> None:
        """Take every worker one step further towards its end; then end."""
        for _, handle in self.turnstile.close():
            self.care.take_back(handle)
        for reference in self.lines:
            line = reference()
            if line is not None:
                line.close()
        now, close_by = time.monotonic(), self._close_by
        for handle in tuple(self.fleet.handles.values()):
            handle.condemned = True
            if handle.state is S.SPARE:
                self.care.retire(handle)
            if (
                handle.state is S.STARTING
                or now >= close_by + _LAST_GRACE
                or (handle.state is S.IDLE and now >= close_by)
                or (handle.state is S.IDLE and self.holdups.in_vain(handle))
            ):
                self.care.revoke(handle, "the pool was closed")
            if handle.state is S.LOST and not handle.ended_ns and self._outlives(handle):
                self.care.give_up(handle)
        self.holdups.tell(self.fleet.handles.values(), close_by)
        if not self.fleet.handles and self._keepers_ended():
            self._end()

    def _outlives(self, handle: Handle) -> bool:
        """Tell whether a worker that was to be killed is not to be waited for."""
        if handle.process.has_ended():
            return False
        late = time.monotonic_ns() - self._without_stops(handle.since_ns) > _GIVE_UP_NS
        return late or handle.process.refused is not None

    def _keepers_ended(self) -> bool:
        """End what waits for the outside; True once it has ended, or has taken too long."""
        now = time.monotonic()
        if self._keepers_since is None:
            self._keepers_since = now
            for keeper in self.keepers:
                keeper.end()
        if all(keeper.ended for keeper in self.keepers):
            return True
        since = self._keepers_since
        if now - since - self.standstills.counted(since) < _KEEPERS_GRACE:
            return False
        logger().warning("%s has ended, and its session store has not let go yet", self.config.name)
        return True

    def _end(self) -> None:
        """Give back everything; then it is done. A step that is struck is not taken again."""
        if self.closed_ns is None:
            self.closed_ns = time.monotonic_ns()
            self._last_steps.extend((*self._givings_back(), self.at_end))
        while self._last_steps:
            self._last_steps.popleft()()
        self.done = True
        if self.for_good:
            uptime = (self.closed_ns - self.opened_ns) / 1e9
            self.hooks.emit("pool.terminate", {"uptime": uptime})

    def _givings_back(self) -> tuple[Callable[[], object], ...]:
        """Return what gives back memory and descriptors, when there are no workers."""
        return (
            *self.fleet.givings_back(), self._leave_breaker, self._close_others,
            self._launcher.close,
        )  # fmt: skip

    def _leave_breaker(self) -> None:
        breaker = self.fleet.breaker
        if breaker is not None and self._circuit_changed in breaker.listeners:
            breaker.listeners.remove(self._circuit_changed)

    def _close_others(self) -> None:
        for close in self.closers:
            try:
                close()
            except Exception:
                logger().exception("%s: what was to end with it did not", self.config.name)

    def give_up(self, failure: BaseException, for_good: bool) -> None:
        """End everything now, because no worker could be started: whoever waits is told why."""
        self.for_good = for_good or (self.failure is not None and self.for_good)
        self.failure = failure  # before anybody is woken
        self.close(0.0, kill=True)


def _nothing() -> None:
    """An order: a turn with one looks at all workers."""


def _row(handle: Handle, idle: bool, lost: Callable[[Handle], bool], weigh: bool) -> health.Row:
    tenure = tenure_of(handle)
    lease = handle.live_lease  # after it: what is found of an older one is acted on by nobody
    since_ns = tenure.since_ns or time.monotonic_ns()  # 0: this moment begun or over
    gone = lease is None and not idle and handle.state is S.IDLE
    return health.Row(
        slot=handle.slot,
        generation=handle.generation,
        state=handle.state,
        since_ns=handle.idle_since_ns if handle.state is S.IDLE else handle.since_ns,
        idle=idle,
        leased_since_ns=None if lease is None else since_ns,
        probed_ns=handle.probed_ns,
        probe_failures=handle.probe_failures,
        tenure=tenure,
        lost=gone and lost(handle),
        leak_warned=handle.leak_warned == tenure.lease,
        leaving=handle.row[t.PHASE] == t.PHASE_LEAVING,
        left=handle.left,
        worn=handle.worn is not None,
        expires_ns=handle.expires_ns,
        # A busy worker cannot say it itself; one that /proc hides (hidepid=2) says it later.
        rss_bytes=(weigh and resident_bytes(handle.pid or 0)) or handle.row[t.RSS_BYTES],
        cpu_ns=handle.row[t.CPU_NS],
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
    OOM_KILLS.abandon()
    log_through(None)  # a worker that is forked comes from the manager's thread


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
