"""The bench: every figure is there, has its target beside it, and is plausible. Not how fast."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minipool.tools import peers, procfs
from minipool.tools.figures import Result, Series, above, over, shown
from minipool.tools.floors import Bare

ROOT = Path(__file__).parent.parent

TARGETS = {  # name: what people read of it, and the most it may be
    "lease_call": ("call in a lease / floor", 1.35),
    "checkout_call": ("checkout + call / floor", 1.5),
    "checkout_call_over_executor": ("checkout + call / ProcessPoolExecutor", 0.25),
    "checkout_call_over_multiprocessing": ("checkout + call / multiprocessing.Pool", 0.6),
    "checkout_checkin": ("checkout + checkin / queue put + get", 1.3),
    "hooks_lease_call": ("call in a lease: a listener on every event - none", 1.5e-6),
    "session_warm": ("warm session / none", 1.3),
    "session_moving": ("moving session / none", 2.5),
    "session_of_many": ("one of many / one of 10", 1.2),
    "session_memory": ("one idle, empty session", 1500.0),
    "session_commit": ("commit to SQLite - in memory", 60e-6),
    "sleepers": ("64 sleeping calls / the ideal 400 ms", 1.05),
    "startup": ("8 workers ready / 8 bare processes ready", 1.3),
    "recovery": ("recovery from SIGKILL / start of a bare process", 2.5),
    "recovery_time": ("SIGKILL to the next good reply", 0.05),
    "recovery_spare": ("SIGKILL in a call to the next good reply, spares=1", 0.003),
    "death_told": ("from the exit code to WorkerDied", 0.001),
    "timeout_longest": ("CallTimeout with the stack, beyond the 100 ms: the longest", 0.05),
    "memory_rss": ("resident memory: worker - bare process", 2e6),
    "memory_pss": ("proportional memory: worker - bare process", 1e6),
    "idle_wakeups": ("idle pool: voluntary context switches a second", 5.0),
    "idle_ticks": ("idle pool: processor time in clock ticks", 1.0),
    "watched_p50_metrics": ("p50 of a call: metrics / nobody looks", 1.03),
    "watched_p50_all": ("p50 of a call: metrics, dashboard, top / nobody looks", 1.03),
    "watched_excess_metrics": ("excess over the p50: metrics / nobody looks", 1.03),
    "watched_excess_all": (
        "excess over the p50: metrics, dashboard, top / nobody looks",
        1.03,
    ),
    "watched_cpu_all": ("processor time a second of metrics, dashboard, top", 0.03),
    "import": ("import of Pool - multiprocessing.connection", 0.01),
}


def minipool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minipool", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=50,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Any:
    done = minipool("bench", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_report_has_every_target(report: Any) -> None:
    """Each figure that must be reached is measured and carries what it is held against."""
    found = {row["name"]: (row["about"], row["target"]) for row in report["targets"]}
    assert found == TARGETS
    for row in report["targets"]:
        assert row["verdict"] == ("ok" if row["value"] <= row["target"] else "MISSED")


@pytest.mark.slow
def test_report_has_every_group_side_by_side(report: Any) -> None:
    """Floor and minipool stand beside each other, pinned and not, and for each thread count."""
    groups = report["groups"]
    assert list(groups) == [
        "latency", "latency_unpinned", "hooks", "sessions", "throughput", "sleepers", "startup", "recovery", "deaths", "memory",
        "idle", "watching", "import",
    ]  # fmt: skip
    series = {name: {s["name"] for s in group["series"]} for name, group in groups.items()}
    calls = {"floor", "lease_call", "checkout_call", "pool_call", "checkout_checkin", "queue"}
    for name in ("latency", "latency_unpinned"):
        assert series[name] >= calls | {"ProcessPoolExecutor", "multiprocessing.Pool"}
    for threads in (1, 2, 4, 8):
        assert series["throughput"] >= {f"floor_{threads}", f"minipool_{threads}"}
    for name in ("startup", "recovery"):
        assert series[name] >= {"floor", "minipool"}
    assert series["import"] == {"floor", "package", "minipool"}


@pytest.mark.slow
def test_figures_are_plausible(report: Any) -> None:
    """Every figure is a positive number inside its own spread, of the size that fits its unit."""
    most = {"s": 30.0, "B": 1e9, "1/s": 1e7, "x": 1e4}
    for group in report["groups"].values():
        for series in group["series"]:
            assert 0 < series["value"] < most[series["unit"]], series
        for row in group["series"] + group["results"]:
            assert row["low"] <= row["value"] <= row["high"], row
            assert math.isfinite(row["value"]) and row["rounds"] >= 1, row
            assert row["about"], row


@pytest.mark.slow
def test_report_tells_where_it_was_measured(report: Any) -> None:
    facts = report["environment"]
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["start_method"] == "forkserver"
    assert facts["cpus"] >= 1 and facts["usable_cpus"] >= 1 and len(facts["load_average"]) == 3


def test_people_see_every_target_with_its_verdict() -> None:
    """What is printed has a line for each target, the verdict on it, and the machine's load."""
    done = minipool("bench", "--quick", "--only", "memory")
    assert done.returncode == 0, done.stderr
    before, _, targets = done.stdout.partition("\ntargets\n")
    assert "load average" in before and "start method forkserver" in before
    lines = targets.splitlines()
    about = [TARGETS[name][0] for name in ("memory_rss", "memory_pss")]
    assert [line.split("  ")[1] for line in lines] == about
    for line in lines:
        assert "at most" in line and line.endswith((": ok", ": MISSED")), line


