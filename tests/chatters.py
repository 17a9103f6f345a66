"""Worker code for tests of sessions, named for what it does to the state of its session."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from gates import pass_gate
from minipool import current_session


def put(key: str, value: Any) -> None:
    current_session()[key] = value


def get(key: str) -> Any:
    return current_session()[key]


def drop(key: str) -> None:
    del current_session()[key]


def keys() -> list[str]:
    return sorted(current_session())


def put_and_drop_by_a_name_of_its_own() -> list[bool]:
    """Use keys of a class that nobody else can import; tell whether they stay what they are."""

    class Name(str):
        pass

    session = current_session()
    session[Name("own")] = 1
    session.setdefault(Name("log"), []).append(1)
    del session[Name("old")]
    return [type(key) is str for key in session]


def append(key: str, value: Any) -> int:
    """Change a value deep inside, without setting the key."""
    values = current_session().setdefault(key, [])
    values.append(value)
    return len(values)


def add(key: str = "n", amount: int = 1) -> int:
    session = current_session()
    session[key] = session.get(key, 0) + amount
    return int(session[key])


def change_and_raise(key: str, value: Any) -> None:
    current_session()[key] = value
    current_session().setdefault("log", []).append("never")
    raise ValueError(value)


def change_and_die(key: str, value: Any) -> None:
    current_session()[key] = value
    os.kill(os.getpid(), signal.SIGKILL)


def change_and_wait(key: str, value: Any, gate: str) -> int:
    current_session()[key] = value
    return pass_gate(gate)


def change_and_return_unpicklable(key: str) -> Any:
    current_session()[key] = "never"
    return threading.Lock()


def keep_unpicklable(key: str) -> None:
    current_session()["well"] = 1
    current_session()[key] = threading.Lock()


def take_unreadable() -> Any:
    current_session()["well"] = 1
    return Unreadable()


def pid() -> int:
    return os.getpid()


def session_id() -> str:
    return str(current_session().id)


def local(key: str) -> Any:
    return current_session().local.get(key)


def set_local(key: str, value: Any) -> None:
    current_session().local[key] = value


class Unreadable:
    """Can be pickled, but not read again."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


class CountsPickling:
    """Counts how often it was pickled in this process."""

    pickled = 0

    def __reduce__(self) -> Any:
        CountsPickling.pickled += 1
        return CountsPickling, ()


def pickled() -> int:
    return CountsPickling.pickled


class Keeper:
    """Keeps what it is given, outside of the session as well."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def share(self) -> None:
        current_session()["shared"] = self.kept

    def spoil(self) -> None:
        self.kept.append("spoilt")

    def seen(self) -> list[Any]:
        return list(current_session()["shared"])


class Diary:
    """Writes down, in a file, which sessions began and ended here."""

    def __init__(self, path: str) -> None:
        self.path = path

    def session_started(self, session: Any) -> None:
        session.local["compiled"] = f"by {os.getpid()}"
        self._write(f"started {session.id}")

    def session_ended(self, session: Any) -> None:
        self._write(f"ended {session.id} {session.local.get('mark')}")

    def mark(self, word: str) -> None:
        current_session().local["mark"] = word

    def compiled(self) -> Any:
        return current_session().local["compiled"]

    def raise_first(self) -> None:
        raise ValueError("first")

    def _write(self, line: str) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{line}\n".encode())
        os.close(fd)


class RaisesAtSessionStart:
    def session_started(self, session: Any) -> None:
        raise LookupError("no such customer")


class RaisesAtSessionEnd:
    def session_ended(self, session: Any) -> None:
        raise LookupError("no such customer")


def add_alone(folder: str) -> int:
    """Count in a session's state, and fail if another worker does the same at this moment."""
    session = current_session()
    path = os.path.join(folder, f"{session.id}.lock")
    me = f"{os.getpid()}"
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        with open(path) as file:
            owner = file.read()
        # A worker that was killed leaves its file; one that lives must not be here.
        if owner and owner != me and _alive(int(owner)):
            raise AssertionError(f"{session.id} is in two workers: {owner} and {me}") from None
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    os.write(fd, me.encode())
    os.close(fd)
    try:
        session["n"] = session.get("n", 0) + 1
        session.setdefault("last", []).append(session["n"])
        del session["last"][:-3]
        return int(session["n"])
    finally:
        os.unlink(path)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class NotesUnpickling:
    """Counts how often it was unpickled in this process."""

    unpickled = 0

    def __setstate__(self, state: Any) -> None:
        NotesUnpickling.unpickled += 1

    def __getstate__(self) -> Any:
        return {"any": 1}


def take_unpickling_note() -> None:
    current_session()["note"] = NotesUnpickling()


def unpickled_notes() -> int:
    return NotesUnpickling.unpickled
