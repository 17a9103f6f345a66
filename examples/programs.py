"""Keep named programs in a pool: made once, checked at the door, rebuilt after a kill -9.

    python3 examples/programs.py              nothing needs to be installed

A program is an object that a worker makes from a recipe. The recipe belongs to a session, so when
the worker is killed the next one makes the program again, and goes on with what it had learned.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, Dict

try:
    import minipool
except ImportError:  # a fresh clone; workers take over sys.path, so they find it too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import minipool
from minipool import CallMismatch, Field, Pool, Programs, Signature, WorkerDied


class Classifier:
    """Tells topics apart by their words. What it learns is in the session, not in the object."""

    def __init__(self, *topics: str) -> None:
        self.topics = topics  # a real one would load a model here, once per worker

    def execute(self, text: str, topic: Any = None) -> Dict[str, Any]:
        """Guess the topic of a text; or learn, if it is told."""
        learned = minipool.current_session().setdefault("words", {t: [] for t in self.topics})
        words = text.lower().split()
        if topic is not None:
            learned[topic] += words
        hits = {name: sum(word in known for word in words) for name, known in learned.items()}
        best = max(hits, key=lambda name: hits[name])
        return {"topic": best, "hits": hits[best]}


SIGNATURE = Signature(
    inputs=[Field("text", "string"), Field("topic", "string", required=False)],
    outputs=[Field("topic", "string"), Field("hits", "integer")],
)


def kill_worker() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    logging.disable(logging.WARNING)  # that a worker was killed is no news here
    with Pool(size=2) as pool:
        programs = Programs(pool)
        programs.create("topics", Classifier, "sea", "kitchen", signature=SIGNATURE)
        programs.execute("topics", {"text": "sail wind harbour anchor", "topic": "sea"})
        programs.execute("topics", {"text": "oven butter pan onion", "topic": "kitchen"})
        print("before:", programs.execute("topics", {"text": "butter in the pan"}))

        try:
            programs.execute("topics", {"txt": "butter", "topic": 7})
        except CallMismatch as error:
            print("refused:", error)

        with pool.checkout(session=programs.session) as w:
            try:
                w.call(kill_worker)
            except WorkerDied as error:
                print("killed:", error.signal)
        print("after:", programs.execute("topics", {"text": "wind in the harbour"}))
        print("rebuilds:", programs.info("topics").rebuilds)


if __name__ == "__main__":  # workers import this file, and must not open a pool of their own
    main()
