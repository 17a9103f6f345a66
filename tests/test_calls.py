"""Calls: what can be called, how results and errors come back, what each costs the worker."""

from __future__ import annotations

import builtins
import functools
import json
import math
import operator
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

import minipool
import rogues
from ears import Ear
from minipool import CallMismatch, Lease, Pool, RemoteError, WorkerDied
from rogues import NotAFunction, Stateful

HUGE = 50_000_000


@pytest.fixture
def pool() -> Iterator[Pool[Stateful]]:
    with Pool(Stateful, args=(10,), size=1) as made:
        yield made


@pytest.fixture
def w(pool: Pool[Stateful]) -> Iterator[Lease[Stateful]]:
    with pool.checkout() as lease:
        yield lease


def recycled(pool: Pool[Any], pid: int | None) -> bool:
    """Tell whether the next lease of a pool of one gets another process."""
    with pool.checkout(timeout=20) as w:
        return w.pid != pid


# -- what can be called --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "args", "result"),
    [
        ("add", (2,), 12),
        (Stateful.add, (2,), 12),
        ("twice", (4,), 8),
        (Stateful.twice, (4,), 8),
        ("name", (), "stateful"),
        (Stateful.name, (), "stateful"),
        (rogues.double, (4,), 8),
        (len, ([1, 2],), 2),
        (math.factorial, (5,), 120),
        (str.upper, ("a",), "A"),
        (operator.add, (1, 2), 3),
        (operator.itemgetter(1), ([1, 2],), 2),
        (rogues.half, (), 1.0),
        (functools.partial(rogues.describe, 1, third=3), (2,), (1, 2, 3)),
        (NotAFunction(1), (2,), 3),
        (NotAFunction(1).plus, (2,), 3),
        (Stateful(5).get, (), 5),
        ([].__len__, (), 0),
        (int, ("7",), 7),
        (os.getcwd, (), os.getcwd()),
    ],
)
def test_anything_callable_can_be_called(
    w: Lease[Stateful], target: Any, args: tuple[Any, ...], result: Any
) -> None:
    """Methods by name or as attributes, functions, builtins, classes, partials, objects."""
    assert w.call(target, *args) == result


def test_class_is_called_to_make_an_object(w: Lease[Stateful]) -> None:
    made = w.call(Stateful, 7)

    assert (type(made), made.value) == (Stateful, 7)


def test_callable_without_hash_can_be_called(w: Lease[Stateful]) -> None:
    """Its name cannot be remembered, and need not be."""
    assert w.call(rogues.Unhashable(), 3) == 3


def test_method_is_also_an_attribute_of_the_lease(w: Lease[Stateful]) -> None:
    assert w.add(5) == 15
    assert w.call("get") == 15
    with pytest.raises(AttributeError):
        w._private  # noqa: B018


def test_pool_calls_as_a_lease_does(pool: Pool[Stateful]) -> None:
    """One-shot calls, with and without options, and the state stays in the worker."""
    assert pool.call("add", 1) == 11
    assert pool.call(Stateful.add, amount=2) == 13
    assert pool.options(timeout=20).call("add", 3) == 16
    assert pool.options(idempotent=True).call(rogues.double, 2) == 4


def test_arguments_may_be_named_like_ours(w: Lease[Stateful], pool: Pool[Stateful]) -> None:
    """target=, self=, timeout= and the like belong to the function, not to us."""
    names = ["target", "timeout", "args", "kwargs", "name", "kind", "handle", "idempotent"]
    theirs: dict[str, Any] = {name: f"<{name}>" for name in names}

    assert w.call(rogues.awkward, 1, self=2, **theirs) == ((1,), {"self": 2, **theirs})
    assert w.call("show", 1, **theirs) == ((1,), theirs)
    assert w.show(1, **theirs) == ((1,), theirs)
    assert w.call(functools.partial(rogues.awkward, 1), **theirs) == ((1,), theirs)
    w.release()
    assert pool.call("show", **theirs) == ((), theirs)
    assert pool.options(timeout=20).call("show", **theirs) == ((), theirs)


