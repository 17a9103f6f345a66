"""Inspection: what a pool tells of itself, to whoever asks. Nothing here disturbs its callers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .engine.handle import Handle
from .engine.manager import Manager
from .engine.states import WorkerState
from .lifecycle import Lifecycle

if TYPE_CHECKING:
    from .breaker import CircuitBreaker
    from .engine.inquest import Death
    from .observe import Dashboard
    from .status import HealthReport, PoolStats, SessionInfo, WorkerInfo


class Inspection(Lifecycle):
    """What may be asked of a pool, at any time and from any thread."""

    def workers(self) -> list[WorkerInfo]:
        """Return what each worker is doing now, in the order of their ids."""
        from .status import worker_info  # reports are imported when somebody asks for one

        handles = self._handles()
        return [worker_info(handles[slot]) for slot in sorted(handles)]

    def worker(self, worker_id: int) -> WorkerInfo:
        """Return what one worker is doing now.

        Raises:
            KeyError: there is no such worker at the moment.
        """
        from .status import worker_info

        handle = self._handles().get(worker_id)
        if handle is None:
            raise KeyError(f"{self.config.name} has no worker {worker_id!r} now")
        return worker_info(handle)

    def _handles(self) -> dict[int, Handle]:
        desk = self._desk
        if desk is None:
            return {}
        desk.check_process()
        return dict(desk.manager.fleet.handles)

    def deaths(self) -> list[Death]:
        """Return how the last 100 workers ended that nobody had told to, oldest first."""
        self._handles()
        return [] if self._desk is None else self._desk.manager.fleet.known_deaths()

    def dump(self) -> dict[int, str]:
        """Return the Python stacks of every worker, by its id, and stop none of them.

        Also of workers that are busy in C. Takes half a second at most; the text is empty for one
        that did not answer: it is booting, or was stopped.
        """
        from .engine.blackbox import stacks_of

        return stacks_of(self._handles().values())

    def sessions(self) -> list[SessionInfo]:
        """Return what is known of each session of this process."""
        from .status import session_infos

        if self._desk is None:
            return []
        self._desk.check_process()
        return session_infos(self._sessions)

    def stats(self) -> PoolStats:
        """Return what the pool did so far and how it stands; also after it was closed."""
        from .status import pool_stats

        return pool_stats(self.config, self._desk, len(self._sessions) if self._desk else 0)

    def health_check(self, probe: bool = False) -> HealthReport:
        """Tell whether the pool is well: healthy, degraded or unhealthy, and why.

        With `probe`, every idle worker is asked first; that takes `health_check_timeout` at most.
        """
        from .status import health_report

        desk = self._desk
        if desk is not None:
            desk.check_process()
            if probe and not desk.manager.closing:
                self._probe_all(desk.manager)
        return health_report(self.config, desk, self._closed, self._failure)

    def _probe_all(self, manager: Manager) -> None:
        asked: list[Handle] = []
        placed: list[bool] = []

        def probe_idle() -> None:
            # A token may be left over from a worker that is gone: `probe` claims it first.
            for handle in manager.turnstile.idle.copy().values():
                manager.care.probe(handle)
                asked.append(handle)
            placed.append(True)

        manager.order(probe_idle)
        if not manager.here:
            manager.wait_for(lambda: bool(placed), self.config.health_check_timeout)
            manager.wait_for(
                lambda: not any(handle.state is WorkerState.PROBING for handle in asked),
                self.config.health_check_timeout + 0.5,
            )

    def dashboard(
        self, port: int = 0, *, host: str = "127.0.0.1", token: str | None = None
    ) -> Dashboard:
        """Serve a web page that shows this pool, and all others of this process; see its `url`.

        Opens the pool. The page is served until `close()`, or the end of this pool. Port 0 is any
        free one. Where `host` is not of this machine alone, visitors must show the token.

        Raises:
            OSError: the address is taken, or not this machine's.
            ValueError: the token has more in it than letters, digits and ._~-
        """
        from .observe import serve

        return serve(self, self._open(0).manager, host, port, token)

    @property
    def breaker(self) -> CircuitBreaker | None:
        """What stops starting workers when that keeps failing; `breaker.reset()` goes on now.

        None: the option `breaker` is off. Opens the pool if this is its first use.
        """
        if self._desk is None and self._breaker is not None:
            return self._breaker  # of an opening that failed
        desk = self._desk or self._open_now()
        desk.check_process()
        return desk.manager.fleet.breaker

    def __repr__(self) -> str:
        desk = self._desk
        failed = "" if self._failure is None else f", could not start: {self._failure}"
        if desk is None:
            status = ("closed" if self._closed else "not open yet") + failed
        elif desk.forked:
            status = f"belongs to process {desk.manager.pid}"
        elif desk.manager.done:
            status = "closed" + failed
        else:
            s = self.stats()
            status = "closing, " if desk.manager.closing else ""
            status += f"{s.workers} of {s.size} workers: {s.idle} idle, {s.leased} leased, "
            status += f"{s.starting} starting; {s.waiting} waiting"
        return f"<Pool {self.config.name}: {status}>"
