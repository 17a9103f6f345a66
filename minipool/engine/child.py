"""The life of a worker process: start, make the user's object, answer requests, end.

Runs in the worker, in its main thread, and imports as little as it can: every worker pays for it.
The worker waits on its pipe for ever and has no idle exit; it ends when told to, when the pipe
ends, and at the latest when its parent does (see `lifeline`).
"""

from __future__ import annotations

import _signal  # without the enums of `signal`: a forked child pays for each page it touches
import contextlib
import os
import pickle
import sys
import time
from typing import TYPE_CHECKING, Any, Callable, NoReturn

from ..errors import CallMismatch, PoolStartError
from . import blackbox, dispositions, wire
from . import table as t
from .assignment import Assignment, Setup, unpacked
from .channel import Unreceived
from .conversation import NotHere, Session, WarmSessions
from .lifeline import die_with_parent, end_all, lead_a_group
from .resources import keep_standard_streams, limit, resident_bytes
from .workerend import FastWorkerEnd, PortableWorkerEnd

if TYPE_CHECKING:
    from types import TracebackType

    from .baggage import Baggage  # imported by the workers that are given some
    from .voice import Voice

LEFT = 143  # the exit code of a worker that SIGTERM has made leave, as a shell tells that signal
_REFRESH_NS = 1_000_000_000  # how often a busy worker reports cpu time and memory
_FUNCTION_ALONE, _METHOD_ALONE = wire.FUNCTION | wire.ALONE, wire.METHOD | wire.ALONE
_TAINTS = (SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, RecursionError)


class CurrentWorker:
    """What worker code may know about the worker it runs in; see `minipool.current_worker()`."""

    def __init__(self, pool: str, worker_id: int, generation: int) -> None:
        self.pool = pool
        self.worker_id = worker_id
        self.generation = generation
        self.pid = os.getpid()

    def __repr__(self) -> str:
        return (
            f"<worker {self.worker_id} of {self.pool}, generation {self.generation}, "
            f"pid {self.pid}>"
        )


_current: CurrentWorker | None = None

# How far a worker's start has come: what it may do meanwhile depends on it, see `nesting`.
FETCHING, MAKING = "fetching", "making"  # its class, by imports; then its object
stage: str | None = None  # neither: it is ready, or this is no worker
places: tuple[str, ...] = ()  # where the pools were opened that this process is below of
refused: str | None = None  # why the last opening was refused in this process


def current_worker() -> CurrentWorker | None:
    """Return who runs this code: the worker's id, generation, pid and pool; None in no worker."""
    return _current


_session: Session | None = None


def current_session() -> Session:
    """Return the state of the session that the running call belongs to: a mapping.

    Raises:
        LookupError: no call of a session is running here.
    """
    if _session is None:
        raise LookupError(
            "no call of a session is running here; check out with `checkout(session=...)`, and ask "
            "in the thread that runs the call"
        )
    return _session


def main(conn: Any, setup: Setup, inherited: Assignment | None) -> None:
    """Be one worker, from the first instruction to the last.

    Without an `inherited` assignment, the first frame is one.
    """
    global refused, stage
    stage, refused = FETCHING, None
    if inherited is not None:
        from .forked_locks import disown  # which the parent has imported

        disown(inherited.importing)
    try:
        end, words, group, problem = _settled(conn, setup)
        assignment = inherited or _received(end, setup, group)
        _take_on(assignment, setup, words)
    except Exception as error:
        with contextlib.suppress(OSError):  # the owner is gone
            _end(conn, setup).send(0, wire.START_FAILED, wire.pack_error(error))
        raise SystemExit(1) from None
    worker = _Worker(end, words, shared=setup.table is not None, forked=inherited is not None)
    assert _current is not None
    try:
        worker.start(setup, assignment, problem)
        del assignment  # its arguments are the object's business now
        worker.serve()
        orphaned = False
    except BaseException as error:
        _end_if_forked(_current.pid)
        if not end.has_ended(error):
            raise
        orphaned = True  # the owner is gone or has done with us
    _end_if_forked(_current.pid)
    worker.close()
    _end_if_forked(_current.pid)
    if orphaned and group:
        end_all(group)


