"""Opening: how a pool comes up, and how it goes down when its process ends."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from multiprocessing import (
    util as _multiprocessing_util,  # its exit handler must be older than ours
)
from typing import TYPE_CHECKING, Any, Callable

from .engine import wire
from .engine.desk import Desk
from .engine.launch import Launcher
from .engine.manager import Manager, live_managers
from .errors import SessionError, WorkerStartError
from .sessions import Sessions

if TYPE_CHECKING:
    from .breaker import CircuitBreaker
    from .config import PoolConfig
    from .telemetry import Hooks

_GIVE_UP_TIME = 5.0  # seconds at most for the workers of an opening that failed to end
_EXIT_GRACE = 2.0  # seconds that pools still open at exit have, all together
PENDING = Exception("workers are starting, and nobody knows yet what will come of them")
_LEAST_TO_LOG = 0.1  # seconds for what was logged, where the workers have taken all of that


def open_desk(
    launcher: Launcher,
    config: PoolConfig,
    hooks: Hooks,
    breaker: CircuitBreaker | None,
) -> tuple[Desk, Sessions]:
    """Bring up everything behind a pool, and let the manager begin to start workers.

    `breaker` is that of an opening before, which failed; None: this is the first one. If this one
    fails, the pool may be opened again: a store that the user made stays open for that.

    Raises:
        PoolStartError, OSError, RuntimeError: nothing was started; everything is given back.
    """
    _end_with_process()
    lent = _lent(config)
    store = _store(config)
    if lent and store is not None:
        _check_free(config, store)
    try:
        launcher.open()
        try:
            manager = Manager(launcher, config, hooks, breaker)
        except BaseException:  # out of descriptors, or of memory
            launcher.close()
            raise
    except BaseException:
        if store is not None and not lent:
            store.close()
        raise
    targets = wire.Targets(launcher.worker, launcher.method == "fork", config.codec is not None)
    kind = Desk
    if config.max_calls is not None:
        from .engine.tally import TallyDesk as kind  # imported by those who use it
    desk = kind(manager, targets)
    # Pool and leases know the desk, the manager does not: when they are collected, so is it.
    forgotten = weakref.finalize(desk, manager.close, 0.0, True)
    forgotten.atexit = False  # `_close_all` does better
    manager.at_end = forgotten.detach  # else it would outlive the first collection
    sessions = Sessions(desk, store)
    for keeper in manager.keepers:
        keeper.lets_go = not lent
    manager.start()
    for keeper in manager.keepers:
        keeper.lets_go = True
    return desk, sessions


def _check_free(config: PoolConfig, store: Any) -> None:
    """Raise SessionError if another pool has that store, or it was closed.

    A store's sessions have one owner: what one pool lets expire, the other would be using.
    """
    user = _user_of(store)
    if user is not None:
        raise SessionError(
            f"session_store={store!r} of {config.name} is in use by {user.config.name}; "
            f"give each pool a store of its own, on the same file if you like"
        )
    if getattr(store, "is_closed", False) is True:
        raise SessionError(
            f"session_store={store!r} of {config.name} is closed; a pool closes its store as it "
            f"ends: make a new one"
        )


def _user_of(store: Any) -> Manager | None:
    """Return the manager of the pool that has that very store, if one has it."""
    for manager in live_managers():
        if any(keeper.keeps(store) for keeper in manager.keepers):
            return manager
    return None


def _lent(config: PoolConfig) -> bool:
    """Tell whether the store, if there is one, is the user's own."""
    return not isinstance(config.session_store, (str, os.PathLike))


def close_lent(config: PoolConfig) -> None:
    """Close the store that the user made for a pool, as the pool will not be opened (again).

    But one that another pool uses is that one's to close.
    """
    store: Any = config.session_store
    if _lent(config) and store is not None and _user_of(store) is None:
        store.close()


def _store(config: PoolConfig) -> Any:
    """Return where sessions are kept; None: in memory."""
    store = config.session_store
    if not isinstance(store, (str, os.PathLike)):
        return store
    from .store import SQLiteStore  # imported by those who use it

    return SQLiteStore(os.fspath(store))