def test_one_group_alone_under_each_start_method(start_method: str) -> None:
    """`--only` measures that group and no other."""
    done = minipool(
        "bench", "--quick", "--json", "--only", "memory", "--start-method", start_method
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["groups"]) == ["memory"]
    assert found["environment"]["start_method"] == start_method
    assert [row["name"] for row in found["targets"]] == ["memory_rss", "memory_pss"]


def test_missing_peer_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is not installed is named, and the others are measured."""
    monkeypatch.setattr(peers, "STANDARD", {})
    for name in peers.OTHERS:
        monkeypatch.setitem(sys.modules, name, None)
    opened, missing = peers.open_peers(multiprocessing.get_context("spawn"), 1, others=True)
    assert (opened, missing) == ([], ["loky", "pebble", "mpire"])


def test_unknown_command_names_the_known_ones() -> None:
    done = minipool("bnech")
    assert done.returncode == 2
    assert "'bnech'" in done.stderr and "choose from" in done.stderr and "bench" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "lateness"], "'lateness'"),
        (["--idle-seconds", "0"], "give seconds, more than 0"),
        (["--idle-seconds", "nan"], "give seconds, more than 0"),
        (["--idle-seconds", "soon"], "'soon'"),
        (["--start-method", "magic"], "'magic'"),
    ],
)
def test_wrong_option_is_refused_with_its_value(arguments: list[str], said: str) -> None:
    done = minipool("bench", *arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_no_command_prints_the_help() -> None:
    done = minipool()
    assert done.returncode == 0 and "usage: minipool" in done.stdout and "bench" in done.stdout


def test_version_is_the_package_version() -> None:
    import minipool as package

    assert minipool("--version").stdout == f"minipool {package.__version__}\n"


def test_ratios_are_taken_round_by_round() -> None:
    """What slows one round down slows both sides of it, and cancels out."""
    floor = Series("floor", "floor", "s", (1.0, 10.0, 1.0))
    ours = Series("ours", "ours", "s", (2.0, 20.0, 3.0))
    assert over("r", "r", ours, floor).series.rounds == (2.0, 2.0, 3.0)
    assert above("d", "d", ours, floor).series.rounds == (1.0, 10.0, 2.0)
    assert ours.value == 3.0  # the median


def test_target_is_the_most_that_is_ok() -> None:
    series = Series("a", "a", "x", (1.3,))
    assert Result(series, 1.3).verdict == "ok"
    assert Result(series, 1.29).verdict == "MISSED"
    assert Result(series).verdict == ""


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (9.8765e-6, "s", "9.88 µs"),
        (0.0123, "s", "12.3 ms"),
        (-0.005, "s", "-5.00 ms"),
        (0.0, "s", "0.00 µs"),
        (1_234_567, "B", "1.23 MB"),
        (321, "B", "0.32 kB"),
        (0.0, "ticks", "0 ticks"),
        (1.2549, "x", "1.25 x"),
    ],
)
def test_values_are_shown_in_a_unit_that_fits(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text


@pytest.mark.skipif(not procfs.available(), reason="needs /proc")
def test_pinning_takes_every_process_and_lets_it_go_again(start_method: str) -> None:
    """This process, its children and its fork server's children share one core, for a while."""
    allowed = os.sched_getaffinity(0)
    with Bare(multiprocessing.get_context(start_method)) as bare:
        bare.wait_ready()
        with procfs.pinned() as core:
            assert core == max(allowed)
            assert os.sched_getaffinity(0) == os.sched_getaffinity(bare.pid) == {max(allowed)}
            assert bare.caller()() == 1
        assert os.sched_getaffinity(0) == os.sched_getaffinity(bare.pid) == allowed
