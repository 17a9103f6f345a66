"""The dashboard: what it serves, to whom, and that nobody is held up or left behind by it."""

from __future__ import annotations

import contextlib
import errno
import gc
import http.client
import json
import os
import select
import signal
import socket
import threading
import time
from http.server import HTTPServer
from pathlib import Path
from typing import Any, Iterator

import pytest

import scripts
from ears import Ear, wait_until
from gates import Gate, pass_gate
from minipool import Pool
from minipool.observe import dashboard as module
from minipool.observe import visitors
from minipool.observe.dashboard import Dashboard
from minipool.observe.openmetrics import CONTENT_TYPE
from workers import Counter, DiesOnCall, fail

LAST = 20.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.1)


@pytest.fixture
def pool() -> Iterator[Pool[Counter]]:
    with Pool(Counter, size=2, name="cooks") as made:
        yield made


def port_of(dashboard: Dashboard) -> int:
    return int(dashboard.url.rpartition(":")[2].partition("/")[0])


class Answer:
    """What came back for one question."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    where: Dashboard, path: str, method: str = "GET", host: str | None = None, **headers: str
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(where), timeout=LAST)
    try:
        if host is not None:
            headers["Host"] = host
        connection.request(
            method, path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        return Answer(connection.getresponse())
    finally:
        connection.close()


class Stream:
    """Hears a dashboard's readings."""

    def __init__(self, where: Dashboard, query: str = "") -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port_of(where), timeout=LAST)
        self._connection.request("GET", f"/events?{query}")
        self.response = self._connection.getresponse()

    def next(self) -> Any:
        """Wait for one reading."""
        while True:
            line = self.response.readline()
            if line.startswith(b"data: "):
                return json.loads(line[6:])
            assert line, "the stream has ended"

    def until(self, condition: Any) -> Any:
        """Wait for the reading of which something is true."""
        for _ in range(200):
            reading = self.next()
            if condition(reading):
                return reading
        raise AssertionError(f"never so: {reading}")

    def close(self) -> None:
        self.response.close()
        self._connection.close()


@contextlib.contextmanager
def stream(where: Dashboard, query: str = "") -> Iterator[Stream]:
    made = Stream(where, query)
    try:
        yield made
    finally:
        made.close()


# -- what is served ------------------------------------------------------------------------------


def test_a_dashboard_can_be_asked_for_at_any_time_and_opens_the_pool() -> None:
    with Pool(Counter, size=1, name="late") as pool:
        with pool.dashboard() as dashboard:
            assert ask(dashboard, "/").status == 200
    with contextlib.closing(Pool(Counter, size=1)) as closed:
        with closed.dashboard() as dashboard:
            assert "127.0.0.1" in dashboard.url


