"""OpenMetrics: what is told is true, and every reader can read it."""

from __future__ import annotations

import shutil
import subprocess
import threading
from typing import Any, Iterator

import pytest

import rogues
from ears import wait_until
from minipool import CheckoutTimeout, Pool, WorkerDied
from minipool.observe import openmetrics
from minipool.observe.openmetrics import exposition
from openmetrics_parser import Families, Labels, parse
from rogues import Stateful

LAST = 20.0
AWKWARD = 'two\nlines, "quotes", a \\ and <b>ü</b>'


@pytest.fixture
def pool() -> Iterator[Pool[Any]]:
    with Pool(Stateful, size=2, max_size=4, min_size=1, name="p", checkout_timeout=LAST) as made:
        yield made


@pytest.fixture
def story(pool: Pool[Any]) -> str:
    """What is told of a pool that has had some of everything."""
    with pool.checkout(session="ada") as w:
        for _ in range(10):
            w.call("add", 1)
        with pool.checkout(), pytest.raises(CheckoutTimeout):
            pool.checkout(timeout=0)
    with pytest.raises(KeyError):
        pool.call(rogues.raise_it, "KeyError", "k")
    with pytest.raises(WorkerDied):
        pool.call(rogues.kill_self)
    wait_until(pool, lambda: pool.stats().workers_lost == 1)
    with pool.checkout():
        return exposition([pool])


def value(
    families: Families, family: str, suffix: str = "", pool: str = "p", **labels: str
) -> float:
    return families[family][suffix, (("pool", pool), *labels.items())]


def test_story_is_told(story: str) -> None:
    told = parse(story)

    assert value(told, "minipool_worker_count", state="leased") == 1
    assert value(told, "minipool_worker_max") == 4
    assert value(told, "minipool_worker_idle_min") == 1
    assert value(told, "minipool_worker_pending_requests") == 0
    assert value(told, "minipool_worker_timeouts", "_total") == 1
    assert value(told, "minipool_call_time_seconds", "_count") == 11
    assert value(told, "minipool_call_time_seconds", "_bucket", le="+Inf") == 11
    assert value(told, "minipool_call_exceptions", "_total") == 1
    assert value(told, "minipool_errors", "_total", type="WorkerDied") == 1
    assert value(told, "minipool_errors", "_total", type="CheckoutTimeout") == 1
    assert value(told, "minipool_errors", "_total", type="CallTimeout") == 0
    assert value(told, "minipool_worker_ends", "_total", how="lost") == 1
    assert value(told, "minipool_session_checkouts", "_total", affinity="new") == 1
    assert value(told, "minipool_sessions") == 1
    starts = value(told, "minipool_worker_starts", "_total")
    assert value(told, "minipool_worker_create_time_seconds", "_count") == starts >= 2
    assert value(told, "minipool_worker_wait_time_seconds", "_count") == 5
    assert value(told, "minipool_worker_use_time_seconds", "_count") == 4
    used = value(told, "minipool_worker_use_time_seconds", "_sum")
    leased = value(told, "minipool_worker_leased_seconds", "_total")
    assert 0 < used < leased < value(told, "minipool_worker_served_seconds", "_total")
    assert value(told, "minipool_worker_memory_bytes") > 1_000_000


def test_units_and_totals_are_in_the_names(story: str) -> None:
    """As OpenMetrics wants it, and OpenTelemetry where it has a name for it."""
    assert "# TYPE minipool_worker_wait_time_seconds histogram\n" in story
    assert "# UNIT minipool_worker_wait_time_seconds seconds\n" in story
    assert "# UNIT minipool_worker_memory_bytes bytes\n" in story
    assert "# TYPE minipool_worker_timeouts counter\n" in story
    assert "\nminipool_worker_timeouts_total{" in story


def test_labels_are_few_and_stay_few(story: str) -> None:
    """A process, a session or a generation as a label would make series without end."""
    labels = {key for series in parse(story).values() for _, pairs in series for key, _ in pairs}
    assert labels == {"pool", "state", "le", "how", "type", "affinity"}
    assert "ada" not in story


@pytest.mark.parametrize("name", [AWKWARD, "\\", '"', "\\n", "plain"])
def test_name_arrives_whatever_is_in_it(name: str) -> None:
    told = parse(exposition([Pool(size=1, name=name)]))

    assert value(told, "minipool_worker_count", pool=name, state="idle") == 0


def test_half_characters_do_not_break_it() -> None:
    assert openmetrics._escaped("\ud800") == "?"


def test_pools_are_told_apart(pool: Pool[Any]) -> None:
    """Even if they have one name: no series is told twice."""
    pool.call("add", 1)
    other, third = Pool(size=1, name="p"), Pool(size=1, name="q")
    told = parse(exposition([pool, other, third]))

    counts = [
        value(told, "minipool_call_time_seconds", "_count", pool=n) for n in ("p", "p#2", "q")
    ]
    assert counts == [1, 0, 0]


