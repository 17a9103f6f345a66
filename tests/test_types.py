"""What a type checker sees: results are inferred, wrong arguments are refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SNIPPET = """
from typing import List

from minipool import Lease, Pool, PoolConfig


class Model:
    def __init__(self, path: str) -> None: ...

    def predict(self, x: float, scale: int = 1) -> List[float]: ...


def size_of(data: bytes) -> int: ...


pool = Pool(Model, args=("weights",), size=2)
reveal_type(pool)  # Pool[Model]
with pool.checkout(timeout=2.0) as w:
    reveal_type(w)  # Lease[Model]
    reveal_type(w.call(Model.predict, 1.5))  # list[float]
    reveal_type(w.call(Model.predict, 1.5, scale=2))  # list[float]
    reveal_type(w.call(size_of, b""))  # int
    reveal_type(w.call("predict", "anything"))  # Any
    reveal_type(w.predict("anything"))  # Any
    reveal_type(w.options(timeout=1.0))  # Lease[Model]
    reveal_type(w.options(idempotent=True).call(Model.predict, 1.5))  # list[float]
    w.call(Model.predict, "wrong")  # refused
    w.call(Model.predict)  # refused
    w.call(Model.predict, 1.5, nonsense=2)  # refused
    w.call(size_of, "wrong")  # refused
    w.call(size_of)  # refused
reveal_type(pool.call(Model.predict, 1.5))  # list[float]
reveal_type(pool.call(size_of, b""))  # int
reveal_type(pool.options(timeout=1).call(Model.predict, 1.5))  # list[float]
pool.call(size_of, 5)  # refused
pool.checkout("wrong")  # refused
with Pool("package.module:Class") as named:
    reveal_type(named.call("anything"))  # Any
reveal_type(Pool().checkout().call(size_of, b""))  # int
reveal_type(Pool(config=PoolConfig(size=1)).open())  # Pool[None]
"""


@pytest.mark.slow
def test_calls_are_checked_and_inferred(tmp_path: Path) -> None:
    """Pool[Model] makes w.call(Model.predict, x) know its result and refuse a wrong argument."""
    pytest.importorskip("mypy", reason="mypy is in the dev extra only")
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET)

    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary",
         "--disable-error-code=empty-body", "--follow-imports=silent",
         "--config-file=", f"--cache-dir={tmp_path / 'cache'}", str(snippet)],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip

    said: dict[int, str] = {}
    for number, kind, text in re.findall(r"snippet\.py:(\d+): (\w+): (.*)", done.stdout):
        said.setdefault(int(number), f"{kind}: {text}")
    for number, line in enumerate(SNIPPET.splitlines(), 1):
        expected = line.partition("  # ")[2]
        got = re.sub(r"(minipool|snippet|builtins)\.(\w+\.)*", "", said.pop(number, ""))
        if expected == "refused":
            assert got.startswith("error: "), f"{line!r}: {done.stdout}"
        elif expected:
            assert f'Revealed type is "{expected}"' in got, f"{line!r}: {got!r} {done.stderr}"
        else:
            assert not got.startswith("error"), f"{line!r}: {got!r}"
