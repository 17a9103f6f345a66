"""Too few descriptors, processes or threads: said at once, with the limit, the need and the remedy."""

from __future__ import annotations

import errno
import gc
import os
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import scripts
from ears import Ear, wait_until
from minipool import ConfigError, Pool, PoolStartError
from minipool.engine import shortage
from minipool.observe.autoscale import Autoscaler
from minipool.observe.optimizer import Decision
from workers import identity

LAST = 20.0


def taken() -> int:
    return len(os.listdir("/proc/self/fd"))


Narrow = Callable[[int], None]


@pytest.fixture
def leave(monkeypatch: pytest.MonkeyPatch) -> Narrow:
    """Have so many descriptors left, as far as the pool is told."""

    def narrow(count: int) -> None:
        limit = taken() + count
        monkeypatch.setattr(shortage, "descriptor_limit", lambda: limit)

    return narrow


# -- descriptors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "need"),
    [
        ({"size": 200}, "200 workers need 827 descriptors (4 each"),
        ({"size": 200, "lazy": True}, "200 workers need 827 descriptors (4 each"),
        ({"size": 198, "spares": 2}, "200 workers need 827 descriptors (4 each"),
        ({"size": 100, "forward_logs": True}, "100 workers need 528 descriptors (5 each"),
        ({"size": 100, "capture_output": True, "forward_logs": True},
         "100 workers need 730 descriptors (7 each"),
        ({"size": 150, "min_size": 1, "max_size": 900}, "150 workers need 627 descriptors"),
    ],
)  # fmt: skip
def test_pool_that_has_too_few_is_refused_before_anything_is_started(
    options: dict[str, Any], need: str, leave: Narrow, start_method: str
) -> None:
    leave(500)
    limit = shortage.descriptor_limit()
    before, threads = taken(), threading.active_count()
    pool = Pool(start_method=start_method, **options)
    ear = Ear(pool, "worker.init", "error", "pool.init")
    with pytest.raises(PoolStartError) as caught:
        pool.open()
    assert need in str(caught.value)
    assert f"may have {limit}; raise the limit of open files (`ulimit -n " in str(caught.value)
    assert not pool.closed
    assert not ear.heard
    assert (taken(), threading.active_count()) == (before, threads)