def _settled(
    conn: Any, setup: Setup
) -> tuple[FastWorkerEnd | PortableWorkerEnd, memoryview, bool, BaseException | None]:
    """Have this process be one that can be told what to do.

    Returns its pipe, its row, whether it may kill its group, and why the main module was refused.
    """
    keep_standard_streams(conn, setup)
    problem = None if setup.main is None else _main_refused(setup.main)
    group = lead_a_group() and setup.kill_group
    dispositions.begin()
    die_with_parent(setup.lifeline, group)
    if setup.box is not None:
        blackbox.install(setup.box.fd)
    if setup.niceness and hasattr(os, "nice"):
        os.nice(setup.niceness)
    words = _row(setup)
    end = _end(conn, setup)
    _let_go_when_forked(end, words)
    return end, words, group, problem


def _end(conn: Any, setup: Setup) -> FastWorkerEnd | PortableWorkerEnd:
    return (PortableWorkerEnd if setup.portable else FastWorkerEnd)(conn, setup.max_message)


def _take_on(assignment: Assignment, setup: Setup, words: memoryview) -> None:
    """Have this process be a worker of that pool, as far as others see it."""
    global _current, places
    _current = CurrentWorker(assignment.pool, setup.slot, setup.generation)
    places = assignment.places
    _show_in_ps(f"{assignment.pool}/{setup.slot}")
    os.environ.update(assignment.env)
    if setup.voice is not None:
        baggage = assignment.baggage
        seen = words.toreadonly()  # a view of its own, for children that worker code forks, too
        setup.voice.begin(seen, lambda: None if _session is None else _session.id, baggage)


