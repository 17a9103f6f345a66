"""Listeners ready-made: the logger, the reporter and the examples' StatsD and OpenTelemetry."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any, Iterator

import pytest

import scripts
from ears import Ear
from minipool import EVENTS, Hooks, Pool, telemetry
from minipool.errors import CheckoutTimeout
from rogues import Stateful, raise_it

EXAMPLES = Path(__file__).parent.parent / "examples"
LAST = 20.0


class Emits:
    """Has hooks, as a pool has, and nothing else."""

    def __init__(self) -> None:
        self.hooks = Hooks("p")


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append(record)


LOG = logging.getLogger("events of the tests")


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What is logged to LOG."""
    handler = Records()
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    yield handler.all
    LOG.removeHandler(handler)


def emit_all(hooks: Hooks) -> None:
    """Emit each event once, each of its fields being its own name."""
    for name, (_, measurements, metadata) in EVENTS.items():
        fields = {field: field for field in re.findall(r"\w+", metadata)}
        hooks.emit(name, dict.fromkeys(re.findall(r"\w+", measurements), 1.5), **fields)


# -- the reporter --------------------------------------------------------------------------------


def test_reporter_hears_every_event_until_it_is_detached() -> None:
    pool, heard = Emits(), []
    detach = telemetry.attach_reporter(pool, lambda name, *_: heard.append(name))

    emit_all(pool.hooks)
    assert heard == list(EVENTS)

    detach()
    emit_all(pool.hooks)
    assert heard == list(EVENTS)
    assert not any(pool.hooks.values())
    detach()  # twice is as good as once


def test_reporter_hears_what_it_was_asked_to_hear() -> None:
    """A misspelt name attaches nothing at all."""
    pool, heard = Emits(), []
    telemetry.attach_reporter(pool, lambda name, *_: heard.append(name), ["error", "recovery"])
    with pytest.raises(KeyError, match=r"there are: pool\.init"):
        telemetry.attach_reporter(pool, print, ["pool.init", "errors"])

    emit_all(pool.hooks)

    assert heard == ["error", "recovery"]
    assert pool.hooks["pool.init"] == []


def test_detaching_leaves_other_listeners_alone() -> None:
    """Also another attachment of the same function."""
    pool, heard = Emits(), []
    first, second = (telemetry.attach_reporter(pool, heard.append, ["error"]) for _ in range(2))
    first()
    assert pool.hooks["error"] == [heard.append]
    second()
    assert pool.hooks["error"] == []


# -- the logger ----------------------------------------------------------------------------------


def test_levels_are_those_of_what_happened(records: list[logging.LogRecord]) -> None:
    """Lives at INFO, health and traffic at DEBUG, leaks at WARNING, errors at ERROR."""
    pool = Emits()
    telemetry.attach_logger(pool, LOG, calls=True)

    emit_all(pool.hooks)

    levels = {record.event: record.levelname for record in records}  # type: ignore[attr-defined]
    assert set(levels) == set(EVENTS)
    for name in ("error", "operation.exception", "span.exception"):
        assert levels[name] == "ERROR"
    for name in ("worker.health_check", "utilization", "queue.depth", *telemetry.OF_CALLS):
        assert levels[name] == "DEBUG"
    for name in ("pool.init", "worker.init", "worker.terminate", "recovery", "session.lost"):
        assert levels[name] == "INFO"
    assert levels["lease.leaked"] == "WARNING"


@pytest.mark.parametrize("name", EVENTS)
def test_record_has_every_field_as_an_attribute(
    name: str, records: list[logging.LogRecord]
) -> None:
    """None clashes with what logging itself puts there."""
    pool = Emits()
    telemetry.attach_logger(pool, LOG, calls=True)
    fields = re.findall(r"\w+", " ".join(EVENTS[name][1:]))

    emit_all(pool.hooks)

    (record,) = (one for one in records if one.event == name)  # type: ignore[attr-defined]
    assert vars(record)["pool"] == "p"
    assert set(fields) <= set(vars(record))
    for field in fields:
        assert f" {field}={'1.5' if field in EVENTS[name][1] else field}" in record.getMessage()


