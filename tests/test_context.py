"""Context variables that the caller names travel with his calls."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextvars import Context, ContextVar
from pathlib import Path
from typing import Any, Iterator

import pytest

import minipool
from ears import Ear
from minipool import CallMismatch, ConfigError, Pool, WorkerDied
from scripts import environment, run
from workers import kill_self

trace_id: ContextVar[Any] = ContextVar("trace_id")
tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
same_name: ContextVar[Any] = ContextVar("trace_id")
NAMES = ["test_context:trace_id", "test_context:tenant"]


class Scoped:
    variable: ContextVar[int] = ContextVar("scoped")


class Unreadable:
    """Cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("x",)


class Tracer:
    def __init__(self) -> None:
        self.at_check: list[Any] = []
        self.kept = 0

    def seen(self) -> tuple[Any, str]:
        return trace_id.get(None), tenant.get()

    def add(self, *, amount: int) -> tuple[int, Any]:
        self.kept += amount
        return self.kept, trace_id.get(None)

    def change(self) -> None:
        trace_id.set("changed by the call")

    def fail(self) -> None:
        raise LookupError(trace_id.get(None))

    def remember(self, key: str) -> tuple[Any, int]:
        session = minipool.current_session()
        session[key] = trace_id.get(None)
        return trace_id.get(None), len(session)

    def health_check(self) -> None:
        self.at_check.append(trace_id.get(None))

    def checks(self) -> list[Any]:
        return self.at_check


def seen() -> tuple[Any, str]:
    return trace_id.get(None), tenant.get()


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    """Set the variable for the test, and undo that."""
    token = trace_id.set("abc")
    yield
    trace_id.reset(token)


@pytest.fixture
def pool() -> Iterator[Pool[Tracer]]:
    with Pool(Tracer, size=1, context=[trace_id, tenant]) as pool:
        yield pool


def test_values_are_set_in_the_worker_while_the_call_runs(start_method: str) -> None:
    with Pool(Tracer, size=1, start_method=start_method, context=[trace_id, tenant]) as pool:
        assert pool.call("seen") == ("abc", "nobody")
        assert pool.call(seen) == ("abc", "nobody")
        assert pool.call("add", amount=2) == (2, "abc")
        token = tenant.set("Ada")
        try:
            assert pool.call("seen") == ("abc", "Ada")
        finally:
            tenant.reset(token)
        assert pool.call("seen") == ("abc", "nobody")


def test_variables_may_be_given_by_name() -> None:
    with Pool(Tracer, size=1, context=[*NAMES, "test_context:Scoped.variable"]) as pool:
        assert pool.call("seen") == ("abc", "nobody")


def test_without_the_option_nothing_travels() -> None:
    with Pool(Tracer, size=1) as pool:
        assert pool.call("seen") == (None, "nobody")


def test_values_are_gone_after_the_call(pool: Pool[Tracer]) -> None:
    """Neither a probe nor a caller who has no value sees that of the call before."""
    pool.call("change")
    pool.health_check(probe=True)
    assert pool.call("checks") == [None]
    assert Context().run(pool.call, "seen") == (None, "nobody")


def test_values_are_undone_when_the_call_raises(pool: Pool[Tracer]) -> None:
    with pytest.raises(LookupError, match="abc"):
        pool.call("fail")
    pool.health_check(probe=True)
    assert pool.call("checks") == [None]


def test_each_caller_brings_his_own(pool: Pool[Tracer]) -> None:
    wrong: list[Any] = []

    def call(number: int) -> None:
        trace_id.set(number)
        for _ in range(50):
            found = pool.call("seen")
            if found[0] != number:
                wrong.append((number, found))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_values_travel_with_calls_of_a_session(pool: Pool[Tracer]) -> None:
    """Also when the state has to be sent again, or has moved."""
    with pool.checkout(session="s") as w:
        assert w.remember("a") == ("abc", 1)
        assert w.remember("b") == ("abc", 2)
        trace_id.set("def")
        assert w.remember("c") == ("def", 3)
    pool.drain()
    with pool.checkout(session="s", timeout=20) as w:
        assert w.remember("d") == ("def", 4)
        assert dict(w.state) == {"a": "abc", "b": "abc", "c": "def", "d": "def"}


def test_value_that_cannot_be_pickled_is_refused_before_anything_is_sent(
    pool: Pool[Tracer],
) -> None:
    with pool.checkout() as w:
        before = w.pid, w.add(amount=1)
        trace_id.set(threading.Lock())
        with pytest.raises(CallMismatch, match=r"'trace_id', a lock, cannot be sent.*nothing"):
            w.add(amount=1)
        trace_id.set("again")
        assert (w.pid, w.add(amount=0)) == (before[0], (1, "again"))


def test_value_that_does_not_unpickle_costs_the_call_and_not_the_worker(
    pool: Pool[Tracer],
) -> None:
    with pool.checkout() as w:
        trace_id.set(Unreadable())
        with pytest.raises(ValueError, match="invalid literal"):
            w.add(amount=1)
        trace_id.set("well")
        assert w.add(amount=0) == (0, "well")


def test_values_travel_with_a_call_that_is_made_again(tmp_path: Path) -> None:
    with Pool(Tracer, size=1, context=[trace_id]) as pool:
        once = str(tmp_path / "once")
        assert pool.options(idempotent=True, timeout=20).call(die_once, once) == "abc"


def die_once(path: str) -> Any:
    try:
        open(path, "x").close()
    except FileExistsError:
        return trace_id.get()
    kill_self()


def test_events_of_a_call_carry_the_values(pool: Pool[Tracer]) -> None:
    ear = Ear(pool, "operation.start", "operation.stop", "operation.exception")
    pool.call("seen")
    with pytest.raises(LookupError):
        pool.call("fail")
    with pytest.raises(WorkerDied):
        pool.call(kill_self)
    assert [event.metadata["context"] for event in ear.heard] == [{"trace_id": "abc"}] * 6


def test_events_of_a_pool_without_context_have_no_such_field() -> None:
    with Pool(Tracer, size=1) as pool:
        ear = Ear(pool, "operation.start")
        pool.call("seen")
    assert "context" not in ear.heard[0].metadata


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (trace_id, "give a list"),
        ("test_context:trace_id", "give a list"),
        (["trace_id"], "give a list"),
        ([3], "give a list"),
        ([ContextVar("nowhere")], "no module has it"),
        (["test_context:missing"], "AttributeError"),
        (["no_such_module:x"], "ModuleNotFoundError"),
        (["test_context:NAMES"], "no ContextVar"),
        ([trace_id, same_name], "two variables are named 'trace_id'"),
    ],
    ids=["a variable", "a name", "no colon", "number", "nowhere", "missing", "no module", "no variable", "twice"],
)  # fmt: skip
def test_what_no_worker_could_find_is_refused(given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        Pool(context=given)
    assert caught.value.option == "context"


def test_variable_of_a_script_travels(tmp_path: Path, start_method: str) -> None:
    code = """
        import sys
        from contextvars import ContextVar
        from minipool import Pool

        request = ContextVar("request")

        def seen():
            return request.get()

        if __name__ == "__main__":
            with Pool(size=1, start_method=sys.argv[1], context=[request]) as pool:
                request.set(7)
                print(pool.call(seen))
    """
    assert run(tmp_path, code, start_method)[:2] == (0, "7\n")


def test_variable_that_workers_cannot_import_is_refused() -> None:
    program = (
        "from contextvars import ContextVar; from minipool import Pool; "
        "request = ContextVar('request'); Pool(context=[request])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "ConfigError" in done.stderr and "put it into a module of its own" in done.stderr
