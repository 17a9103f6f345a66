"""Nesting: a pool that is opened as a module is imported must not be opened again by its workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import scripts
from minipool import Pool
from workers import getpid

COUNTED = """
with open({counts!r}, "a") as file:
    file.write("!")
from minipool import Pool
class Model:
    def answer(self): return 42
def answer(): return 42
"""
IMPORTS = """
    import sys
    if sys.argv[2] == "above":
        import app

    def main():
        try:
            import app
            print(app.pool.call("answer"))
            app.pool.close()
        except Exception as error:
            print(type(error).__name__, error)

    if __name__ == "__main__":
        main()
"""


def run(tmp_path: Path, app: str, *args: str, script: str = IMPORTS) -> tuple[str, int]:
    """Run a script beside a module `app`; return its output and how often `app` was imported."""
    counts = tmp_path / "counts"
    app = COUNTED.format(counts=str(counts)) + app.replace("METHOD", repr(args[0]))
    (tmp_path / "app.py").write_text(app)
    env = scripts.environment(first_path=str(tmp_path))
    exitcode, out, err = scripts.run(tmp_path, script, *args, env=env)
    assert exitcode == 0, err
    return out, len(counts.read_text())


WITHOUT_OPEN = "make the pool there without `open()`, as its first use opens it, or open it in"


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize(
    ("app", "remedy"),
    [
        ("pool = Pool(Model, size=2, start_method=METHOD).open()", WITHOUT_OPEN),
        (
            "pool = Pool(Model, size=2, start_method=METHOD)\npool.call('answer')",
            "make the pool there, and put `call()`, which opens the pool as it is its first use, "
            "into a function",
        ),
        (
            "with Pool(Model, size=2, start_method=METHOD) as pool:\n    pool.call('answer')",
            "put the `with` block into a function",
        ),
        (
            "def opened():\n    return Pool('app:Model', size=2, start_method=METHOD).open()\n"
            "pool = opened()",
            WITHOUT_OPEN,
        ),
        (
            "pool = Pool(size=2, start_method=METHOD, warm_up=[(answer, ())]).open()",
            WITHOUT_OPEN,
        ),
    ],
    ids=["open", "first-use", "with", "named", "warm-up"],
)
def test_module_that_opens_a_pool_of_its_own_class_is_told_at_once(
    app: str, remedy: str, method: str, tmp_path: Path
) -> None:
    """The module and what to do, and one import for each of the first workers."""
    out, imports = run(tmp_path, app, method, "below")
    assert out.startswith("PoolStartError") and out.count("\n") == 1
    assert "module 'app'" in out and f"{tmp_path / 'app.py'}, line " in out
    assert remedy in out and out.count("`open()`") == remedy.count("`open()`")
    assert imports <= 8, "of some starts at most"


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_module_that_the_main_script_imports_is_named_as_well(method: str, tmp_path: Path) -> None:
    """A worker that is still importing the main script cannot say so: its parent does."""
    script = IMPORTS.replace("        import app\n\n", "        try:\n            import app\n"
                             "        except Exception as error:\n"
                             "            if __name__ != '__main__':\n                raise\n"
                             "            print(type(error).__name__, error)\n"
                             "            sys.exit()\n\n", 1)  # fmt: skip
    # Workers see the arguments of the program: `above` for them too.
    app = "pool = Pool(Model, size=2, start_method=METHOD).open()"
    out, imports = run(tmp_path, app, method, "above", script=script)
    assert out.startswith("PoolStartError") and "module 'app'" in out
    assert "make the pool there without `open()`" in out
    assert imports <= 4


def test_module_that_is_preloaded_may_not_open_a_pool(tmp_path: Path) -> None:
    """It would be the fork server's, and that of a fork server of the fork server's."""
    app = "pool = Pool(size=2, start_method=METHOD, preload=['app']).open()"
    out, imports = run(tmp_path, app, "forkserver", "below")
    assert "PoolStartError" in out and "module 'app'" in out and "without `open()`" in out
    assert imports <= 4  # this program, the fork server, two workers


def test_what_the_text_advises_works(start_method: str, tmp_path: Path) -> None:
    app = "pool = Pool(Model, size=2, start_method=METHOD)"
    assert run(tmp_path, app, start_method, "below")[0] == "42\n"


def test_module_may_open_a_pool_whose_workers_do_not_import_it(
    start_method: str, tmp_path: Path
) -> None:
    """Forked workers import nothing, and others not what is only another module's."""
    module = "Model" if start_method == "fork" else "'workers:Counter'"
    app = f"pool = Pool({module}, size=1, start_method=METHOD).open()\n"
    app += "answer = pool.call('add', 42) if METHOD != 'fork' else 42\n"
    app += "pool.close()\n"
    script = "import sys\nif __name__ == '__main__':\n    import app\n    print(app.answer)\n"
    assert run(tmp_path, app.replace("METHOD", repr(start_method)), start_method, script=script) == (
        "42\n", 1,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_call_whose_function_is_in_such_a_module_says_so(method: str, tmp_path: Path) -> None:
    """The worker is ready, and would open one more pool before it could call anything."""
    app = "pool = Pool(size=1, start_method=METHOD).open()"
    script = (
        IMPORTS.replace('"answer"', "app.answer")
        .replace("            app.pool.close()\n", "")
        .replace("        except", "        except ZeroDivisionError: pass\n        except")
    )
    out, imports = run(tmp_path, app, method, "below", script=script)
    assert out.startswith("PoolStartError") and "module 'app'" in out
    assert "to find what it is to call" in out
    assert imports == 2


class Nests:
    """Has a pool of its own from its start, and makes another in a call."""

    def __init__(self, start_method: str) -> None:
        self.start_method = start_method
        self.inner = Pool(size=1, start_method=start_method).open()

    def pids(self) -> list[int]:
        with Pool(size=1, start_method=self.start_method) as other:
            return [self.inner.call(getpid), other.call(getpid)]

    def close(self) -> None:
        self.inner.close()


def test_worker_may_have_pools_of_its_own(start_method: str) -> None:
    with Pool(Nests, args=(start_method,), size=1, start_method=start_method) as pool:
        pids: Any = pool.call("pids")
        assert len({*pids, pool.workers()[0].pid}) == 3


def imports_and_opens(start_method: str, folder: str) -> int:
    """Run in a worker that is ready: what its own code imports may open a pool."""
    import sys

    sys.path.insert(0, folder)
    try:
        import opens_at_its_top  # type: ignore[import-not-found]
    finally:
        sys.path.remove(folder)
    answer: int = opens_at_its_top.answer
    return answer


def test_worker_that_is_ready_may_import_what_opens_a_pool(
    start_method: str, tmp_path: Path
) -> None:
    (tmp_path / "opens_at_its_top.py").write_text(
        f"from minipool import Pool\nwith Pool(size=1, start_method={start_method!r}) as pool:\n"
        f"    answer = pool.call(abs, -42)\n"
    )
    with Pool(size=1, start_method=start_method) as pool:
        assert pool.call(imports_and_opens, start_method, str(tmp_path)) == 42