class _Worker:
    """The user's object, and the loop that calls it."""

    def __init__(self, end: Any, words: memoryview, shared: bool, forked: bool) -> None:
        self._end = end
        self._words = words
        self._shared = shared
        self._forked = forked  # by the parent's manager, which is no main thread
        self._object: Any = None
        self._functions: dict[bytes, Callable[..., Any]] = {}
        self._baggage: Baggage | None = None
        self._voice: Voice | None = None
        self._leaving = False  # SIGTERM has come
        self._parent_knows = False  # of that, and will tell it to stop

    def start(self, setup: Setup, assignment: Assignment, problem: BaseException | None) -> None:
        """Make the user's object and tell the parent that it is there, or why it is not.

        `problem` is why it need not be tried.

        Raises:
            SystemExit: it could not be made; the parent knows why.
        """
        global stage
        words = self._words
        words[t.WORKER_WORDS] = memoryview(bytearray(72)).cast("q")
        self._voice = setup.voice
        words[t.PHASE] = t.PHASE_BOOTING
        words[t.READY_GENERATION] = -setup.generation
        try:
            if problem is not None:
                raise problem
            if assignment.limits:
                limit(assignment.limits)
            for module in assignment.preload:
                _import(module)
            codec = None if assignment.codec is None else wire.unpack_codec(assignment.codec)
            self._dumps, self._loads = wire.functions_of(codec)
            if assignment.baggage is not None:
                assignment.baggage.open()
            self._baggage = assignment.baggage
            spec = assignment.spec
            make, args, kwargs = spec if isinstance(spec, tuple) else _unpickled(spec)
            if isinstance(make, str):
                make = wire.find(make)
            stage = MAKING
            if make is not None:
                self._object = make(*args, **kwargs)
            self._sessions = WarmSessions(self._object)
        except BaseException as error:
            self._end.send(0, wire.START_FAILED, wire.pack_error(_blamed(error)))
            raise SystemExit(1) from None
        for kind, name, body in assignment.warm_up:
            status, reply = self._run(kind, name, body)
            if status in (wire.RAISED, wire.RAISED_AND_TAINTED):
                self._end.send(0, wire.START_FAILED, reply)
                raise SystemExit(1)
        stage = None
        words[t.PHASE] = t.PHASE_SERVING
        dispositions.leave_on_sigterm(self._asked_to_leave)
        words[t.READY_GENERATION] = setup.generation
        if not self._shared:  # else it is told a moment later, and nobody waits for it
            self._refresh(time.monotonic_ns())
        self._reply(0, wire.READY, b"")
        if self._shared:
            self._refresh(time.monotonic_ns())

    def serve(self) -> None:
        """Answer requests until told to stop.

        A timer that a call has left behind may strike between two calls, and its handler raise.
        While the worker waits for a request, that costs nothing: it is told, timers are stopped,
        and the worker goes on. Elsewhere a reply may be half sent, so the exception ends it.
        """
        while True:
            try:
                return self._answer_requests()
            except BlockingIOError as error:
                if not (self._leaving and self._end.found_nothing(error.__traceback__)):
                    raise
                if self._may_leave():
                    self._leave()
                self._end.wait_on()
            except Unreceived as problem:
                self._reply(problem.call_id, *self._failure(_no_room(problem.size)))
            except Exception as error:
                end = self._end
                if end.has_ended(error) or not end.was_waiting(error.__traceback__):
                    raise
                _stop_timers()
                with contextlib.suppress(Exception):
                    print(f"minipool: a signal handler raised between two calls, and timers that "
                          f"were left running are stopped: {error!r}", file=sys.stderr)  # fmt: skip
                    sys.excepthook(type(error), error, error.__traceback__)

    def _answer_requests(self) -> None:
        words, now = self._words, time.monotonic_ns
        receive, send, shared = self._end.receive, self._end.send, self._shared
        if self._forked and dispositions.DEAF_WHEN_FORKED:
            receive = dispositions.heard_first(receive)
        run = self._run if self._baggage is None else self._run_laden
        busy_ns, refresh_at = words[t.BUSY_NS], now() + _REFRESH_NS
        while True:
            call_id, kind, name, body = receive()
            if kind == wire.STOP:
                if body:
                    self._sessions.end(None)
                return
            if kind == wire.PROBE:
                self._answer_probe(call_id, body)
                continue
            start = now()
            words[t.CALL_STARTED_NS] = start
            words[t.CALL_ID] = call_id  # from here on the call has begun
            if not shared:
                self._reply(call_id, wire.BEGUN, b"")
            status, result = run(kind, name, body)
            end = now()
            busy_ns += end - start
            words[t.BUSY_NS] = busy_ns
            words[t.BEAT_NS] = end  # last: from here on the call has ended
            if end > refresh_at:
                self._refresh(end)
                refresh_at = end + _REFRESH_NS
            if self._leaving:
                self._parent_knows, status = True, status | wire.LEAVING
            if shared:
                send(call_id, status, result)
            else:
                self._reply(call_id, status, result)

    def _asked_to_leave(self) -> None:
        """Hear SIGTERM. The parent is told with the next reply; one that is idle just leaves.

        A wait for a request ends by this; a request that is there is taken all the same.
        """
        if not self._leaving:
            self._leaving = True
            self._words[t.PHASE] = t.PHASE_LEAVING
        self._end.stop_waiting()

    def _may_leave(self) -> bool:
        """Tell whether nobody has leased this worker, as far as it can know."""
        return not (self._parent_knows or (self._shared and self._words[t.LEASED_SINCE_NS]))

    def _leave(self) -> NoReturn:
        """End by SIGTERM, between two calls: whoever sends one now hears that it has not begun."""
        self._words[t.PHASE] = t.PHASE_STOPPING
        self._end.let_go()
        self.close()
        raise SystemExit(LEFT)

    def _run(self, kind: int, name: bytes, body: Any) -> tuple[int, bytes]:
        """Run one call; return the status and body of its reply. Raises nothing."""
        loads, dumps = self._loads, self._dumps  # see `Handle.request`
        try:
            if kind == _FUNCTION_ALONE:
                target = self._functions.get(name) or self._find(name)
                result = target(loads(body))
            elif kind == _METHOD_ALONE:
                target = self._method(name)
                result = target(loads(body))
            elif kind & wire.SESSION:
                return self._run_in_session(kind & ~wire.SESSION, name, body)
            else:
                result = self._run_other(kind, name, body)
        except BaseException as error:
            return self._failure(self._no_callable(error, name) or error)
        try:
            return 0, dumps(result, 5)
        except MemoryError as error:
            return self._failure(error)
        except BaseException as problem:
            kind_of = type(result).__name__
            if kind_of == "coroutine" and hasattr(result, "close"):
                result.close()  # else it would complain that nobody has awaited it
            stand_in = wire.unpicklable_result(problem, kind_of)
            return wire.REFUSED, wire.pack_error(stand_in)

    def _run_laden(self, kind: int, name: bytes, body: Any) -> tuple[int, bytes]:
        """Run one call with the context variables that it brought."""
        assert self._baggage is not None
        end = 4 + int.from_bytes(body[:4], "big")
        try:
            tokens = self._baggage.unpack(body[4:end])
        except BaseException as error:
            return self._failure(error)
        try:
            return self._run(kind, name, body[end:])
        finally:
            self._baggage.put_away(tokens)

    def _run_other(self, kind: int, name: bytes, body: Any) -> Any:
        kind, how = kind & ~wire.FLAGS, kind & wire.FLAGS
        if kind == wire.SHIPPED:
            target, args, kwargs = self._loads(body)
            return target(*args, **kwargs)
        method = kind == wire.METHOD
        target = self._method(name) if method else self._functions.get(name) or self._find(name)
        if how == wire.KEYWORDS:
            args, kwargs = self._loads(body)
            return target(*args, **kwargs)
        return target(*self._loads(body))

    def _method(self, name: bytes) -> Callable[..., Any]:
        method: Callable[..., Any] | None = getattr(self._object, name.decode(), None)
        if method is None:
            raise wire.no_such_method(self._object, name.decode())
        return method

    def _no_callable(self, error: BaseException, name: bytes) -> CallMismatch | None:
        """Return what is to be told if it was no call at all, as the target cannot be called.

        That is looked for where a call has failed, in what it left: asking before costs each one.
        """
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        if last is None or last.tb_frame.f_code not in _CALLERS or type(error) is not TypeError:
            return None
        target = last.tb_frame.f_locals.get("target", len)
        if callable(target):
            return None
        from .absence import of_method

        return of_method(self._object, target, name.decode())

    def _failure(self, error: BaseException) -> tuple[int, bytes]:
        if type(error) is CallMismatch and _is_ours(error.__traceback__):
            error.__traceback__ = None  # its text says all
        self._words[t.FAILURES] += 1
        status = wire.RAISED_AND_TAINTED if isinstance(error, _TAINTS) else wire.RAISED
        return status, wire.pack_error(error)

    def _find(self, name: bytes) -> Callable[..., Any]:
        if len(self._functions) >= 4096:
            self._functions.clear()
        try:
            function: Callable[..., Any] = wire.find_for(self._object, name.decode())
        except (AttributeError, ModuleNotFoundError) as error:
            from .absence import of_function

            mismatch = of_function(name.decode(), error, self._forked)
            if mismatch is None:
                raise
            raise mismatch from None
        self._functions[name] = function
        return function

    def _run_in_session(self, kind: int, name: bytes, body: Any) -> tuple[int, bytes]:
        """Run one call with its session at hand; commit what it changed if it returns."""
        global _session
        end = 4 + int.from_bytes(body[:4], "big")
        try:
            session = self._sessions.enter(body[4:end])
        except NotHere:
            self._words[t.CALL_ID] -= 1  # it has not begun; it comes again, under the same id
            return wire.NOT_HERE, b""
        except BaseException as error:
            return self._failure(error)
        _session = session
        status, result = self._run(kind, name, body[end:])
        _session = None
        if status != wire.RETURNED:
            self._sessions.undo(session)
            return status, result
        try:
            changes = session.changes()
            packed = pickle.dumps(changes, 5) if changes else b""
            if packed:
                self._end.check(4 + len(packed) + len(result))  # the commit must not be refused
                result = b"".join((len(packed).to_bytes(4, "big"), packed, result))
        except BaseException as error:
            self._sessions.undo(session)
            return self._failure(error)
        session.commit(changes)
        return wire.COMMITTED if changes else status, result

    def _answer_probe(self, call_id: int, body: Any) -> None:
        """Run the object's own `health_check()`, if it has one; False or an exception is ill."""
        if body:
            self._sessions.end(pickle.loads(body))
        check = getattr(self._object, "health_check", None)
        try:
            if check is not None and check() is False:
                raise RuntimeError("health_check() returned False")
            status, body = wire.RETURNED, b""
        except BaseException as error:
            status, body = wire.RAISED, wire.pack_error(error)
        now = time.monotonic_ns()
        self._words[t.BEAT_NS] = now
        self._refresh(now)
        self._reply(call_id, status, body)

    def _reply(self, call_id: int, status: int, body: bytes) -> None:
        if self._shared:
            self._end.send(call_id, status, body)
            return
        words = self._packed_words()
        try:
            body = words + body
        except MemoryError as error:
            status, body = self._failure(error)
            body = words + body
        self._end.send(call_id, status | wire.WITH_WORDS, body)

    def _packed_words(self) -> bytes:
        return wire.WORDS.pack(*self._words[t.WORKER_WORDS])

    def _refresh(self, now: int) -> None:
        self._words[t.CPU_NS] = time.process_time_ns()
        self._words[t.RSS_BYTES] = resident_bytes()
        if self._voice is not None:
            self._voice.tell_dropped()

    def close(self) -> None:
        """Let the user's object clean up. Whatever it raises is printed and ends nothing."""
        self._words[t.PHASE] = t.PHASE_STOPPING
        close = getattr(self._object, "close", None)
        if callable(close):
            try:
                close()
            except Exception:
                sys.excepthook(*sys.exc_info())
        self._object = None
        if self._voice is not None:
            self._voice.tell_dropped()