def test_the_port_is_the_one_that_was_asked_for(pool: Pool[Counter]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(OSError):
            pool.dashboard(other.getsockname()[1])
        assert all(listeners == [] for listeners in pool.hooks.values())
        free = other.getsockname()[1]
    with pool.dashboard(free) as dashboard:
        assert dashboard.url == f"http://127.0.0.1:{free}/"


def test_the_page_needs_nothing_from_outside_and_runs_only_its_own_script(
    pool: Pool[Counter],
) -> None:
    with pool.dashboard() as dashboard:
        first, second = ask(dashboard, "/"), ask(dashboard, "/")
    text, policy = first.body.decode(), first.headers["Content-Security-Policy"]

    assert first.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "unsafe" not in policy and "default-src 'none'" in policy
    nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
    assert f'<script nonce="{nonce}">' in text and f'<style nonce="{nonce}">' in text
    assert nonce not in second.body.decode()
    assert "src=" not in text and "url(" not in text and "innerHTML" not in text
    assert text.count("http") == text.count("http://www.w3.org/2000/svg")


def test_readings_come_as_events_and_follow_the_pool(pool: Pool[Counter]) -> None:
    with pool.dashboard() as dashboard, stream(dashboard) as heard:
        assert heard.response.getheader("Content-Type") == "text/event-stream"
        before = heard.next()["pool"]
        assert (before["name"], before["word"], before["score"]) == ("cooks", "healthy", 100.0)
        assert before["now"]["calls"] == 0 and before["now"]["call_p50"] is None
        for _ in range(7):
            pool.call("add", 1)
        after = heard.until(lambda reading: reading["pool"]["now"]["calls"] == 7)["pool"]

    assert after["now"]["call_p50"] > 0 and max(after["series"]["throughput"]) > 0
    assert sum(worker["calls"] for worker in after["workers"]) == 7
    assert {worker["pid"] for worker in after["workers"]} == {w.pid for w in pool.workers()}


def test_all_live_pools_are_there_and_each_can_be_chosen(pool: Pool[Counter]) -> None:
    with pool.dashboard() as dashboard, stream(dashboard) as heard:
        with Pool(Counter, size=1, name="waiters"):
            two = heard.until(lambda reading: len(reading["pools"]) == 2)["pools"]
            assert [each["name"] for each in two] == ["cooks", "waiters"]
            with stream(dashboard, f"pool={two[1]['id']}") as other:
                assert other.next()["pool"]["name"] == "waiters"
            assert [each["name"] for each in ask(dashboard, "/api/pools").json] == [
                "cooks",
                "waiters",
            ]
        heard.until(lambda reading: len(reading["pools"]) == 1)
        with stream(dashboard, f"pool={two[1]['id']}") as ended:
            assert ended.next()["pool"] is None


def test_a_window_has_as_many_points_as_it_needs(pool: Pool[Counter]) -> None:
    with pool.dashboard() as dashboard:
        for window in ("60", "3600", "0", "-5", "nan", "9" * 400, "%C2%B2"):
            with stream(dashboard, f"window={window}") as heard:
                series = heard.next()["pool"]["series"]
                assert {len(line) for line in series.values()} == {len(series["age"])}


def test_deaths_are_told_of(tmp_path: Path) -> None:
    """The page says why the worker before ended, and lists the events of it."""
    with Pool(DiesOnCall, size=1) as pool, pool.dashboard() as dashboard:
        ear = Ear(pool, "worker.init")
        with stream(dashboard) as heard:
            heard.next()
            with contextlib.suppress(Exception):
                pool.call("die", signal.SIGKILL)
            ear.wait("worker.init")
            told = heard.until(lambda reading: reading["pool"]["workers"][0]["last_death"])["pool"]

    assert "SIGKILL" in told["workers"][0]["last_death"]
    assert "during 'die'" in told["workers"][0]["last_death"]
    assert {"worker.terminate", "error"} <= {event["name"] for event in told["events"]}
    assert told["now"]["errors"] == {"WorkerDied": 1} and told["now"]["crashes"] == 1


def test_a_death_before_the_dashboard_was_opened_is_told_of(tmp_path: Path) -> None:
    with Pool(DiesOnCall, size=1) as pool:
        ear = Ear(pool, "worker.init")
        with contextlib.suppress(Exception):
            pool.call("leave", 3)
        ear.wait("worker.init")
        with pool.dashboard() as dashboard, stream(dashboard) as heard:
            worker = heard.next()["pool"]["workers"][0]
    assert "exit code 3" in worker["last_death"] and "during 'leave'" in worker["last_death"]


def test_a_worker_that_was_told_to_end_is_told_of() -> None:
    with Pool(Counter, size=1) as pool, pool.dashboard() as dashboard:
        ear = Ear(pool, "worker.init")
        with stream(dashboard) as heard:
            heard.next()
            pool.drain()
            ear.wait("worker.init")
            events = heard.until(lambda reading: len(reading["pool"]["events"]) >= 2)["pool"][
                "events"
            ]
    (end,) = [event for event in events if event["name"] == "worker.terminate"]
    assert "the pool was drained" in end["text"] and not end["bad"]


def test_exceptions_of_the_users_code_are_no_errors_of_the_pool(pool: Pool[Counter]) -> None:
    with pool.dashboard() as dashboard, stream(dashboard) as heard:
        with pytest.raises(LookupError):
            pool.call(fail, LookupError)
        now = heard.until(lambda reading: reading["pool"]["now"]["user_errors"])["pool"]["now"]

    assert now["error_rate"] == 0.0 and now["errors"] == {}


def test_health_is_200_as_long_as_every_pool_serves(tmp_path: Path, gate: Gate) -> None:
    with Pool(Counter, size=1, name="well") as pool, pool.dashboard() as dashboard:
        with stream(dashboard) as heard:
            heard.next()
        answer = ask(dashboard, "/healthz")
        assert (answer.status, answer.json["status"]) == (200, "serving")
        with Pool(size=1, name="ill", close_timeout=LAST) as other, stream(dashboard) as heard:
            heard.until(lambda reading: len(reading["pools"]) == 2)
            holder = threading.Thread(target=other.call, args=(pass_gate, gate.path))
            holder.start()
            gate.wait_arrived()
            closer = threading.Thread(target=other.close)
            closer.start()
            wait_until(other, lambda: other.closed)
            answer = ask(dashboard, "/healthz")
            gate.open()
            holder.join()
            closer.join()
        assert answer.status == 503
        assert [each["status"] for each in answer.json["pools"]] == ["healthy", "unhealthy"]
        assert answer.json["pools"][1]["reasons"]


def test_metrics_are_those_of_every_pool(pool: Pool[Counter]) -> None:
    with Pool(Counter, size=1, name="waiters"), pool.dashboard() as dashboard:
        pool.call("add", 1)
        answer = ask(dashboard, "/metrics")
    assert answer.headers["Content-Type"] == CONTENT_TYPE
    text = answer.body.decode()
    assert 'minipool_call_time_seconds_count{pool="cooks"} 1\n' in text
    assert 'minipool_call_time_seconds_count{pool="waiters"} 0\n' in text
    assert text.endswith("# EOF\n")


def test_what_is_not_there_is_not_found_and_nothing_can_be_changed(pool: Pool[Counter]) -> None:
    with pool.dashboard() as dashboard:
        assert ask(dashboard, "/../etc/passwd").status == 404
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            assert ask(dashboard, "/", method).status == 405
        head = ask(dashboard, "/api/pools", "HEAD")
        assert (head.status, head.body) == (200, b"") and int(head.headers["Content-Length"]) > 2
        assert ask(dashboard, "/events", "HEAD").status == 200


# -- who is let in -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "10.0.0.5",
        "",
        "[",
        "localhost.",
        "a@b",
    ],
)
def test_other_names_than_this_machines_are_refused(pool: Pool[Counter], host: str) -> None:
    """A web site whose name was made to mean our address (DNS rebinding) reads nothing."""
    with pool.dashboard() as dashboard:
        for path in ("/", "/events", "/metrics", "/api/pools", "/healthz"):
            assert ask(dashboard, path, host=host).status == 403


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:99", "127.0.0.1", "127.8.8.8", "[::1]:8000"]
)
def test_this_machines_own_names_are_let_in(pool: Pool[Counter], host: str) -> None:
    """At any port: there may be a tunnel in between."""
    with pool.dashboard() as dashboard:
        assert ask(dashboard, "/healthz", host=host).status == 200


