"""Pools below pools: what a worker imports late, or starts by itself, opens none without end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import scripts
from minipool import Pool, PoolStartError

MOST = 6  # imports of the module that opens a pool, before the whole thing is broken off
COUNTED = """
import os, threading
with open("counts", "a+") as file:
    file.write("!")
    file.seek(0)
    if len(file.read()) > {most}:
        os._exit(9)
from minipool import Pool
"""
CALLS = """
import sys
if __name__ == "__main__":
    try:
        import app
        print(app.pool.call("answer"))
    except Exception as error:
        print(type(error).__name__, error)
"""


def run(folder: Path, script: str, **modules: str) -> tuple[str, int]:
    """Run a script beside some modules; return its output and how often what counts did so."""
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code)
    env = scripts.environment(first_path=str(folder))
    exitcode, out, err = scripts.run(folder, script, env=env)
    assert exitcode == 0, err
    return out, len((folder / "counts").read_text())


def counted(code: str, method: str) -> str:
    return COUNTED.format(most=MOST) + code.replace("METHOD", repr(method))


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_call_that_imports_what_opened_its_pool_opens_no_other(method: str, tmp_path: Path) -> None:
    """Each worker that runs the call would have workers that run it, and so on."""
    app = """
from models import Model
pool = Pool(Model, size=1, start_method=METHOD).open()
pool.call("answer")
"""
    model = "class Model:\n    def answer(self):\n        import app\n"
    out, imports = run(tmp_path, CALLS, app=counted(app, method), models=model)
    assert out.startswith("PoolStartError module 'app'"), out
    assert "a worker of the pool that was opened there before" in out
    assert "make the pool there without `open()`" in out
    assert imports == 2


def test_forked_call_that_imports_the_main_script_anew_opens_no_other(tmp_path: Path) -> None:
    """Under its own name it is one more module, which no guard keeps from opening the pool."""
    script = counted(
        """
from models import Model
pool = Pool(Model, size=1, start_method="fork", call_timeout=10).open()
try:
    print(pool.call("answer"))
except Exception as error:
    print(type(error).__name__, error)
""",
        "fork",
    )
    model = "class Model:\n    def answer(self):\n        import script\n"
    out, imports = run(tmp_path, script, models=model)
    assert out.startswith("PoolStartError module 'script'"), out
    assert imports == 2


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_thread_of_a_module_opens_no_pool_in_a_worker_that_is_ready(
    method: str, tmp_path: Path
) -> None:
    """It outlives the import that has started it, here until the first call."""
    app = """
go, said = threading.Event(), []
class Model:
    def answer(self):
        go.set()
        thread.join(20)
        return said
def bring_up():
    global pool
    go.wait(20)
    try:
        pool = Pool(Model, size=1, start_method=METHOD).open()
        said.append("opened")
    except Exception as error:
        said.append(f"{type(error).__name__} {error}")
thread = threading.Thread(target=bring_up, name="early")
thread.start()
"""
    script = CALLS.replace("import app", "import app; app.go.set(); app.thread.join()")
    out, imports = run(tmp_path, script, app=counted(app, method))
    assert out.startswith("[\"PoolStartError thread 'early' opens a pool"), out
    assert f"({tmp_path / 'app.py'}, line " in out and "start that thread in a function" in out
    assert imports == 2


class OpensItsOwn:
    """Has a pool of its own class below it as soon as it is made."""

    def __init__(self, counts: str, start_method: str) -> None:
        with open(counts, "a+") as file:
            file.write("!")
            file.seek(0)
            if len(file.read()) > MOST:
                os._exit(9)
        args = (counts, start_method)
        self.inner = Pool(OpensItsOwn, args=args, size=1, start_method=start_method).open()


def test_constructor_that_opens_a_pool_of_its_own_class_ends(
    start_method: str, tmp_path: Path
) -> None:
    counts = tmp_path / "counts"
    pool = Pool(OpensItsOwn, args=(str(counts), start_method), size=1, start_method=start_method)
    with pytest.raises(PoolStartError, match="processes would start without end; open it later"):
        pool.open()
    assert len(counts.read_text()) == 2


class Deepens:
    """Has pools of its own class below it, in a function, as it is told."""

    def deepen(self, levels: int) -> int:
        if levels == 0:
            return 0
        with Pool(Deepens, size=1, start_method="fork") as pool:
            return 1 + int(pool.call("deepen", levels - 1))


def test_function_may_open_pools_below_pools_but_not_without_end() -> None:
    assert Deepens().deepen(3) == 3
    with pytest.raises(PoolStartError, match=r"below 8 pools.*a call that leads to itself"):
        Deepens().deepen(20)
