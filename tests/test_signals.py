"""Ctrl-C, SIGTERM, and handlers that use the pool wherever they come."""

from __future__ import annotations

import itertools
import os
import pty
import select
import signal
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

import scripts
from gates import Gate, pass_gate
from minipool import Pool, PoolError
from minipool.signals import SignalHandlers
from rogues import Stateful
from scripts import wait_gone

SOON = 3.0  # seconds; a second is what is promised, by a machine that does nothing else

INTERRUPTED = """
    import os, sys, threading
    os.open(sys.argv[4], os.O_RDWR)  # the terminal of this session from now on
    from gates import pass_gate
    from minipool import MinipoolError, Pool
    from troublemakers import StopsAtGateInInit, busy_in_c, busy_in_python
    from workers import getpid

    def quietly(f, *args):
        try:
            f(*args)
        except MinipoolError:
            pass

    def use(pool, state, gate):
        if state == "idle":
            print(*(info.pid for info in pool.workers()), flush=True)
            threading.Event().wait()
        elif state in ("python", "c"):
            print(*(info.pid for info in pool.workers()), flush=True)
            pool.call(busy_in_python if state == "python" else busy_in_c, gate)
        else:
            for _ in range(2):
                threading.Thread(target=quietly, args=(pool.call, pass_gate, gate), daemon=True).start()
            print(*(info.pid for info in pool.workers()), flush=True)
            pool.checkout(timeout=None)

    def main(method, state, gate, terminal, how):
        worker = StopsAtGateInInit if state == "opening" else None
        pool = Pool(worker, args=(gate,) if worker else (), size=2, start_method=method,
                    call_timeout=None, max_waiting=5)
        if how == "with":
            with pool:
                use(pool, state, gate)
        else:
            globals()["pool"] = pool.open()
            use(pool, state, gate)

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


@pytest.fixture
def terminal() -> Iterator[tuple[int, str]]:
    """A terminal: the end where one types, and the name of the other."""
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    yield ours, name
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("how", ["with", "exit"])
@pytest.mark.parametrize("state", ["idle", "python", "c", "waiting", "opening"])
def test_one_ctrl_c_is_one_clean_keyboard_interrupt(
    start_method: str, state: str, how: str, gate: Gate, terminal: tuple[int, str], tmp_path: Path
) -> None:
    """Typed at a real terminal: one traceback, of the program's own; and nobody is left."""
    keys, name = terminal
    process = scripts.start(tmp_path, INTERRUPTED, start_method, state, gate.path, name, how)
    assert process.stdout is not None
    pids: list[int] = []
    if state != "opening":
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
    if state != "idle":
        gate.wait_arrived(1 if state in ("python", "c") else 2)
    typed = time.monotonic()
    os.write(keys, b"\x03")
    code, out, err = scripts.finish(process)
    took = time.monotonic() - typed
    assert (code, out) == (-signal.SIGINT, ""), err
    assert err.count("Traceback (most recent call last)") == 1, err
    assert err.rstrip().endswith("KeyboardInterrupt"), err
    assert took < SOON, f"{took:.2f} s"
    wait_gone(*pids)


# -- SIGTERM ---------------------------------------------------------------------------------------

TERMINATED = """
    import os, signal, sys, threading
    from gates import pass_gate
    from minipool import Pool, PoolClosed

    def former(signum, frame):
        print("former", pool.closed, pool.stats().workers, flush=True)
        if wants == "exit":
            sys.exit(7)

    if __name__ == "__main__":
        method, gate, wants = sys.argv[1:]
        if wants == "ignored":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif wants != "default":
            signal.signal(signal.SIGTERM, former)
        before = signal.getsignal(signal.SIGTERM)
        with Pool(size=2, start_method=method, call_timeout=None) as pool:
            pool.install_signal_handlers()
            assert signal.getsignal(signal.SIGTERM) is not before
            print(*(info.pid for info in pool.workers()), flush=True)
            if wants != "close":
                with pool.checkout() as w:
                    print("answered", w.call(pass_gate, gate) > 0, flush=True)
                    try:
                        pool.call(os.getpid)
                    except PoolClosed:
                        print("refused", flush=True)
                if wants in ("default", "exit"):
                    threading.Event().wait()
        assert signal.getsignal(signal.SIGTERM) == before
        print("restored", flush=True)
"""