_CALLERS = (_Worker._run.__code__, _Worker._run_other.__code__)


def _is_ours(trace: TracebackType | None) -> bool:
    """Tell whether nothing of the user's is in a traceback."""
    ours = os.path.dirname(__file__) + os.sep
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith((ours, "<frozen ")):
            return False
        trace = trace.tb_next
    return True


def _received(end: FastWorkerEnd | PortableWorkerEnd, setup: Setup, group: bool) -> Assignment:
    """Wait for the assignment."""
    try:
        body = end.receive_assignment()
    except (EOFError, OSError):
        end_all(group)  # the owner is gone, or has done with us
    assignment, levels = unpacked(body)
    if setup.voice is not None:
        setup.voice.levels = levels
    return assignment


def _main_refused(words: dict[str, Any]) -> BaseException | None:
    """Import the main module; return what it raised if it was refused to open a pool.

    The parent shall tell that, and once. Anything else it raises is told as multiprocessing does.
    """
    from multiprocessing import process, spawn

    current: Any = process.current_process()
    current._inheriting = True
    try:
        spawn.prepare(words)
    except BaseException as error:
        if refused is not None:
            return error
        if not isinstance(error, Exception):
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1) from None
    finally:
        del current._inheriting
    return None


def _unpickled(spec: Any) -> Any:
    """Return class and arguments.

    Raises:
        PoolStartError: the class is not where it was in the parent; without a traceback, as that
            would show nothing of the user's. And whatever unpickling raises.
    """
    try:
        return pickle.loads(spec)
    except AttributeError as error:
        from .absence import of_class

        absent = of_class(error)
        if absent is None:
            raise
        raise absent from None