def test_a_question_without_or_with_two_hosts_is_refused(pool: Pool[Counter]) -> None:
    with pool.dashboard() as dashboard:
        for hosts in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
            with socket.create_connection(("127.0.0.1", port_of(dashboard)), LAST) as raw:
                raw.sendall(b"GET / HTTP/1.1\r\n" + hosts + b"\r\n")
                assert b" 403 " in raw.makefile("rb").readline()


def test_no_other_origin_may_read_any_answer(pool: Pool[Counter]) -> None:
    with pool.dashboard() as dashboard:
        for path in ("/", "/metrics", "/api/pools", "/healthz", "/nothing"):
            headers = ask(dashboard, path, Origin="http://evil.example").headers
            assert not [name for name in headers if name.lower().startswith("access-control")]
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_others_reach_asks_for_a_token(pool: Pool[Counter], host: str) -> None:
    try:
        dashboard = pool.dashboard(host=host)
    except OSError:
        pytest.skip(f"{host} cannot be bound here")
    with dashboard:
        token = dashboard.url.rpartition("=")[2]
        assert len(token) >= 32
        for path in ("/", "/events", "/metrics", "/api/pools", "/healthz", "/nothing"):
            assert ask(dashboard, path).status == 401
            assert ask(dashboard, path, Authorization=f"Bearer x{token}").status == 401
        assert ask(dashboard, f"/healthz?token={token}").status == 200
        assert ask(dashboard, "/healthz", Authorization=f"Bearer {token}").status == 200
        assert ask(dashboard, f"/healthz?token={token}", host="evil.example").status == 403
        moved = ask(dashboard, f"/?token={token}")
        assert (moved.status, moved.headers["Location"]) == (303, "./")
        cookie = moved.headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert ask(dashboard, "/", Cookie=cookie.partition(";")[0]).status == 200


