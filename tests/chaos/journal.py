"""Journals on disk: what a process does and is told, one line each, written before it goes on.

A line is a single write to a file opened with O_APPEND. It is the kernel's when the call returns,
so it survives the kill -9 of the process that wrote it. Imported by workers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Iterator, List, Tuple

Line = List[Any]


class Journal:
    """One file of lines. Any thread may write."""

    def __init__(self, path: str | Path) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._fd = os.open(path, flags, 0o600)

    def write(self, *words: Any) -> None:
        os.write(self._fd, json.dumps(words).encode() + b"\n")

    def close(self) -> None:
        os.close(self._fd)


class Journals:
    """All journals of one folder, read while they are being written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, int] = {}  # file -> bytes read so far

    def new_lines(self) -> Iterator[Tuple[str, Line]]:
        """Return each line that was not there before, with the name of its file."""
        for name in sorted(os.listdir(self._folder)):
            start = self._read.get(name, 0)
            with open(self._folder / name, "rb") as file:
                file.seek(start)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]  # the last line may be half written
            self._read[name] = start + len(whole)
            for line in whole.splitlines():
                yield name, json.loads(line)
