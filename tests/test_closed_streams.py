"""Programs without standard streams: their workers print into nothing, and go on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import scripts

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no such descriptors")

PROGRAM = """
    import os, stat, sys
    from minipool import Pool

    def say(name):
        print("hello " * 100, file=getattr(sys, name), flush=True)
        for fd in (1, 2):
            assert stat.S_ISREG(os.fstat(fd).st_mode) is False, "the table of a pool"
        return os.getpid()

    if __name__ == "__main__":
        told = os.open("told", os.O_WRONLY | os.O_CREAT, 0o600)
        for fd in map(int, sys.argv[2].split(",")):
            os.close(fd)
        with Pool(size=2, start_method=sys.argv[1]) as pool:
            with pool.checkout() as other:
                pids = {pool.call(say, name) for name in ("stdout", "stderr", "stdout")}
                pids.add(other.call(say, "stdout"))
            os.write(told, b"%d %d" % (len(pids), len(pool.workers())))
"""


@pytest.mark.parametrize(
    ("method", "closed", "portable"),
    [
        ("spawn", "1", "1"), ("spawn", "2", "1"), ("spawn", "1,2", "1"), ("fork", "1", "1"),
        ("spawn", "1", "0"), ("fork", "2", "0"),
    ],
)  # fmt: skip
def test_worker_of_a_program_without_standard_streams_prints_into_nothing(
    tmp_path: Path, method: str, closed: str, portable: str
) -> None:
    """The numbers are free in the program, and must not be those of what a worker needs."""
    env = scripts.environment(MINIPOOL_PORTABLE=portable)
    code, _, err = scripts.run(tmp_path, PROGRAM, method, closed, env=env)
    assert (code, (tmp_path / "told").read_text()) == (0, "2 2"), err
