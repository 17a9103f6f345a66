"""The dashboard's page in a real browser: what an operator sees, and that it is true."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Iterator

import pytest

import browser
import scripts
from browser import Browser
from gates import Gate, pass_gate
from minipool import Pool
from minipool.observe import dashboard as module
from minipool.observe.dashboard import Dashboard
from workers import Counter, DiesOnCall

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not ((browser.CHROMIUM and browser.DRIVER) or os.environ.get("BROWSER_TESTS")),
        reason="chromium and chromedriver are not installed",
    ),
]

MARKUP = '<img src=x onerror="document.title=\'owned\'"><b>bold</b> & "co" \'</script>'


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.2)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Browser]:
    """A browser, whose console says nothing bad until the end."""
    with browser.browser(tmp_path) as made:
        yield made
        complaints = [each for each in made.complaints() if "ERR_CONNECTION_REFUSED" not in each]
        assert not [each for each in complaints if "ERR_INCOMPLETE_CHUNKED" not in each]


@pytest.fixture
def pool() -> Iterator[Pool[Counter]]:
    with Pool(Counter, size=2, name="cooks") as made:
        yield made


def shown(page: Browser, dashboard: Dashboard) -> Browser:
    page.open(dashboard.url)
    page.wait("!document.getElementById('board').hidden")
    return page


def names(selector: str, text: str) -> str:
    """Return the expression that an element says so."""
    return f"document.querySelector('{selector}').textContent.includes({text!r})"


def test_values_change_while_load_runs(page: Browser, pool: Pool[Counter]) -> None:
    with pool.dashboard() as dashboard:
        shown(page, dashboard)
        assert page.text("#word") == "healthy" and page.text("#score") == "100"
        assert page.text("#card-latency .quiet") == "no calls yet"
        assert page.text("#value-latency") == "\u2013"
        for _ in range(50):
            pool.call("add", 1)
        page.wait(names("#card-throughput .quiet", "50 calls in all"))
        page.wait(r"/[\d.]+ (µs|ms)/.test(document.getElementById('value-latency').textContent)")
        for _ in range(50):
            pool.call("add", 1)
        page.wait(names("#card-throughput .quiet", "100 calls in all"))
        line = "document.querySelector('#card-throughput path.first').getAttribute('d')"
        before = page.run(f"return {line}")
        page.wait(f"{line} !== {before!r}")
        assert page.run("return document.title").startswith("healthy")


def test_a_busy_and_a_waiting_pool_says_so(page: Browser, gate: Gate) -> None:
    with Pool(size=1, name="jammed") as pool, pool.dashboard() as dashboard:
        shown(page, dashboard)
        threads = [
            threading.Thread(target=pool.call, args=(pass_gate, gate.path)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        gate.wait_arrived()
        page.wait("document.getElementById('value-queue').textContent === '2'")
        page.wait(names("#reasons", "2 callers are waiting"))
        page.wait(names("#rows", "leased"))
        page.wait("document.getElementById('word').textContent !== 'healthy'")
        gate.open(3)
        for thread in threads:
            thread.join()
        page.wait("document.getElementById('value-queue').textContent === '0'")


def test_the_table_tells_why_the_worker_before_ended(page: Browser) -> None:
    with Pool(DiesOnCall, size=1) as pool, pool.dashboard() as dashboard:
        shown(page, dashboard)
        with pytest.raises(Exception):
            pool.call("die", signal.SIGKILL)
        page.wait(names("#rows", "SIGKILL"))
        page.wait(names("#events", "worker.terminate"))
        page.wait(names("#card-errors .quiet", "1 WorkerDied"))


def test_the_selector_shows_every_live_pool(page: Browser, pool: Pool[Counter]) -> None:
    """By the keyboard alone; and a pool that has ended is not called well."""
    with pool.dashboard() as dashboard:
        shown(page, dashboard)
        assert page.text("#name") == "cooks"
        with Pool(Counter, size=3, name="waiters"):
            page.wait("document.getElementById('pool').options.length === 2")
            page.run("document.getElementById('pool').focus()")
            page.press("\ue015")  # arrow down
            page.wait(names("#name", "waiters"))
            page.wait("document.getElementById('rows').children.length === 3")
            assert page.run("return location.search").startswith("?pool=2")
            page.open(page.run("return location.href"))  # what is looked at survives a reload
            page.wait(names("#name", "waiters"))
        page.wait(names("#empty", "This pool has ended"))
        assert page.run("return document.getElementById('board').hidden")
        page.run("document.getElementById('pool').focus()")
        page.press("\ue015")
        page.wait(names("#name", "cooks"))


def test_windows_change_the_time_that_lines_show(page: Browser, pool: Pool[Counter]) -> None:
    with pool.dashboard() as dashboard:
        shown(page, dashboard)
        assert "1 min ago" in page.text("#card-queue .ends")
        page.run("document.querySelector('input[name=window]:checked').focus()")
        for label in ("5 min", "15 min", "60 min"):
            page.press("\ue014")  # arrow right
            page.wait(names("#card-queue .ends", f"{label} ago"))
        assert "window=3600" in page.run("return location.search")
        label = page.run(
            "return document.querySelector('#card-queue svg').getAttribute('aria-label')"
        )
        assert label == "Queue in the last 60 min: from 0 to 0"


def test_a_name_with_markup_stays_text(page: Browser) -> None:
    with Pool(Counter, size=1, name=MARKUP) as pool, pool.dashboard() as dashboard:
        shown(page, dashboard)
        with pool.checkout(session=MARKUP) as worker:
            worker.call("add", 1)
            page.wait("document.querySelector('#rows .session').textContent.length > 1")
            assert page.text("#rows .session") == MARKUP
        assert page.text("#name") == MARKUP
        assert page.text("#pool option") == f"{MARKUP} (healthy)"
        assert page.run("return document.querySelectorAll('img, b').length") == 0
        assert page.run("return document.title") == f"healthy · {MARKUP} · minipool"


def test_a_lost_connection_is_said_and_found_again(page: Browser, tmp_path: Path) -> None:
    pool = Pool(Counter, size=1, name="here and gone").open()
    dashboard = pool.dashboard()
    port = int(dashboard.url.rpartition(":")[2].strip("/"))
    shown(page, dashboard)
    pool.close()
    page.wait("!document.getElementById('line').hidden")
    assert "Disconnected since" in page.text("#line")
    assert page.run("return document.body.className") == "stale"
    with Pool(Counter, size=1, name="back again") as pool, pool.dashboard(port):
        page.wait(names("#name", "back again"))
        page.wait("document.getElementById('line').hidden")
        assert page.run("return document.body.className") == ""


def test_a_process_that_stands_still_is_not_called_well(page: Browser, tmp_path: Path) -> None:
    """The connection is there, but no news: what is shown is of the past, and says so."""
    code = """
        import sys
        from minipool import Pool
        from workers import Counter

        if __name__ == "__main__":
            with Pool(Counter, size=1) as pool:
                print(pool.dashboard().url, flush=True)
                sys.stdin.readline()
    """
    program = scripts.start(tmp_path, code, stdin=-1)
    assert program.stdout is not None
    page.open(program.stdout.readline().strip())
    page.wait("!document.getElementById('board').hidden")
    os.kill(program.pid, signal.SIGSTOP)
    page.wait(names("#line", "No news since"))
    os.kill(program.pid, signal.SIGCONT)
    page.wait("document.getElementById('line').hidden")
    page.open("about:blank")
    assert scripts.finish(program)[0] == 0


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 2560])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_screen(
    page: Browser, pool: Pool[Counter], tmp_path: Path, width: int, scheme: str
) -> None:
    """Nothing but the table scrolls sideways, and words stand out from what is behind them."""
    with pool.dashboard() as dashboard:
        page.look(width, 900, scheme)
        shown(page, dashboard)
        assert page.run("return document.documentElement.scrollWidth") <= width
        for selector in ("#word", ".quiet", "#value-queue", "h3", "thead th", ".brand"):
            assert page.run(CONTRAST, selector) >= 4.5, selector


CONTRAST = """
const parts = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
  const c = [r, g, b][i] / 255;
  return sum + weight * (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
}, 0);
const node = document.querySelector(arguments[0]);
let behind = node;
while (parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
const two = [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor];
const [a, b] = two.map((text) => light(parts(text))).sort((x, y) => y - x);
return (a + 0.05) / (b + 0.05);
"""


def test_everything_has_a_name_that_can_be_read_out(page: Browser, pool: Pool[Counter]) -> None:
    with pool.dashboard() as dashboard:
        shown(page, dashboard)
        page.devtools("Accessibility.enable")
        nodes = page.devtools("Accessibility.getFullAXTree")["nodes"]
    told = [
        (n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]
    ]
    for role, name in [
        ("heading", "cooks"), ("heading", "Workers"), ("heading", "Recent events"),
        ("combobox", "Pool"), ("radio", "1 min"), ("radio", "60 min"), ("group", "Window"),
        ("columnheader", "Why the one before ended"), ("rowheader", "0"), ("region", "Workers"),
    ]:  # fmt: skip
        assert (role, name) in told
    assert all(
        name for role, name in told if role in ("image", "combobox", "radio", "link", "heading")
    )
    assert sum(role == "image" for role, _ in told) == 5
