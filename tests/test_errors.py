"""Every public error: its place in the hierarchy, its fields, its text, and its way over a pipe."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

import minipool
from minipool import errors


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("it stays here")


ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, BaseException)
}

BASES: dict[str, tuple[type[BaseException], ...]] = {
    "MinipoolError": (Exception,),
    "ConfigError": (errors.MinipoolError, ValueError),
    "CallMismatch": (errors.MinipoolError, TypeError),
    "PoolError": (errors.MinipoolError,),
    "CheckoutTimeout": (errors.PoolError, TimeoutError),
    "TooManyWaiters": (errors.PoolError,),
    "PoolClosed": (errors.PoolError,),
    "PoolForked": (errors.PoolError,),
    "PoolStartError": (errors.PoolError,),
    "CircuitOpen": (errors.PoolError,),
    "LeaseError": (errors.MinipoolError,),
    "LeaseReleased": (errors.LeaseError,),
    "LeaseRevoked": (errors.LeaseError,),
    "SessionError": (errors.MinipoolError,),
    "SessionNotFound": (errors.SessionError,),
    "SessionExists": (errors.SessionError,),
    "SessionLost": (errors.SessionError,),
    "SessionBusy": (errors.SessionError,),
    "ProgramError": (errors.MinipoolError,),
    "ProgramExists": (errors.ProgramError,),
    "ProgramNotFound": (errors.ProgramError,),
    "ProgramMismatch": (errors.ProgramError,),
    "WorkerError": (errors.MinipoolError,),
    "WorkerDied": (errors.WorkerError,),
    "WorkerStartError": (errors.WorkerError,),
    "CallTimeout": (errors.WorkerError, TimeoutError),
    "ProtocolError": (errors.WorkerError,),
    "RemoteError": (errors.MinipoolError,),
}


def test_hierarchy_is_as_promised() -> None:
    """Each error has just the bases that callers catch it by; none is missing here."""
    assert {name: cls.__bases__ for name, cls in ERRORS.items()} == BASES


def test_every_error_is_public_and_documented() -> None:
    """All errors can be had from the package, and say what they mean."""
    for name, cls in ERRORS.items():
        assert getattr(minipool, name) is cls
        assert name in minipool.__all__
        assert cls.__doc__


@pytest.mark.parametrize("name", ERRORS)
def test_error_pickles_with_its_fields(name: str) -> None:
    """Type, text and every field survive each pickle protocol, and a copy."""
    cls = ERRORS[name]
    fields: dict[str, Any] = {field: f"<{field}>" for field in _fields(cls)}
    fields["extra"] = [1, {"deep": None}]
    fields["__notes__"] = ["what `add_note` adds"]
    error = cls("what, value, remedy", **fields)

    protocols = range(pickle.HIGHEST_PROTOCOL + 1)
    copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in protocols]
    for again in (*copies, copy.copy(error)):
        assert type(again) is cls
        assert str(again) == "what, value, remedy"
        assert again.args == error.args
        assert vars(again) == fields


def _fields(cls: type) -> list[str]:
    return [field for base in cls.__mro__ for field in vars(base).get("__annotations__", {})]


def test_field_may_have_the_name_of_the_text() -> None:
    """`message` is a field of RemoteError and no clash with the error's own text."""
    error = errors.RemoteError("text", type_name="KeyError", message="'k'", traceback="Trace")

    again = pickle.loads(pickle.dumps(error))

    assert (str(again), again.message, again.type_name) == ("text", "'k'", "KeyError")


def test_subclass_of_a_user_pickles_too() -> None:
    """A user's own kind of our errors travels like ours, whatever makes it."""
    again = pickle.loads(pickle.dumps(_OwnTimeout(1.0)))

    assert type(again) is _OwnTimeout
    assert (str(again), again.timeout) == ("late after 1.0", 1.0)
    assert isinstance(again, TimeoutError)


class _OwnTimeout(errors.CheckoutTimeout):
    def __init__(self, timeout: float) -> None:
        super().__init__(f"late after {timeout}", timeout=timeout)


@pytest.mark.parametrize("value", [lambda: None, open, {"deep": lambda: None}, Unpicklable()])
def test_value_that_cannot_travel_goes_as_its_text(value: Any) -> None:
    """A worker's own pool may refuse an option that cannot be pickled; the error gets home."""
    error = errors.ConfigError("wrong", option="codec", value=value)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.option) == (errors.ConfigError, "wrong", "codec")
    assert again.value in (value, repr(value))


def test_error_that_holds_itself_is_refused_at_once() -> None:
    error = errors.ConfigError("wrong")
    error.value = error
    with pytest.raises(RecursionError):
        pickle.dumps(error)


def test_mark_of_an_answer_stays_where_it_was_made() -> None:
    error = errors.WorkerDied("dead", started=False)
    errors.mark_answered(error)
    assert errors.answered(error)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert not errors.answered(again) and vars(again) == {"started": False}
    other = errors.RemoteError("could not travel")
    errors.mark_answered(other)
    assert not errors.answered(other) and not errors.answered(ValueError())