@pytest.mark.parametrize(
    ("wants", "code", "said"),
    [
        ("default", -signal.SIGTERM, []),
        ("exit", 7, ["former True 0"]),
        ("ignored", 0, ["restored"]),
        ("function", 0, ["former True 0", "restored"]),
    ],
)
def test_sigterm_lets_calls_end_and_then_has_its_former_course(
    start_method: str, wants: str, code: int, said: list[str], gate: Gate, tmp_path: Path
) -> None:
    """The call that runs is answered, new ones are refused, and no worker is left by then."""
    process = scripts.start(tmp_path, TERMINATED, start_method, gate.path, wants)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    gate.wait_arrived()
    process.terminate()
    gate.open()
    got, out, err = scripts.finish(process)
    assert (got, err) == (code, "")
    lines = out.splitlines()
    assert lines[:2] == ["answered True", "refused"]
    assert sorted(lines[2:]) == sorted(said)
    wait_gone(*pids)


def test_second_sigterm_waits_for_no_lease(gate: Gate, tmp_path: Path) -> None:
    process = scripts.start(tmp_path, TERMINATED, "forkserver", gate.path, "default")
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    gate.wait_arrived()
    watches = [os.pidfd_open(pid) for pid in pids]
    process.terminate()
    assert len(select.select(watches, [], [], 20)[0]) == 1, "the idle one ends, the busy one not"
    start = time.monotonic()
    process.terminate()
    code, _, _ = scripts.finish(process)
    assert code != 0
    assert time.monotonic() - start < SOON, "close_timeout is 30 s"
    wait_gone(*pids)
    for watch in watches:
        os.close(watch)


def test_handlers_are_restored_by_close(gate: Gate, tmp_path: Path) -> None:
    code, out, err = scripts.run(tmp_path, TERMINATED, "forkserver", gate.path, "close")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == ["restored"]


@pytest.fixture
def former() -> Iterator[list[int]]:
    """Signals that came through to who handled SIGUSR2 before."""
    came: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: came.append(signum))
    yield came
    signal.signal(signal.SIGUSR2, before)


def _signal() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)


def test_handlers_make_way_when_another_thread_has_closed_the_pool(former: list[int]) -> None:
    with Pool(size=1) as pool:
        pool.install_signal_handlers(signal.SIGUSR2)
        closer = threading.Thread(target=pool.close)
        closer.start()
        closer.join(20)
        _signal()
        assert former == [signal.SIGUSR2]


def test_handlers_of_a_pool_that_never_opened_make_way(former: list[int]) -> None:
    pool = Pool(size=1)
    pool.install_signal_handlers(signal.SIGUSR2)
    _signal()
    assert former == [signal.SIGUSR2]
    assert pool.closed


def test_handlers_keep_no_forgotten_pool(former: list[int]) -> None:
    pool = Pool(size=1)
    pool.install_signal_handlers(signal.SIGUSR2)
    del pool
    _signal()
    assert former == [signal.SIGUSR2]


def test_handlers_of_two_pools_end_both(former: list[int]) -> None:
    with Pool(size=1) as one, Pool(size=1) as two:
        one.install_signal_handlers(signal.SIGUSR2)
        two.install_signal_handlers(signal.SIGUSR2)
        two.install_signal_handlers(signal.SIGUSR2)  # once more is as good as once
        _signal()
        for pool in (two, one):
            desk = pool._desk
            assert desk is not None and desk.manager.wait_done(20)
    assert former == [signal.SIGUSR2]


@pytest.mark.parametrize("when", ["before it is asked", "as it is asked", "afterwards"])
def test_signal_is_passed_on_once_whenever_the_pool_ends(former: list[int], when: str) -> None:
    """The end may be told of at any moment; what comes later finds nothing to do here."""

    def ask(at_once: bool) -> bool:
        if when == "as it is asked":
            handlers.ended()
        return True

    handlers = SignalHandlers(lambda: ask, (signal.SIGUSR2,))
    handlers.install()
    if when == "before it is asked":
        handlers.ended()
    _signal()
    if when == "afterwards":
        handlers.ended()
    assert former == [signal.SIGUSR2]
    handlers(signal.SIGUSR2, None)
    assert former == [signal.SIGUSR2] * 2


