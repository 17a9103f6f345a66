"""What travels: names of things to call, codecs, and exceptions of every awkward kind."""

from __future__ import annotations

import json
import math
import operator
import pickle
import sys
import types
from typing import Any

import pytest

import rogues
from minipool import CallMismatch, RemoteError
from minipool.engine import wire
from minipool.engine.wire import (
    FUNCTION,
    METHOD,
    SHIPPED,
    RemoteTraceback,
    Targets,
    explain_unpicklable,
    find,
    functions_of,
    name_of,
    pack_codec,
    pack_error,
    unpack_codec,
    unpack_error,
    why_main_unreachable,
    why_unreachable,
)
from rogues import Stateful

# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (rogues.double, "rogues:double"),
        (Stateful, "rogues:Stateful"),
        (Stateful.add, "rogues:Stateful.add"),
        (Stateful.twice, "rogues:Stateful.twice"),
        (len, "builtins:len"),
        (math.factorial, f"{math.factorial.__module__}:factorial"),  # "math" before 3.15
        (str.upper, None),  # a slot of a type: its module is not told
        (rogues.half, None),
        (Stateful().add, None),
        (Stateful.name, None),
        (lambda: 1, None),
        (rogues.make_local(), None),
        (rogues.NotAFunction(1), None),
    ],
)
def test_name_leads_back_to_its_target_or_there_is_none(target: Any, name: str | None) -> None:
    """What has a name is found under it; what is not the very thing under its name has none."""
    assert name_of(target) == name
    if name is not None:
        assert find(name) is target


