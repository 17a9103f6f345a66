"""`python -m minipool dashboard`: pools of other processes in a browser, and a dashboard asked."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator
from urllib.parse import urlsplit

import pytest

from minipool import Pool
from minipool.engine import table as t
from minipool.observe import onlooker
from minipool.observe.onlooker import PoolSight, Unreadable, WorkerSight
from minipool.observe.outside import Outside
from scripts import environment, finish, start
from workers import Counter

LAST = 20.0
PORTABLE = bool(os.environ.get("MINIPOOL_PORTABLE"))
from_outside = pytest.mark.skipif(
    not onlooker.available() or PORTABLE, reason="there is no table to be seen from outside"
)

PROGRAM = """
    import sys
    from minipool import Pool
    from workers import Counter

    if __name__ == "__main__":
        with Pool(Counter, size=2, name="cooks") as pool:
            for _ in range(5):
                pool.call("add", 1)
            print("ready", flush=True)
            sys.stdin.readline()
"""


def command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "minipool", "dashboard", *arguments],
        env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], LAST)[0], "it says nothing"
    return process.stdout.readline()


def get(url: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=LAST)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def readings(url: str) -> Iterator[Any]:
    """Yield what the page of a dashboard is told, for a while."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=LAST)
    connection.request("GET", "/events")
    response = connection.getresponse()
    deadline = time.monotonic() + LAST
    try:
        while time.monotonic() < deadline:
            text = response.readline()
            assert text, "the stream has ended"
            if text.startswith(b"data: "):
                yield json.loads(text[6:])
        raise AssertionError("what was waited for never came")
    finally:
        response.close()
        connection.close()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that has a pool and no dashboard."""
    process = start(tmp_path, PROGRAM, stdin=subprocess.PIPE)
    assert line(process) == "ready\n"
    yield process
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        finish(process)


# -- by PID --------------------------------------------------------------------------------------


@from_outside
def test_a_process_that_has_no_dashboard_is_seen_from_outside(
    program: subprocess.Popen[str],
) -> None:
    shown = command(str(program.pid))
    url = line(shown).split()[0]
    pool = next(readings(url))["pool"]

    assert (pool["name"], pool["word"]) == (f"cooks ({program.pid})", "healthy")
    assert pool["now"]["calls"] == 5 and len(pool["workers"]) == 2
    unknown = ("error_rate", "errors", "user_errors", "active_sessions")
    assert [pool["now"][name] for name in unknown] == [None] * 4 and pool["events"] is None
    assert get(url, "/healthz")[0] == 200
    assert get(url, "/metrics")[0] == 404
    shown.send_signal(signal.SIGINT)
    assert finish(shown)[0] == 130


@from_outside
def test_a_stopped_process_is_seen_as_stopped(program: subprocess.Popen[str]) -> None:
    shown = command(str(program.pid))
    url = line(shown).split()[0]
    os.kill(program.pid, signal.SIGSTOP)
    pool = next(r["pool"] for r in readings(url) if r["pool"]["word"] == "stopped")

    assert pool["score"] == 0 and pool["reasons"] == ["its process is stopped by a signal"]
    status, body = get(url, "/healthz")
    assert status == 503 and json.loads(body)["pools"][0]["reasons"] == pool["reasons"]
    os.kill(program.pid, signal.SIGCONT)
    assert next(r for r in readings(url) if r["pool"]["word"] == "healthy")
    shown.send_signal(signal.SIGINT)
    finish(shown)


@from_outside
def test_the_command_ends_with_the_process_it_shows(program: subprocess.Popen[str]) -> None:
    shown = command(str(program.pid))
    line(shown)
    assert program.stdin is not None
    program.stdin.write("\n")
    finish(program)
    status, out, err = finish(shown)
    assert (status, out, err) == (0, "the process has ended\n", "")


@from_outside
def test_a_process_without_pools_is_refused_with_the_reason() -> None:
    status, out, err = finish(command(str(os.getpid())))
    assert (status, out) == (1, "") and "no open pool" in err
    status, out, err = finish(command("4194305"))  # more than a pid can be
    assert (status, out) == (1, "") and "there is no such process" in err


def test_what_is_no_pid_and_no_url_is_refused() -> None:
    status, out, err = finish(command("cooks"))
    assert (status, out) == (2, "") and "'cooks'" in err


# -- by URL --------------------------------------------------------------------------------------


def test_a_running_dashboard_is_asked_how_its_pools_are() -> None:
    with Pool(Counter, size=1, name="cooks") as pool:
        with pool.dashboard(token="open-sesame") as dashboard:
            for url, expected in [
                (dashboard.url, (0, "cooks: healthy\n", "")),
                (dashboard.url.partition("?")[0], (2, "")),
            ]:
                assert finish(command(url))[: len(expected)] == expected
            gone = dashboard.url
    status, out, err = finish(command(gone))
    assert (status, out) == (2, "") and "no dashboard answers" in err


def test_a_pool_that_cannot_serve_is_told_with_its_reasons() -> None:
    with Pool(Counter, size=1, name="cooks") as pool, pool.dashboard() as dashboard:
        dashboard._board.health = lambda: (  # type: ignore[method-assign]
            False,
            {
                "pools": [
                    {"name": "cooks", "status": "unhealthy", "reasons": ["no flour", "no fire"]}
                ]
            },
        )
        assert finish(command(dashboard.url)) == (1, "cooks: unhealthy: no flour: no fire\n", "")


# -- what is made of what is seen ------------------------------------------------------------------


def worker(worker_id: int = 0, **facts: Any) -> WorkerSight:
    plain = WorkerSight(
        worker_id=worker_id, generation=1, pid=7, state="idle", process="sleeping", calls=0,
        raised=0, in_call_for=None, leased_for=None, quiet_for=None, cpu_seconds=0.0, rss_bytes=1,
        leases=0, leased=0.0, wait_times=[0] * t.BUCKETS, call_times=[0] * t.BUCKETS,
    )  # fmt: skip
    return plain._replace(**facts)


def pool_sight(at: float, *workers: WorkerSight, **facts: Any) -> PoolSight:
    plain = PoolSight(
        at=at, name="p", pid=7, opened=1.0, status="open", told_for=0.5, size=2, waiting=0,
        started=2, lost=0, retired=0, start_failures=0, leases=0, leased=0.0,
        wait_times=[0] * t.BUCKETS, call_times=[0] * t.BUCKETS,
        workers=workers or (worker(0), worker(1)),
    )  # fmt: skip
    return plain._replace(**facts)


class Scene:
    """An outside that is written by the test."""

    def __init__(self) -> None:
        self.sights: list[PoolSight] = []
        self.board = Outside(look=self._look)

    def _look(self, pid: int | None) -> tuple[list[PoolSight], list[Unreadable]]:
        return self.sights, []

    def show(self, *sights: PoolSight) -> list[Any]:
        self.sights = list(sights)
        self.board.tick()
        return self.board.pools()


def test_utilization_is_leased_time_over_the_time_of_the_workers_in_service() -> None:
    scene = Scene()
    scene.show(pool_sight(10.0))
    (told,) = scene.show(pool_sight(12.0, leased=1.0))
    assert told["now"]["utilization"] == pytest.approx(0.25)


def test_a_stopped_worker_is_not_in_service() -> None:
    (told,) = Scene().show(pool_sight(10.0, worker(0), worker(1, process="stopped")))
    assert told["now"]["states"] == {"idle": 1, "stopped": 1} and told["score"] < 80
    assert told["reasons"] == ["1 of 2 workers are in service", "worker 1 is stopped by a signal"]


def test_a_dead_worker_is_lost_before_its_manager_says_so() -> None:
    for process in ("gone", "zombie"):
        (told,) = Scene().show(pool_sight(10.0, worker(0), worker(1, process=process)))
        assert told["now"]["states"] == {"idle": 1, "lost": 1}


def test_a_silent_manager_is_not_well() -> None:
    scene = Scene()
    (told,) = scene.show(pool_sight(10.0, status="silent", told_for=9.0))
    assert (told["word"], told["score"]) == ("silent", 0)
    assert told["reasons"] == ["its manager has said nothing for 9 s"]
    assert scene.board.health()[0] is False


def test_a_pool_that_is_gone_is_given_up_and_one_with_the_same_name_is_another() -> None:
    scene = Scene()
    (first,) = scene.show(pool_sight(10.0))
    assert scene.show() == []
    assert scene.board.health()[0] is False
    (second,) = scene.show(pool_sight(11.0, opened=10.5))
    assert first["id"] != second["id"]


def test_what_is_kept_of_a_pool_does_not_grow_for_ever() -> None:
    """An hour of looks is the most that is kept."""
    scene = Scene()
    for second in itertools.takewhile(lambda s: s < 4500, itertools.count(10)):
        scene.sights = [pool_sight(float(second))]
        scene.board.tick()
    (post,) = scene.board.posts.values()
    kept = post.metrics.history(1e9)
    assert len(kept) <= 300 + 360 + 2
    assert len(post.series(3600)["age"]) <= 241