def test_only_the_main_thread_installs_handlers() -> None:
    problems: list[Any] = []

    def install() -> None:
        try:
            pool.install_signal_handlers()
        except RuntimeError as problem:
            problems.append(problem)

    pool = Pool(size=1)
    thread = threading.Thread(target=install)
    thread.start()
    thread.join(20)
    assert len(problems) == 1


# -- handlers that use the pool --------------------------------------------------------------------


class Storm:
    """Signals the main thread again and again, each time as soon as the last was handled."""

    def __init__(self, use: Any) -> None:
        self.use, self.handled = use, 0
        self._ready, self._over = threading.Semaphore(0), False
        self._before = signal.signal(signal.SIGUSR1, self._handle)
        self._thread = threading.Thread(target=self._send)

    def _handle(self, signum: int, frame: Any) -> None:
        try:
            self.use(self.handled)
        finally:
            self.handled += 1
            self._ready.release()

    def _send(self) -> None:
        while not self._over:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            assert self._ready.acquire(timeout=20), "a handler hangs"

    def __enter__(self) -> Storm:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over = True
        self._ready.release()
        self._thread.join(20)
        signal.signal(signal.SIGUSR1, self._before)


@pytest.mark.parametrize("path", ["fast", "portable"])
@pytest.mark.parametrize("size", [1, 2])
def test_handlers_that_use_the_pool_cannot_deadlock_it(
    size: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come in every step of checkouts, calls, sessions and reports, and do the same."""
    if path == "portable":
        monkeypatch.setenv("MINIPOOL_PORTABLE", "1")
    with Pool(Stateful, size=size, checkout_timeout=20, close_timeout=1) as pool:
        done: list[int] = []

        def use(number: int) -> None:
            try:
                with pool.checkout(timeout=0.02 if number % 5 == 0 else 0) as w:
                    done.append(w.call("add", 0))
                pool.stats()
                pool.health_check()
            except PoolError:  # all workers are with those we interrupted
                pass

        with Storm(use) as storm:
            for number in itertools.count():
                if number >= 300 and storm.handled > 100:
                    break
                assert pool.call("show", number) == ((number,), {})
                with pool.checkout() as w:
                    assert w.call("show", -number) == ((-number,), {})
                with pool.checkout(session=f"s{number % 3}") as w:
                    w.state["n"] = number
                    assert w.call("show", "s") == (("s",), {})
        assert done or size == 1
        assert pool.stats().faults == 0
        assert pool.stats().workers_lost == 0


def test_handler_may_close_the_pool_wherever_it_comes() -> None:
    for number in range(12):
        with Pool(Stateful, size=1) as pool:

            def close_at_last(handled: int, pool: Any = pool, last: int = 7 * number) -> None:
                if handled == last:
                    pool.close(timeout=0.05)

            with Storm(close_at_last):
                with pytest.raises(Exception) as caught:
                    while True:
                        with pool.checkout() as w:
                            w.call("add", 1)
            assert type(caught.value).__name__ in ("PoolClosed", "LeaseRevoked", "LeaseReleased")


class Interrupted(Exception):
    """Raised by a signal handler."""


@pytest.mark.parametrize("portable", ["", "1"], ids=["fast", "portable"])
def test_signal_that_does_not_wake_the_caller_is_heard_all_the_same(
    portable: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came in the moment before he began to wait; or, as here, to another thread."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    def signal_myself() -> None:
        gate.wait_arrived()
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    monkeypatch.setenv("MINIPOOL_PORTABLE", portable)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Pool(size=1, call_timeout=None) as pool:
            thread = threading.Thread(target=signal_myself)
            thread.start()
            with pytest.raises(Interrupted):
                pool.call(pass_gate, gate.path)
            thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
