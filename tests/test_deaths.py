"""Deaths: what a killed, hung or babbling worker costs its caller, and what it does not."""

from __future__ import annotations

import os
import re
import select
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import rogues
from ears import Ear, handle_of
from gates import Gate
from minipool import (
    CallTimeout,
    CheckoutTimeout,
    Pool,
    ProtocolError,
    WorkerDied,
    WorkerError,
)
from minipool.engine import desk as desk_module
from rogues import Stateful

LAST = 20.0


@pytest.fixture
def pool() -> Iterator[Pool[Stateful]]:
    with Pool(Stateful, size=2, checkout_timeout=LAST, close_timeout=5.0) as made:
        yield made


def run(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def kill(pid: int | None, signum: int = signal.SIGKILL) -> None:
    assert pid is not None
    os.kill(pid, signum)


def kill_and_wait(pid: int | None) -> None:
    """Kill a process and wait until it is dead (its parent need not know yet)."""
    assert pid is not None
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([fd], [], [], LAST)[0]
    finally:
        os.close(fd)


def kill_once_sent(pool: Pool[Any], worker_id: int) -> None:
    """Have the next call of a stopped worker find it killed just after the request was written."""
    handle = handle_of(pool, worker_id)
    channel = handle.channel
    name = "_poll" if hasattr(channel, "_poll") else "_receive"
    receive = getattr(channel, name)
    kill(handle.pid, signal.SIGSTOP)

    def killing(*args: Any) -> Any:
        kill(handle.pid)
        return receive(*args)

    setattr(channel, name, killing)


# -- idle ----------------------------------------------------------------------------------------


def test_idle_worker_that_was_killed_is_replaced(start_method: str) -> None:
    """The next checkout gets a new worker, and nobody sees an error."""
    with Pool(Stateful, size=1, start_method=start_method, checkout_timeout=LAST) as pool:
        ear = Ear(pool, "worker.terminate", "worker.init")
        pid = pool.workers()[0].pid
        kill(pid)

        dead = ear.wait("worker.terminate")
        assert (dead.metadata["pid"], dead.metadata["exitcode"]) == (pid, -signal.SIGKILL)
        ear.wait("worker.init")
        with pool.checkout(timeout=LAST) as w:
            assert w.pid != pid
            assert w.call("add", 1) == 1
        stats = pool.stats()
        assert (stats.workers, stats.workers_lost, stats.faults) == (1, 1, 0)


def test_death_a_moment_before_checkout_and_call_is_not_seen(pool: Pool[Stateful]) -> None:
    """Killed without a pause before the call: the call runs on another worker by itself."""
    for number in range(10):
        kill_and_wait(next(info.pid for info in pool.workers() if info.state == "idle"))
        assert pool.options(timeout=LAST).call(rogues.double, number) == 2 * number


def test_death_between_claim_and_first_call_is_not_seen(pool: Pool[Stateful]) -> None:
    """Leased, killed, then called for the first time: another worker does it, in this lease."""
    with pool.checkout() as w:
        pid = w.pid
        kill_and_wait(pid)
        assert w.call("add", 3) == 3
        assert w.pid != pid
        assert w.call("get") == 3, "and the lease goes on with that worker"


def test_death_between_two_calls_of_a_lease_is_told(pool: Pool[Stateful]) -> None:
    """What the first call left in the worker is gone, so the caller must know."""
    with pool.checkout() as w:
        pid, worker_id = w.pid, w.worker_id
        w.call("add", 3)
        kill_and_wait(pid)
        with pytest.raises(WorkerDied, match="had not begun") as caught:
            w.call("get")

    died = caught.value
    assert (died.started, died.pid, died.worker_id) == (False, pid, worker_id)
    assert (died.exitcode, died.signal, died.target) == (-9, "SIGKILL", "get")
    with pool.checkout() as w:
        assert w.pid != pid


def test_second_lease_of_a_worker_begins_anew(pool: Pool[Stateful]) -> None:
    """Calls of earlier leases do not make the first call of this one a later one."""
    for _ in range(3):
        pool.call("add", 1)
    with pool.checkout() as w:
        pid = w.pid
        kill_and_wait(pid)
        assert w.call(rogues.double, 4) == 8
        assert w.pid != pid


# -- busy ----------------------------------------------------------------------------------------


def test_death_in_mid_call_is_told_at_once(start_method: str, gate: Gate) -> None:
    """With exit code and signal, and long before the timeout of the call."""
    with Pool(Stateful, size=2, start_method=start_method, checkout_timeout=LAST) as pool:
        with pool.checkout() as w:
            pid = w.pid
            killer = run(lambda: (gate.wait_arrived(), kill(pid)))
            start = time.monotonic()
            with pytest.raises(WorkerDied, match="by SIGKILL during 'wait_at'") as caught:
                w.options(timeout=None).call("wait_at", gate.path)
            assert time.monotonic() - start < LAST / 2
            killer.join(LAST)

        died = caught.value
        assert (died.exitcode, died.signal, died.started) == (-9, "SIGKILL", True)
        assert (died.pid, died.target) == (pid, "wait_at")
        assert "retry only if it may run twice" in str(died)
        assert pool.call("add", 1) == 1
        assert pool.stats().faults == 1


@pytest.mark.parametrize(
    ("target", "args", "name"),
    [
        (rogues.kill_self, (signal.SIGKILL,), "SIGKILL"),
        (rogues.kill_self, (signal.SIGHUP,), "SIGHUP"),
        (rogues.kill_self, (signal.SIGABRT,), "SIGABRT"),
        (rogues.segfault, (), "SIGSEGV"),
    ],
)
def test_signal_that_ended_the_worker_is_named(
    pool: Pool[Stateful], target: Any, args: tuple[Any, ...], name: str
) -> None:
    with pytest.raises(WorkerDied, match=name) as caught:
        pool.call(target, *args)

    assert caught.value.signal == name
    assert caught.value.exitcode == -signal.Signals[name]
    assert caught.value.started


def test_sigint_does_not_reach_workers(pool: Pool[Stateful], gate: Gate) -> None:
    """Ctrl-C goes to the whole terminal; a worker leaves it to its parent."""
    with pool.checkout() as w:
        caller = run(lambda: (gate.wait_arrived(), kill(w.pid, signal.SIGINT), gate.open()))
        assert w.call("wait_at", gate.path) == w.pid
        caller.join(LAST)


# -- calls that had not begun --------------------------------------------------------------------


def test_first_call_that_had_not_begun_runs_elsewhere(pool: Pool[Stateful]) -> None:
    """Sent, but not begun when the worker died: nobody sees it, within the same lease."""
    with pool.checkout() as w:
        pid = w.pid
        kill_once_sent(pool, w.worker_id)
        assert w.call("add", 5) == 5
        assert w.pid != pid
        assert w.call("get") == 5


def test_later_call_that_had_not_begun_is_told(pool: Pool[Stateful]) -> None:
    with pool.checkout() as w:
        w.call("add", 5)
        kill_once_sent(pool, w.worker_id)
        with pytest.raises(WorkerDied, match="it may be made again") as caught:
            w.call("add", 5)
    assert caught.value.started is False


def test_call_that_runs_elsewhere_may_have_to_wait_for_the_new_worker() -> None:
    """In a pool of one it is the replacement that runs it."""
    with Pool(Stateful, size=1) as pool, pool.checkout() as w:
        kill_once_sent(pool, 0)
        assert w.options(timeout=LAST).call("add", 5) == 5
        assert w.generation > 1


def test_call_that_runs_elsewhere_keeps_its_one_deadline(pool: Pool[Stateful]) -> None:
    """The second worker does not get the whole time again."""
    with pool.checkout() as w:
        kill_once_sent(pool, w.worker_id)
        for info in pool.workers():
            if info.pid != w.pid:
                kill(info.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(CallTimeout) as caught:
            w.options(timeout=0.5).call("add", 5)
        assert time.monotonic() - start < LAST / 2
    assert caught.value.timeout < 0.5
    assert caught.value.started is False


def test_call_that_runs_elsewhere_gives_up_at_its_deadline(monkeypatch: Any) -> None:
    """When no other worker comes, the caller is told in time and holds nothing."""
    with Pool(Stateful, size=1) as pool:
        with monkeypatch.context() as patch, pool.checkout() as w:
            kill_once_sent(pool, 0)
            patch.setattr(handle_of(pool).__class__, "start", _refuse_to_start)
            start = time.monotonic()
            with pytest.raises((CheckoutTimeout, WorkerDied)):
                w.options(timeout=0.3).call("add", 5)
            assert time.monotonic() - start < LAST / 2
        with pool.checkout(timeout=LAST) as w:
            assert w.call("add", 1) == 1


def _refuse_to_start(*args: Any) -> None:
    raise OSError("no more processes")


# -- idempotent ----------------------------------------------------------------------------------


def test_idempotent_call_runs_again_when_its_worker_died(
    pool: Pool[Stateful], tmp_path: Path
) -> None:
    """Marked as such, a call that had begun is made again on another worker."""
    there = tmp_path / "there"

    with pool.checkout() as w:
        pid = w.pid
        assert w.options(idempotent=True).call("die_unless_there", str(there)) == w.pid != pid
    assert there.read_text() == "xx"
    assert pool.options(idempotent=True).call("die_unless_there", str(there))


def test_other_calls_never_run_twice(pool: Pool[Stateful], tmp_path: Path) -> None:
    there = tmp_path / "there"

    with pytest.raises(WorkerDied) as caught:
        pool.call("die_unless_there", str(there))

    assert caught.value.started
    assert there.read_text() == "x"


def test_idempotent_call_that_is_not_the_first_is_told(
    pool: Pool[Stateful], tmp_path: Path
) -> None:
    """Another worker would not have what the first call left."""
    there = tmp_path / "there"

    with pool.checkout() as w:
        w.call("add", 1)
        with pytest.raises(WorkerDied):
            w.options(idempotent=True).call("die_unless_there", str(there))
    assert there.read_text() == "x"


def test_idempotent_call_ends_at_its_deadline(pool: Pool[Stateful]) -> None:
    """A call that kills every worker is not made for ever."""
    start = time.monotonic()

    with pytest.raises((WorkerError, CheckoutTimeout)):
        pool.options(timeout=0.5, idempotent=True).call(rogues.kill_self)

    assert time.monotonic() - start < LAST / 2


def test_idempotent_call_that_raises_is_not_made_again(pool: Pool[Stateful]) -> None:
    """An exception of the user's is a result; so is a timeout of the call."""
    with pool.checkout() as w:
        with pytest.raises(rogues.PlainError):
            w.options(idempotent=True).call("raise_it", "PlainError")
        assert w.call("get") == 1


# -- timeouts ------------------------------------------------------------------------------------


def test_timeout_is_told_in_few_digits_and_by_the_names_of_its_sources(gate: Gate) -> None:
    """What is left of a time for checkout and call together has the digits of a subtraction."""
    with Pool(Stateful, size=1) as pool:
        with pytest.raises(CallTimeout) as caught:
            pool.options(timeout=0.2).call("wait_at", gate.path)
    assert re.search(r"within 0\.\d{1,7} s on", str(caught.value)), caught.value
    assert "`call_timeout`, or that of `options()`" in str(caught.value)


def test_call_timeout_kills_only_the_culprit(gate: Gate) -> None:
    """The neighbours keep their processes and their state."""
    with Pool(Stateful, size=3, checkout_timeout=LAST) as pool:
        neighbours = [pool.checkout() for _ in range(2)]
        for number, w in enumerate(neighbours):
            w.call("add", number + 1)
        pids = [w.pid for w in neighbours]
        with pool.checkout() as w:
            culprit = w.pid
            assert culprit is not None
            fd = os.pidfd_open(culprit)
            start = time.monotonic()
            with pytest.raises(CallTimeout, match=r"did not end within 0\.2 s") as caught:
                w.options(timeout=0.2).call("wait_at", gate.path)
            took = time.monotonic() - start

        late = caught.value
        assert isinstance(late, TimeoutError)
        assert 0.2 <= took < LAST / 2
        assert (late.timeout, late.started, late.target) == (0.2, True, "wait_at")
        assert late.pid == culprit
        assert select.select([fd], [], [], LAST)[0], "the culprit is dead"
        os.close(fd)
        assert [w.pid for w in neighbours] == pids
        assert [w.call("get") for w in neighbours] == [1, 2]
        for w in neighbours:
            w.release()


def test_timeout_of_a_call_that_had_not_begun_says_so(pool: Pool[Stateful]) -> None:
    with pool.checkout() as w:
        kill(w.pid, signal.SIGSTOP)
        with pytest.raises(CallTimeout, match="had not begun") as caught:
            w.options(timeout=0.1).call("add", 1)
    assert caught.value.started is False


def test_timeout_of_a_stopped_worker_in_mid_argument(pool: Pool[Stateful]) -> None:
    """The deadline holds while a large argument is being written."""
    with pool.checkout() as w:
        kill(w.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(CallTimeout):
            w.options(timeout=0.2).call(rogues.size_of, bytes(50_000_000))
        assert time.monotonic() - start < LAST / 2
    assert pool.call("get") == 0


def test_late_reply_never_reaches_another(gate: Gate) -> None:
    """A call is given up and its gate opened then: no later call gets its result."""
    with Pool(Stateful, size=1, checkout_timeout=LAST) as pool:
        for number in range(3):
            with pytest.raises(CallTimeout):
                pool.options(timeout=0.1).call(rogues.stand_and_return, gate.path, "late")
            for value in range(10):
                assert pool.call(rogues.double, value) == 2 * value
            assert pool.stats().faults == number + 1
        gate.open(3)
        assert pool.call(rogues.double, "mine") == "minemine"


def test_timeout_of_the_pool_holds_for_calls(gate: Gate) -> None:
    """call_timeout is the default; options() overrides it both ways."""
    with Pool(Stateful, size=1, call_timeout=0.1, checkout_timeout=LAST) as pool:
        with pytest.raises(CallTimeout) as caught:
            pool.call("wait_at", gate.path)
        assert caught.value.timeout == 0.1

        with pool.checkout() as w:
            opener = run(lambda: (gate.wait_arrived(2), gate.open()))
            assert w.options(timeout=LAST).call("wait_at", gate.path) == w.pid
            opener.join(LAST)


# -- babble --------------------------------------------------------------------------------------


def test_stray_bytes_on_an_idle_pipe_are_seen_at_checkout(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is replaced, the caller gets another one and sees no error."""
    monkeypatch.setattr(desk_module, "_TRUSTED_NS", 0)
    with Pool(Stateful, size=1, checkout_timeout=LAST) as pool:
        with pool.checkout() as w:
            pid = w.pid
            w.call(rogues.write_to_pipe_later, gate.path)
        gate.wait_arrived()
        gate.open()
        gate.wait_arrived()  # it has written

        with pool.checkout() as w:
            assert w.pid != pid
            assert w.call("add", 1) == 1
        assert pool.stats().faults == 0


def test_stray_bytes_in_a_call_are_a_protocol_error(pool: Pool[Stateful]) -> None:
    """The reply cannot be trusted any more: the worker is killed, the next one is well."""
    with pool.checkout() as w:
        pid = w.pid
        with pytest.raises(ProtocolError, match="descriptors that are not its own") as caught:
            w.call(rogues.write_to_pipe)
        assert caught.value.pid == pid

    for number in range(5):
        assert pool.call(rogues.double, number) == 2 * number


def test_code_that_closes_the_pipe_is_a_death(pool: Pool[Stateful]) -> None:
    with pool.checkout() as w:
        with pytest.raises(WorkerDied) as caught:
            w.options(timeout=LAST).call(rogues.close_pipe)
    assert caught.value.started

    assert pool.call("get") == 0


# -- many ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_callers_under_constant_killing_get_their_own_answers() -> None:
    """Workers are killed at random while threads call: each answer is right or WorkerDied."""
    with Pool(Stateful, size=4, checkout_timeout=60, health_check_interval=None) as pool:
        stop = threading.Event()
        wrong: list[Any] = []
        right = []

        def call(seed: int) -> None:
            number = seed * 1_000_000
            while not stop.is_set():
                number += 1
                try:
                    if pool.call(rogues.double, number) != 2 * number:
                        wrong.append(number)
                    right.append(number)
                except WorkerDied as died:
                    if died.signal != "SIGKILL" or not died.started:
                        wrong.append(died)
                except Exception as error:
                    wrong.append(error)

        threads = [run(lambda seed=seed: call(seed)) for seed in range(8)]  # type: ignore[misc]
        ear = Ear(pool, "recovery")
        for number in range(15):
            pids = [info.pid for info in pool.workers() if info.state in ("idle", "leased")]
            if pids:
                os.kill(pids[number % len(pids)] or 0, signal.SIGKILL)
            ear.wait("recovery", number + 1)
        stop.set()
        for thread in threads:
            thread.join(LAST)

        assert not wrong
        assert len(right) > 100
        assert pool.stats().workers == 4
