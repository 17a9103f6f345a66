"""Show every live pool of this user, and what its workers do, as `top` does for processes.

Rates and percentiles are over the last ten seconds; with --once and --json over one interval.
Pools are read from outside and do not notice. A pool of another minipool version, or without
shared memory, cannot be read; other users' pools are not looked for.

keys: q quits, s sorts by the next column, r reverses, arrows and page keys move.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import sys
import time
from typing import Any, Callable, NamedTuple, Sequence

from .._sync import Latch
from . import onlooker
from .onlooker import Unreadable
from .watch import STUCK, PoolView, Watch, Worker, as_object

HELP = "show what the workers of every live pool do, from outside"


# -- for people ----------------------------------------------------------------------------------


class Column(NamedTuple):
    """One column of the table of workers."""

    head: str
    width: int  # below 0: text stands to the left
    text: Callable[[Worker], str]
    key: Callable[[Worker], float]  # to sort by


def _rate(worker: Worker, name: str) -> float:
    value = getattr(worker.rates, name) if worker.rates else None
    return -1.0 if value is None else float(value)


def _lately(head: str, width: int, name: str, text: Callable[[float], str]) -> Column:
    return Column(head, width, lambda w: text(_rate(w, name)), lambda w: -_rate(w, name))


def state_of(worker: Worker) -> str:
    """Return one worker's state in a few words; capitals are for what is wrong."""
    sight = worker.sight
    if worker.stopped_for is not None:
        return f"STOPPED {_time(worker.stopped_for)}"
    if sight.process in ("gone", "zombie"):
        return "DEAD"
    if sight.in_call_for is not None:
        return f"{'STUCK' if worker.stuck else 'calling'} {_time(sight.in_call_for)}"
    return sight.state


def _urgency(worker: Worker) -> float:
    wrong = state_of(worker)[:2].isupper()
    return -1e9 * wrong - (worker.sight.in_call_for or worker.sight.leased_for or 0.0)


COLUMNS = (  # in 80 columns there is room up to MEMORY
    Column("ID", 3, lambda w: str(w.sight.worker_id), lambda w: w.sight.worker_id),
    Column("PID", 7, lambda w: str(w.sight.pid), lambda w: w.sight.pid),
    Column("GEN", 4, lambda w: str(w.sight.generation), lambda w: -w.sight.generation),
    Column("STATE", -15, state_of, _urgency),
    Column("CALLS", 7, lambda w: str(w.sight.calls), lambda w: -w.sight.calls),
    _lately("CALLS/s", 7, "calls", lambda value: _number(value)),
    _lately("P50", 7, "call_p50", lambda value: _time(value)),
    _lately("P99", 7, "call_p99", lambda value: _time(value)),
    _lately("CPU%", 5, "cpu", lambda value: _share(value)),
    Column("MEMORY", 8, lambda w: f"{w.sight.rss_bytes / 1e6:.1f}M", lambda w: -w.sight.rss_bytes),
    _lately("USE%", 5, "utilization", lambda value: _share(value)),
    Column("RAISED", 7, lambda w: str(w.sight.raised), lambda w: -w.sight.raised),
    Column("LEASED", 7, lambda w: _time(w.sight.leased_for), lambda w: -(w.sight.leased_for or 0)),
)


def lines(
    pools: Sequence[PoolView],
    unreadable: Sequence[Unreadable],
    column: int = 0,
    reverse: bool = False,
) -> list[tuple[str, str]]:
    """Return the screen as lines of text, each with what it is: pool, head, worker, bad, note."""
    found: list[tuple[str, str]] = []
    heads = [each.head + "*" * (index == column) for index, each in enumerate(COLUMNS)]
    for pool in pools:
        found += _pool_lines(pool)
        found.append((_in_columns(heads), "head"))
        for worker in sorted(pool.workers, key=COLUMNS[column].key, reverse=reverse):
            wrong = state_of(worker)[:2].isupper()
            text = _in_columns([each.text(worker) for each in COLUMNS])
            found.append((text, "bad" if wrong else "worker"))
        found.append(("", "note"))
    for one in unreadable:
        name = f"{_printable(one.name)}  " if one.name else ""
        found.append((f"{name}pid {one.pid}: {one.reason}", "note"))
    return found


def _in_columns(cells: Sequence[str]) -> str:
    widths = [each.width for each in COLUMNS]
    return " ".join(
        cell.rjust(width) if width > 0 else cell.ljust(-width) for cell, width in zip(cells, widths)
    )


def _pool_lines(pool: PoolView) -> list[tuple[str, str]]:
    """Return how a pool stands, what it did lately, and what it did in all."""
    sight, rates = pool.sight, pool.rates
    status = sight.status
    if pool.stopped_for is not None:
        status = f"STOPPED {_time(pool.stopped_for)}"
    elif status == "silent":
        status = f"SILENT {_time(sight.told_for)}"
    states = [worker.sight.state for worker in pool.workers]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    first = (
        f"{_printable(sight.name)}  pid {sight.pid}  {status}  {len(states)} of {sight.size} "
        f"workers{': ' + counts if counts else ''}; {sight.waiting} waiting"
    )
    lately = "  this is the first look: no rates yet"
    if rates is not None:
        lately = (
            f"  {_number(rates.calls)} calls/s: p50 {_time(rates.call_p50)}, p99 "
            f"{_time(rates.call_p99)}; wait p50 {_time(rates.wait_p50)}, p99 "
            f"{_time(rates.wait_p99)}; use {_share(rates.utilization)}%, cpu {_share(rates.cpu)}%"
        )
    in_all = (
        f"  up {_time(sight.at - sight.opened)}: {sight.started} started, {sight.lost} died, "
        f"{sight.retired} retired, {sight.start_failures} failed to start"
    )
    wrong = status[:2].isupper() or (sight.size > 0 and not states)
    return [(first, "bad" if wrong else "pool"), (lately, "note"), (in_all, "note")]