def test_pool_without_a_worker_runs_functions_only() -> None:
    with Pool(size=1) as pool:
        assert pool.call(rogues.double, 4) == 8
        with pytest.raises(CallMismatch, match="no worker class"):
            pool.call("add")


def test_code_knows_which_worker_runs_it(w: Lease[Stateful], pool: Pool[Stateful]) -> None:
    here = w.call(rogues.where)

    assert here == (pool.config.name, w.worker_id, w.generation, w.pid)
    assert minipool.current_worker() is None, "this is no worker"


def test_huge_argument_and_result_travel(w: Lease[Stateful]) -> None:
    """Fifty megabytes each way, and small ones again behind them."""
    assert w.call(rogues.size_of, bytes(HUGE)) == HUGE
    result = w.call(rogues.make_bytes, HUGE)
    assert (len(result), result[:1], result[-1:]) == (HUGE, b"x", b"x")
    assert w.call("add", 1) == 11


def _free_bytes() -> int:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1]) if found else 0


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
@pytest.mark.skipif(_free_bytes() < 16 << 30, reason="it takes 16 GB of memory")
def test_three_gigabytes_travel() -> None:
    """More than a length of four bytes can tell, there and back."""
    with Pool(size=1, call_timeout=200) as pool:
        assert pool.call(rogues.size_of, bytes(3 << 30)) == 3 << 30
        assert len(pool.call(rogues.make_bytes, 3 << 30)) == 3 << 30
        assert pool.stats().workers_lost == 0


# -- mismatches: nothing was sent ----------------------------------------------------------------


def calls_of(w: Lease[Any], pool: Pool[Any]) -> int:
    return pool.worker(w.worker_id).calls


@pytest.mark.parametrize("call", [lambda w: w.call("ad", 1), lambda w: w.ad(1)])
def test_missing_method_names_the_nearest(w: Lease[Stateful], call: Any) -> None:
    with pytest.raises(CallMismatch, match="did you mean 'add'"):
        call(w)
    assert w.call("add", 1) == 11


@pytest.mark.parametrize(
    ("target", "remedy"),
    [
        (lambda: 1, "`def` at the top"),
        (rogues.make_local(), "move it to the top"),
        (5, "neither a method's name nor callable"),
        ("x" * 70_000, "too long"),
        (functools.partial(lambda: 1), "cannot be sent"),
    ],
)
def test_what_a_worker_cannot_find_is_refused_here(
    w: Lease[Stateful], pool: Pool[Stateful], target: Any, remedy: str
) -> None:
    """The error names the remedy; nothing was sent; the worker has its state."""
    before = calls_of(w, pool)

    with pytest.raises(CallMismatch, match=remedy) as caught:
        w.call(target)

    assert isinstance(caught.value, TypeError)
    assert calls_of(w, pool) == before
    assert w.call("add", 1) == 11


@pytest.mark.parametrize("target", ["show", rogues.awkward, rogues.half])
def test_unpicklable_argument_is_named_and_nothing_sent(
    w: Lease[Stateful], pool: Pool[Stateful], target: Any
) -> None:
    before = calls_of(w, pool)

    with pytest.raises(CallMismatch, match=r"argument 1 .*Unpicklable.*this one stays here"):
        w.call(target, 1, rogues.Unpicklable())
    with pytest.raises(CallMismatch, match=r"argument 'model' .*Unpicklable"):
        w.call(target, model=rogues.Unpicklable())

    assert calls_of(w, pool) == before
    assert w.call("add", 1) == 11


IN_A_SESSION = """
from minipool import CallMismatch, ConfigError, Pool

def f():
    return 1

class C:
    pass

pool = Pool(size=1).open()
try:
    pool.call(f)
except CallMismatch as error:
    print("function:", error)
try:
    Pool(C, start_method="spawn")
except ConfigError as error:
    print("class:", error)
print("well:", pool.call(len, "four"))
pool.close()
"""


def run_python(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], input=stdin, cwd=Path(__file__).parent.parent,
        capture_output=True, text=True, timeout=50,
    )  # fmt: skip


def test_function_of_an_interactive_session_names_the_remedy() -> None:
    """Given with -c or typed in: no worker can import it, and that is said; the rest works."""
    done = run_python("-c", IN_A_SESSION)

    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(lines) == {"function", "class", "well"}, done.stderr
    for what in ("function", "class"):
        assert "put it into a module of its own and import it from there" in lines[what]
    assert lines["well"] == "4"
    assert done.returncode == 0


