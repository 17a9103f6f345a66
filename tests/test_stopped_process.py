"""A program that is stopped for a while, with all its workers, goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, Iterator

import pytest

import scripts
from gates import Gate
from minipool import LeaseRevoked, Pool

PATIENCE = 20.0

PROGRAM = """
import json, os, sys, threading
from minipool import Pool
from minipool.engine import standstill
from ears import Ear
from gates import pass_gate

LIMIT = float(sys.argv[1])
GATE = sys.argv[2]


class Slow:
    # Each instance stands at the gate in one of its ways.

    def __init__(self, at=None):
        self.at = at
        self.passed = False
        self.pass_gate("start")

    def pass_gate(self, here):
        if self.at == here and not self.passed:
            self.passed = True  # the next probe is not looked at
            pass_gate(GATE)

    def call(self):
        pass_gate(GATE)
        return "answered"

    def pid(self):
        return os.getpid()

    def health_check(self):
        self.pass_gate("probe")

    def close(self):
        self.pass_gate("close")
        if self.at == "close":
            print(json.dumps(["worker", "closed"]), flush=True)


def pool(at=None, **options):
    return Pool(Slow, args=(at,), size=1, health_check_timeout=LIMIT, **options)


def main():
    standstill.LATE = 0.2  # so that a short stop is one
    found = {}
    threads = []

    def have(name, work):
        def run():
            try:
                found[name] = work()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
        threads.append(threading.Thread(target=run))
        threads[-1].start()

    def leased():
        with lease:
            return lease.call("pid")

    def whole():
        return options.call("pid")

    def in_session(session):
        with calls.checkout(session=session, timeout=LIMIT) as mine:
            return mine.call("pid")

    def started():
        starts.wait_ready()
        return starts.stats().start_failures

    calls = pool(call_timeout=LIMIT, checkout_timeout=LIMIT)
    options = calls.options(timeout=LIMIT)
    leases = pool(lease_timeout=LIMIT)
    closes = pool("close", close_timeout=LIMIT)
    probes = pool("probe", health_check_interval=LIMIT, max_health_failures=1)
    starts = pool("start", init_timeout=LIMIT)
    ends = pool(close_timeout=LIMIT).open()
    with calls, leases, probes, closes:
        ear = Ear(probes, "worker.health_check")
        starts.open(wait=False)  # arrives at the gate
        have("start", started)
        have("close", closes.close)  # the second
        have("call", lambda: calls.options(session="busy").call("call"))  # the third
        threading.Thread(target=probes.health_check, args=(True,)).start()  # the fourth
        lease = leases.checkout()
        last = ends.checkout()
        have("last", lambda: last.call("call"))  # the fifth
        assert sys.stdin.readline() == "all are at the gate\\n"
        have("end", ends.close)
        have("busy", lambda: in_session("busy"))
        have("checkout", lambda: calls.call("pid"))
        have("whole", whole)
        have("session", lambda: in_session("free"))
        manager = calls._desk.manager
        lines = manager.turnstile, *(line() for line in manager.lines)
        assert manager.wait_for(lambda: [len(line.waiters) for line in lines] == [3, 1], 20)
        assert ends._desk.manager.wait_for(lambda: ends._desk.manager.closing, 20)
        print(json.dumps(["all", "wait"]), flush=True)
        assert sys.stdin.readline() == "are you awake?\\n"
        for one in calls, leases, probes, closes, starts:  # as the manager finds it now
            one._desk.manager.command(lambda: None)
        print(json.dumps(["I am", "awake"]), flush=True)
        assert sys.stdin.readline() == "go on\\n"
        have("lease", leased)
        for thread in threads:
            thread.join()
        found["probe"] = ear.wait("worker.health_check").metadata["healthy"]
        found["deaths"] = [repr(one.deaths()) for one in (calls, leases, probes, starts, closes, ends)]
    starts.close()
    print(json.dumps(["found", found]), flush=True)


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def program(tmp_path: Path, gate: Gate) -> Iterator[subprocess.Popen[str]]:
    process = scripts.start(tmp_path, PROGRAM, "3.5", gate.path, stdin=subprocess.PIPE)
    yield process
    os.killpg(process.pid, signal.SIGCONT)
    scripts.finish(process)


def line(output: IO[str]) -> list[object]:
    """Return the next that the program says."""
    assert select.select([output], [], [], PATIENCE)[0], "it says nothing"
    said: list[object] = json.loads(output.readline())
    return said


def test_pool_that_is_terminated_after_a_stop_ends_at_once() -> None:
    """However much of the time that it had for its leases a stop has spared it."""
    pool = Pool(size=1).open()
    assert pool._desk is not None
    manager = pool._desk.manager
    lease = pool.checkout()
    now = time.monotonic()  # an hour after it began to close, in which it was stopped
    manager._closes.append((now - 3600.0, now - 3600.0 + 20.0))
    manager.standstills._stops = ((now - 3600.0, now),)
    pool.terminate()

    assert manager.done
    with pytest.raises(LeaseRevoked):
        lease.call(len, ())


@pytest.mark.slow
def test_no_deadline_comes_while_all_is_stopped(program: subprocess.Popen[str], gate: Gate) -> None:
    """Not that of a call, a checkout, a probe, a start, a lease or an end."""
    assert program.stdin is not None and program.stdout is not None
    gate.wait_arrived(5)
    program.stdin.write("all are at the gate\n")
    program.stdin.flush()
    assert line(program.stdout) == ["all", "wait"]

    os.killpg(program.pid, signal.SIGSTOP)
    assert not select.select([program.stdout], [], [], 3.5)[0], "it was not stopped"
    os.killpg(program.pid, signal.SIGCONT)

    program.stdin.write("are you awake?\n")
    program.stdin.flush()
    assert line(program.stdout) == ["I am", "awake"]
    gate.open(5)
    program.stdin.write("go on\n")
    program.stdin.flush()
    assert line(program.stdout) == ["worker", "closed"], "it was not given the time to end"
    said, found = line(program.stdout)
    assert said == "found"
    assert isinstance(found, dict)
    pids = {found[name] for name in ("checkout", "whole", "session", "busy")}
    assert len(pids) == 1 and isinstance(pids.pop(), int), found
    assert found["call"] == "answered"
    assert found["last"] == "answered", "its lease was revoked, as if the time to close were over"
    assert isinstance(found["lease"], int), found
    assert found["start"] == 0
    assert found["probe"] is True
    assert found["deaths"] == ["[]"] * 6
    assert found["close"] is None and found["end"] is None
