"""The house: each module imports only from the rooms before it."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "minipool"

# In order: a module may import from those before it in this list, and from no other.
ROOMS = [
    "_sync", "errors", "telemetry", "backoff", "breaker", "retry", "commands", "cgroup", "config",
    "engine.states", "engine.descriptors", "engine.bell", "engine.table", "engine.shape", "engine.traces", "engine.mainmodule", "engine.whereabouts", "engine.absence", "engine.wire", "engine.sigpipe", "engine.channel", "engine.portable",
    "engine.conversation", "engine.baggage", "engine.voice", "engine.assignment", "engine.workerend",
    "engine.transcript", "engine.resources", "engine.shortage", "engine.blackbox", "engine.lifeline", "engine.dispositions",
    "engine.forked_locks", "engine.child", "engine.preloaded", "engine.health", "engine.sizing",
    "engine.oom", "engine.fork_server", "engine.popen", "engine.standstill", "engine.process", "engine.deadend", "engine.inquest", "engine.handle", "engine.verdict", "engine.laden",
    "engine.nesting", "engine.launch", "engine.diagnosis", "engine.turnstile", "engine.passage", "engine.poller", "engine.jobs", "engine.logrelay",
    "engine.teller", "engine.scribe", "engine.fleet", "engine.care", "engine.staff", "engine.holdups", "engine.manager",
    "engine.pace", "engine.refusal", "engine.desk", "engine.tally",
    "store.host", "store.files", "store.open_files", "store.owners", "store.schema", "store.rows",
    "store.database", "store.sqlite_store", "records", "nearness", "housekeeping", "sessions", "status", "lease", "deadline", "warmup", "opening", "views",
    "signals", "lifecycle", "inspection", "pool", "signatures", "programs",
    "observe.reading", "observe.score", "observe.ticker", "observe.metrics",
    "observe.openmetrics", "observe.optimizer", "observe.autoscale",
    "tools.procfs", "observe.onlooker", "observe.watch", "observe.top",
    "observe.portrait", "observe.board", "observe.inside", "observe.outside", "observe.news",
    "observe.script", "observe.page", "observe.visitors", "observe.dashboard",
    "tools.floors", "tools.figures", "tools.peers", "tools.rounds", "tools.dashboard",
    "tools.speed", "tools.hearing", "tools.costs", "tools.deaths", "tools.conversations",
    "tools.watching", "tools.bench", "tools.cli", "__main__",
]  # fmt: skip
HALLS = {
    "",
    "engine",
    "observe",
    "store",
    "tools",
}  # packages: their __init__ may name anything, lazily


def _modules() -> dict[str, ast.Module]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix("__init__").removesuffix(".")] = ast.parse(path.read_text())
    return found


def _imports(name: str, tree: ast.Module) -> set[str]:
    """Return the modules of the package that a module imports, wherever in it."""
    here = name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "minipool" for alias in node.names), (
                f"{name} imports minipool absolutely, so it could not be vendored"
            )
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.module is None or node.module.split(".")[0] != "minipool" or node.level, name
        if node.level:
            base = here[: len(here) - (node.level - 1)]
            if node.module:
                base = [*base, *node.module.split(".")]
            for alias in node.names:
                path = ".".join([*base, alias.name])
                found.add(path if path in ROOMS else ".".join(base))
    return found


def test_every_module_has_its_room() -> None:
    assert set(_modules()) - HALLS == set(ROOMS)


def test_modules_import_only_from_rooms_before_theirs() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, tree in _modules().items()
        if name not in HALLS
        for other in _imports(name, tree)
        if other not in HALLS and ROOMS.index(other) >= ROOMS.index(name)
    ]
    assert not wrong