def _blamed(error: BaseException) -> BaseException:
    """Return what is to be told of a start that failed.

    If it was refused to open a pool, that is it. Its text says all, without a traceback, unless
    something else came of it.
    """
    if refused is None:
        if isinstance(error, PoolStartError) and _is_ours(error.__traceback__):
            error.__traceback__ = None
        return error
    why = wire.named(error)
    if refused in why:
        return PoolStartError(refused)
    blamed = PoolStartError(f"{refused}; after that the start failed by {why}")
    blamed.__cause__ = error
    return blamed


def _import(preload: str) -> None:
    """Import a module that the fork server, if there is one, may have failed to import.

    Raises:
        ImportError: it raised anything at all.
    """
    try:
        __import__(preload)
    except BaseException as error:
        why = f"preload: cannot import {preload!r}: {type(error).__name__}: {error}"
        raise ImportError(why, name=preload) from error


def _show_in_ps(name: str) -> None:
    """Show pool and slot where the kernel names a process, which has room for 15 bytes."""
    pool, _, slot = name.rpartition("/")
    room = 14 - len(slot)
    text = pool.encode(errors="replace")[:room].decode(errors="ignore") + "/" + slot
    with contextlib.suppress(OSError), open("/proc/self/comm", "wb") as comm:  # Linux only
        comm.write(text.encode())


def _no_room(size: int) -> MemoryError:
    """Return the error for a request that this process has no memory for."""
    return MemoryError(
        f"the worker has no room for a request of {size} bytes; nothing of the call has run, and "
        f"the worker is replaced; pass less, or raise `memory_limit`"
    )


def _row(setup: Setup) -> memoryview:
    if setup.table is None:
        return memoryview(bytearray(t.ROW_BYTES)).cast("q")
    words = t.row_of(t.attach(setup.table.fd), setup.slot)
    os.close(setup.table.fd)
    return words


def _let_go_when_forked(end: FastWorkerEnd | PortableWorkerEnd, words: memoryview) -> None:
    """Take pipe and row from every child of this process: a call may fork, and both return from it.

    What the child does with either then raises, which ends it: see `_end_if_forked`.
    """
    if not hasattr(os, "register_at_fork"):
        return
    end.close_on_exec()  # `spawn` has passed it through one

    def let_go() -> None:
        end.let_go()
        words.release()

    os.register_at_fork(after_in_child=let_go)


def _end_if_forked(pid: int) -> None:
    """End this process if a call has forked, and this is the child that returned from it."""
    if os.getpid() != pid:
        os._exit(1)


def _stop_timers() -> None:
    for timer in ("ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF"):
        if hasattr(_signal, timer):
            _signal.setitimer(getattr(_signal, timer), 0)