def _printable(text: str) -> str:
    """Return a name with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _time(seconds: float | None) -> str:
    if seconds is None or seconds < 0:
        return "-"
    if seconds < 0.0009995:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{hours:.0f} h"


def _number(value: float) -> str:
    return "-" if value < 0 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _share(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.0f}"


# -- the screen ----------------------------------------------------------------------------------


class Screen:
    """The live view in a terminal: what is shown, in what order, from which line on."""

    def __init__(self, window: Any, watch: Watch, interval: float) -> None:
        self._window, self._watch, self._interval = window, watch, interval
        self._column, self._reverse, self._top = 0, False, 0
        self._looks: tuple[Any, Any] = ((), ())

    def run(self) -> None:
        """Look, draw, and wait for a key or the next look, until told to quit."""
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                self._looks = self._watch.look()
                due = time.monotonic() + self._interval
            self._draw()
            # A Ctrl-C that comes just before this wait is heard after it: so it is a short one.
            self._window.timeout(max(0, min(1000, int((due - time.monotonic()) * 1000) + 1)))
            key = self._window.getch()
            if not self._press(key) or (key < 0 and _hung_up()):
                return

    def _press(self, key: int) -> bool:
        """Do what a key asks for; False: quit."""
        import curses

        page = max(1, self._window.getmaxyx()[0] - 2)
        moves = {
            curses.KEY_UP: -1, curses.KEY_DOWN: 1, curses.KEY_PPAGE: -page,
            curses.KEY_NPAGE: page, curses.KEY_HOME: -self._top,
        }  # fmt: skip
        if key in (ord("q"), ord("Q")):
            return False
        if key == ord("s"):
            self._column = (self._column + 1) % len(COLUMNS)
        elif key == ord("r"):
            self._reverse = not self._reverse
        elif key in moves:
            self._top += moves[key]
        return True

    def _draw(self) -> None:
        import curses

        looks = {"pool": curses.A_BOLD, "head": curses.A_REVERSE, "bad": curses.A_STANDOUT}
        pools, unreadable = self._looks
        text = lines(pools, unreadable, self._column, self._reverse)
        height, width = self._window.getmaxyx()
        self._top = max(0, min(self._top, len(text) - height + 1))
        workers = sum(len(pool.workers) for pool in pools)
        title = (
            f"minipool top  {time.strftime('%H:%M:%S')}  pools: {len(pools)}, workers: {workers}"
        )
        title += "   q quit, s sort, r reverse"
        self._window.erase()
        shown = [(title, "note"), *text[self._top : self._top + height - 1]]
        for y, (line, kind) in enumerate(shown[:height]):
            with contextlib.suppress(curses.error):  # it has just been made smaller
                self._window.addnstr(y, 0, line, max(0, width - 1), looks.get(kind, 0))
        self._window.refresh()


def _hung_up() -> bool:
    """Tell whether the terminal is gone: then no wait for a key takes any time."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), 0)
    return bool(poll.poll(0))


# -- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what top can be told."""
    parser.add_argument("pid", nargs="?", type=int, metavar="PID",
                        help="only the pools of this process")  # fmt: skip
    parser.add_argument("--once", action="store_true", help="print what there is, and end")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    parser.add_argument("--interval", type=_seconds, default=1.0, metavar="S",
                        help="seconds between two looks (default: 1)")  # fmt: skip
    parser.add_argument("--stuck", type=_seconds, default=STUCK, metavar="S",
                        help="a call that takes longer is called stuck (default: 10)")  # fmt: skip


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: give seconds, more than 0")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Show pools; 0, or 1 if there was none, or 2 if that cannot be done here."""
    if not onlooker.available():
        return _refuse("top reads /proc, which this system does not have")
    watch = Watch(arguments.pid, arguments.stuck)
    if arguments.once or arguments.json:
        return _once(watch, arguments)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _refuse("top needs a terminal; --once and --json do without")
    try:
        import curses
    except ImportError:
        return _refuse("this Python has no curses; --once and --json do without")
    try:
        curses.wrapper(_live, watch, arguments)
    except curses.error as problem:
        return _refuse(f"this terminal is of no use ({problem}); --once and --json do without")
    return 0


def _live(window: Any, watch: Watch, arguments: argparse.Namespace) -> None:
    import curses

    with contextlib.suppress(curses.error):  # it cannot hide its cursor
        curses.curs_set(0)
    Screen(window, watch, arguments.interval).run()


def _once(watch: Watch, arguments: argparse.Namespace) -> int:
    pools, unreadable = watch.look()
    if pools:  # rates need two
        Latch().wait(arguments.interval)
        pools, unreadable = watch.look()
    if arguments.json:
        print(json.dumps(as_object(pools, unreadable), indent=1))
    else:
        for line, _ in lines(pools, unreadable):
            print(line)
        if not pools and not unreadable:
            print("no live pool was found", file=sys.stderr)
    return 0 if pools else 1


def _refuse(why: str) -> int:
    print(f"minipool: {why}", file=sys.stderr)
    return 2