def test_calls_are_logged_for_who_asks(records: list[logging.LogRecord]) -> None:
    """By default no call pays for a logger but one that raises."""
    pool = Emits()
    telemetry.attach_logger(pool, LOG)

    emit_all(pool.hooks)

    told = {record.event for record in records}  # type: ignore[attr-defined]
    assert set(EVENTS) - told == set(telemetry.OF_CALLS)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.12345678, "0.123457"), (-9, "-9"), (None, "None"), ("its worker died", "'its worker died'"),
     ("two\nlines", "'two\\nlines'"), ("", "''"), ("a=b", "'a=b'"), ("plain", "plain")],
)  # fmt: skip
def test_values_stay_one_word(value: Any, shown: str, records: list[logging.LogRecord]) -> None:
    """A line of the log is one event, whatever a session or a reason is called."""
    pool = Emits()
    telemetry.attach_logger(pool, LOG)
    pool.hooks.emit("worker.terminate", {}, reason=value)
    assert records[-1].getMessage() == f"p: worker.terminate reason={shown}"


def test_errors_are_logged_as_text(records: list[logging.LogRecord]) -> None:
    """A record that is kept keeps no traceback, and so no worker."""
    pool = Emits()
    telemetry.attach_logger(pool, LOG)
    with pytest.raises(KeyError), telemetry.span(pool, "answer"):
        raise KeyError("k")
    assert vars(records[-1])["error"] == "KeyError: 'k'"


def test_real_pool_is_logged_from_its_first_worker_to_its_last(
    records: list[logging.LogRecord],
) -> None:
    pool = Pool(Stateful, size=1, name="logged")
    detach = telemetry.attach_logger(pool, LOG)
    ear = Ear(pool, "recovery")
    with pool:
        with pytest.raises(KeyError):
            pool.call(raise_it, "KeyError", "k")
        os.kill(pool.workers()[0].pid or 0, signal.SIGKILL)
        ear.wait("recovery")
    detach()

    told = [(r.levelname, vars(r)["event"]) for r in records if r.levelno > logging.DEBUG]
    told.remove(("INFO", "pool.init"))  # in another thread than the first worker's
    assert told == [
        ("INFO", "worker.init"), ("ERROR", "operation.exception"),
        ("ERROR", "error"), ("INFO", "worker.terminate"), ("INFO", "worker.init"),
        ("INFO", "recovery"), ("INFO", "worker.terminate"), ("INFO", "pool.terminate"),
    ]  # fmt: skip
    assert {vars(record)["pool"] for record in records} == {"logged"}


def test_logger_has_a_name_of_its_own(caplog: Any) -> None:
    """Below "minipool", so that one line of configuration reaches both, or only the events."""
    pool = Emits()
    detach = telemetry.attach_logger(pool)
    with caplog.at_level(logging.INFO, "minipool"):
        pool.hooks.emit("pool.init", {"size": 1})
        detach()
        pool.hooks.emit("pool.init", {"size": 2})
    told = [(record.name, record.getMessage()) for record in caplog.records]
    assert told == [("minipool.events", "p: pool.init size=1")]


QUIET = """
    import sys, time
    from minipool import CallTimeout, Pool

    if __name__ == "__main__":
        with Pool(size=1, start_method=sys.argv[1]) as pool:
            try:
                pool.options(timeout=0.01).call(time.sleep, 60)
            except CallTimeout:
                print(pool.call(abs, -1), pool.health_check(probe=True).status, len(pool.deaths()))
        print("logging" in sys.modules)
"""


def test_what_is_not_shown_imports_no_logging(start_method: str, tmp_path: Path) -> None:
    """A worker that was killed, and a probe, are worth a record, but not by default.

    While a Ctrl-C ends the program, an import by the manager could even spoil its exit code.
    """
    assert scripts.run(tmp_path, QUIET, start_method) == (0, "1 healthy 1\nFalse\n", "")


# -- the examples --------------------------------------------------------------------------------


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = {
    "count", "max", "idle.min", "pending_requests", "timeouts",
    "create_time", "wait_time", "use_time",
}  # fmt: skip


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Where StatsD listens, on a port of its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        bound.settimeout(LAST)
        yield bound


FIGURE = re.compile(
    r"minipool\.worker\.([\w.]+):(-?[\d.]+)\|(g|c|ms)\|#((?:state:\w+,)?)pool:([\w.-]+)"
)


