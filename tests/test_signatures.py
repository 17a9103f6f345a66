"""Arguments are checked in the caller: what does not fit never reaches a worker."""

from __future__ import annotations

import abc
import functools
import math
import pickle
from typing import Any

import pytest

from ears import Ear
from minipool import CallMismatch, Pool
from minipool.engine.shape import of_function, of_method


def one(value: Any) -> Any:
    return value


def many(first: int, second: int = 2, *rest: int, only: int, more: int = 5) -> Any:
    return first, second, rest, only, more


def positional(a: int, /, b: int) -> tuple[int, int]:
    return a, b


def anything(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@functools.lru_cache(maxsize=8)
def cached(a: int, b: int = 1) -> int:
    return a + b


@functools.wraps(one)
def injects(*args: Any) -> Any:
    """Shows the signature of another function, and takes more than that."""
    return args


class Base:
    def inherited(self, a: int) -> int:
        return a

    def overridden(self, a: int) -> int:
        return a


class Offers(Base):
    """One method of each kind."""

    def __init__(self) -> None:
        self.calls = 0
        self.made_at_start = lambda a, b: a + b

    def method(self, a: int, b: int = 2) -> int:
        self.calls += 1
        return a + b

    @staticmethod
    def static(a: int) -> int:
        return a

    @classmethod
    def of_class(cls, a: int) -> str:
        return f"{cls.__name__} {a}"

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def cached(self, a: int) -> int:
        return a

    def overridden(self, a: int, b: int = 0) -> int:  # type: ignore[override]
        return a + b

    def named_like_our_words(self, self_: int, target: int, args: int) -> int:
        return self_ + target + args

    nested = Base
    builtin = math.factorial

    def count(self) -> int:
        return self.calls


class Shaped(abc.ABC):  # noqa: B024
    """A metaclass of the library's own is no reason to know nothing."""

    def method(self, a: int) -> int:
        return a


class MakesAnother:
    """Its objects are of another class."""

    def __new__(cls) -> Any:
        return Offers()

    def method(self) -> None:
        raise AssertionError("never made")


class AnswersAll:
    """Shows one method and has another."""

    def __getattribute__(self, name: str) -> Any:
        return anything

    def method(self) -> None:
        raise AssertionError("never reached")


def make_offers() -> Offers:
    return Offers()


REFUSED: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    ("method", (), {}),
    ("method", (1, 2, 3), {}),
    ("method", (1,), {"c": 3}),
    ("method", (1,), {"a": 1}),
    (Offers.method, (), {}),
    ("static", (), {}),
    ("static", (1, 2), {}),
    (Offers.static, (1, 2), {}),
    ("of_class", (), {}),
    ("of_class", (1, 2), {}),
    ("cached", (), {}),
    ("inherited", (), {}),
    (Offers.inherited, (1, 2), {}),
    (Base.inherited, (1, 2), {}),
    (Base.overridden, (1, 2, 3), {}),
    (one, (), {}),
    (one, (1, 2), {}),
    (many, (1,), {}),
    (many, (1,), {"only": 1, "nonsense": 2}),
    (positional, (1,), {}),
    (positional, (), {"a": 1, "b": 2}),
    (cached, (), {}),
    (math.factorial, (), {}),
    (math.factorial, (1, 2), {}),
    (len, (), {}),
]

TAKEN: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = [
    ("method", (1,), {}, 3),
    ("method", (1, 5), {}, 6),
    ("method", (), {"a": 1, "b": 1}, 2),
    (Offers.method, (1,), {"b": 3}, 4),
    ("static", (1,), {}, 1),
    (Offers.static, (1,), {}, 1),
    ("of_class", (1,), {}, "Offers 1"),
    ("cached", (1,), {}, 1),
    ("inherited", (1,), {}, 1),
    (Base.inherited, (1,), {}, 1),
    (Base.overridden, (1, 2), {}, 3),
    ("named_like_our_words", (), {"self_": 1, "target": 2, "args": 3}, 6),
    ("made_at_start", (1, 2), {}, 3),
    ("builtin", (4,), {}, 24),
    (one, (1,), {}, 1),
    (many, (1,), {"only": 4}, (1, 2, (), 4, 5)),
    (many, (1, 2, 3, 4), {"only": 4, "more": 0}, (1, 2, (3, 4), 4, 0)),
    (positional, (1,), {"b": 2}, (1, 2)),
    (anything, (1, 2), {"x": 3}, ((1, 2), {"x": 3})),
    (anything, (), {}, ((), {})),
    (cached, (1,), {"b": 2}, 3),
    (math.factorial, (4,), {}, 24),
    (max, (1, 2), {}, 2),
    (dict, (), {"a": 1}, {"a": 1}),
    (functools.partial(many, only=1), (1,), {}, (1, 2, (), 1, 5)),
]


