"""Two stores on one file in one process walk at random until it is killed; another looks on.

What was acknowledged is there afterwards, each time, and of what was under way all or nothing. The
seed is printed; with it, each life does the same, up to the moment of its death.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
from pathlib import Path
from typing import Any, Dict, Optional

import pytest

import scripts
from minipool.store import SQLiteStore

KEYS = 4  # of each store
LIVES = 6
State = Optional[Dict[str, bytes]]  # None: there is no such session

WALKER = """
    import sys
    from test_store_walk import walk

    if __name__ == "__main__":
        walk(*sys.argv[1:])
"""


def walk(path: str, seed: str, pipe: str) -> None:
    """Do one thing after the other; say before each what is to come of it, and after it that it
    has."""
    dice, out = random.Random(seed), int(pipe)
    known: dict[str, tuple[int, dict[str, bytes]] | None] = {}
    stores = [SQLiteStore(path) for _ in range(2)]

    def tell(*words: Any) -> None:
        data = pickle.dumps(words)
        os.write(out, len(data).to_bytes(4, "big") + data)  # so short that it is all or nothing

    def opened(which: int, key: str) -> tuple[int, dict[str, bytes]]:
        """Have a session open, and what the store says of it in line with what is known."""
        if known.get(key) is None:
            tell("will", key, {})
            loaded = stores[which].open(key)
            version, state = loaded if loaded is not None else (0, None)
            if key in known and loaded is not None:
                tell("wrong", f"{key} was deleted, and is there")
            known[key] = version, dict(state or {})
            tell("is", key, known[key][1])
        found = known[key]
        assert found is not None
        return found

    while True:
        which = dice.randrange(2)
        key, store = f"{which}.{dice.randrange(KEYS)}", stores[which]
        deed = dice.choices(["commit", "delete", "read", "reopen"], [80, 5, 10, 5])[0]
        if deed == "commit":
            version, state = opened(which, key)
            names = dice.sample("abcd", dice.randrange(1, 4))
            changes = {name: dice.choice([None, *[os.urandom(200)] * 4]) for name in names}
            after = {name: data for name, data in {**state, **changes}.items() if data is not None}
            tell("will", key, after)
            store.commit(key, version + 1, changes)
            known[key] = version + 1, after
            tell("is", key, after)
        elif deed == "delete":
            opened(which, key)
            tell("will", key, None)
            store.delete(key)
            known[key] = None
            tell("is", key, None)
        elif deed == "read":
            loaded, expected = store.read(key), known.get(key)
            if expected is not None and (
                loaded is None or (loaded[0], dict(loaded[1] or {})) != expected
            ):
                tell("wrong", f"{key} is {loaded}, and should be {expected}")
        else:
            store.close()
            stores[which] = SQLiteStore(path)
            for mine in [each for each in known if each.startswith(f"{which}.")]:
                expected = known[mine]
                if expected is not None:
                    loaded = stores[which].open(mine)
                    if loaded is None or (loaded[0], dict(loaded[1] or {})) != expected:
                        tell("wrong", f"{mine} is {loaded} now, and was {expected}")


class Knowledge:
    """What a process has said of its sessions, and what it was about to do last."""

    def __init__(self) -> None:
        self.told = 0
        self.states: dict[str, State] = {}
        self.will: dict[str, State] = {}

    def hear(self, word: str, *facts: Any) -> None:
        assert word != "wrong", facts
        key, state = facts
        self.will.pop(key, None)
        (self.will if word == "will" else self.states)[key] = state
        self.told += word == "is"

    def judge(self, path: Path) -> None:
        """Open every session, as a pool does after its owner's death."""
        store = SQLiteStore(str(path))
        try:
            for key in {**self.states, **self.will}:
                loaded = store.read(key)
                found = None if loaded is None else dict(loaded[1] or {})
                may_be = [each[key] for each in (self.states, self.will) if key in each]
                if key not in self.states:
                    may_be.append(None)
                assert found in may_be, f"{key} is {found}, and should be one of {may_be}"
                self.states[key] = found
            self.will.clear()
            taken = [key for key, state in self.states.items() if state is not None]
            for key in taken:
                assert store.open(key) is not None
        finally:
            store.close()


def heard(file: Any) -> Any:
    """Return the next thing that was said; None: nothing will be any more."""
    size = file.read(4)
    data = file.read(int.from_bytes(size, "big")) if len(size) == 4 else b""
    return pickle.loads(data) if data else None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_what_two_stores_on_one_file_acknowledged_survives_the_death_of_their_process(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    seed = request.config.getoption("--chaos-seed") or random.SystemRandom().randrange(1 << 32)
    print(f"--chaos-seed {seed}")
    dice, path, knowledge = random.Random(seed), tmp_path / "sessions.db", Knowledge()
    for life in range(LIVES):
        folder = tmp_path / f"life {life}"
        folder.mkdir()
        reader, writer = os.pipe()
        process = scripts.start(
            folder, WALKER, str(path), f"{seed}/{life}", str(writer), pass_fds=(writer,)
        )
        os.close(writer)
        end = knowledge.told + dice.randrange(100, 400)
        looks = sorted(dice.sample(range(knowledge.told, end), 3))
        with open(reader, "rb") as file:
            words = heard(file)
            while words is not None:
                knowledge.hear(*words)
                if looks and knowledge.told >= looks[0]:
                    looks.pop(0)
                    SQLiteStore(str(path)).close()
                if knowledge.told >= end:
                    process.kill()
                words = heard(file)
        code, _, errors = scripts.finish(process)
        assert code == -9 and knowledge.told >= end, f"seed {seed}, life {life}: {errors}"
        knowledge.judge(path)
    assert sorted(os.listdir(path.parent))[-1] == path.name  # and neither -wal nor -shm