def test_first_use_that_is_refused_may_be_tried_again(
    leave: Narrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(20)
    pool = Pool(size=2)
    with pytest.raises(PoolStartError, match="2 workers need"):
        pool.call(identity, 1)
    monkeypatch.undo()
    assert pool.call(identity, 1) == 1
    pool.close()


ENOUGH = """
    import os, re, resource, sys
    from minipool import Pool, PoolStartError
    from workers import identity

    if __name__ == "__main__":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard))
        options = {"size": 4, "start_method": sys.argv[1]}
        if sys.argv[2] == "forwards":
            options.update(forward_logs=True, capture_output=True)
        try:
            Pool(**options).open()
        except PoolStartError as error:
            enough = int(re.search(r"`ulimit -n (\\d+)`", str(error)).group(1))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (20, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
        with Pool(**options) as pool:
            assert [pool.call(identity, number) for number in range(9)] == list(range(9))
            stats = pool.stats()
            print(stats.idle + stats.leased, stats.start_failures, stats.workers_lost)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (enough, hard)
        print(enough - 4 * (7 if sys.argv[2] == "forwards" else 4) < 48)
"""


@pytest.mark.parametrize("what", ["forwards", "plain"])
def test_limit_that_the_error_asks_for_is_enough(
    what: str, start_method: str, tmp_path: Path
) -> None:
    """And the limit itself is never changed."""
    code, out, err = scripts.run(tmp_path, ENOUGH, start_method, what)
    assert code == 0, err
    assert out.split() == ["4", "0", "0", "True"], out + err


def test_size_that_has_too_few_is_refused_and_changes_nothing(leave: Narrow) -> None:
    with Pool(size=2, max_overflow=2) as pool:
        leave(60)
        with pytest.raises(ConfigError, match=r"size=50: 48 workers need .*ulimit -n") as caught:
            pool.resize(50)
        assert caught.value.option == "size"
        assert (pool.stats().size, pool.stats().start_failures) == (2, 0)
        pool.resize(4)
        pool.wait_ready(4, timeout=LAST)
        leave(0)
        pool.resize(1)
        wait_until(pool, lambda: pool.stats().workers == 1)


def test_autoscale_that_has_too_few_says_so_and_goes_on(
    leave: Narrow, caplog: pytest.LogCaptureFixture
) -> None:
    with Pool(size=1, min_size=1, max_size=90) as pool:
        scaler = Autoscaler(pool)
        leave(30)
        scaler._carry_out(Decision(80, None, "much to do"))
        assert "is not resized: size=80: 79 workers need" in caplog.text
        assert pool.stats().size == 1


GROWTH = """
    import resource, sys, threading
    from ears import Ear, wait_until
    from gates import Gate
    from minipool import Pool
    from pathlib import Path
    from workers import identity

    if __name__ == "__main__":
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        method, folder = sys.argv[1:]
        with Pool(size=1, max_size=100, start_method=method, checkout_timeout=60) as pool:
            import os
            ear = Ear(pool, "error", "breaker.changed")
            limit = max(map(int, os.listdir("/proc/self/fd"))) + 1 + 30
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            held, gate = [], threading.Event()
            def hold():
                with pool.checkout() as w:
                    held.append(w.pid)
                    gate.wait(50)
                    w.call(identity, 1)
            threads = [threading.Thread(target=hold) for _ in range(20)]
            for thread in threads:
                thread.start()
            ear.wait("error", 1)
            (error,) = {str(event.metadata["error"]) for event in ear.heard[:1]}
            print("ulimit -n" in error, "Errno" in error)
            gate.set()
            for thread in threads:
                thread.join()
            stats = pool.stats()
            print(len(held), len(set(held)) > 1, stats.workers_lost, stats.breaker)
"""


def test_growth_ends_where_descriptors_do_and_nobody_is_lost(
    start_method: str, tmp_path: Path
) -> None:
    code, out, err = scripts.run(tmp_path, GROWTH, start_method, str(tmp_path), timeout=60)
    assert code == 0, err
    assert out.splitlines() == ["True False", "20 True 0 closed"], out + err


# -- processes -----------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group that limits how many processes there may be in it."""
    for place in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")):
        made = place / f"minipool-pids-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            if (made / "pids.max").exists():
                yield made
                return
        finally:
            scripts.wait_gone(*map(int, (made / "cgroup.procs").read_text().split()))
            made.rmdir()
    pytest.skip("no control group can be made here")


FULL = """
    import os, sys
    from ears import Ear, wait_until
    from minipool import Pool, PoolStartError
    from workers import identity

    def limit(most):
        with open(os.path.join(group, "pids.max"), "w") as file:
            file.write(str(most))

    def count():
        with open(os.path.join(group, "pids.current")) as file:
            return int(file.read())

    if __name__ == "__main__":
        method, group = sys.argv[1:]
        with open(os.path.join(group, "cgroup.procs"), "w") as file:
            file.write(str(os.getpid()))
        with Pool(size=1, start_method=method, breaker=False) as pool:
            ear = Ear(pool, "error")
            pool.call(identity, 1)
            limit(count())
            pool.resize(2)
            ear.wait("error", 1)
            print(ear.heard[0].metadata["error"])
            assert pool.call(identity, 2) == 2
            limit(count() + 1)  # the manager of another pool, and none of its workers
            try:
                Pool(size=1, start_method=method, breaker=False, init_timeout=20).open()
            except PoolStartError as error:
                print(error)
            limit("max")
            pool.wait_ready(2, timeout=20)
            print("recovered")
"""


def test_no_more_processes_is_said_in_words(start_method: str, group: Path, tmp_path: Path) -> None:
    """Neither an errno nor the end of a pipe: how many there are, and how many there may be."""
    code, out, err = scripts.run(tmp_path, FULL, start_method, str(group), timeout=60)
    assert code == 0, err
    grown, opened, recovered = out.splitlines()
    assert recovered == "recovered"
    for told in (grown, opened):
        assert "may have" in told and "`pids.max`" in told, out
        assert "EOFError" not in told and "Errno" not in told, out


# -- threads -------------------------------------------------------------------------------------

THREADED: list[dict[str, Any]] = [
    {},
    {"forward_logs": True, "capture_output": True},
    {"session_store": "sessions.db"},
]


@pytest.mark.parametrize("options", THREADED, ids=["plain", "forwarding", "store"])
def test_pool_without_a_thread_is_refused_and_keeps_nothing(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever thread it is that cannot be started."""
    if "session_store" in options:
        options = {"session_store": tmp_path / "sessions.db"}
    start, left = threading.Thread.start, [0]

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("minipool"):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("can't start new thread")
        start(thread)

    refused = 0
    for allowed in range(12):
        gc.collect()
        before = taken()
        left[0] = allowed
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", limited)
            pool = Pool(size=1, init_timeout=LAST, **options)
            try:
                pool.open()
            except PoolStartError as error:
                refused += 1
                assert "can't start new thread" in str(error)
                assert "`ulimit -u`" in str(error) and "`pids.max`" in str(error)
                assert isinstance(error.__cause__, RuntimeError)
                del error
            pool.close()
        del pool
        gc.collect()
        assert taken() <= before
        if left[0] > 0:
            break
    assert refused > 0


# -- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (OSError(errno.EMFILE, "x"), r"this process has \d+ and may have \d+ \(`ulimit -n`\)"),
        (OSError(errno.ENFILE, "x"), "fs.file-max"),
        (OSError(errno.EAGAIN, "x"), "no process can be forked; "),
        (EOFError("unexpected EOF"), "the fork server ended .* where it could not fork: "),
        (ConnectionResetError(104, "x"), "the fork server ended"),
        (FileNotFoundError(2, "No such file or directory", "/tmp/pymp-x/listener-y"),
         "cannot be reached at '/tmp/pymp-x/listener-y': No such file"),
        (PermissionError(13, "Permission denied"), "as a process was being started"),
        (ValueError("other"), "^ValueError: other$"),
    ],
)  # fmt: skip
def test_what_keeps_a_process_from_being_started_is_said(problem: Exception, words: str) -> None:
    import re

    assert re.search(words, shortage.in_words(problem))