def wait_started(
    desk: Desk, count: int, since: float, limit: float | None = None
) -> BaseException | None:
    """Wait for the first workers; return why, as soon as it is known that they will not come.

    It is known when the class or a preload has raised, or so many starts have failed in a row
    that it is no chance, and those that are left are too few. `since`, a monotonic time, is when
    the opening began: what failed before says nothing. If nothing is known after `limit` seconds,
    it is PENDING.
    """
    manager, enough = desk.manager, False

    def settled() -> bool:
        nonlocal enough  # it is enough to have seen them: one may be lost a moment later
        needed = min(count, manager.staff.target)
        enough = enough or ready_count(manager) >= needed
        return enough or manager.closing or _lost(manager, needed, since)

    # Workers that do not get ready are failures after init_timeout each; this is the backstop.
    init_timeout = desk.config.init_timeout
    timeout = None if init_timeout is None else 2 * init_timeout + 1
    if limit is not None and (timeout is None or limit < timeout):
        if not manager.wait_for(settled, limit):
            return PENDING
    else:
        manager.wait_for(settled, timeout)
    desk.check_open()
    if enough:
        return None
    return _why_lost(manager, since) or WorkerStartError(
        f"{ready_count(manager)} of {count} workers became ready within {timeout} s; raise "
        f"`init_timeout`"
    )


def _lost(manager: Manager, needed: int, since: float) -> bool:
    """Tell whether so many workers are not to be hoped for."""
    verdict = manager.fleet.verdict
    if verdict is not None and verdict.at >= since:
        return verdict.hope(manager.staff.target) < needed
    return manager.fleet.hopeless


def _why_lost(manager: Manager, since: float) -> BaseException | None:
    fleet = manager.fleet
    if fleet.verdict is not None and fleet.verdict.at >= since:
        return fleet.verdict.failure
    if fleet.last_failure is None and fleet.breaker is not None and fleet.hopeless:
        return fleet.breaker.error(f"no worker of {manager.config.name} was started")
    return fleet.last_failure


def give_up(desk: Desk, failure: BaseException, then: Callable[[], object]) -> None:
    """End an opening that failed, and wait for that, some seconds at most.

    The pool may be opened again, from when `then` is called on. A store that the user made stays
    open for that.
    """
    manager = desk.manager
    for keeper in manager.keepers:
        keeper.lets_go = not _lent(desk.config)
    ended = manager.at_end
    manager.at_end = lambda: (ended(), then())
    manager.give_up(failure, for_good=False)
    if manager.wait_done(_GIVE_UP_TIME):
        manager.join(1.0)


def ready_count(manager: Manager) -> int:
    """Return how many workers are in service and fit for the next caller."""
    return len(manager.fleet.usable())


def note_pool(pool: Any) -> None:
    """Remember a pool that was opened, weakly."""
    _pools.add(pool)


def live_pools() -> list[Any]:
    """Return the pools that were opened in this process and have not ended, oldest first."""
    managers = set(live_managers())
    found = []
    for pool in tuple(_pools):
        desk = pool._desk
        if desk is not None and desk.manager in managers:
            found.append((desk.manager.opened_ns, id(pool), pool))
    return [pool for _, _, pool in sorted(found)]


def _close_all() -> None:
    """At interpreter exit: end every pool that was left open, before multiprocessing joins."""
    managers = live_managers()
    for manager in managers:
        manager.close(0.0)
    deadline = time.monotonic() + _EXIT_GRACE
    for manager in managers:
        if not manager.wait_done(max(0.0, deadline - time.monotonic())):
            manager.close(0.0, kill=True)
            manager.wait_done(1.0)
    for manager in managers:  # which may have log records to write; its thread ends with us
        manager.join(max(_LEAST_TO_LOG, deadline - time.monotonic()))


def _end_with_process() -> None:
    """Have this process's pools ended when it ends, also where `atexit` is not called.

    A process of multiprocessing joins its children first of all, and pools in it would keep them.
    """
    global _ends_with
    if _ends_with != os.getpid():
        _ends_with = os.getpid()
        _multiprocessing_util.Finalize(None, _close_all, exitpriority=100)


_ends_with = 0
_pools: weakref.WeakSet[Any] = weakref.WeakSet()
atexit.register(_close_all)  # registered later than multiprocessing's handler, so called before
