"""A listener that holds up the manager makes no deadline late, and hides no stop."""

from __future__ import annotations

import threading
import time
from typing import Any, Iterator

import pytest

from ears import handle_of
from gates import Gate, pass_gate
from minipool import CheckoutTimeout, Pool
from minipool.engine import channel, portable, standstill
from minipool.engine.manager import Manager

LAST = 20.0


class HoldsUp:
    """A listener that stays until it is let go."""

    def __init__(self) -> None:
        self.came, self.go = threading.Event(), threading.Event()

    def __call__(self, *_: Any) -> None:
        self.came.set()
        assert self.go.wait(LAST)


@pytest.fixture
def pool() -> Iterator[Pool[None]]:
    with Pool(size=1) as made:
        yield made


@pytest.fixture
def manager(pool: Pool[None]) -> Iterator[Manager]:
    """A manager whose present turn has begun long ago."""
    assert pool._desk is not None
    manager, listener = pool._desk.manager, HoldsUp()
    manager.order(lambda: listener("", {}, {}))
    assert listener.came.wait(LAST)
    account = manager.standstills
    account._phase = tuple(min(one, one - 10.0) for one in account._phase[:2]) + account._phase[2:]
    yield manager
    listener.go.set()


def test_checkout_that_is_over_does_not_wait_for_a_listener(
    pool: Pool[None], manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standstill, "_PATIENCE", 10 * LAST)
    with pool.checkout():
        found: list[Any] = []

        def wait() -> None:
            try:
                pool.checkout(timeout=0.01)
            except CheckoutTimeout as error:
                found.append(error)

        caller = threading.Thread(target=wait)
        caller.start()
        caller.join(LAST / 2)
        assert found, "it waits for the listener"


def test_caller_in_the_line_is_witness_of_a_stop(
    pool: Pool[None], manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    account, dues = manager.standstills, []  # type: Any, list[float]
    monkeypatch.setattr(account, "witness", dues.append)
    with pool.checkout():
        began = time.monotonic()
        with pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0.05)
        assert began < dues[0] < time.monotonic()


def test_caller_in_a_call_is_witness_of_a_stop(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "LOOK", 0.01)
    monkeypatch.setattr(portable, "LOOK", 0.01)
    with Pool(size=1, call_timeout=LAST) as pool:
        assert pool._desk is not None
        assert handle_of(pool).channel.witness == pool._desk.manager.standstills.witness
        told, dues = threading.Event(), []  # type: threading.Event, list[float]

        def witness(due: float) -> None:
            dues.append(due)
            told.set()

        handle_of(pool).channel.witness = witness
        caller = threading.Thread(target=lambda: pool.call(pass_gate, gate.path))
        caller.start()
        gate.wait_arrived()
        assert told.wait(LAST / 2)
        gate.open()
        caller.join(LAST)
        assert dues == sorted(dues)


@pytest.mark.parametrize(
    ("left", "ended"),
    [(5.0, -5.0 + channel.LOOK), (channel.LOOK / 2, 0.0), (-3.0, 3.0)],
)
def test_wait_of_a_call_was_to_end_by_its_look_or_deadline(left: float, ended: float) -> None:
    """By the latter if that was nearer; where it was over, at once."""
    end, dues = channel.End(10), []  # type: channel.End, list[float]
    end._due, end._began = 100.0, 90.0
    end.lost, end.witness = lambda since: 50.0, dues.append
    assert end._after_look(100.0, left) == (100.0 if left > channel.LOOK else 150.0)
    assert dues == [pytest.approx(100.0 + ended)]