def test_script_on_standard_input_names_the_remedy() -> None:
    """Every worker would import the file "<stdin>": one clear error instead of dying workers."""
    done = run_python("-", stdin=IN_A_SESSION)

    assert done.returncode == 1
    assert "PoolStartError" in done.stderr
    assert "save the program as a file" in done.stderr


# -- results that cannot travel ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Unpicklable", "this one stays here"),
        ("UnpicklableWithEvilText", "cannot be sent back"),
        ("make_local", "cannot be sent back"),
        ("ExitsWhenUnpickled", "cannot be unpickled here: ValueError: made elsewhere"),
        ("UnpicklesOnlyIn", "cannot be unpickled here: LookupError: wrong process"),
    ],
)
def test_result_that_cannot_travel_is_described(
    w: Lease[Stateful], pool: Pool[Stateful], name: str, reason: str
) -> None:
    """A RemoteError says why, and the worker is well and has its state."""
    pid = w.pid

    with pytest.raises(RemoteError, match=reason) as caught:
        w.call("return_it", name)

    assert "Traceback" in caught.value.traceback
    assert w.call("add", 1) == 11
    w.release()
    assert not recycled(pool, pid)
    assert pool.stats().discarded == 0


# -- exceptions of the user ----------------------------------------------------------------------


def test_exception_arrives_as_itself_with_its_remote_traceback(
    w: Lease[Stateful], pool: Pool[Stateful]
) -> None:
    """Type, arguments, attributes; the worker keeps its state, and its good name."""
    with pytest.raises(rogues.PlainError) as caught:
        w.call("raise_it", "PlainError", "text", 5)

    assert (caught.value.args, caught.value.note) == (("text", 5), "kept")
    cause = str(caught.value.__cause__)
    assert "in raise_it" in cause
    assert "rogues.py" in cause
    assert w.call("get") == 11, "it counted the call that raised"
    assert (pool.stats().raised, pool.stats().faults) == (1, 0)


def test_remote_causes_are_told(w: Lease[Stateful]) -> None:
    with pytest.raises(ValueError, match="the outer one") as caught:
        w.call(rogues.raise_with_cause)

    assert "the deeper one" in str(caught.value.__cause__)


@pytest.mark.parametrize("name", ["KeyError", "StopIteration", "OSError", "EOFError",
                                  "BrokenPipeError", "TimeoutError", "AssertionError"])  # fmt: skip
def test_builtin_exceptions_are_the_calls_and_not_the_pipes(w: Lease[Stateful], name: str) -> None:
    """Also those that the pipe itself might raise."""
    with pytest.raises(getattr(builtins, name), match="mine"):
        w.call(rogues.raise_it, name, "mine")
    assert w.call("get") == 10


@pytest.mark.parametrize(
    ("name", "args"),
    [("TwoArguments", ("text", 2)), ("HoldsLock", ("text",)), ("OnlyInWorker", ("text",))],
)
def test_exception_that_cannot_travel_has_a_stand_in(
    w: Lease[Stateful], pool: Pool[Stateful], name: str, args: tuple[Any, ...]
) -> None:
    """RemoteError has its type, message and traceback; the worker is well."""
    pid = w.pid

    with pytest.raises(RemoteError) as caught:
        w.call("raise_it", name, *args)

    error = caught.value
    assert (error.type_name, error.message) == (f"rogues.{name}", "text")
    assert "in raise_it" in error.traceback
    assert w.call("get") == 11
    w.release()
    assert not recycled(pool, pid)


def test_exception_without_text_arrives(w: Lease[Stateful]) -> None:
    with pytest.raises(rogues.EvilText):
        w.call("raise_it", "EvilText")
    assert w.call("get") == 11


def test_own_base_exception_arrives_as_itself(w: Lease[Stateful], pool: Pool[Stateful]) -> None:
    """A BaseException of the user's is no sign that the worker should go."""
    pid = w.pid

    with pytest.raises(rogues.OwnBase, match="mine"):
        w.call("raise_it", "OwnBase", "mine")

    w.release()
    assert not recycled(pool, pid)


