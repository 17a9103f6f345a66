"""Two processes, two pools each, one store; everything is killed or locked, and nothing is lost.

The seed is printed. To replay a run (what the kernel makes of it differs), or to have a long one:

    python -m pytest tests/chaos/test_shared_store.py --chaos-seed 42 --chaos-seconds 1800
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from shared_store import SharedStore


@pytest.mark.slow
@pytest.mark.timeout(0)  # how long it takes is an option
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc and signals by pidfd")
def test_nothing_is_lost_on_a_shared_store(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """What was acknowledged is in the store once, what was refused is not; nothing that may not
    ran twice; no worker was ended but by the storm; both go on to serve; nothing is left."""
    seed = request.config.getoption("--chaos-seed") or random.SystemRandom().randrange(1 << 32)
    seconds = request.config.getoption("--chaos-seconds")
    print(f"--chaos-seed {seed}")
    run = SharedStore(tmp_path, seed, seconds)
    run.run()
    outcomes = run.auditor.outcomes
    print(dict(sorted(outcomes.items())))
    violations = "\n".join(run.auditor.violations[:20])
    assert not violations, f"seed {seed}, {len(run.auditor.violations)} violations:\n{violations}"
    assert outcomes["commit: answered"] > 5 * seconds
    assert outcomes["lives"] > 2 and outcomes["workers killed"] > seconds / 10
