"""Forked workers and modules whose import was under way: no lock of theirs holds up a call."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

import scripts

OPENS = """
from minipool import Pool
def above(x): return x + 1
class Above:
    def late(self):
        import app
        return app.above(1)
pool = Pool({worker}, size=1, start_method="fork", call_timeout=15, init_timeout=15).open()
def below(x): return x + 1
"""
MEETS = """
import importlib, os, threading
from minipool import Pool

pid, entered, go = os.getpid(), threading.Event(), threading.Event()

def value(name):
    return importlib.import_module(name).value

def found(pool):
    return [pool.call(value, name) for name in ("halfway", "package.inner")]

def main():
    threads = [threading.Thread(target=value, args=(name,)) for name in ("halfway", "package.inner")]
    for thread in threads:
        entered.clear()
        thread.start()
        entered.wait(20)
    try:
        with Pool(size=1, start_method="fork", call_timeout=15) as pool:
            print(*found(pool))
            go.set()
            for thread in threads:
                thread.join()
            print(*found(pool), value("halfway"), value("package.inner"))
    finally:
        go.set()
"""
HALFWAY = """
import os, meets
if os.getpid() == meets.pid:
    meets.entered.set()
    meets.go.wait(20)
value = 42
"""


def run(folder: Path, script: str, **modules: str) -> str:
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code)
    exitcode, out, err = scripts.run(
        folder, script, env=scripts.environment(first_path=str(folder))
    )
    assert exitcode == 0, err
    return out


@pytest.mark.parametrize(
    ("worker", "call"),
    [
        ("None", "app.above, 1"),
        ("Above", "app.above, 1"),
        ("Above", "'late'"),
        ("'app:Above'", "'late'"),
    ],
)
def test_worker_has_what_the_module_defines_that_opened_its_pool(
    worker: str, call: str, tmp_path: Path
) -> None:
    """The module's lock was held by the thread that opened the pool, which a worker lacks."""
    script = f"import app\nprint(app.pool.call({call}))\n"
    assert run(tmp_path, script, app=OPENS.format(worker=worker)) == "2\n"


def test_what_is_defined_below_the_opening_is_told(tmp_path: Path) -> None:
    script = """
        import app
        try:
            app.pool.call(app.below, 1)
        except CallMismatch as error:
            print(error)
    """
    script = "from minipool import CallMismatch\n" + textwrap.dedent(script)
    out = run(tmp_path, script, app=OPENS.format(worker=None))
    assert "no function 'below' in `app`" in out
    assert "'app' has not been imported to its end: a worker that is forked meanwhile" in out


def test_worker_imports_anew_what_another_thread_was_importing(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "inner.py").write_text(HALFWAY)
    out = run(tmp_path, "import meets\nmeets.main()\n", meets=MEETS, halfway=HALFWAY)
    assert out == "42 42\n42 42 42 42\n"
