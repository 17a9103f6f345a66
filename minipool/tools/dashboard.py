"""Show pools in a browser.

With a PID, the pools of that process, or without one all of this user's, are looked at from
outside, as `top` does: they need no dashboard of their own, and do not notice. Sessions, errors
and events are not seen from there; `pool.dashboard()` shows those, too.

With the URL of a dashboard that is running, tell how its pools are. The exit status is 0 if all
can serve, 1 if not, 2 if nobody answers.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import parse_qs, urlsplit

HELP = "show the pools of a process in a browser, or ask a running dashboard"
_PATIENCE = 10.0  # seconds for an answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe what follows the command's name."""
    parser.add_argument("target", nargs="?", metavar="PID|URL", help="default: all your processes")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (%(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to serve at (any free one)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    target = arguments.target
    if target is None or target.isdecimal():
        return _serve(None if target is None else int(target), arguments.host, arguments.port)
    if target.startswith(("http://", "https://")):
        return _ask(target)
    print(f"{target!r} is neither a PID nor a URL (http://...)", file=sys.stderr)
    return 2


def _serve(pid: int | None, host: str, port: int) -> int:
    from ..observe.dashboard import Dashboard  # a web server, which the other commands need not
    from ..observe.outside import Outside

    board = Outside(pid)
    board.tick()
    if pid is not None and not board.posts:
        reasons = [one.reason for one in board.unreadable] or ["it has no open pool that is seen"]
        print(f"process {pid}: {'; '.join(reasons)}", file=sys.stderr)
        return 1
    try:
        dashboard = Dashboard(board, host, port)
    except OSError as error:
        print(f"{host}:{port} cannot be served: {error}", file=sys.stderr)
        return 1
    with dashboard:
        print(f"{dashboard.url}  (Ctrl-C ends it)", flush=True)
        board.over.wait()
        print("the process has ended")
    return 0


def _ask(url: str) -> int:
    """Tell what a dashboard's /healthz says."""
    where = urlsplit(url)
    request = urllib.request.Request(f"{where.scheme}://{where.netloc}/healthz")
    for token in parse_qs(where.query).get("token", []):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            return _tell(json.load(answer), 0)
    except urllib.error.HTTPError as refusal:
        with refusal:
            if refusal.code == 503:
                return _tell(json.load(refusal), 1)
            print(f"{url}: {refusal.read().decode(errors='replace').strip()}", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"{url}: no dashboard answers: {error}", file=sys.stderr)
    return 2


def _tell(health: dict[str, Any], status: int) -> int:
    for pool in health["pools"]:
        print(": ".join([f"{pool['name']}: {pool['status']}", *pool["reasons"]]))
    if not health["pools"]:
        print("no pool is open there")
    return status