@pytest.fixture
def pool() -> Any:
    with Pool(Offers, size=1) as opened:
        yield opened


def test_call_that_cannot_fit_never_reaches_the_worker(pool: Pool[Offers]) -> None:
    """It is refused with the signature, before an event tells of a call."""
    ear = Ear(pool)
    with pool.checkout() as w:
        for target, args, kwargs in REFUSED * 2:
            with pytest.raises(CallMismatch) as caught:
                w.call(target, *args, **kwargs)
            error = caught.value
            assert "nothing was sent" in str(error), (target, args, kwargs)
            assert f"{error.target}{error.signature} cannot be called with" in str(error)
            assert error.signature.startswith("(") and error.target, (target, args, kwargs)
    assert [event.name for event in ear.heard if event.name.startswith("operation")] == []
    assert pool.workers()[0].calls == 0


def test_call_that_fits_is_made(pool: Pool[Offers]) -> None:
    with pool.checkout() as w:
        for target, args, kwargs, result in TAKEN * 2:
            assert w.call(target, *args, **kwargs) == result, (target, args, kwargs)


def test_refused_call_costs_no_worker_and_no_state(pool: Pool[Offers]) -> None:
    """The same process goes on with what it had."""
    with pool.checkout() as w:
        pid, before = w.pid, w.count()
        for _ in range(10):
            with pytest.raises(TypeError):
                w.method(1, 2, 3, 4)
        assert (w.pid, w.count()) == (pid, before)


def test_text_says_what_was_given_and_what_is_taken(pool: Pool[Offers]) -> None:
    with pytest.raises(CallMismatch) as caught:
        pool.call("method", 1, 2, 3, c=4)
    assert str(caught.value) == (
        "Offers.method(a, b=2) cannot be called with 3 arguments and c=: too many positional "
        "arguments; nothing was sent; give the arguments that it takes"
    )
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.target, again.signature) == ("Offers.method", "(a, b=2)")


def test_decorated_function_takes_what_its_wrapper_takes(pool: Pool[Offers]) -> None:
    """What `__wrapped__` shows is not what Python asks."""
    shape = of_function(injects)
    for count in (0, 1, 3):
        assert count in shape.counts
        shape.check((None,) * count, {})


def test_missing_method_is_told_by_the_worker(pool: Pool[Offers]) -> None:
    with pytest.raises(CallMismatch, match="did you mean 'method'"):
        pool.call("methud", 1, 2, 3)


def test_factory_is_left_to_the_worker() -> None:
    """Of an object nobody knows yet only the worker can tell what it takes; it is well after."""
    with Pool(make_offers, size=1) as pool:
        with pool.checkout() as w:
            pid = w.pid
            with pytest.raises(TypeError, match="positional argument") as caught:
                w.method()
            assert not isinstance(caught.value, CallMismatch)
            assert w.call(Offers.method, 1) == 3
            assert w.method(1) == 3
            assert w.pid == pid


def test_class_that_makes_others_is_not_believed() -> None:
    """Neither its own `__new__` nor `__getattribute__` leads to a call refused wrongly."""
    with Pool(MakesAnother, size=1) as pool:
        assert pool.call("method", 1) == 3
    assert of_method(AnswersAll, "method").counts == of_function(anything).counts
    assert 5 not in of_method(Shaped, "method").counts


def test_function_of_a_class_keeps_self_where_the_pool_has_no_object() -> None:
    with Pool(size=1) as pool:
        assert pool.call(Base.inherited, Base(), 4) == 4
        with pytest.raises(CallMismatch, match=r"Base\.inherited\(self, a\)"):
            pool.call(Base.inherited, 4)


def test_method_of_another_class_is_a_plain_function(pool: Pool[Offers]) -> None:
    assert pool.call(Shaped.method, Shaped(), 4) == 4
    with pytest.raises(CallMismatch):
        pool.call(Shaped.method, 4)


def test_refusal_agrees_with_python_for_every_shape_of_call() -> None:
    """For each number of arguments and set of keywords: refused exactly when Python refuses."""
    names = ("a", "b", "first", "second", "only", "more", "value", "x")
    sets = [(), *[(n,) for n in names], ("a", "b"), ("first", "only"), ("only", "more"), ("b", "a")]
    for function in (one, many, positional, anything, cached, injects):
        shape = of_function(function)
        for count in range(6):
            for given in sets:
                args, kwargs = tuple(range(count)), dict.fromkeys(given, 1)
                assert _fits(shape, args, kwargs) == _works(function, args, kwargs), (
                    function, args, kwargs,
                )  # fmt: skip


def _fits(shape: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if not kwargs and len(args) in shape.counts:
        return True  # as the lease does it
    try:
        shape.check(args, kwargs)
        shape.check(args, kwargs)  # now it is remembered
    except CallMismatch:
        return False
    return True


def _works(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        function(*args, **kwargs)
    except TypeError:
        return False
    return True