def test_name_taken_by_another_is_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that was wrapped or replaced in its module must not be called as the new one."""
    original = rogues.double
    monkeypatch.setattr(rogues, "double", rogues.describe)

    assert name_of(original) is None


@pytest.mark.parametrize("name", ["nowhere_at_all:f", "rogues:nothing", "rogues:Stateful.nothing"])
def test_finding_what_is_not_there_raises(name: str) -> None:
    with pytest.raises((ImportError, AttributeError)):
        find(name)


def targets(**options: Any) -> Targets:
    given = {"worker": Stateful, "starts_by_fork": False, "own_codec": False, **options}
    return Targets(**given)


@pytest.mark.parametrize(
    ("target", "kind", "name"),
    [
        ("add", METHOD, b"add"),
        (Stateful.add, METHOD, b"add"),
        (Stateful.twice, METHOD, b"twice"),
        (rogues.double, FUNCTION, b"rogues:double"),
        (len, FUNCTION, b"builtins:len"),
        (Stateful, FUNCTION, b"rogues:Stateful"),
        (Stateful.name, SHIPPED, b"Stateful.name"),
        (Stateful().add, SHIPPED, b"Stateful.add"),
    ],
)
def test_target_is_named_by_its_kind(target: Any, kind: int, name: bytes) -> None:
    """Methods go by name, importable functions by path, all else among the arguments."""
    assert targets()[target][:2] == (kind, name)


@pytest.mark.parametrize("target", [rogues.half, rogues.NotAFunction(1), operator.add, str.upper])
def test_every_callable_has_some_way(target: Any) -> None:
    """A partial, a callable object, an operator, a method of a builtin: none is refused."""
    kind, name = targets()[target][:2]

    assert kind in (FUNCTION, SHIPPED)
    assert 0 < len(name) <= 200


def test_what_is_shipped_is_not_kept_alive() -> None:
    """Names are found out once; a partial may hold anything, and is not remembered."""
    known = targets()
    known[rogues.double], known[rogues.half]

    assert rogues.double in known
    assert rogues.half not in known


def test_memory_of_names_is_bounded() -> None:
    """A program that makes up method names does not fill the memory."""
    known = targets()
    for number in range(5_000):
        known[f"method_{number}"]

    assert len(known) <= 4096
    assert known["add"][:2] == (METHOD, b"add")


def test_method_without_an_object_is_a_mismatch() -> None:
    with pytest.raises(CallMismatch, match="no worker class"):
        targets(worker=None)["add"]


@pytest.mark.parametrize("target", [5, None, b"add", ["add"]])
def test_what_cannot_be_called_is_a_mismatch(target: Any) -> None:
    with pytest.raises(CallMismatch, match="neither a method's name nor callable"):
        targets().resolve(target)


@pytest.mark.parametrize("name", ["x" * 70_000, "\udc00"])
def test_name_that_does_not_fit_a_frame_is_a_mismatch(name: str) -> None:
    """It is found before anything is sent, and costs no worker."""
    with pytest.raises(CallMismatch, match="name"):
        targets()[name]


def test_longest_name_fits() -> None:
    assert targets()["x" * wire.MAX_NAME][:2] == (METHOD, b"x" * wire.MAX_NAME)


# -- what workers cannot import ------------------------------------------------------------------


def of_main(monkeypatch: pytest.MonkeyPatch, **words: Any) -> Any:
    """Make a function of a main module with these words."""
    main = types.ModuleType("__main__")
    main.__dict__.update(words)
    monkeypatch.setitem(sys.modules, "__main__", main)
    exec("def f(): pass", main.__dict__)
    return main.__dict__["f"]


def test_lambda_and_local_name_the_remedy() -> None:
    """Neither can be imported; the text says what to write instead."""
    for target, remedy in [(lambda: 1, "`def` at the top"), (rogues.make_local(), "to the top")]:
        with pytest.raises(CallMismatch, match=remedy):
            targets()[target]


def test_function_of_an_interactive_session_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    f = of_main(monkeypatch)

    assert "module of its own" in str(why_unreachable(f, starts_by_fork=False))
    with pytest.raises(CallMismatch, match="interactive session"):
        targets()[f]
    assert targets(starts_by_fork=True)[f][0] == FUNCTION, "a forked worker has it"


@pytest.mark.parametrize(
    ("words", "reachable"),
    [
        ({"__file__": __file__}, True),
        ({"__file__": "/nowhere/at/all.py"}, False),
        ({"__file__": "<stdin>"}, False),
        ({"__spec__": types.SimpleNamespace(name="package.tool")}, True),
        ({"__spec__": types.SimpleNamespace(name="package.__main__")}, False),
        ({"__spec__": types.SimpleNamespace(name="__main__")}, False),
        ({}, False),
    ],
)
def test_main_module_is_reachable_if_workers_import_it(
    words: dict[str, Any], reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script and `-m module` are; a REPL, stdin, a deleted file, a package's main are not."""
    of_main(monkeypatch, **words)

    why = why_main_unreachable()

    assert (why is None) == reachable
    assert reachable or "put it into a module" in str(why) or "cannot import" in str(why)


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "guilty"),
    [
        ((1, rogues.Unpicklable()), {}, "argument 1"),
        ((1,), {"lock": rogues.Unpicklable()}, "argument 'lock'"),
    ],
)
def test_guilty_argument_is_named(args: Any, kwargs: Any, guilty: str) -> None:
    """Of many arguments the one that cannot be pickled is told, its type, and the reason."""
    error = explain_unpicklable(TypeError("all"), pickle.dumps, "add", args, kwargs)

    assert str(error).startswith(guilty)
    assert "Unpicklable" in str(error)
    assert "this one stays here" in str(error)
    assert "nothing was sent" in str(error)


def test_argument_whose_error_has_no_text_is_named_too() -> None:
    """An exception whose own text raises does not hide the reason behind another error."""
    bad = rogues.UnpicklableWithEvilText()

    error = explain_unpicklable(rogues.EvilText(), pickle.dumps, "add", (bad,), {})

    assert str(error).startswith("argument 0")


# -- codecs --------------------------------------------------------------------------------------


def test_codec_of_texts_becomes_one_of_bytes() -> None:
    """json makes str and wants str or bytes; it is given and taken real bytes."""
    dumps, loads = functions_of(json)

    data = dumps({"a": [1, None]}, 5)

    assert data == b'{"a": [1, null]}'
    assert loads(memoryview(data)) == {"a": [1, None]}


def test_codec_gets_real_bytes() -> None:
    """Not a memoryview, which not every codec takes."""
    dumps, loads = functions_of(rogues.ShipsFunctions())

    assert loads(memoryview(dumps(lambda x: x + 1, 5)))(1) == 2


def test_codec_travels_by_name_or_pickled() -> None:
    assert unpack_codec(pack_codec(json)) is json
    assert isinstance(unpack_codec(pack_codec(rogues.ShipsFunctions())), rogues.ShipsFunctions)


def test_own_codec_may_ship_what_pickle_cannot() -> None:
    """With a codec of the user's a lambda is given to it instead of being refused."""
    assert targets(own_codec=True)[lambda: 1][0] == SHIPPED


# -- exceptions ----------------------------------------------------------------------------------


