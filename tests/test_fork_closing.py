"""A process that is forked while its parent closes something closes nothing a second time."""

from __future__ import annotations

from pathlib import Path

import scripts

CLOSES = """
    import os, sys

    real, parent, forked = os.close, os.getpid(), []
    forks = False

    def close(fd):
        \"\"\"Close it, and have a child forked before anything else is done.\"\"\"
        try:
            real(fd)
        except OSError:
            if os.getpid() != parent:
                os._exit(9)  # nothing has that number now: by chance a file could have it
            raise
        if forks and os.getpid() == parent:
            child = os.fork()
            if child == 0:
                os._exit(0)
            forked.append(fd)
            if os.waitpid(child, 0)[1]:
                print("closed again in a child:", fd, flush=True)

    os.close = close  # before others keep it
    from minipool import Pool
    from workers import Counter

    def main(method):
        global forks
        pool = Pool(Counter, size=2, start_method=method, forward_logs=True)
        with pool:
            assert pool.call("add", 1) == 1
            forks = True
        forks = False
        print(len(forked) >= 8, pool._desk.manager.done)

    if __name__ == "__main__":
        main(sys.argv[1])
"""


def test_child_forked_in_the_midst_of_a_close_closes_nothing_again(
    start_method: str, tmp_path: Path
) -> None:
    """The number may be that of a file of the program's by then."""
    exitcode, out, err = scripts.run(tmp_path, CLOSES, start_method)
    assert (exitcode, out) == (0, "True True\n"), err