def test_statsd_hears_every_figure_over_a_real_socket(server: socket.socket) -> None:
    """Each datagram is figures of that form and nothing else; gauges, counts and times arrive."""
    pool = Pool(Stateful, size=1, overflow_idle=0.1, name="a b|c")
    listener = load("statsd").StatsD(pool, *server.getsockname())
    with pool, pool.checkout() as w:
        w.call("add", 1)
        with pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0)
    listener.close()

    found: dict[str, list[tuple[str, float]]] = {}
    while set(found) != NAMES or not any(value for _, value in found["timeouts"]):
        for line in server.recv(65536).decode().split("\n"):
            figure = FIGURE.fullmatch(line)
            assert figure, line
            assert figure[5] == "a_b_c"
            found.setdefault(figure[1], []).append((figure[4] + figure[3], float(figure[2])))
    for name in ("create_time", "wait_time", "use_time"):
        assert [kind for kind, _ in found[name]] == ["ms"], name
    assert set(found["max"]) == set(found["idle.min"]) == {("g", 1.0)}
    assert {kind for kind, _ in found["count"]} == {
        f"state:{state},g"
        for state in ("idle", "leased", "starting", "probing", "stopping", "lost")
    }
    assert sum(value for _, value in found["timeouts"]) == 1
    assert not any(pool.hooks.values())


def test_statsd_without_a_server_harms_nothing() -> None:
    """Nobody listens at that port: the pool works as ever, and the listener stays."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    pool = Pool(Stateful, size=1)
    listener = load("statsd").StatsD(pool, *address)
    with pool:
        for number in range(1, 10):
            assert pool.call("add", 1) == number
        assert pool.hooks["worker.checkin"]
    listener.close()


def test_listeners_of_the_examples_do_not_keep_a_forgotten_pool(server: socket.socket) -> None:
    """It is collected, and ends, though its own lists hold what reads its figures."""
    pool: Any = Pool(Stateful, size=1).open()
    listener = load("statsd").StatsD(pool, *server.getsockname())
    ended, gone = threading.Event(), weakref.ref(pool)
    pool.hooks["pool.terminate"].append(lambda *event: ended.set())

    del pool
    gc.collect()

    assert gone() is None
    assert ended.wait(LAST)
    listener.close()


def test_statsd_shows_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "statsd.py")],
        cwd=tmp_path, env=scripts.environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    figures = [FIGURE.fullmatch(line) for line in done.stdout.splitlines()]
    assert {figure[1] for figure in figures if figure} == NAMES and all(figures)


def test_open_telemetry_collects_every_figure() -> None:
    """A reader finds all names, with no attribute but the pool's name and a state."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    pools = [Pool(Stateful, size=1, name=name) for name in ("one", "other")]
    detach = load("open_telemetry").instrument(*pools, meter=provider.get_meter("minipool"))
    with pools[0], pools[1]:
        with pools[0].checkout() as w:
            w.call("add", 1)
            with pytest.raises(CheckoutTimeout):
                pools[0].checkout(timeout=0)
            found = collected(reader)
        pools[1].call("add", 1)
        later = collected(reader)

        assert set(found) | set(later) == {f"minipool.worker.{name}" for name in NAMES}
        assert found["minipool.worker.count"]["one", "leased"] == 1
        assert found["minipool.worker.count"]["one", "idle"] == 0
        assert found["minipool.worker.count"]["other", "idle"] == 1
        assert found["minipool.worker.timeouts"] == {("one",): 1, ("other",): 0}
        assert found["minipool.worker.create_time"] == {("one",): 1, ("other",): 1}
        assert later["minipool.worker.use_time"] == {("one",): 1, ("other",): 1}
        assert later["minipool.worker.max"] == {("one",): 1, ("other",): 1}
        detach()
    assert collected(reader).get("minipool.worker.max", {}) == {}
    assert not any(pools[0].hooks.values())
    provider.shutdown()


def collected(reader: Any) -> dict[str, dict[tuple[str, ...], int]]:
    """Return each metric's value, or count, by the values of its attributes."""
    found: dict[str, dict[tuple[str, ...], int]] = {}
    data = reader.get_metrics_data()
    for metric in data.resource_metrics[0].scope_metrics[0].metrics if data else ():
        for point in metric.data.data_points:
            assert set(point.attributes) <= {"pool", "state"}
            value = point.value if hasattr(point, "value") else point.count
            found.setdefault(metric.name, {})[tuple(point.attributes.values())] = value
    return found


def test_open_telemetry_says_what_to_install(tmp_path: Path) -> None:
    """Where it is missing the example ends with one line; where it is there it shows all."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "open_telemetry.py")],
        cwd=tmp_path, env=scripts.environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if done.returncode:
        assert done.stderr == "OpenTelemetry is not installed; try: pip install opentelemetry-sdk\n"
    else:
        assert {name for name in NAMES if f"minipool.worker.{name} " in done.stdout} == NAMES
