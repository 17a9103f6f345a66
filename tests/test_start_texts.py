"""What is told of a worker whose constructor hangs, crashes or leaves: where it was, what to do."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from pathlib import Path

import pytest

from ears import Ear
from minipool import Pool, PoolStartError

FILE = re.escape(f'File "{Path(__file__)}", line ')
PORTABLE = os.environ.get("MINIPOOL_PORTABLE") == "1"


class Hangs:
    def __init__(self) -> None:
        self.load()

    def load(self) -> None:
        threading.Event().wait()


class Crashes:
    def __init__(self) -> None:
        self.load()

    def load(self) -> None:
        ctypes.string_at(0)


class Leaves:
    def __init__(self) -> None:
        os._exit(3)


class SaysNothing:
    def __init__(self) -> None:
        raise MemoryError


def told(kind: type, **options: object) -> str:
    with pytest.raises(PoolStartError) as caught:
        Pool(kind, size=1, **options).open()
    return str(caught.value)


@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_constructor_that_hangs_is_told_with_its_place_and_the_option(method: str) -> None:
    text = told(Hangs, init_timeout=1, start_method=method)
    assert re.search(rf"not ready within 1 s; it was in File .*, by {FILE}\d+ in load;", text), text
    assert "raise `init_timeout`" in text and text.endswith("; open a new pool")
    assert "correct what kept" not in text


def test_constructor_that_crashes_is_told_with_the_line_of_the_users_code() -> None:
    """It may have been bad luck, so it is tried again; the first try is looked at."""
    pool = Pool(Crashes, size=1)
    ear = Ear(pool, "error")
    pool.open(wait=False)
    text = str(ear.wait("error").metadata["error"])
    pool.close()
    assert "ended by SIGSEGV" in text
    assert re.search(rf"it was in File .* in string_at, by {FILE}\d+ in load;", text), text


@pytest.mark.skipif(PORTABLE, reason="without a shared table nothing tells how far it came")
@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_constructor_that_leaves_is_no_missing_guard(method: str) -> None:
    text = told(Leaves, start_method=method)
    assert "ended with exit code 3 as its object was being made" in text
    assert "`os._exit()`" in text and "__main__" not in text and "tells why" not in text


def test_exception_without_a_text_is_told_by_its_name_alone() -> None:
    assert "did not start: MemoryError; correct" in told(SaysNothing)


class Nests:
    def __init__(self) -> None:
        Pool(Leaves, size=1).open()


def test_pool_that_fails_in_a_constructor_gives_one_advice_what_then() -> None:
    assert told(Nests).count("open a new pool") == 1
