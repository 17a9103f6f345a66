"""The parent's end of one worker: start it, talk to it, kill it, learn how it ended.

A handle is one generation of one slot; the next worker in the slot gets a new handle, so a
straggler with an old handle cannot touch the new worker. Who owns the slot may call `request`;
the manager alone starts, stops and reaps; anybody may `kill`.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import pickle
import signal
import time
import weakref
from typing import TYPE_CHECKING, Any

from ..errors import (
    CallMismatch,
    PoolForked,
    ProtocolError,
    WorkerError,
)
from . import blackbox, inquest, wire
from . import table as t
from .assignment import Assignment, Setup
from .blackbox import LAST_WORDS, SHOW
from .channel import FastEnd, Garbled, PeerGone, TimedOut, TooLong, Unreceived, Unsent, pair
from .child import main
from .deadend import DeadEnd
from .health import SENT_SIGTERM
from .process import WorkerProcess
from .states import WorkerEvent, WorkerState, advance

if TYPE_CHECKING:
    from ..breaker import Permit
    from .bell import Closing
    from .transcript import Transcript

_DYING = 0.25  # seconds from the end of the pipe to the end of its process
_END = 1.0  # seconds from the signal that kills a process to its end
_LAST_WORDS = 0.05  # seconds; it takes one in fifty, unless the worker is stopped
_FAULTS = {PeerGone: "died", TimedOut: "too late", Garbled: "garbled its reply"}
_LONGEST_NAME = 100  # characters of a pool's name in that of a process
_MOST_TOLD, _MOST_TOLD_BYTES = 200, 16 * 1024  # of ended sessions, in one probe
_IN_SERVICE = (WorkerState.IDLE, WorkerState.PROBING)

PROBE_ID = -1  # what a probe carries in place of a call's id
_monotonic_ns = time.monotonic_ns


class Handle:
    """One worker process, as the parent sees it."""

    __slots__ = (  # more attributes than CPython keeps quick in a dict
        "__weakref__", "_assignment", "_dumps", "_exchange", "_limit", "_loads", "_noted_id",
        "_portable", "_repeating", "_telling", "_theirs", "abandoned", "box", "calls_before",
        "calls_sent", "channel", "condemned", "conn", "cut", "death", "ended_ns", "expires_ns",
        "explaining", "failed", "fault", "generation", "idle_since_ns", "in_call", "killed_for",
        "last_begun_id", "leak_warned", "lease", "origin", "permit", "pid", "probe_failures",
        "probed_ns", "process", "ready_ns", "reserve", "revoked", "row", "serving_ns", "session",
        "session_ended_ns", "sessions", "sessions_over", "since_ns", "slot", "spawned_ns",
        "start_error", "state", "tainted", "thread", "transcript", "unsettled", "worn",
    )  # fmt: skip

    def __init__(self, slot: int, generation: int, row: memoryview, codec: Any) -> None:
        self.slot = slot
        self.generation = generation
        self.row = row
        self.pid: int | None = None
        self.state = WorkerState.VACANT  # what the manager knows; IDLE stands for LEASED as well
        self.since_ns = time.monotonic_ns()
        self.ready_ns = 0
        self.idle_since_ns = 0
        self.tainted: str | None = None  # why it must not be used again
        self.worn: str | None = None  # why it is to go as soon as another can take its place
        self.killed_for: str | None = None  # why the manager killed it
        self.reserve = False  # out of service, whatever it does
        self.unsettled: dict[int, Handle] | None = None  # the fleet's, while it is in the fleet
        self.serving_ns = 0  # in service, and since when
        self.expires_ns = 0  # when it will have reached its max_lifetime, where there is one
        # Between a request and its reply, when nobody else may use the pipe: what was called.
        self.in_call: bool | bytes = False
        self.failed = False  # while `in_call`: nobody waits for the reply (any more)
        self.fault: weakref.ref[WorkerError] | None = None  # the error that told of its failure
        self.lease: weakref.ref[Any] | None = None
        self.probe_failures = 0
        self.probed_ns = 0
        self.leak_warned = 0  # the number of the lease that was reported as leaked
        self.condemned = False  # its end is wanted, however it comes
        self.cut = False  # it cannot be killed, and that was told
        self.abandoned = False  # this process is a fork of the owner
        self.start_error: BaseException | None = None  # what its constructor raised
        self.explaining = False  # that is being found out
        self.permit: Permit | None = None  # the breaker's leave to start it; None: no breaker
        self.spawned_ns = self.since_ns
        self.last_begun_id: int | None = None  # known once the process has ended
        self._noted_id = 0  # where the worker has to say what has begun: maybe heard after its end
        self.ended_ns = 0  # when its process was found ended
        self.revoked: str | None = None  # why it was taken away from its lease
        self.session: Any = None  # the record of the session that the present lease is for
        self.sessions: dict[str, None] = {}  # those this worker has warm
        self.session_ended_ns = 0  # when the last lease of a session ended
        self.sessions_over: collections.deque[tuple[str, int]] = collections.deque()  # to tell
        self.thread = 0  # that took the present lease
        self.origin = ""  # the stack that took it, where that is asked for
        self.calls_before = 0  # the present lease
        self.calls_sent = 0
        self._dumps, self._loads = wire.functions_of(codec)
        self._telling: list[tuple[str, int]] = []  # what the probe under way tells
        self._assignment: tuple[bytes, ...] = ()  # what is sent once it is started
        self._repeating = False  # the call under way is sent a second time, with all of the state
        self.box: blackbox.BlackBox | None = None
        self.death: inquest.Death | None = None  # once the caller whose call failed knows of it
        self.process: Any = None
        self.conn: Any = None
        self._theirs: list[Any] = []  # the worker's ends of pipes, until it is started
        self.transcript: Transcript | None = None  # of what it says, where that is wanted
        self.channel: Any = None

    # -- start and end (manager) -------------------------------------------------------------

    def prepare(self, context: Any, setup: Setup, assignment: Assignment) -> None:
        """Make everything that the process will need.

        A forked worker inherits its assignment, which need not even be picklable then.

        Raises:
            OSError: there is no room for one more pipe; nothing is left.
        """
        forks = context.get_start_method() == "fork"
        if not forks:
            self._assignment = assignment.parts(setup.voice.levels if setup.voice else {})
        self._theirs = [] if setup.voice is None else [setup.voice]
        self.conn, theirs = pair(context, setup.portable)
        self._theirs.append(theirs)
        # Nobody writes these words now: the last worker is dead, and this one is not there yet.
        self.row[t.WORKER_WORDS] = memoryview(bytearray(wire.WORDS.size)).cast("q")
        name = f"minipool-{assignment.pool[:_LONGEST_NAME]}-{self.slot}"
        args = (theirs, setup, assignment if forks else None)
        self._portable, self._limit = setup.portable, setup.max_message
        self.box = blackbox.make()
        bare = setup.main is not None
        self.process = WorkerProcess(context, name, main, args, setup.kill_group, self.box, bare)
        setup.box = None if self.box is None else self.box.theirs

    def start(self, closing: Closing | None = None) -> None:
        """Start the process, and nothing else: see `started`. `closing`: as for the process.

        Raises:
            OSError, EOFError, RuntimeError: no process was started; everything is given back.
        """
        theirs, self._theirs = self._theirs, []  # the process that is forked now must keep it
        lent = None if self.box is None else self.box.lend()
        try:
            self.process.start(closing)
        except BaseException:
            self.conn.close()
            raise
        finally:
            for end in theirs:
                end.close()
            if lent is not None:
                lent.close()

    def started(self) -> None:
        """Note that it was started, and send its assignment as far as the pipe takes it.

        It is booting now; its ready frame comes by itself.
        """
        self.pid = self.process.pid
        row = self.row
        row[t.GENERATION], row[t.PID], row[t.LEASED_SINCE_NS] = self.generation, self.pid or 0, 0
        self.move(WorkerEvent.SPAWNED)
        if self._portable:
            from .portable import PortableEnd

            self.channel = PortableEnd(self.conn, self.process.death_fd, self._limit)
            self.channel.on_words = self._note
        else:
            self.channel = FastEnd(self.conn, self.process.death_fd, self._limit)
        self._exchange = self.channel.exchange
        parts, self._assignment = self._assignment, ()
        if not parts:
            return
        try:
            self.channel.post(0, wire.ASSIGN, *parts)
        except PeerGone:
            pass  # its end is about to be seen
        except (RuntimeError, MemoryError):  # out of threads, or of memory
            self.kill()

    def not_started(self, problem: Exception) -> None:
        """Kill a process that was started, but not to be talked to: `started` has raised."""
        if self.state is WorkerState.VACANT:
            self.move(WorkerEvent.SPAWNED)
        if self.channel is None:
            self.channel = DeadEnd(self.conn)
            self._exchange = self.channel.exchange
        self.start_error = problem
        self.kill()

    def kill(self, signum: int = signal.SIGKILL) -> bool:
        """Send a signal, if the process is still there. Never hits another: no stored pid."""
        return not self.abandoned and bool(self.process.kill(signum))

    def move(self, event: WorkerEvent) -> None:
        """Change the state, here and in the table. Manager only."""
        self.state = advance(self.state, event)
        self.since_ns = time.monotonic_ns()
        self.row[t.STATE] = self.state
        if self.unsettled is not None:
            self.unsettled[self.slot] = self

    def reap(self) -> None:
        """Forget a process whose end is known. Pipe and process go when nobody uses them.

        The row is for the next worker from now on. A lease that still holds this one keeps a copy
        to read and write, so it can spoil nothing.
        """
        self.process.exitcode(0)
        self.move(WorkerEvent.REAPED)
        self.last_begun_id = self.row[t.CALL_ID]
        self.end_lease(time.monotonic_ns())
        self.row = t.parting_copy(self.row)
        self.process.close()
        if self.box is not None:
            self.box.close()
        self.hang_up_for_good()

    @property
    def why_revoked(self) -> str | None:
        """Why it was taken away from its lease, and what had stopped it, if anything had."""
        return self.revoked and inquest.with_stop(self, self.revoked)

    def hang_up_for_good(self) -> None:
        """Close the pipe of a buried worker, once no thread can be waiting at it any more.

        1. A caller waits in `poll`. 2. The worker dies, which wakes it. 3. The manager closes the
        pipe, and the next worker's gets its number. 4. The caller runs, and the kernel looks that
        number up once more: it would wait on, for the wrong worker.

        So the caller's failure must come first; if it never does (an interrupt took it away), the
        pipe is closed when it is collected.
        """
        busy = self.in_call and not self.failed
        if self.state is WorkerState.VACANT and self.live_lease is None and not busy:
            self.channel.close()

    def cut_off(self) -> None:
        """Talk no more to a worker that cannot be killed: it ends with its call, or with the pool.

        A caller that waits for it hears of it in a second.
        """
        self.channel.hang_up()
        busy = self.in_call and not self.failed
        if self.live_lease is None and not busy:
            self.channel.close()

    def end_lease(self, now: int) -> float:
        """Add the time since the lease began to the row; return it in seconds. Once a lease."""
        row = self.row
        since, row[t.LEASED_SINCE_NS] = row[t.LEASED_SINCE_NS], 0
        if since:
            row[t.LEASED_NS] += now - since
        return (now - since) / 1e9 if since else 0.0

    def abandon(self) -> None:
        """Let go of the pipe in a process that was forked from the owner."""
        self.abandoned, self.tainted = True, "it belongs to another process"
        self.lease = None  # nobody is to be told when it is dropped here
        self.unsettled = None
        if self.process is not None:
            self.process.abandon()
        for end in (self.channel or self.conn, *self._theirs):
            if end is not None:
                end.close()
        if self.box is not None:
            self.box.abandon()

    @property
    def doing(self) -> str:
        """What it does now, in the words of the reports."""
        if self.state is WorkerState.IDLE:
            if self.row[t.LEASED_SINCE_NS]:
                return "leased"
            if self.in_call or (self.tainted is not None and not self.worn_out):
                return "stopping"  # it was given back unfit, of which the manager is about to hear
        return self.state.name.lower()

    @property
    def worn_out(self) -> bool:
        """Whether nothing but wear keeps it from being used again."""
        return self.worn is not None and self.tainted is self.worn

    @property
    def live_lease(self) -> Any:
        """Return the lease that holds this worker now, or None."""
        reference = self.lease
        lease = None if reference is None else reference()
        return lease if lease is not None and lease.holds(self) else None

    # -- calls (who owns the slot) -----------------------------------------------------------

    def request(
        self, kind: int, name: bytes, args: tuple[Any, ...], kwargs: Any, timeout: float | None
    ) -> Any:
        """Run one call in the worker and return its result.

        Raises:
            Exception: what the call raised, or why its arguments cannot be pickled; the worker
                is well (or `tainted` says why it must not be used for the next one).
            WorkerError: the worker is of no more use, and has been killed.
        """
        # CPython 3.11 is slow to call an attribute that is no method.
        dumps, exchange, loads = self._dumps, self._exchange, self._loads
        try:
            if len(args) == 1 and not kwargs:
                kind, body = kind | wire.ALONE, dumps(args[0], 5)
            elif kwargs and kind != wire.SHIPPED:
                kind, body = kind | wire.KEYWORDS, dumps((args, kwargs), 5)
            else:
                body = dumps(args, 5)
        except Exception as problem:
            raise self._unpicklable(problem, kind, name, args, kwargs) from problem
        session = self.session  # ours until the call is over, whoever releases the lease meanwhile
        if session is not None:
            kind |= wire.SESSION
            body = session.head(self) + body
        self.calls_sent = call_id = self.calls_sent + 1
        self.in_call = name
        start = _monotonic_ns()
        try:
            status, reply = exchange(call_id, kind, name, body, timeout, start)
        except (PeerGone, TimedOut, Garbled) as problem:
            raise self._failed(problem, name, timeout, start) from None
        except TooLong as problem:
            raise self._too_long(problem, name) from None
        except Unreceived as problem:
            raise self._unreceived(problem, name) from None
        except Unsent:
            raise self._unsent(name) from None
        self.in_call = False
        took = _monotonic_ns() - start
        if status:
            status = self._heard_of_leaving(status)
            if status == wire.NOT_HERE and session is not None:
                return self._repeat(session, kind, name, args, kwargs, timeout, took)
        octave = took.bit_length()  # `table.bucket`, written out: it is on the way of every call
        if 9 <= octave <= 38:
            self.row[t.CALL_TIMES - 72 + (octave << 3) + ((took >> (octave - 4)) & 7)] += 1
        else:
            self.row[t.CALL_TIMES + t.bucket(took)] += 1
        if status == wire.COMMITTED and session is not None:
            return self._committed(session, reply, name)
        if status:
            raise self._remote_error(status, reply, name)
        try:
            return loads(reply)
        except (Exception, SystemExit) as problem:
            raise wire.unreadable(problem, loads, reply)  # noqa: B904  its cause is set

    def _heard_of_leaving(self, status: int) -> int:
        """Return the status without the flag of a worker that leaves once its lease is over."""
        if status & wire.LEAVING:
            self.worn = self.worn or SENT_SIGTERM
            self.tainted = self.tainted or self.worn
        return status & ~wire.LEAVING

    @property
    def left(self) -> bool:
        """Whether SIGTERM has made it leave: it ends by itself, and takes no call any more."""
        return bool(self.row[t.PHASE] == t.PHASE_STOPPING)

    def _committed(self, session: Any, reply: bytes | memoryview, name: bytes) -> Any:
        end = 4 + int.from_bytes(reply[:4], "big")
        result = self._result(reply[end:])  # first: what cannot be read is no success
        try:
            changes = pickle.loads(reply[4:end])
        except Exception as problem:
            raise self._nonsense(problem, name) from problem
        session.commit(changes)
        return result

    def _result(self, reply: bytes | memoryview) -> Any:
        try:
            return self._loads(reply)
        except (Exception, SystemExit) as problem:
            raise wire.unreadable(problem, self._loads, reply)  # noqa: B904  its cause is set

    def _repeat(
        self,
        session: Any,
        kind: int,
        name: bytes,
        args: tuple[Any, ...],
        kwargs: Any,
        timeout: float | None,
        took_ns: int,
    ) -> Any:
        """Make a call again, with its session's state; without it, nothing has run."""
        if self._repeating:
            raise self._nonsense(ValueError("it lacks the state that came along"), name)
        session.missing()
        self.calls_sent -= 1  # that was no call: what is sent now is still the same
        took = took_ns / 1e9 - self.channel.lost((_monotonic_ns() - took_ns) / 1e9)
        left = None if timeout is None else max(0.0, timeout - took)
        self._repeating = True
        try:
            return self.request(kind & ~wire.FLAGS, name, args, kwargs, left)
        finally:
            self._repeating = False

    def _unpicklable(
        self, problem: Exception, kind: int, name: bytes, args: tuple[Any, ...], kwargs: Any
    ) -> CallMismatch:
        target: Any = name.decode(errors="replace")
        if kind == wire.SHIPPED:
            target, args, kwargs = args
        return wire.explain_unpicklable(problem, self._dumps, target, args, kwargs)

    def _too_long(self, problem: TooLong, name: bytes) -> CallMismatch:
        self.calls_sent, self.in_call = self.calls_sent - 1, False
        state = "" if self.session is None else self.session.not_sent(self)
        return CallMismatch(
            f"the call to {name.decode(errors='replace')!r} takes {problem} bytes{state}, more "
            f"than `max_message`; nothing was sent; pass less, or raise it"
        )

    def _unsent(self, name: bytes) -> MemoryError:
        """Return the error for a request that this process has no memory for."""
        self.calls_sent, self.in_call = self.calls_sent - 1, False
        return MemoryError(
            f"this process has no room for the call to {name.decode(errors='replace')!r}; nothing "
            f"was sent; pass less"
        )

    def _unreceived(self, problem: Unreceived, name: bytes) -> MemoryError:
        """Return the error for a result that this process has no memory for."""
        self.in_call = False
        if self.session is not None:
            self.session.missing()  # what the worker has committed is not committed here
        return MemoryError(
            f"this process has no room for the {problem.size} bytes of what "
            f"{name.decode(errors='replace')!r} returned; the call has run, and committed nothing; "
            f"its worker is well; return less"
        )

    def _nonsense(self, problem: Exception, name: bytes) -> WorkerError:
        """End a worker whose reply is one by its header only; return the error that tells so."""
        self.in_call = True
        now = time.monotonic_ns()  # as good as any: it is not made again
        return self._failed(Garbled(f"its body is none: {problem!r}"), name, None, now)

    def _remote_error(self, status: int, body: bytes | memoryview, name: bytes) -> BaseException:
        """Return the exception that a reply brought."""
        try:
            if status not in wire.ERRORS:
                raise ValueError(f"status {status}")
            error = wire.unpack_error(body)
        except Exception as problem:
            return self._nonsense(problem, name)
        self.row[t.RAISED] += 1
        if status == wire.RAISED_AND_TAINTED:
            self.tainted = f"the call ended in {type(error).__name__}"
        return error

    def _note(self, words: bytes | memoryview) -> None:
        """Take over the worker's words, where it cannot write them itself."""
        noted = memoryview(words[: wire.WORDS.size]).cast("q")
        self.row[t.WORKER_WORDS] = noted
        self._noted_id = noted[t.CALL_ID - t.WORKER_WORDS.start]

    def _failed(
        self, problem: Exception, name: bytes, timeout: float | None, start: int
    ) -> WorkerError:
        """Kill the worker after a broken exchange; return the error that tells of it."""
        if self.abandoned:
            raise PoolForked(
                f"worker {self.slot} (pid {self.pid}) belongs to the process this one was forked "
                f"from; open a pool of your own here",
                owner_pid=os.getppid(),
            )
        target = name.decode(errors="replace")
        if isinstance(problem, PeerGone) and self.left and not self.has_begun:
            return self._missed(target, start)
        self.tainted = self.tainted or f"{_FAULTS[type(problem)]} during {target!r}"
        if isinstance(problem, PeerGone):
            self.process.exitcode(_DYING)  # dying by itself: do not spoil its exit code
            if not self.process.has_ended():
                self.killed_for = self.killed_for or "its pipe ended, but not its process"
        elif isinstance(problem, TimedOut):
            self._hear_last_words()
        self.kill()
        error = self._fault(problem, target, timeout)
        self.failed = True
        self.hang_up_for_good()
        error.sent_ns = start
        self.fault = weakref.ref(error)  # the error itself would hold all that waits for its call
        return error

    def _missed(self, target: str, start: int) -> WorkerError:
        """Return the error for a call that was sent to a worker as it left: it never begins.

        The worker is closing its object, and is killed for nothing.
        """
        error = inquest.obituary(self, target, started=False)
        self.death = None  # a recycling is none
        self.tainted, self.in_call = self.tainted or SENT_SIGTERM, False
        error.sent_ns = start
        self.fault = weakref.ref(error)
        return error

    def failed_with(self, error: BaseException) -> bool:
        """Tell whether an error is the one that told of this worker's failure.

        All else that comes out of `request` is an answer, whatever its type, and the worker well;
        or it was raised by a signal handler.
        """
        return self.fault is not None and self.fault() is error

    def _fault(self, problem: Exception, target: str, timeout: float | None) -> WorkerError:
        """Return the error that tells of a broken exchange, whose worker was killed."""
        if not self.process.refused:
            self.process.exitcode(_END)
        if isinstance(problem, PeerGone):
            return inquest.obituary(self, target, self._had_begun())
        if isinstance(problem, TimedOut):
            return inquest.verdict(self, target, self._had_begun(), timeout)
        return ProtocolError(
            f"worker {self.slot} (pid {self.pid}) answered {target!r} with something that is "
            f"no reply ({problem}); it was killed; does the call write to descriptors that "
            f"are not its own?",
            worker_id=self.slot,
            pid=self.pid,
        )

    def _had_begun(self) -> bool:
        """Tell whether the last call had begun, once its worker can begin nothing any more.

        A worker that is being killed runs on until its end. If that does not come in time, nobody
        knows, and the call counts as begun.
        """
        if self.has_begun or not self.process.has_ended():
            return True
        self.channel.hear_out()
        return self.has_begun

    @property
    def has_begun(self) -> bool:
        """Whether the last call that was sent has begun."""
        begun_id = self.row[t.CALL_ID]
        if self.last_begun_id is not None:  # asked second: the row may be another worker's by now
            begun_id = max(self.last_begun_id, self._noted_id)
        return begun_id >= self.calls_sent

    @property
    def unheard(self) -> bool:
        """Whether its caller may yet hear more of it: where it cannot write the table itself."""
        return bool(self._portable and self.in_call and not self.failed)

    def _hear_last_words(self) -> None:
        """Have the worker tell where it is, of which it dies, and give it a moment for it."""
        if self.ask_last_words():
            self.process.exitcode(_LAST_WORDS)

    def ask_last_words(self) -> bool:
        """Ask the worker to tell where it is, of which it dies; False if it cannot be asked."""
        asked = self.box is not None and self.box.ask(self.kill, LAST_WORDS) is not None
        if asked and self.process.stopped:
            self.kill(signal.SIGCONT)  # it goes on with what was sent before this
        return asked

    def show(self, times: int) -> object:
        """Ask a worker in service for its stacks, which its black box will take.

        None: it cannot be asked. The signal would end one that is booting or stopping.
        """
        if self.box is None or self.ended_ns or self.state not in _IN_SERVICE:
            return None
        return self.box.ask(self.kill, SHOW, times)

    # -- manager's conversation --------------------------------------------------------------

    def send_probe(self) -> None:
        """Ask an idle worker whether it is well; the answer comes as a frame of `receive`.

        Raises:
            PeerGone: it is dead.
        """
        self.in_call = self.failed = True  # no caller waits
        self._telling = self._next_to_tell()
        body = pickle.dumps(self._telling) if self._telling else b""
        self.channel.post(PROBE_ID, wire.PROBE, body)

    def _next_to_tell(self) -> list[tuple[str, int]]:
        """Return which ended sessions one probe tells of: at least one, of about 16 KiB."""
        telling: list[tuple[str, int]] = []
        room = _MOST_TOLD_BYTES
        for over in itertools.islice(tuple(self.sessions_over), _MOST_TOLD):
            room -= len(over[0])
            if telling and room < 0:
                break
            telling.append(over)
        return telling

    def probed(self) -> None:
        """Hear that the probe was answered, and with it what it told."""
        self.in_call = self.failed = False
        for _ in self._telling:
            self.sessions_over.popleft()
        self._telling = []

    def send_stop(self, sessions_end: bool) -> None:
        """Ask the worker to close its object and end. A dead one is stopped enough."""
        with contextlib.suppress(PeerGone):
            self.channel.post(0, wire.STOP, b"\1" if sessions_end else b"")

    def receive(self) -> tuple[int, int, bytes | memoryview] | None:
        """Return call id, status and body of the frame that is there, or None. Never waits.

        Raises:
            PeerGone, Garbled: the worker is of no more use.
        """
        reply = self.channel.receive_now()
        if reply is None:
            return None
        if len(reply) < wire.REPLY.size:
            raise Garbled(f"a frame of {len(reply)} bytes")
        _, call_id, status = wire.REPLY.unpack_from(reply)
        body = reply[wire.REPLY.size :]
        if status & wire.WITH_WORDS:
            self._note(body)
            status, body = status & ~wire.WITH_WORDS, body[wire.WORDS.size :]
        return call_id, status, body
