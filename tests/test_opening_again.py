"""An opening that fails closes what it has opened, and nothing else: the rest may be tried again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

from ears import Ear, wait_until
from gates import Gate
from minipool import Pool, PoolClosed, PoolStartError, SessionError, lifecycle
from minipool.engine.launch import Launcher
from minipool.store import SQLiteStore
from troublemakers import AllButOneAfterGates, FailsWhileFileExists, RaisesAfterTheGate
from workers import Counter

LAST = 20.0
OPENINGS = pytest.mark.parametrize(
    "opened",
    [Pool.open, lambda pool: pool.open(wait=False), Pool.__enter__],
    ids=["open", "open and do not wait", "with"],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a session store may be."""
    return tmp_path / "store.sqlite"


# -- nothing was opened ----------------------------------------------------------------------------


@OPENINGS
def test_store_that_cannot_be_opened_now_leaves_the_pool_unopened(
    opened: Callable[[Any], Any], path: Path
) -> None:
    """What is the matter with it may be over in a moment."""
    SQLiteStore(str(path)).close()
    path.chmod(0o666)
    pool = Pool(Counter, size=1, session_store=str(path))
    ear = Ear(pool, "pool.init", "pool.terminate")
    for _ in range(2):
        with pytest.raises(SessionError, match="chmod"):
            opened(pool)
        assert not pool.closed and ear.heard == []
        assert "not open yet, could not start" in repr(pool) and "chmod" in repr(pool)
    path.chmod(0o600)
    with opened(pool):
        pool.create_session("ada", {"a": 1})
        assert pool.session_state("ada") == {"a": 1}
    assert [event.name for event in ear.heard] == ["pool.init", "pool.terminate"]
    assert "could not start" not in repr(pool)