def test_the_token_can_be_chosen_and_is_asked_for_then(pool: Pool[Counter]) -> None:
    for wrong in ("", "a b", "a;b", "a\r\nb", "ä"):
        with pytest.raises(ValueError, match="token"):
            pool.dashboard(token=wrong)
        assert all(listeners == [] for listeners in pool.hooks.values())
    with pool.dashboard(token="open-sesame") as dashboard:
        assert dashboard.url.endswith("/?token=open-sesame")
        assert ask(dashboard, "/healthz").status == 401
        assert ask(dashboard, "/healthz?token=open-sesame").status == 200


def test_a_token_that_is_not_asked_for_does_not_come_back(pool: Pool[Counter]) -> None:
    with pool.dashboard() as dashboard:
        answer = ask(dashboard, "/?token=x%0d%0aSet-Cookie:%20a=b")
    assert answer.status == 200 and "Set-Cookie" not in answer.headers


# -- slow, dead and many visitors ------------------------------------------------------------------


def connect(dashboard: Dashboard, request: bytes) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    made.settimeout(LAST)
    made.connect(("127.0.0.1", port_of(dashboard)))
    made.sendall(request)
    return made


SILENT_READER = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"


def hung_up(visitor: socket.socket) -> bool:
    """Wait until we are hung up on."""
    deadline = time.monotonic() + LAST
    with contextlib.suppress(ConnectionError):
        while visitor.recv(65536):
            if time.monotonic() > deadline:
                return False
    return True


def test_who_does_not_read_holds_nobody_up(pool: Pool[Counter]) -> None:
    with pool.dashboard() as dashboard, stream(dashboard) as heard:
        silent = [connect(dashboard, SILENT_READER) for _ in range(5)]
        unfinished = connect(dashboard, b"GET / HT")
        for expected in range(1, 4):
            pool.call("add", 1)
            heard.until(lambda reading, n=expected: reading["pool"]["now"]["calls"] >= n)
        assert ask(dashboard, "/healthz").status == 200
        for visitor in (*silent, unfinished):
            visitor.close()


def test_who_does_not_finish_asking_is_hung_up_on(
    pool: Pool[Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if he says a letter now and then."""
    monkeypatch.setattr(visitors, "PATIENCE", 0.3)
    with pool.dashboard() as dashboard:
        dripping = connect(dashboard, b"GET / HTTP/1.1\r\nX: ")
        dripping.settimeout(0.1)
        with pytest.raises(OSError):
            for _ in range(200):
                dripping.sendall(b"x")
                with contextlib.suppress(socket.timeout):
                    if not dripping.recv(100):
                        raise ConnectionError
            raise AssertionError("he was listened to for ever")
        dripping.close()


def test_more_visitors_than_there_is_room_for_are_hung_up_on(
    pool: Pool[Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visitors, "MOST_GUESTS", 3)
    with pool.dashboard() as dashboard:
        three = [Stream(dashboard) for _ in range(3)]
        fourth = connect(dashboard, SILENT_READER)
        assert hung_up(fourth)
        fourth.close()
        for each in three:
            assert each.next()
            each.close()


def test_a_visitor_who_cannot_be_let_in_is_tried_again_once_a_tick(
    pool: Pool[Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """He stands at the door, ready, all the time; the thread does not look at him all the time."""
    with pool.dashboard() as dashboard, stream(dashboard) as heard:
        heard.next()
        tries: list[int] = []
        door, accept = threading.Event(), dashboard._server.socket.accept

        def no_descriptors() -> Any:
            tries.append(1)
            if not door.is_set():
                raise OSError(errno.EMFILE, "too many open files")
            return accept()

        monkeypatch.setattr(HTTPServer, "get_request", lambda server: no_descriptors())
        with connect(dashboard, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n") as waiting:
            for _ in range(5):
                assert heard.next()
            assert 0 < len(tries) <= 6
            door.set()
            assert b" 200 " in waiting.makefile("rb").readline()


def test_a_stream_without_news_says_that_it_is_there(
    pool: Pool[Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visitors, "_SILENT", 0.05)
    monkeypatch.setattr(module, "INTERVAL", 1000.0)
    with pool.dashboard() as dashboard, stream(dashboard) as heard:
        heard.next()
        assert [heard.response.readline() for _ in range(3)][1] == b": no news\n"


def test_a_broken_reading_is_logged_and_the_next_one_comes(
    pool: Pool[Counter], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with pool.dashboard() as dashboard, stream(dashboard) as heard:
        heard.next()
        board = dashboard._board
        tick, broken = board.tick, threading.Event()

        def breaks_once() -> None:
            if not broken.is_set():
                broken.set()
                raise OSError("no descriptors for this one")
            tick()

        monkeypatch.setattr(board, "tick", breaks_once)
        assert broken.wait(LAST)
        assert heard.next()
    assert "missed a reading" in caplog.text
    caplog.clear()


def threads() -> list[str]:
    """Return what threads of dashboards there are."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name in ("minipool-dashboard", "minipool-visitor")]


# -- the end ---------------------------------------------------------------------------------------


def test_close_hangs_up_on_everybody_and_can_be_called_again(pool: Pool[Counter]) -> None:
    dashboard = pool.dashboard()
    heard, silent = Stream(dashboard), connect(dashboard, SILENT_READER)
    unfinished = connect(dashboard, b"GET / HT")
    for _ in range(3):
        heard.next()
    port = port_of(dashboard)
    begun = time.monotonic()
    dashboard.close()
    dashboard.close()
    assert time.monotonic() - begun < visitors.PATIENCE / 2

    assert dashboard.closed and "closed" in repr(dashboard)
    assert b"data" not in heard.response.read() and hung_up(silent)
    assert not threads()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), LAST)
    assert all(listeners == [] for listeners in pool.hooks.values())
    heard.close()
    silent.close()
    unfinished.close()


