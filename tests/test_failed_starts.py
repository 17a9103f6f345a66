"""Starts that fail before there is a worker: the parent is told why, and nothing of them is left."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import tempfile
import types
from multiprocessing import process, util
from pathlib import Path
from typing import Any, NoReturn

import pytest

import scripts
from minipool import Pool, PoolStartError, RemoteError
from minipool.engine import care, child, table

LIMIT = 1 << 40


def refuse_memory(*args: Any) -> NoReturn:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a limit of the address space, as far as a pool is told."""
    ask = resource.getrlimit

    def getrlimit(kind: int) -> tuple[int, int]:
        return (LIMIT, LIMIT) if kind == resource.RLIMIT_AS else ask(kind)

    monkeypatch.setattr(resource, "getrlimit", getrlimit)


def why_not_opened(**options: Any) -> str:
    pool = Pool(size=1, **options)
    with pytest.raises(PoolStartError) as caught:
        pool.open()
    return str(caught.value)


@pytest.mark.parametrize("path", ["", "1"], ids=["fast", "portable"])
@pytest.mark.parametrize(
    "step", ["keep_standard_streams", "die_with_parent", "_row", "_show_in_ps"]
)
def test_step_that_fails_before_the_worker_is_there_is_told_by_it(
    step: str, path: str, limited: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked worker imports no main module, so no guard can be missing."""
    monkeypatch.setenv("MINIPOOL_PORTABLE", path)
    monkeypatch.setattr(child, step, refuse_memory)
    told = why_not_opened(start_method="fork")
    assert "worker 0 did not start: OSError: [Errno 12] Cannot allocate memory" in told
    assert f"{LIMIT >> 10} KiB of address space (`ulimit -v`): raise that limit" in told
    assert "guard" not in told and "code" not in told


NOT_NICER = """
    import sys
    from minipool import Pool, PoolStartError

    if __name__ == "__main__":
        try:
            Pool(size=1, start_method=sys.argv[1], niceness=3).open()
        except PoolStartError as error:
            print(error)
"""


def test_every_start_method_tells_it(start_method: str, tmp_path: Path) -> None:
    custom = (
        "import os\ndef nice(by):\n    raise PermissionError(by, 'not nicer')\nos.nice = nice\n"
    )
    (tmp_path / "sitecustomize.py").write_text(custom)
    env = scripts.environment(first_path=str(tmp_path))
    code, out, err = scripts.run(tmp_path, NOT_NICER, start_method, env=env)
    assert (code, err) == (0, "")
    assert "worker 0 did not start: PermissionError: [Errno 3] not nicer" in out


class Refuses:
    def __init__(self) -> None:
        raise MemoryError("no room")


def test_reason_is_told_where_there_is_no_thread_to_unpickle_it_in(
    limited: None, start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its words; no code of anybody's runs for that."""

    def thread(**options: Any) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(care, "threading", types.SimpleNamespace(Thread=thread))
    pool: Pool[Any] = Pool(Refuses, size=1, start_method=start_method)
    with pytest.raises(PoolStartError, match=r"no room.*`ulimit -v`") as caught:
        pool.open()
    cause = caught.value.__cause__
    assert isinstance(cause, RemoteError) and cause.type_name == "MemoryError"


def descriptors() -> dict[str, str]:
    """Return what is open, by number."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of this very list
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("step", ["a process", "the table"])
def test_pool_that_could_not_be_opened_holds_no_descriptor(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the error, whose traceback leads to what was made until then."""
    Pool(size=1, start_method="spawn").open().terminate()  # what multiprocessing keeps is there
    before = descriptors()
    if step == "a process":
        monkeypatch.setattr(util, "spawnv_passfds", refuse_memory)
    else:
        monkeypatch.setattr(table, "_make", refuse_memory)
    pool = Pool(size=2, start_method="spawn")
    with pytest.raises(PoolStartError, match="Cannot allocate memory"):
        pool.open()
    assert descriptors() == before


def test_fork_server_that_has_no_place_for_its_socket_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gettempdir() -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", gettempdir)
    monkeypatch.delitem(process.current_process()._config, "tempdir", raising=False)  # type: ignore[attr-defined]
    told = why_not_opened(start_method="forkserver")
    assert "TMPDIR" in told and 'start_method="spawn"' in told and "code" not in told
    assert Pool(size=1).open().terminate() is None