@OPENINGS
@pytest.mark.parametrize("lacking", ["descriptors", "thread"])
def test_what_the_system_lacks_leaves_the_pool_unopened(
    opened: Callable[[Any], Any], lacking: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that the user made stays open for the next try."""

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def no_descriptors(launcher: Launcher) -> None:
        raise OSError("too many open files")

    store = SQLiteStore(str(path))
    pool = Pool(Counter, size=1, session_store=store)
    with monkeypatch.context() as patch:
        if lacking == "descriptors":
            patch.setattr(Launcher, "open", no_descriptors)
        else:
            patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(PoolStartError, match="the next use tries again"):
            opened(pool)
    assert not pool.closed and not store.is_closed
    with opened(pool):
        pool.create_session("ada", {"a": 1})
        assert pool.session_state("ada") == {"a": 1}
    assert store.is_closed


def test_class_that_cannot_be_found_leaves_the_pool_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool("comes_later:Worker", size=1)
    for use in (lambda: pool.call("add"), pool.open, pool.open):
        with pytest.raises(PoolStartError, match="comes_later"):
            use()
        assert not pool.closed and "comes_later" in repr(pool)
    (tmp_path / "comes_later.py").write_text("from workers import Counter as Worker\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pool.open():
        assert pool.call("add") == 1


def test_pool_that_could_not_be_opened_can_be_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the store that was kept for the next try."""

    def no_descriptors(launcher: Launcher) -> None:
        raise OSError("too many open files")

    store = SQLiteStore(str(path))
    pool = Pool(Counter, size=1, session_store=store)
    with monkeypatch.context() as patch:
        patch.setattr(Launcher, "open", no_descriptors)
        with pytest.raises(PoolStartError):
            pool.open()
    pool.close()
    assert store.is_closed
    for use in (pool.open, lambda: pool.call("add")):
        with pytest.raises(PoolClosed, match=r"could not start: .*too many open files"):
            use()


@pytest.mark.parametrize("opened", [Pool.open, lambda pool: pool.call("add")], ids=["open", "use"])
def test_pool_closes_no_store_that_another_pool_uses(
    opened: Callable[[Any], Any], path: Path
) -> None:
    """It was not opened itself because of that."""
    store = SQLiteStore(str(path))
    with Pool(Counter, size=1, session_store=store) as user:
        other = Pool(Counter, size=1, session_store=store)
        with pytest.raises(SessionError, match="in use by"):
            opened(other)
        other.close()
        user.create_session("ada", {"a": 1})
        assert user.session_state("ada") == {"a": 1}
    assert store.is_closed


# -- another opening made it -----------------------------------------------------------------------


@pytest.fixture
def obstacle(tmp_path: Path) -> Path:
    """A file while which is there, FailsWhileFileExists cannot start."""
    path = tmp_path / "obstacle"
    path.touch()
    return path


@pytest.mark.parametrize(
    "first",
    [lambda pool: pool.open(wait=False), lambda pool: pool.drain()],
    ids=["open", "use"],
)
def test_opening_that_fails_leaves_a_pool_open_that_was_opened_before(
    first: Callable[[Any], Any], obstacle: Path
) -> None:
    """Its starts are repeated in the background, as before."""
    pool = Pool(FailsWhileFileExists, args=(str(obstacle),), size=1)
    first(pool)
    with pytest.raises(
        PoolStartError,
        match=r"is in the way; correct the worker's code .*; the pool goes on trying",
    ):
        pool.open()
    assert not pool.closed
    obstacle.unlink()
    wait_until(pool, lambda: pool.stats().idle == 1)
    assert pool.call("pid")
    pool.close()


class Waiting:
    """Tells who waits for an opening; whoever made that is held back, until another has seen it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._came, self._wait = threading.Semaphore(0), lifecycle.wait_started
        self.go_on = threading.Event()
        monkeypatch.setattr(lifecycle, "wait_started", self._wait_started)

    def _wait_started(self, desk: Any, count: int, since: float, *more: Any) -> Any:
        self._came.release()
        failure = self._wait(desk, count, since, *more)
        assert since or self.go_on.wait(LAST)
        return failure

    def wait(self) -> None:
        """Wait until somebody does."""
        assert self._came.acquire(timeout=LAST)


@pytest.mark.parametrize("explicit", [True, False], ids=["open", "use"])
def test_whoever_opened_a_pool_settles_what_becomes_of_it(
    explicit: bool, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else waits for the same opening, and sees it fail first."""
    uses: list[Callable[[], Any]] = [lambda: pool._open(wait_for=1), lambda: pool.open()]
    waiting = Waiting(monkeypatch)
    pool = Pool(RaisesAfterTheGate, args=(gate.path,), size=1, checkout_timeout=LAST)
    with ThreadPoolExecutor(2) as threads:
        opening = threads.submit(uses[explicit])
        gate.wait_arrived()
        waiting.wait()
        other = threads.submit(uses[not explicit])
        waiting.wait()
        gate.open()
        errors = [other.exception(LAST)]
        waiting.go_on.set()
        errors.append(opening.exception(LAST))
    for error in errors:
        assert isinstance(error, PoolStartError) and "no weights here" in str(error)
    assert "; the pool goes on trying" in str(errors[0])
    assert ("; open a new pool" in str(errors[1])) == explicit
    assert pool.closed == explicit


def test_opening_of_all_that_fails_leaves_the_opening_of_one_alone(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, gate_of_first = Waiting(monkeypatch), Gate(str(tmp_path / "first gate"))
    waiting.go_on.set()
    args = (str(tmp_path / "first"), gate_of_first.path, gate.path)
    pool = Pool(AllButOneAfterGates, args=args, size=2)
    with ThreadPoolExecutor(2) as threads:
        opening = threads.submit(pool.open, workers=1)
        waiting.wait()
        gate_of_first.wait_arrived()
        gate.wait_arrived()
        other = threads.submit(pool.open)
        waiting.wait()
        gate_of_first.open()
        error = other.exception(LAST)
        assert isinstance(error, PoolStartError) and "the first one" in str(error)
        assert not pool.closed and not opening.done()
        gate.open(2)
        assert opening.result(LAST) is pool
    pool.close()
    gate_of_first.close()
