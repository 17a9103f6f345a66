"""Messages that a process has no memory for: the caller is told, and the pipe is as good as before."""

from __future__ import annotations

from typing import Any, Iterator

import pytest

import rogues
from chatters import get, keys, put
from ears import Ear, handle_of, wait_until
from minipool import Pool
from rogues import Stateful
from workers import memory_at_start

MB = 1_000_000
ROOM, TOO_MUCH = 150 * MB, 200 * MB  # bytes beside what a worker begins with


@pytest.fixture(params=["fast", "portable"])
def narrow(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, start_method: str
) -> Iterator[Pool[Stateful]]:
    """A pool of one worker that has room for a small message and not for a large one."""
    if request.param == "portable":
        monkeypatch.setenv("MINIPOOL_PORTABLE", "1")
    options: dict[str, Any] = {"call_timeout": None, "start_method": start_method}
    with Pool(
        Stateful, size=1, memory_limit=memory_at_start(start_method) + ROOM, **options
    ) as pool:
        yield pool


def test_request_without_room_is_a_memory_error_and_ends_no_worker(
    narrow: Pool[Stateful],
) -> None:
    with narrow.checkout() as w:
        w.call("add", 3)
        with pytest.raises(MemoryError, match=rf"{TOO_MUCH // MB}\d+ bytes.*`memory_limit`"):
            w.call(rogues.size_of, bytes(TOO_MUCH))
        assert w.call("get") == 3, "the same worker, and the next reply is the next call's"
        assert w.call(rogues.size_of, bytes(MB)) == MB
    stats = narrow.stats()
    assert (stats.workers_lost, stats.faults, stats.raised) == (0, 0, 1)


def test_worker_without_room_is_recycled_when_it_is_given_back(narrow: Pool[Stateful]) -> None:
    ear, pid = Ear(narrow, "worker.terminate"), narrow.call("pid")
    with pytest.raises(MemoryError):
        narrow.options(idempotent=True).call(rogues.size_of, bytes(TOO_MUCH))
    gone = ear.wait("worker.terminate")
    assert (gone.metadata["pid"], gone.metadata["exitcode"]) == (pid, 0)
    assert gone.metadata["reason"] == "the call ended in MemoryError"
    assert narrow.options(timeout=20).call("pid") != pid
    assert narrow.stats().workers_lost == 0


def test_session_is_what_it_was_after_a_request_without_room(narrow: Pool[Stateful]) -> None:
    call = narrow.options(session="ada").call
    call(put, "name", "Ada")
    with pytest.raises(MemoryError):
        call(put, "data", bytes(TOO_MUCH))
    assert narrow.session_state("ada") == {"name": "Ada"}
    with narrow.checkout(session="ada", timeout=20) as w:
        assert (w.call(keys), w.call(get, "name")) == (["name"], "Ada")
    assert narrow.stats().workers_lost == 0


def test_result_without_room_in_the_worker_is_a_memory_error(narrow: Pool[Stateful]) -> None:
    """There is room for the result, and not for its pickle beside it."""
    with narrow.checkout() as w:
        with pytest.raises(MemoryError):
            w.call(rogues.make_bytes, 100 * MB)
        assert w.call(rogues.make_bytes, 3) == b"xxx"
    assert narrow.stats().workers_lost == 0


class Full(bytearray):
    """Has no room for more than a megabyte."""

    def __iadd__(self, piece: Any) -> Any:
        if len(self) + len(piece) > MB:
            raise MemoryError
        self.extend(piece)
        return self

    def __getitem__(self, part: Any) -> Any:
        rest = super().__getitem__(part)
        return Full(rest) if isinstance(part, slice) else rest


@pytest.mark.parametrize("path", ["fast", "portable"])
def test_result_without_room_here_is_a_memory_error_and_its_worker_well(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "portable":
        monkeypatch.setenv("MINIPOOL_PORTABLE", "1")
    with Pool(Stateful, size=1) as pool, pool.checkout() as w:
        w.call("add", 3)
        handle_of(pool).channel._got = Full()
        with pytest.raises(MemoryError, match=rf"{5 * MB // 10000}\d+ bytes.*is well"):
            w.call(rogues.make_bytes, 5 * MB)
        assert w.call("get") == 3
        assert w.call(rogues.make_bytes, 5 * MB) == b"x" * 5 * MB
        assert pool.stats().workers_lost == 0


def test_commit_without_room_here_commits_nothing_on_either_side() -> None:
    with Pool(Stateful, size=1) as pool, pool.checkout(session="ada") as w:
        w.call(put, "name", "Ada")
        handle_of(pool).channel._got = Full()
        with pytest.raises(MemoryError):
            w.call(put, "data", bytes(5 * MB))
        assert dict(w.state) == {"name": "Ada"}
        assert w.call(keys) == ["name"]
        w.call(put, "data", b"less")
        assert dict(w.state) == {"name": "Ada", "data": b"less"}


class Fat(bytes):
    """Cannot be put together with anything."""

    def __add__(self, other: Any) -> Any:
        raise MemoryError

    def __radd__(self, other: Any) -> Any:
        raise MemoryError


@pytest.mark.parametrize("path", ["laden", "portable"])
def test_request_without_room_here_ends_no_worker(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was sent, so the worker knows nothing of it."""
    if path == "portable":
        monkeypatch.setenv("MINIPOOL_PORTABLE", "1")
    variables = ["talkers:trace_id"] if path == "laden" else []
    with Pool(Stateful, size=1, context=variables) as pool, pool.checkout() as w:
        w.call("add", 3)
        handle, dumps = handle_of(pool), handle_of(pool)._dumps
        handle._dumps = lambda value, protocol: Fat(dumps(value, protocol))
        with pytest.raises(MemoryError, match="nothing was sent"):
            w.call("add", 1)
        handle._dumps = dumps
        assert w.call("add", 1) == 4
        assert pool.stats().workers_lost == 0


def test_burst_of_requests_without_room_leaves_the_pool_whole() -> None:
    with Pool(size=2, memory_limit=memory_at_start() + ROOM) as pool:
        data = bytes(TOO_MUCH)
        for _ in range(3):
            with pytest.raises(MemoryError):
                pool.options(timeout=30).call(rogues.size_of, data)
        wait_until(pool, lambda: pool.stats().idle == 2)
        stats = pool.stats()
        assert (stats.workers_lost, stats.start_failures, stats.breaker) == (0, 0, "closed")
