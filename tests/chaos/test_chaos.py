"""Everything goes wrong at once, for a while, and nothing is lost.

Each episode is a pool with options, callers and a storm of its own, all drawn from one seed,
which is printed. To replay a storm, or to have a longer one:

    python -m pytest tests/chaos --chaos-seed 42 --chaos-seconds 3600
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from callers import SESSIONS, Callers
from ledger import Ledger
from storm import Clock, Storm
from subjects import Subject

from ears import wait_until
from minipool import CircuitBreaker, Pool

PATIENCE = 60.0  # seconds for anything to come to its end; it never takes that long


@pytest.mark.slow
@pytest.mark.timeout(0)  # how long it takes is an option
@pytest.mark.filterwarnings("ignore:a lease of worker:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_is_lost_in_a_storm(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One owner, each call answered once and rightly or failed with a typed error, no committed
    state lost, all workers there again when it is over, and nothing left at the end."""
    seed = request.config.getoption("--chaos-seed") or random.SystemRandom().randrange(1 << 32)
    until = time.monotonic() + request.config.getoption("--chaos-seconds")
    print(f"--chaos-seed {seed}")
    ledger, clock = Ledger(), Clock(monkeypatch)
    number = 0
    while number == 0 or time.monotonic() < until:
        episode(number, f"{seed}/{number}", ledger, clock, tmp_path)
        assert not ledger.violations, f"seed {seed}, episode {number}: {ledger.violations[:10]}"
        number += 1
    print(f"{number} episodes: {dict(sorted(ledger.outcomes.items()))}")
    assert ledger.outcomes["answered"] > 50 * number and ledger.outcomes["committed"] > 50 * number


def episode(number: int, seed: str, ledger: Ledger, clock: Clock, folder: Path) -> None:
    """Open a pool, let it be used and shot at, and see whether it gets over it."""
    dice = random.Random(seed)
    stored = dice.random() < 0.4  # those sessions go on in the next such episode
    keys = "kept-" if stored else f"{number}-"
    store = str(folder / "sessions.sqlite") if stored else None
    pool = Pool(Subject, args=(str(folder),), session_store=store, **options(dice)).open()
    callers = Callers(pool, number, ledger, seed, keys)
    storm = Storm(pool, callers, folder, dice, clock)
    try:
        storm.rage(dice.uniform(2.0, 5.0))
        end = dice.choices(["settle", "close", "terminate"], weights=[6, 2, 2])[0]
        if end == "close":
            pool.close(timeout=dice.choice([0.0, 0.5]))
        elif end == "terminate":
            pool.terminate()
        storm.calm()
    finally:
        callers.join(PATIENCE)
    ledger.count(f"end: {end}")
    if end == "settle":
        settle(pool, ledger, keys)
    pool.close()


def options(dice: random.Random) -> dict[str, Any]:
    """Draw the options of one pool."""
    return {
        "size": 4,
        "start_method": dice.choice(["forkserver", "forkserver", "forkserver", "spawn"]),
        "strategy": dice.choice(["lifo", "fifo"]),
        "affinity": dice.choice(["prefer", "any"]),
        "affinity_wait": dice.choice([0.0, 0.01]),
        "checkout_timeout": 20.0,
        "call_timeout": dice.choice([0.5, 2.0]),
        "breaker": dice.choice([False, CircuitBreaker(retry_after=0.3)]),
        "kill_group": dice.choice([True, False]),
        "retry": dice.choice([None, 3]),
        "spares": dice.choice([0, 0, 1, 2]),
        "max_calls": dice.choice([None, None, 20]),
        "max_lifetime": dice.choice([None, None, 1.0]),
        "warm_up": dice.choice([(), [("square", (2,))]]),
        "forward_logs": dice.choice([False, True]),
        "capture_output": dice.choice([False, True]),
        "health_check_interval": dice.choice([0.1, 1.0]),
        "health_check_timeout": 0.5,
        "close_timeout": 10.0,
    }


def settle(pool: Pool[Any], ledger: Ledger, keys: str) -> None:
    """Expect a pool to be as good as new, and every session to be what the callers know."""
    desk = pool._desk
    assert desk is not None
    size = desk.manager.staff.target
    wait_until(pool, lambda: len(desk.manager.turnstile.idle) == size, PATIENCE)
    assert pool.stats().waiting == 0
    leases = [pool.checkout(timeout=20) for _ in range(size)]
    assert [lease.call("square", n) for n, lease in enumerate(leases)] == [
        n * n for n in range(size)
    ]
    for lease in leases:
        lease.release()
    for session in (f"{keys}{n}" for n in range(SESSIONS)):
        with pool.checkout(session=session, timeout=20) as w:  # nobody has it any more
            ledger.judge(session, w.state.get("entry", (0, 0)))
    for session in pool.sessions():
        assert not session.leased, session
