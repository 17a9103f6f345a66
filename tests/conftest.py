"""What every test shares: start methods, gates, and the check that nothing is left behind."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import multiprocessing
import os
import select
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, Iterator

import pytest

import shares
from gates import Gate

START_METHODS = [
    method
    for method in ("forkserver", "spawn", "fork")
    if method in multiprocessing.get_all_start_methods()
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-seconds", type=float, default=5.0, help="how long tests/chaos rages")
    parser.addoption("--chaos-seed", type=int, default=None, help="replay a storm of tests/chaos")
    parser.addoption("--endurance", type=int, default=1, help="times as much of test_endurance.py")
    parser.addoption("--processes", type=int, default=2, help="how many do a whole run together")
    parser.addoption("--queue", type=int, help="a pipe: take from it which files of tests to run")


def pytest_cmdline_main(config: pytest.Config) -> None:
    """Have part of a whole run done by other processes, where there is a core for it."""
    shares.divide(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out of a whole run on the portable path what takes both paths in any run."""
    if os.environ.get("MINIPOOL_PORTABLE") == "1" and shares.whole(config):
        config.hook.pytest_deselected(items=[item for item in items if _sets_path(item)])
        items[:] = [item for item in items if not _sets_path(item)]


def _sets_path(item: Any) -> bool:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(parameter in ("fast", "portable") for parameter in map(str, parameters))


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    return shares.run(session)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    shares.report(terminalreporter)


def pytest_sessionfinish(session: pytest.Session) -> None:
    shares.join(session)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "logs_errors: the test makes minipool log at ERROR")
    config.addinivalue_line(
        "markers", "impatient: the test times the wait for a worker's last words"
    )
    faulthandler.enable()
    # A shell ignores some in the background, and `nohup` another.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGHUP", "SIGQUIT"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def servers() -> None:
    """Start multiprocessing's own helpers first: they stay, and are nobody's leftovers."""
    forkserver.ensure_running()
    resource_tracker.ensure_running()


@pytest.fixture(params=START_METHODS)
def start_method(request: pytest.FixtureRequest) -> str:
    """Run the test once with each start method."""
    return str(request.param)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A place where worker code stops until the test lets it go on."""
    made = Gate(str(tmp_path / "gate"))
    yield made
    made.close()


_told: set[int] = set()  # processes left by a test that failed for it: the next ones do not


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, caplog: Any) -> Iterator[None]:
    """Fail if the test leaves a process, thread or descriptor, or logged an error."""
    gc.collect()
    gc.freeze()  # what is there now is none of what the test leaves, and need not be looked at
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    gc.collect()
    for thread in set(threading.enumerate()) - threads:
        thread.join(2)
    left = [thread for thread in set(threading.enumerate()) - threads if thread.is_alive()]
    assert not left, f"threads left: {left}"
    found = {pid: name for pid, name in _descendants().items() if pid not in _told}
    processes = {pid: name for pid, name in found.items() if not _gone(pid, 2.0)}
    _told.update(processes)
    assert not processes, f"processes left: {processes}"
    zombies = [pid for pid in _zombies() if pid not in _told]
    _told.update(zombies)
    assert not zombies, f"processes left unreaped: {zombies}"
    opened = {fd: to for fd, to in _descriptors().items() if descriptors.get(fd) != to}
    assert not opened, f"descriptors left: {opened}"
    if not request.node.get_closest_marker("logs_errors"):
        errors = [
            record.getMessage()
            for when in ("setup", "call")
            for record in caplog.get_records(when)
            if record.name.startswith("minipool") and record.levelno >= logging.ERROR
        ]
        assert not errors, f"logged at ERROR: {errors}"


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them is closed by now
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _zombies() -> list[int]:
    """Return the pids of children that have ended and were not reaped; not of helpers.

    Multiprocessing reaps its fork server when the next one is needed.
    """
    server: Any = forkserver._forkserver
    helpers = {server._forkserver_pid} | shares.other_pids()
    found = []
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            for pid in children.read_text().split():
                with contextlib.suppress(OSError):
                    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                    found += [int(pid)] if state == "Z" and int(pid) not in helpers else []
    return found


def _descendants() -> dict[int, str]:
    """Return pid and command of every process below this one, but multiprocessing's own."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            # After every test, for each process there is: not by `Path`, which takes thrice as long.
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb", 0) as file:
                parents[int(entry)] = int(file.read(1024).rpartition(b")")[2].split(None, 2)[1])
    mine = {os.getpid()}
    found: dict[int, str] = {}
    others = shares.other_pids()
    while True:
        new = {pid for pid, parent in parents.items() if parent in mine and pid not in mine}
        new -= others
        if not new:
            return found
        mine |= new
        for pid in new:
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/cmdline").read_text()[:300]
                helper = "resource_tracker" in name or "forkserver import main" in name
                if not (helper and parents[pid] == os.getpid()):
                    found[pid] = name


def _gone(pid: int, timeout: float) -> bool:
    """Wait for the end of a process."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        return bool(select.select([fd], [], [], timeout)[0])
    finally:
        os.close(fd)
