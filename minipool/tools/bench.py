"""Measure minipool on this machine, beside the floor: the least that Python needs for the same.

Floor and minipool run in one process, alternately, in small batches; each figure is the median of
the rounds, with the lowest and the highest round behind it. Ratios are good only on a machine
that is quiet otherwise. Lines with = are comparisons; some have a target.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import sys
from typing import Any, Callable

from .. import __version__
from ..engine.launch import main_name
from . import floors, procfs
from .conversations import sessions
from .costs import idle, imports, memory, recovery, startup
from .deaths import deaths
from .figures import Group, Result
from .hearing import hooks
from .rounds import Plan
from .speed import latency, sleepers, throughput
from .watching import watching

HELP = "measure speed, memory and idle cost beside the floor"

GROUPS: dict[str, Callable[[Plan], list[Group]]] = {
    "latency": latency,
    "hooks": hooks,
    "sessions": sessions,
    "throughput": throughput,
    "sleepers": sleepers,
    "startup": startup,
    "recovery": recovery,
    "deaths": deaths,
    "memory": memory,
    "idle": idle,
    "watching": watching,
    "import": imports,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the bench can be told."""
    methods = multiprocessing.get_all_start_methods()
    default = "forkserver" if "forkserver" in methods else "spawn"
    parser.add_argument("--only", action="append", choices=list(GROUPS), metavar="NAME",
                        help=f"one group (may be repeated): {', '.join(GROUPS)}")  # fmt: skip
    parser.add_argument("--start-method", choices=methods, default=default,
                        help=f"how processes are started (default: {default})")  # fmt: skip
    parser.add_argument("--peers", action="store_true",
                        help="also loky, pebble and mpire, where they are installed, and all "
                        "others in the throughput table")  # fmt: skip
    parser.add_argument("--idle-seconds", type=_seconds, metavar="S",
                        help="how long the idle pool is watched (default: 30)")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="a few rounds only: shows that it works, not how fast")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: give seconds, more than 0")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0 whatever comes out, as a target missed is a figure and no failure."""
    logging.getLogger("minipool").addHandler(logging.NullHandler())  # deaths are our own doing
    context = multiprocessing.get_context(arguments.start_method)
    if arguments.start_method == "forkserver":
        _start_server(context)
    plan = Plan(context, peers=arguments.peers)
    if arguments.quick:
        plan = plan._replace(rounds=3, batch=25, stretch=0.02, repeats=2, idle_seconds=0.5)
    if arguments.idle_seconds is not None:
        plan = plan._replace(idle_seconds=arguments.idle_seconds)
    names = [name for name in GROUPS if not arguments.only or name in arguments.only]
    facts = environment(plan)
    groups: list[Group] = []
    if not arguments.json:
        print(_headline(facts), flush=True)
    for name in names:
        found = GROUPS[name](plan)
        groups += found
        if not arguments.json:
            _print_lines(found)
    if arguments.json:
        print(json.dumps(report(facts, groups), indent=1))
    else:
        _print_targets(groups)
    return 0


def _start_server(context: Any) -> None:
    """Start the fork server with both sides' code loaded, so that neither has to import it."""
    from multiprocessing import forkserver

    context.set_forkserver_preload(["__main__", main_name(), floors.__name__])
    forkserver.ensure_running()


def environment(plan: Plan) -> dict[str, Any]:
    """Return what the figures depend on, apart from minipool."""
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else []
    return {
        "minipool": __version__,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "usable_cpus": len(procfs.cores()) or os.cpu_count(),
        "start_method": plan.method,
        "load_average": load,
    }


def report(facts: dict[str, Any], groups: list[Group]) -> dict[str, Any]:
    """Return everything as one object for JSON. Times in seconds, sizes in bytes."""
    return {
        "environment": facts,
        "groups": {group.name: group.as_dict() for group in groups},
        "targets": [result.as_dict() for result in _with_targets(groups)],
    }


def _with_targets(groups: list[Group]) -> list[Result]:
    return [result for group in groups for result in group.results if result.target is not None]


def _headline(facts: dict[str, Any]) -> str:
    load = facts["load_average"]
    text = (
        f"minipool {facts['minipool']} on {facts['implementation']} {facts['python']}, "
        f"{facts['system']} {facts['machine']}, {facts['usable_cpus']} cores, "
        f"start method {facts['start_method']}"
    )
    if load:
        text += f"\nload average {load[0]:.2f}: the quieter the machine, the better the figures"
    if sys.dont_write_bytecode:
        text += (
            "\ncompiled files are not written (PYTHONDONTWRITEBYTECODE): where there are none, "
            "each spawned process compiles what it imports, which takes time and memory"
        )
    return text


def _print_lines(groups: list[Group]) -> None:
    for group in groups:
        print()
        for line in group.lines():
            print(line)
    sys.stdout.flush()


def _print_targets(groups: list[Group]) -> None:
    results = _with_targets(groups)
    if results:
        print("\ntargets")
    for result in results:
        print(f"  {result.line(62)}")
