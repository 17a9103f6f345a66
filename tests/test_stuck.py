"""All workers hang in their calls, or are never given back: the pool tells that it serves nobody."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from contextlib import ExitStack
from typing import Any, Iterator

import pytest

from gates import Gate, pass_gate
from minipool import CheckoutTimeout, Pool

LAST = 20.0


@pytest.fixture
def pool() -> Iterator[Pool[Any]]:
    with Pool(size=2, call_timeout=None) as made:
        yield made


def refuse(pool: Pool[Any]) -> None:
    with pytest.raises(CheckoutTimeout):
        pool.checkout(timeout=0.01)


def hang(stack: ExitStack, pool: Pool[Any], gate: Gate, count: int) -> None:
    """Have so many calls stand at the gate, until the stack ends."""
    callers = [
        threading.Thread(target=pool.call, args=(pass_gate, gate.path)) for _ in range(count)
    ]
    for caller in callers:
        caller.start()
        stack.callback(caller.join, LAST)
    stack.callback(gate.open, count)
    gate.wait_arrived(count)


@pytest.mark.parametrize("probe", [False, True])
def test_pool_whose_workers_all_hang_is_degraded(pool: Pool[Any], gate: Gate, probe: bool) -> None:
    with ExitStack() as stack:
        hang(stack, pool, gate, 2)
        assert pool.health_check(probe).status == "healthy", "it is busy, which is no illness"
        refuse(pool)
        report = pool.health_check(probe)

    assert report.status == "degraded"
    (reason,) = report.reasons
    told = r"2 of 2 workers have been in one call for \d+ s, callers time out"
    assert re.fullmatch(told, reason), reason
    assert pool.health_check(probe).status == "healthy", "they have come free"


def test_pool_whose_leases_are_never_given_back_is_degraded(pool: Pool[Any]) -> None:
    with pool.checkout(), pool.checkout():
        refuse(pool)
        (reason,) = pool.health_check().reasons
    assert re.match(r"2 of 2 workers have been leased to the same callers for \d+ s,", reason)

    with pool.checkout(), pool.checkout():
        assert pool.health_check().status == "healthy", "nobody was refused since these began"


def test_pool_with_a_worker_that_comes_free_is_healthy(pool: Pool[Any], gate: Gate) -> None:
    with ExitStack() as stack:
        hang(stack, pool, gate, 1)
        with pool.checkout():
            refuse(pool)

        assert pool.health_check().status == "healthy"


def test_page_for_probes_tells_it(pool: Pool[Any], gate: Gate) -> None:
    with ExitStack() as stack, pool.dashboard() as dashboard:
        hang(stack, pool, gate, 2)
        refuse(pool)
        where = dashboard.url.rstrip("/") + "/healthz"
        with urllib.request.urlopen(where, timeout=LAST) as answer:
            (told,) = json.load(answer)["pools"]

    assert told["status"] == "degraded"
    assert "callers time out" in told["reasons"][0]