def sent(error: BaseException) -> BaseException:
    """Raise it, pack it as a worker does, and unpack it."""
    try:
        raise error
    except BaseException as caught:
        return unpack_error(pack_error(caught))


def test_exception_arrives_as_itself() -> None:
    """Type, arguments and attributes, with the remote traceback as its cause."""
    error = sent(rogues.PlainError("text", 5))

    assert type(error) is rogues.PlainError
    assert (error.args, error.note) == (("text", 5), "kept")
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "PlainError" in str(error.__cause__)
    assert "raise error" in str(error.__cause__), "the line that raised it"


def test_chained_causes_are_in_the_remote_traceback() -> None:
    """What led to an exception in the worker is told, though only the last one travels."""
    with pytest.raises(ValueError) as caught:
        rogues.raise_with_cause()

    error = unpack_error(pack_error(caught.value))

    text = str(error.__cause__)
    assert "the deeper one" in text
    assert "direct cause" in text
    assert "the outer one" in text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (rogues.TwoArguments("two", 2), "two"),
        (rogues.HoldsLock("locked"), "locked"),
        (rogues.ReducesToText("not me"), "not me"),
    ],
)
def test_exception_that_does_not_survive_pickle_has_a_stand_in(
    error: BaseException, message: str
) -> None:
    """Type, message and traceback arrive in a RemoteError."""
    arrived = sent(error)

    assert type(arrived) is RemoteError
    assert arrived.type_name == f"rogues.{type(error).__name__}"
    assert arrived.message == message
    assert arrived.type_name in str(arrived)
    assert message in str(arrived)
    assert "Traceback" in arrived.traceback
    assert "Traceback" in str(arrived.__cause__)


def test_local_exception_has_a_stand_in() -> None:
    class Local(Exception):
        pass

    arrived = sent(Local("here"))

    assert type(arrived) is RemoteError
    assert arrived.type_name.endswith("Local")


def test_exception_that_unpickles_only_there_has_a_stand_in() -> None:
    """It passed the worker's own test and fails here: the text beside it is what arrives."""
    envelope = pickle.loads(pack_error(ValueError("text")))
    envelope["pickled"] = b"\x80\x05cnowhere\nNothing\n."

    arrived = unpack_error(pickle.dumps(envelope))

    assert type(arrived) is RemoteError
    assert (arrived.type_name, arrived.message) == ("ValueError", "text")
    assert "does not unpickle here" in str(arrived)


def test_exception_without_text_travels() -> None:
    """`__str__` and `__repr__` that raise harm neither side."""
    arrived = sent(rogues.EvilText())

    assert type(arrived) is rogues.EvilText
    assert "EvilText" in str(arrived.__cause__)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, rogues.OwnExit])
def test_exception_that_would_end_the_caller_has_a_stand_in(kind: type[BaseException]) -> None:
    """sys.exit() in a worker is an error of the call, not the end of the parent."""
    arrived = sent(kind(3))

    assert type(arrived) is RemoteError
    assert kind.__name__ in arrived.type_name
    assert arrived.message == "3"
    assert "would end the caller" in str(arrived)


def test_own_base_exception_arrives_as_itself() -> None:
    """A user's own BaseException is the user's business."""
    assert type(sent(rogues.OwnBase("mine"))) is rogues.OwnBase


def test_stand_in_pickles_on() -> None:
    """A RemoteError can cross the next pipe."""
    arrived = sent(rogues.HoldsLock("locked"))

    again = pickle.loads(pickle.dumps(arrived))

    assert (again.type_name, again.message) == (arrived.type_name, arrived.message)
    assert again.traceback == arrived.traceback


def test_results_that_cannot_travel_are_described() -> None:
    """Both directions of failure say what it was, and survive reasons without text."""
    there = wire.unpicklable_result(rogues.EvilText(), "Model")
    here = wire.unreadable(rogues.EvilText(), pickle.loads, b"")

    assert "returned a Model" in str(there)
    assert "cannot be unpickled here" in str(here)
    assert "EvilText" in str(here)


def test_missing_method_names_the_nearest() -> None:
    error = wire.no_such_method(Stateful(), "ad")

    assert "did you mean 'add'" in str(error)
    assert "Stateful has no method 'ad'" in str(error)


def test_missing_method_without_likeness_names_some() -> None:
    assert "wait_at" in str(wire.no_such_method(Stateful(), "zzz"))
