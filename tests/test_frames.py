"""What a worker sends that is no reply: its caller is told, and nobody else notices."""

from __future__ import annotations

import pickle
import struct
import threading
import time
from typing import Iterator

import pytest

import rogues
from gates import Gate
from liars import (
    RaisesGated,
    SendsGarbledError,
    SendsHalfAFrame,
    frame,
    keep,
    kept,
    raise_long,
    return_gated,
    write_and,
)
from minipool import (
    CallMismatch,
    CallTimeout,
    Pool,
    PoolStartError,
    ProtocolError,
    RemoteError,
    WorkerDied,
)
from minipool.engine import care, wire
from rogues import Stateful

LAST = 20.0  # seconds: far longer than anything here takes


@pytest.fixture(params=["fast", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "portable":
        monkeypatch.setenv("MINIPOOL_PORTABLE", "1")
    yield request.param


# The first call of a worker has the id 1.
BAD = {
    "garbage": ("return", b"\xff" * 100, ProtocolError),
    "text": ("return", b"Traceback (most recent call last):\n" * 9, ProtocolError),
    "short garbage": ("return", b"!", ProtocolError),
    "a length and no frame": ("hang", b"\0\0\0\x09", CallTimeout),
    "half a length": ("hang", b"\0\0", CallTimeout),
    "half a header": ("die", frame(1, 0)[:7], WorkerDied),
    "half a body": ("hang", frame(1, 0, bytes(999))[:500], CallTimeout),
    "half a body and death": ("die", frame(1, 0, bytes(999))[:500], WorkerDied),
    "half a body and the end": ("close", frame(1, 0, bytes(999))[:500], WorkerDied),
    "a length of two gigabytes": ("hang", b"\x7f\xff\xff\xff123", CallTimeout),
    "a length beyond the limit": ("hang", struct.pack("!iQ", -1, (4 << 30) + 1), ProtocolError),
    "an absurd length": ("hang", struct.pack("!iQ", -1, 1 << 63), ProtocolError),
    "a negative length": ("hang", struct.pack("!i", -2) + bytes(20), ProtocolError),
    "an empty frame": ("hang", bytes(4), ProtocolError),
    "another's reply": ("return", frame(7, 0, pickle.dumps(1)), ProtocolError),
    "an earlier reply": ("return", frame(0, 0, pickle.dumps(1)), ProtocolError),
    "a probe's answer": ("return", frame(-1, 0), ProtocolError),
    "an unknown status": ("hang", frame(1, 77), ProtocolError),
    "words too few": ("hang", frame(1, wire.WITH_WORDS, b"few"), ProtocolError),
    "a second readiness": ("hang", frame(1, wire.READY), ProtocolError),
    "a second start that failed": ("hang", frame(1, wire.START_FAILED), ProtocolError),
    "a commit without a session": ("hang", frame(1, wire.COMMITTED, bytes(40)), ProtocolError),
    "no state without a session": ("hang", frame(1, wire.NOT_HERE), ProtocolError),
    "an exception that is none": ("hang", frame(1, wire.RAISED, b"what?"), ProtocolError),
    "an exception of numbers": ("hang", frame(1, wire.RAISED, pickle.dumps(5)), ProtocolError),
    "two replies at once": ("hang", 2 * frame(1, 0, pickle.dumps(1)), ProtocolError),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_frame_is_told_and_its_worker_replaced(what: str, path: str) -> None:
    then, data, kind = BAD[what]
    with Pool(Stateful, size=1) as pool:
        with pool.checkout() as w:
            pid = w.pid
            start = time.monotonic()
            with pytest.raises(kind):
                w.options(timeout=0.3 if kind is CallTimeout else LAST).call(write_and, then, data)
            assert time.monotonic() - start < LAST / 2, "found late"
        with pool.checkout(timeout=LAST) as w:
            assert w.pid != pid
            assert w.call("add", 2) == 2
        assert pool.stats().faults == 1


def test_commit_of_nonsense_commits_nothing(path: str) -> None:
    with Pool(Stateful, size=1, checkout_timeout=LAST) as pool:
        pool.create_session("s", {"n": 1})
        body = b"\0\0\0\4" + b"what" + pickle.dumps(1)
        with pytest.raises(ProtocolError):
            with pool.checkout(session="s") as w:
                # On the portable path a first exchange has said that the state is not there.
                w.call("get")
                w.call(write_and, "hang", frame(2, wire.COMMITTED, body))
        assert pool.session_state("s") == {"n": 1}
        with pool.checkout(session="s") as w:
            assert w.call("get") == 0


# -- messages that are too long ----------------------------------------------------------------

LIMIT = 1 << 20


@pytest.fixture
def bounded(path: str) -> Iterator[Pool[Stateful]]:
    with Pool(Stateful, size=1, max_message=LIMIT) as pool:
        yield pool


def test_too_long_arguments_are_refused_before_anything_is_sent(bounded: Pool[Stateful]) -> None:
    with bounded.checkout() as w:
        with pytest.raises(CallMismatch, match="max_message"):
            w.call(rogues.size_of, bytes(LIMIT))
        assert w.call(rogues.size_of, bytes(LIMIT - 1000)) == LIMIT - 1000
        assert w.call("add", 3) == 3
    assert bounded.stats().faults == 0


def test_too_long_result_is_told_and_the_worker_is_well(bounded: Pool[Stateful]) -> None:
    with bounded.checkout() as w:
        w.call("add", 3)
        with pytest.raises(RemoteError, match="max_message"):
            w.call(rogues.make_bytes, LIMIT)
        assert len(w.call(rogues.make_bytes, LIMIT - 1000)) == LIMIT - 1000
        assert w.call("get") == 3
    assert bounded.stats().workers_lost == 0


def test_too_long_exception_is_told_and_the_worker_is_well(bounded: Pool[Stateful]) -> None:
    before = bounded.call("pid")
    with pytest.raises(RemoteError, match="max_message"):
        bounded.call(raise_long, LIMIT)
    assert bounded.call("pid") == before


def test_too_long_commit_commits_nothing_on_either_side(bounded: Pool[Stateful]) -> None:
    with bounded.checkout(session="s") as w:
        assert w.call(keep, 10) == 10
        with pytest.raises(RemoteError, match="max_message"):
            w.call(keep, LIMIT)
        assert w.state["data"] == bytes(10)
        assert w.call(kept) == 10
    assert bounded.stats().workers_lost == 0


# -- what runs here when it is unpickled ---------------------------------------------------------


def test_result_that_unpickles_for_ever_holds_its_caller_and_not_the_pool(gate: Gate) -> None:
    """Others call on, leases are revoked in time, and `close()` ends."""
    with Pool(size=2, lease_timeout=0.5) as pool:
        stuck = threading.Thread(target=pool.call, args=(return_gated, gate.path))
        stuck.start()
        gate.wait_arrived()
        assert [pool.call(rogues.double, n) for n in range(20)] == [2 * n for n in range(20)]
        pool.resize(1)
        pool.close(timeout=0.5)
        assert stuck.is_alive()
    assert pool.closed
    gate.open()
    stuck.join(LAST)
    assert not stuck.is_alive()


def test_start_error_that_unpickles_for_ever_does_not_stop_the_manager(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(care, "_UNPACKING", 0.2)
    with pytest.raises(PoolStartError, match=r"GateError.*takes too long") as caught:
        Pool(RaisesGated, args=(gate.path,), size=1).open()
    assert isinstance(caught.value.__cause__, RemoteError)
    gate.open()


def test_manager_does_not_wait_while_a_start_error_is_unpickled(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(care, "_UNPACKING", LAST)
    pool = Pool(RaisesGated, args=(gate.path,), size=1)
    pool.open(wait=False)
    try:
        gate.wait_arrived()  # here, in a thread
        assert pool._desk is not None
        done = threading.Event()
        pool._desk.manager.order(done.set)
        assert done.wait(LAST / 2)
    finally:
        gate.open(100)  # for those that are tried again, too
        pool.close()


def test_start_error_that_is_garbled_is_a_failed_start(path: str) -> None:
    with pytest.raises(PoolStartError):
        Pool(SendsGarbledError, size=1).open()


def test_half_a_frame_of_a_booting_worker_holds_nobody(path: str, gate: Gate) -> None:
    """The manager goes on, and gives the worker up after `init_timeout`."""
    with pytest.raises(PoolStartError, match="not ready within"):
        Pool(SendsHalfAFrame, args=(gate.path,), size=1, init_timeout=2.0).open()
    gate.wait_arrived()
