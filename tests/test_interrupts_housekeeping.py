"""Exceptions raised in what a pool does in the background: its sweep, and its housekeeping."""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from chatters import add
from ears import wait_until
from minipool import Pool, PoolConfig
from minipool.store import SQLiteStore
from strikes import Blow, files_of
from test_interrupts import modules_of
from test_interrupts_sessions import make_impatient

PATIENCE = 20.0  # seconds


@pytest.mark.logs_errors  # the manager says that it failed, and goes on
@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
def test_sweep_is_made_good_wherever_it_was_struck(stored: bool, tmp_path: Path) -> None:
    """The manager goes on, its workers are there, and what has expired is ended all the same."""
    path = tmp_path / "sessions.db" if stored else None
    options: Any = {"session_store": path, "session_ttl": 0.05, "health_check_timeout": 0.1}
    with Pool(size=1, start_method="fork", **options) as pool:
        assert pool._desk is not None
        manager = pool._desk.manager
        files = files_of(modules_of("minipool"))

        def sweep(blow: Blow, over: threading.Event) -> None:
            try:
                manager._last_look = 0.0  # a sweep is due
                with blow:
                    manager._look()
            finally:
                over.set()

        for step in itertools.count():
            assert pool.options(session=f"s{step}", timeout=PATIENCE).call(add) == 1
            blow, over = Blow(step, files), threading.Event()
            manager.order(lambda blow=blow, over=over: sweep(blow, over))
            assert over.wait(PATIENCE), "the manager does nothing any more"
            if not blow.fell:
                break
        assert step > 20
        wait_until(pool, lambda: not pool.sessions() and pool.stats().idle == 1)
        assert pool.call(abs, -1) == 1
        assert pool.stats().start_failures == 0


@pytest.mark.logs_errors
def test_end_is_made_good_wherever_it_was_struck(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The pool closes in time, and nothing is left."""
    monkeypatch.setattr(PoolConfig, "tick", 0.05)
    files = files_of(modules_of("minipool"))
    for step in itertools.count():
        blow = Blow(step, files)
        end_struck(blow)
        caplog.clear()  # records keep the frames, and these the pool
        if not blow.fell:
            break
    assert step > 20
    gc.collect()


def end_struck(blow: Blow) -> None:
    """Close a pool whose manager is struck in its last steps."""
    pool = Pool(size=1, start_method="fork").open()
    assert pool._desk is not None
    manager = pool._desk.manager
    end = manager._end

    def struck() -> None:
        with contextlib.nullcontext() if blow.fell else blow:
            end()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "_end", struck)
        pool.close(timeout=PATIENCE)
        manager._thread.join(PATIENCE)
    assert manager.done and not manager._thread.is_alive()


class WatchedStore:
    """A store that tells how often it has been used, and by whom."""

    def __init__(self, path: Path) -> None:
        self._store = SQLiteStore(str(path))
        self._changed = threading.Condition()
        self.signs = 0
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def beat(self, *used: Any) -> None:
        self._store.beat(*used)
        with self._changed:
            self.signs += 1
            self._changed.notify_all()

    def close(self) -> None:
        self._store.close()
        self.closed = True

    def wait_signs(self, count: int) -> None:
        with self._changed:
            enough = self._changed.wait_for(lambda: self.signs >= count, PATIENCE)
        assert enough, f"there were {self.signs} signs of life, and there are no more"


@pytest.mark.logs_errors
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a callback
@pytest.mark.parametrize(
    "rooms",
    [
        ("housekeeping",),
        pytest.param(
            ("housekeeping", "sessions", "store"),
            marks=[pytest.mark.exhaustive, pytest.mark.timeout(300)],
        ),
    ],
    ids=["by itself", "with the store"],
)
def test_housekeeping_goes_on_wherever_it_was_struck(
    rooms: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs of life go on, callers are served, and the store is closed at the end."""
    housekeeping = pytest.importorskip("minipool.housekeeping")
    monkeypatch.setattr(housekeeping, "_BEAT_S", 0.01, raising=False)
    make_impatient(monkeypatch)
    names = tuple(f"minipool.{room}" for room in rooms)
    files = files_of(
        module for module in modules_of("minipool") if module.__name__.startswith(names)
    )
    for step in range(1, 300):  # 0 is where the thread begins: nothing can be done about that
        if not lives_on(Blow(step, files), housekeeping.__file__, tmp_path / f"{step}.db"):
            break
    assert step > 10


def lives_on(blow: Blow, thread_file: str, path: Path) -> bool:
    """Open, use and close a pool whose housekeeping is struck; tell whether it was."""

    def profile(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_filename == thread_file and "housekeeping" in _thread_name():
            sys.setprofile(blow.profile)
            blow.profile(frame, event, argument)

    store = WatchedStore(path)
    threading.setprofile(profile)
    try:
        pool = Pool(size=1, lazy=True, session_store=store).open()  # no worker is needed
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    with pool:
        pool.create_session("a", {"n": 1})
        store.wait_signs(store.signs + 2)
        pool.create_session("b", {"n": 2})
        assert [pool.session_state(key) for key in "ab"] == [{"n": 1}, {"n": 2}]
    assert store.closed, "the store was not closed"
    left = [each.name for each in threading.enumerate() if each.name.startswith("minipool")]
    assert not left, f"threads left: {left}"
    return blow.fell


def _thread_name() -> str:
    return threading.current_thread().name
