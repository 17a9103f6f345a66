"""README is true: its code runs, its tables are those of the code, its commands are those of CI."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from minipool import EVENTS, MinipoolError, PoolConfig, PoolStats, errors
from minipool.engine.states import TRANSITIONS, WorkerState
from scripts import environment, run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# A fence, with the comment right before it, if there is one.
BLOCKS = re.findall(
    r"(?:^<!-- ([^\n]*) -->\n)?^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL
)
PYTHON = [(comment, code) for comment, language, code in BLOCKS if language == "python"]
SHELL = [(comment, code) for comment, language, code in BLOCKS if language == "sh"]

POOL = """\
import math
import os
import time

import minipool


class Model:
    def __init__(self, path):
        self.path = path

    def predict(self, x):
        return 2 * x


if __name__ == "__main__":
    with minipool.Pool(Model, args=("weights.bin",), size=2) as pool:
"""


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table whose first column has this heading, without its head."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows
    return rows


def code(cell: str) -> str:
    """Return what stands in the cell's backquotes."""
    found = re.fullmatch(r"`([^`]+)`", cell)
    assert found, f"{cell!r} is not one piece of code"
    return found[1]


@pytest.mark.parametrize("block", PYTHON, ids=[f"block{i}" for i in range(len(PYTHON))])
def test_block_runs_as_it_stands(tmp_path: Path, block: tuple[str, str]) -> None:
    """A piece that needs `pool` gets the one that README describes; the others are programs."""
    comment, program = block
    assert comment in ("", "needs: pool")
    if comment:
        program = POOL + textwrap.indent(program, 8 * " ")
    status, out, err = run(tmp_path, program)
    assert status == 0 and "Traceback" not in err, err
    for promised in re.findall(r"print\(.*\)  # (.+?):", program):
        assert promised in out.splitlines()


def test_quickstart_is_the_example_and_has_twelve_lines_of_code() -> None:
    hello = (ROOT / "examples" / "hello.py").read_text()
    assert PYTHON[0][1] == hello
    assert len([line for line in hello.splitlines() if line.strip()]) == 12


def test_options_are_those_of_the_config() -> None:
    described = [(code(name), ast.literal_eval(code(value))) for name, value, _ in table("option")]
    assert described == [(field.name, field.default) for field in dataclasses.fields(PoolConfig)]


def test_errors_are_the_public_ones() -> None:
    public = [
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, MinipoolError)
    ]
    assert [code(row[0]) for row in table("error")] == public


def test_errors_say_which_builtin_they_are_too() -> None:
    for name, what, *_ in table("error"):
        also = re.findall(r"\(an? `(\w+)`\)", what)
        bases = [base.__name__ for base in getattr(errors, code(name)).__bases__]
        assert also == [base for base in bases if not hasattr(errors, base)]


def test_events_are_those_that_are_emitted() -> None:
    assert {
        code(name): (when, numbers, facts) for name, when, numbers, facts in table("event")
    } == (EVENTS)


def test_states_and_their_changes_are_those_of_the_code() -> None:
    described = {
        code(state): set(re.findall(r"`(\w+)`", after)) for state, _, after in table("state")
    }
    assert described == {
        state.name.lower(): {after.name.lower() for after in TRANSITIONS[state].values()}
        for state in WorkerState
    }


def test_figures_it_points_to_are_in_the_stats() -> None:
    named = re.findall(r"stats\(\)\.(\w+)", README)
    assert named and set(named) <= set(PoolStats._fields)


def test_commands_are_those_that_ci_runs() -> None:
    """CI finds each command by its marker; what it extracts is what a reader would type."""
    script = (ROOT / ".ci" / "run").read_text()
    function = re.search(r"^command_of\(\) \{.*?^\}", script, re.MULTILINE | re.DOTALL)
    assert function
    commands = dict(SHELL)
    for marker in ("main job", "test command"):
        assert f'command_of "{marker}"' in script
        found = subprocess.run(
            ["bash", "-euc", f'{function[0]}; command_of "{marker}"'],
            cwd=ROOT, capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        assert found.stdout == commands[marker]
    assert commands["main job"] == "python3 examples/quickstart.py\n"


def test_command_of_the_benchmark_is_there() -> None:
    assert ("", "python3 -m minipool bench\n") in SHELL
    for option in ("--peers", "--json"):
        assert f"`{option}`" in README
    done = subprocess.run(
        [sys.executable, "-m", "minipool", "bench", "--help"],
        env=environment(), capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--peers" in done.stdout and "--json" in done.stdout


def test_files_it_names_exist() -> None:
    named = re.findall(r"`((?:minipool|tests|examples|\.ci)/[\w./-]+)`", README)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_reading_order_leaves_out_no_file_of_the_engine() -> None:
    files = [*(ROOT / "minipool").glob("*.py"), *(ROOT / "minipool" / "engine").glob("*.py")]
    names = [str(path.relative_to(ROOT)) for path in files if not path.name.startswith("__")]
    assert [name for name in sorted(names) if f"`{name}`" not in README] == []