def test_nothing_to_tell_is_told_well() -> None:
    assert all(not series for series in parse(exposition([])).values())


def test_closed_pool_keeps_its_counts(pool: Pool[Any]) -> None:
    pool.call("add", 1)
    pool.close()

    told = parse(exposition([pool]))
    assert value(told, "minipool_call_time_seconds", "_count") == 1
    assert value(told, "minipool_worker_count", state="idle") == 0


def test_counts_never_fall_while_the_pool_is_busy(pool: Pool[Any]) -> None:
    """A reader would take that for a restart. Workers are killed meanwhile, too."""
    over = threading.Event()

    def work(number: int) -> None:
        while not over.is_set():
            with pool.checkout(session=str(number)) as w:
                w.call("add", 1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        before: dict[tuple[str, str, Labels], float] = {}
        for turn in range(60):
            if turn % 20 == 10:
                with pytest.raises(WorkerDied):
                    pool.call(rogues.kill_self)
            for name, series in parse(exposition([pool])).items():
                for (suffix, labels), now in series.items():
                    if suffix:
                        assert now >= before.get((name, suffix, labels), 0), (name, labels)
                        before[name, suffix, labels] = now
    finally:
        over.set()
        for thread in threads:
            thread.join(LAST)


def test_fall_of_a_count_is_not_told(pool: Pool[Any], monkeypatch: Any) -> None:
    pool.call("add", 1)
    exposition([pool])
    reading = openmetrics.read(pool)
    monkeypatch.setattr(
        openmetrics, "read", lambda pool: reading._replace(calls=0, leases=0, call_times=(0,) * 240)
    )

    told = parse(exposition([pool]))
    assert value(told, "minipool_call_time_seconds", "_count") == 1
    assert value(told, "minipool_worker_use_time_seconds", "_count") == 1


def test_official_parser_reads_it(story: str) -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(story)}
    assert set(families) == set(parse(story))
    awkward = exposition([Pool(size=1, name=AWKWARD)])
    samples = [s for f in text_string_to_metric_families(awkward) for s in f.samples]
    assert {sample.labels["pool"] for sample in samples} == {AWKWARD}


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_reads_it(story: str) -> None:
    """It reads the older text format, in which a counter is described under its full name.

    It finds nothing but that OpenTelemetry's name for the count of workers looks like a summary's.
    """
    older = [
        line.replace(line.split()[2], line.split()[2] + "_total", 1)
        if line.startswith("#") and f"# TYPE {line.split()[2]} counter\n" in story
        else line
        for line in story.splitlines()
        if not line.startswith(("# UNIT", "# EOF"))
    ]
    found = subprocess.run(
        ["promtool", "check", "metrics"], input="\n".join([*older, ""]),
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    (lint,) = found.stderr.splitlines()
    assert lint.startswith("minipool_worker_count ") and '"_count" suffix' in lint
    assert found.returncode == 3, "1 would be a text that it cannot read"


BAD = {
    "no end": "# TYPE a gauge\na{} 1\n",
    "something after the end": "# TYPE a gauge\n# EOF\na{} 1\n# EOF\n",
    "empty line": "# TYPE a gauge\n\na{} 1\n# EOF\n",
    "counter without _total": "# TYPE a counter\na{} 1\n# EOF\n",
    "series twice": '# TYPE a gauge\na{x="1"} 1\na{x="1"} 2\n# EOF\n',
    "label twice": '# TYPE a gauge\na{x="1",x="2"} 1\n# EOF\n',
    "family twice": "# TYPE a gauge\na{} 1\n# TYPE b gauge\nb{} 1\n# TYPE a gauge\n# EOF\n",
    "unit not in the name": "# TYPE a gauge\n# UNIT a seconds\na{} 1\n# EOF\n",
    "bare quote": '# TYPE a gauge\na{x="""} 1\n# EOF\n',
    "unknown escape": '# TYPE a gauge\na{x="\\t"} 1\n# EOF\n',
    "no number": "# TYPE a gauge\na{} one\n# EOF\n",
    "negative counter": "# TYPE a counter\na_total{} -1\n# EOF\n",
    "buckets fall": '# TYPE a histogram\na_bucket{le="1"} 2\na_bucket{le="+Inf"} 1\na_count{} 1\na_sum{} 1\n# EOF\n',
    "no last bucket": '# TYPE a histogram\na_bucket{le="1"} 2\na_count{} 2\na_sum{} 1\n# EOF\n',
    "two spaces": "# TYPE a gauge\na{}  1\n# EOF\n",
    "family without a type": "# HELP a b\na{} 1\n# EOF\n",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_parser_of_these_tests_is_strict(text: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        parse(text)


def test_every_family_is_described_once() -> None:
    names = [family.name for family in openmetrics.FAMILIES]
    assert len(set(names)) == len(names)
    assert all(family.about.endswith(".") for family in openmetrics.FAMILIES)