@pytest.mark.parametrize(
    ("target", "args", "type_name", "message"),
    [
        (sys.exit, (3,), "SystemExit", "3"),
        (rogues.exit_quietly, (), "SystemExit", ""),
        (rogues.raise_it, ("KeyboardInterrupt",), "KeyboardInterrupt", ""),
        (rogues.raise_it, ("GeneratorExit",), "GeneratorExit", ""),
        (rogues.raise_it, ("OwnExit", 4), "rogues.OwnExit", "4"),
    ],
)
def test_exit_in_a_call_is_an_error_of_the_call_and_recycles(
    w: Lease[Stateful], pool: Pool[Stateful], target: Any, args: Any, type_name: str, message: str
) -> None:
    """The caller gets a RemoteError and may go on; on return the worker is replaced."""
    pid = w.pid

    with pytest.raises(RemoteError) as caught:
        w.call(target, *args)

    assert (caught.value.type_name, caught.value.message) == (type_name, message)
    assert w.call("get") == 10, "the lease still has its worker"
    w.release()
    assert recycled(pool, pid)
    assert pool.stats().discarded == 1
    assert pool.stats().workers_lost == 0


@pytest.mark.parametrize("code", [0, 7, 255])
def test_os_exit_in_a_call_is_a_death(w: Lease[Stateful], pool: Pool[Stateful], code: int) -> None:
    """It is told from sys.exit(): the process is gone, with its exit code."""
    pid = w.pid

    with pytest.raises(WorkerDied, match=f"exit code {code} during 'rogues:leave'") as caught:
        w.call(rogues.leave, code)

    died = caught.value
    assert (died.exitcode, died.signal, died.started) == (code, None, True)
    assert (died.pid, died.worker_id, died.target) == (pid, 0, "rogues:leave")
    w.release()
    assert recycled(pool, pid)


@pytest.mark.parametrize(
    ("target", "args", "kind"),
    [(rogues.raise_it, ("MemoryError",), MemoryError), (rogues.recurse, (), RecursionError)],
)
def test_exhaustion_arrives_as_itself_and_recycles(
    w: Lease[Stateful], pool: Pool[Stateful], target: Any, args: Any, kind: type[Exception]
) -> None:
    """A worker that ran out of memory or stack is not trusted with the next lease."""
    pid = w.pid

    with pytest.raises(kind):
        w.call(target, *args)

    assert w.call("get") == 10
    w.release()
    assert recycled(pool, pid)


def test_reason_of_recycling_is_told(pool: Pool[Stateful]) -> None:
    ear = Ear(pool, "worker.terminate")

    with pytest.raises(RemoteError):
        pool.call(sys.exit)

    event = ear.wait("worker.terminate")
    assert "RemoteError" in event.metadata["reason"] or "SystemExit" in event.metadata["reason"]
    assert event.metadata["exitcode"] == 0


# -- codecs --------------------------------------------------------------------------------------


def test_json_is_a_codec() -> None:
    """A module with dumps and loads: tuples become lists, as json has it."""
    with Pool(Stateful, args=(1,), size=1, codec=json) as pool, pool.checkout() as w:
        assert w.call("add", 2) == 3
        assert w.call("add", amount=2) == 5
        assert w.call("show", 1, key=None) == [[1], {"key": None}]
        assert w.call(rogues.double, "é") == "éé"
        with pytest.raises(CallMismatch, match=r"argument 0 .*set"):
            w.call("show", {1})
        with pytest.raises(RemoteError, match="returned a set"):
            w.call(rogues.make_set)
        with pytest.raises(KeyError):
            w.call(rogues.raise_it, "KeyError", "k")
        assert w.call("get") == 5


def test_codec_that_ships_code_can_send_a_lambda() -> None:
    """An object with dumps and loads, as cloudpickle is one."""
    with Pool(Stateful, size=1, codec=rogues.ShipsFunctions()) as pool, pool.checkout() as w:
        assert w.call(lambda x: x * 3, 5) == 15
        assert w.call("add", 2) == 2
        assert w.call(rogues.double, 2) == 4
