"""A main script that opens a pool as it is imported: one error tells it, and nothing else is hidden."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import scripts

TOP = """
import sys
sys.stderr.write("imported\\n")
from minipool import Pool
from workers import Counter
"""
FORMS = {
    "open": "pool = Pool(Counter, size=3, start_method=sys.argv[1]).open()",
    "with": "with Pool(Counter, size=3, start_method=sys.argv[1]) as pool:\n    pass",
    "first-use": "pool = Pool(Counter, size=3, start_method=sys.argv[1])\npool.call('add', 1)",
    "thread": "from concurrent.futures import ThreadPoolExecutor\n"
    "def bring_up():\n    return Pool(Counter, size=3, start_method=sys.argv[1]).open()\n"
    "ThreadPoolExecutor(1).submit(bring_up).result()",
}
served = pytest.mark.parametrize("method", ["forkserver", "spawn"])


@served
@pytest.mark.parametrize("form", FORMS)
def test_missing_guard_costs_one_traceback(form: str, method: str, tmp_path: Path) -> None:
    """That of the program itself; no worker's, and none of the fork server's."""
    code, _, err = scripts.run(tmp_path, TOP + FORMS[form], method)
    assert code == 1
    told = err.replace("imported\n", "")
    lines = told.splitlines()
    own = lines.index("Traceback (most recent call last):")
    assert told.count("Traceback") == 1, told
    assert own <= 11 and lines[-1].startswith("minipool.errors.PoolStartError"), told
    assert "under `if __name__ == '__main__':`" in lines[-1]
    assert f"({tmp_path / 'script.py'}, line " in lines[-1]
    assert ("thread 'ThreadPoolExecutor" in lines[-1]) == (form == "thread")
    assert ("your main script" in lines[-1]) == (form != "thread")
    assert err.count("imported\n") >= 2, "what workers write is to be seen"


@served
def test_thread_that_fails_alone_is_blamed_for_what_its_module_lacks_then(
    method: str, tmp_path: Path
) -> None:
    """The import goes on without what the thread was to make, which is no cause of its own."""
    script = f"""{TOP}
import threading
def bring_up():
    global pool
    pool = Pool(Counter, size=1, start_method=sys.argv[1]).open()
thread = threading.Thread(target=bring_up, name="early")
thread.start()
thread.join()
if __name__ == "__main__":
    pass
print(pool.call("add", 1))
"""
    code, _, err = scripts.run(tmp_path, script, method)
    assert code == 1
    assert "thread 'early' opens a pool" in err and "start that thread in a function" in err
    assert "after that the start failed by NameError: name 'pool' is not defined" in err


@served
def test_script_that_exits_when_it_is_refused_is_told_of_that(method: str, tmp_path: Path) -> None:
    script = f"""{TOP}
try:
    pool = Pool(Counter, size=1, start_method=sys.argv[1]).open()
except Exception as error:
    sys.exit(f"told: {{error}}")
"""
    code, _, err = scripts.run(tmp_path, script, method)
    assert code == 1
    in_server = method == "forkserver" and sys.version_info >= (3, 14)  # which imports it as well
    assert err.count("told: ") == 1 + in_server and "put what opens the pool under" in err


@served
def test_other_failure_of_the_main_script_is_shown_by_its_own_hook(
    method: str, tmp_path: Path
) -> None:
    script = f"""{TOP}
def show(kind, error, trace):
    print("shown:", kind.__name__, error)
if __name__ == "__main__":
    try:
        Pool(Counter, size=1, start_method=sys.argv[1]).open()
    except Exception as error:
        print("told:", error)
else:
    sys.excepthook = show
    raise LookupError("here")
"""
    code, out, err = scripts.run(tmp_path, script, method)
    assert code == 0, err
    assert "shown: LookupError here\n" in out
    assert "told: " in out and "with exit code 1 before it could say anything" in out


@served
def test_process_of_the_programs_own_is_refused_aloud(method: str, tmp_path: Path) -> None:
    """It has no pool behind it that would hear why it ended."""
    script = f"""{TOP}
import multiprocessing
if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=print)
    process.start()
    process.join()
    sys.exit(process.exitcode)
Pool(Counter, size=1, start_method=sys.argv[1]).open()
"""
    code, _, err = scripts.run(tmp_path, script, method)
    assert code == 1
    assert "PoolStartError: your main script" in err and "Traceback" in err
