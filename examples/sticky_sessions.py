"""A chat whose history survives a kill -9 of its worker, and then of the whole program.

    python3 examples/sticky_sessions.py            nothing needs to be installed

The history is the state of a session. It is committed with every answer, so what was answered is
never forgotten: not when the worker dies, nor, because the session is in a file, when this
program dies.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    import minipool
except ImportError:  # a fresh clone; workers take over sys.path, so they find it too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import minipool

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


class Chat:
    """Answers questions; what it knows of a conversation is in the session, not in the worker."""

    def session_started(self, session: minipool.Session) -> None:
        session.local["vocabulary"] = set()  # what cannot or need not travel is made anew

    def say(self, line: str) -> str:
        session = minipool.current_session()
        history = session.setdefault("history", [])
        history.append(line)  # a change deep inside a value is noticed
        session.local["vocabulary"].update(line.split())
        return f"line {len(history)}; {len(session.local['vocabulary'])} words known here"


def talk(pool: minipool.Pool[Chat], *lines: str) -> None:
    with pool.checkout(session="ada") as w:
        for line in lines:
            print(f"  {line!r}: {w.say(line)} (worker: {w.affinity})")


def show(pool: minipool.Pool[Any]) -> list[str]:
    history: list[str] = pool.session_state("ada")["history"]
    print(f"  remembered: {history}", flush=True)
    return history


def first_life(path: str) -> None:
    """Talk, lose the worker, talk on, and then die without a word."""
    with minipool.Pool(Chat, size=2, session_store=path) as pool:
        print("A first worker")
        talk(pool, "hello", "my name is Ada")
        with pool.checkout(session="ada") as w:
            victim = w.pid or 0
        print(f"kill -9 of that worker ({victim})")
        os.kill(victim, KILL)
        talk(pool, "do you remember me")
        show(pool)
        print("kill -9 of this whole program", flush=True)
        os.kill(os.getpid(), KILL)


def second_life(path: str) -> bool:
    """Open the same file again and go on."""
    print("The program, started again")
    with minipool.Pool(Chat, size=2, session_store=path) as pool:
        talk(pool, "and now")
        return show(pool) == ["hello", "my name is Ada", "do you remember me", "and now"]


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--first-life":
        first_life(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="sessions-") as directory:
        path = os.path.join(directory, "sessions.sqlite")
        subprocess.run([sys.executable, __file__, "--first-life", path], check=False)
        return 0 if second_life(path) else 1


if __name__ == "__main__":
    sys.exit(main())