def test_it_ends_with_its_pool_even_while_somebody_looks() -> None:
    with Pool(Counter, size=1) as pool:
        dashboard = pool.dashboard()
        heard = Stream(dashboard)
        heard.next()
    assert dashboard.closed
    assert not threads()
    heard.close()


def test_it_ends_with_a_pool_that_is_terminated_by_a_listener() -> None:
    """The manager's own thread closes the dashboard then, and waits for nobody too long."""
    pool = Pool(Counter, size=1).open()
    ear = Ear(pool, "pool.terminate")
    dashboard = pool.dashboard()
    pool.hooks["pool.resized"].append(lambda *event: pool.terminate())
    pool.resize(2)
    ear.wait("pool.terminate")
    pool.close()
    assert dashboard.closed


def test_a_forgotten_pool_is_collected_and_its_dashboard_ends() -> None:
    pool = Pool(Counter, size=1).open()
    dashboard = pool.dashboard()
    with stream(dashboard) as heard:
        heard.next()
        thread = dashboard._thread
        del pool
        gc.collect()
        thread.join(LAST)
    assert dashboard.closed and not thread.is_alive()


def test_it_ends_with_the_program(tmp_path: Path) -> None:
    status, out, err = scripts.run(
        tmp_path,
        """
        from minipool import Pool
        from workers import Counter

        if __name__ == "__main__":
            pool = Pool(Counter, size=1).open()
            print(pool.dashboard().url)
        """,
    )
    assert (status, err) == (0, "") and out.startswith("http://127.0.0.1:")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_answers_nobody(pool: Pool[Counter]) -> None:
    """The child has no copy of the socket: visitors do not wait at a door that nobody opens."""
    with pool.dashboard() as dashboard:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:  # pragma: no cover
            with contextlib.suppress(BaseException):
                signal.alarm(int(LAST))  # it ends even if the test does not come so far
                os.write(writer, b"y" if dashboard.closed else b"n")
                os.close(writer)
                signal.pause()
            os._exit(0)
        os.close(writer)
        assert select.select([reader], [], [], LAST)[0] and os.read(reader, 1) == b"y"
        os.close(reader)
        port = port_of(dashboard)
        assert ask(dashboard, "/healthz").status == 200
        dashboard.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), LAST)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_pool_does_not_notice_a_dashboard_that_stands_still(pool: Pool[Counter]) -> None:
    """Calls go on while a reading hangs, and close() does not wait for it for ever."""
    with pool.dashboard() as dashboard, stream(dashboard) as heard:
        heard.next()
        stuck, go = threading.Event(), threading.Event()
        tick = dashboard._board.tick

        def hang() -> None:
            stuck.set()
            go.wait(LAST)
            tick()

        dashboard._board.tick = hang  # type: ignore[method-assign]
        assert stuck.wait(LAST)
        begun = time.monotonic()
        assert [pool.call("add", 1) for _ in range(20)]
        assert time.monotonic() - begun < 5
        go.set()
