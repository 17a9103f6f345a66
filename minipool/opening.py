"""Opening: how a pool comes up, and how it goes down when its process ends."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from multiprocessing import (
    util as _multiprocessing_util,  # its exit handler must be older than ours
)
from typing import TYPE_CHECKING, Any

from .engine import wire
from .engine.desk import Desk
from .engine.launch import Launcher
from .engine.manager import Manager, live_managers
from .errors import PoolStartError
from .sessions import Sessions

if TYPE_CHECKING:
    from .config import PoolConfig
    from .telemetry import Hooks

_EXIT_GRACE = 2.0  # seconds that pools still open at exit have, all together


def open_desk(launcher: Launcher, config: PoolConfig, hooks: Hooks) -> tuple[Desk, Sessions]:
    """Bring up everything behind a pool, and let the manager begin to start workers.

    Raises:
        PoolStartError, OSError: nothing was started; everything is given back.
    """
    _end_with_process()
    store = _store(config)
    try:
        launcher.open()
        try:
            manager = Manager(launcher, config, hooks)
        except BaseException:  # out of descriptors, or of memory
            launcher.close()
            raise
    except BaseException:
        if store is not None:
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
    manager.start()
    return desk, sessions


def _store(config: PoolConfig) -> Any:
    """Return where sessions are kept; None: in memory."""
    store = config.session_store
    if not isinstance(store, (str, os.PathLike)):
        return store
    from .store import SQLiteStore  # imported by those who use it

    return SQLiteStore(os.fspath(store))


def wait_started(desk: Desk, count: int) -> PoolStartError | None:
    """Wait for the first workers; return at once, with the reason, when none can be started."""
    manager, enough = desk.manager, False

    def settled() -> bool:
        nonlocal enough  # it is enough to have seen them: one may be lost a moment later
        enough = enough or ready_count(manager) >= min(count, manager.staff.target)
        return enough or (manager.fleet.last_failure is not None and not manager.fleet.started)

    # Workers that do not get ready are failures after init_timeout each; this is the backstop.
    init_timeout = desk.config.init_timeout
    timeout = None if init_timeout is None else 2 * init_timeout + 1
    manager.wait_for(settled, timeout)
    desk.check_open()
    if enough:
        return None
    return manager.start_error() or PoolStartError(
        f"{desk.config.name}: {ready_count(manager)} of {count} workers became ready within "
        f"{timeout} s; raise `init_timeout`"
    )


def ready_count(manager: Manager) -> int:
    """Return how many workers are in service and fit for the next caller."""
    return len(manager.fleet.usable())


def note_pool(pool: Any) -> None:
    """Remember a pool that was opened, weakly."""
    _pools.add(pool)


def live_pools() -> list[Any]:
    """Return the pools that were opened in this process and have not ended, oldest first."""
    managers = set(live_managers())
    pools = [pool for pool in tuple(_pools) if pool._desk.manager in managers]
    return sorted(pools, key=lambda pool: pool._desk.manager.opened_ns)


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
