"""The command line: `python -m minipool <command>`.

Each command is a module with `HELP`, one line about it; `add_arguments(parser)`; and
`run(arguments)`, which returns the exit status. Commands are listed in `COMMANDS`, and nowhere
else.
"""

from __future__ import annotations

import argparse
import os
import signal
from types import ModuleType
from typing import Any, Sequence

from .. import __version__
from ..observe import top
from . import bench, dashboard

COMMANDS: dict[str, ModuleType] = {"bench": bench, "top": top, "dashboard": dashboard}

_INTERRUPTED = 130  # what a shell reports for a command that SIGINT ended
_TERMINATED = 143  # the same of SIGTERM


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; without one, print the help.

    `argv` is what follows the program's name; None takes it from `sys.argv`.

    Raises:
        SystemExit: after `--help`, `--version`, or a message on what is wrong with the arguments.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    if os.getpid() == 1:  # of a container, where the kernel sends no signal its default
        signal.signal(signal.SIGTERM, _end)
    try:
        return int(COMMANDS[arguments.command].run(arguments))
    except KeyboardInterrupt:
        return _INTERRUPTED


def _end(signum: int, frame: Any) -> None:
    raise SystemExit(_TERMINATED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minipool", description="A pool of long-lived, stateful worker processes."
    )
    parser.add_argument("--version", action="version", version=f"minipool {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, module in COMMANDS.items():
        module.add_arguments(
            commands.add_parser(name, help=module.HELP, description=module.__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        )  # fmt: skip
    return parser
