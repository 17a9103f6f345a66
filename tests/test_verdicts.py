"""Whether a call had begun: said once its worker can begin nothing any more."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path
from typing import Any, Iterator

import pytest

from ears import handle_of, wait_until
from minipool import CallTimeout, Pool, WorkerDied
from minipool.engine import handle as handle_module
from minipool.engine.channel import PeerGone
from minipool.engine.process import WorkerProcess

LAST = 20.0


@pytest.fixture(params=["fast", "portable"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool[None]]:
    if request.param == "portable":
        monkeypatch.setenv("MINIPOOL_PORTABLE", "1")
    with Pool(size=1, call_timeout=10.0) as made:
        made.call(int)
        yield made


class Ran:
    """A pipe into which a call writes that it has run."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "ran")
        os.mkfifo(self.path)
        self._fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)

    def wait(self) -> None:
        assert select.select([self._fd], [], [], LAST)[0], "the call did not run"

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def ran(tmp_path: Path) -> Iterator[Ran]:
    made = Ran(tmp_path)
    yield made
    made.close()


def say_it_ran(path: str) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(b"!")
    signal.pause()


def test_timed_out_call_that_begins_before_its_worker_is_dead_had_begun(
    pool: Pool[None], ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not be called safe to make again: it runs between the timeout and the kill."""
    with pool.checkout() as w:
        pid = w.pid or 0

        def begin_late(handle: Any) -> None:
            os.kill(pid, signal.SIGCONT)
            ran.wait()

        monkeypatch.setattr(handle_module.Handle, "_hear_last_words", begin_late)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(CallTimeout) as caught:
            w.options(timeout=0.05).call(say_it_ran, ran.path)
    assert caught.value.started is True
    wait_until(pool, lambda: len(pool.deaths()) == 1)
    assert pool.deaths()[0].started is True


def test_call_that_begins_after_its_pipe_broke_had_begun(
    pool: Pool[None], ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not made again on another worker: it runs between the broken pipe and the kill."""
    with pool.checkout() as w:
        handle = handle_of(pool)
        pid, kill = handle.pid, WorkerProcess.kill

        def break_off(*args: Any) -> Any:
            monkeypatch.setattr(handle.channel, name, wait)
            raise PeerGone

        def begin_late(process: WorkerProcess, *args: Any) -> bool:
            if process is handle.process:
                os.kill(pid, signal.SIGCONT)
                ran.wait()
            return kill(process, *args)

        name = "_poll" if hasattr(handle.channel, "_poll") else "_receive_piece"
        wait = getattr(handle.channel, name)
        monkeypatch.setattr(handle.channel, name, break_off)
        monkeypatch.setattr(WorkerProcess, "kill", begin_late)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerDied, match="its pipe ended, but not its process") as caught:
            w.call(say_it_ran, ran.path)
        monkeypatch.undo()
    assert caught.value.started is True
    assert caught.value.signal == "SIGKILL"


def test_call_that_had_not_begun_at_the_end_of_its_worker_may_be_made_again(
    pool: Pool[None],
) -> None:
    """Killed while it was stopped: nothing has run, and the error says so."""
    with pool.checkout() as w:
        os.kill(w.pid or 0, signal.SIGSTOP)
        with pytest.raises(CallTimeout, match="had not begun") as caught:
            w.options(timeout=0.05).call(os.getpid)
    assert caught.value.started is False


def test_call_whose_worker_does_not_end_in_time_counts_as_begun(
    pool: Pool[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that the kernel keeps from dying may still run it."""
    monkeypatch.setattr(WorkerProcess, "has_ended", lambda process, timeout=0.0: False)
    with pool.checkout() as w:
        os.kill(w.pid or 0, signal.SIGSTOP)
        with pytest.raises(CallTimeout) as caught:
            w.options(timeout=0.05).call(os.getpid)
        monkeypatch.undo()
    assert caught.value.started is True
