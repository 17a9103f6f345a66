"""Which arguments a target takes, so that a call that does not fit is refused in the caller.

Runs in the parent. What is not known for sure is left to the worker, where Python itself refuses
it: a call refused here must be one that could not have worked. So of a decorated function the
outermost one counts, as it does for Python, and not what `__wrapped__` or `__signature__` say of
it; and a class that may make anything of its name (its own `__new__`, `__getattribute__` or
metaclass) is believed nothing.

How many arguments fit where there are no keywords is a set, which is all that most calls look
at. Of the others the combinations that once fitted are remembered.
"""

from __future__ import annotations

import functools
import inspect
from types import BuiltinFunctionType, FunctionType
from typing import Any

from ..errors import CallMismatch

_REMEMBERED = 256  # combinations per target; others are bound each time
_MANY = 32  # positional arguments; calls with more are not in the set
_Kind = inspect.Parameter


class Shape:
    """The arguments one target takes; without a signature, any."""

    __slots__ = ("_fitting", "_label", "_signature", "counts")

    def __init__(self, label: str = "", signature: inspect.Signature | None = None) -> None:
        self.counts = _counts(signature)  # of positional arguments that fit without keywords
        self._label = label
        self._signature = signature
        self._fitting: set[tuple[Any, ...]] = set()

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Do nothing if the arguments fit.

        Raises:
            CallMismatch: they do not.
        """
        if self._signature is None:
            return
        given = (len(args), *kwargs)
        if given in self._fitting:
            return
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as problem:
            raise self._mismatch(str(problem), args, kwargs) from None
        if len(self._fitting) < _REMEMBERED:
            self._fitting.add(given)

    def _mismatch(
        self, problem: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> CallMismatch:
        signature = _shown(self._signature)
        return CallMismatch(
            f"{self._label}{signature} cannot be called with {_given(len(args), kwargs)}: "
            f"{problem}; nothing was sent; give the arguments that it takes",
            target=self._label,
            signature=signature,
        )


def of_function(function: Any) -> Shape:
    """Return what a function takes."""
    return _shape(function, bound=False, label=getattr(function, "__qualname__", ""))


def of_method(kind: type, name: str) -> Shape:
    """Return what the method of that name takes, called on an object that `kind` has made."""
    if not makes_its_own(kind):
        return ANYTHING
    found = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    label = f"{kind.__qualname__}.{name}"
    if isinstance(found, staticmethod):
        return _shape(found.__func__, bound=False, label=label)
    if isinstance(found, classmethod):
        return _shape(found.__func__, bound=True, label=label)
    if isinstance(_bare(found), FunctionType):
        return _shape(found, bound=True, label=label)
    return ANYTHING  # there is none, or one that only the object itself can tell


def makes_its_own(kind: type) -> bool:
    """Tell whether calling this class gives an object of it, with the attributes it shows."""
    reads: Any = kind.__getattribute__
    return (
        type(kind).__call__ is type.__call__
        and isinstance(kind.__new__, BuiltinFunctionType)
        and reads is object.__getattribute__
    )


def _shape(function: Any, bound: bool, label: str) -> Shape:
    function = _bare(function)
    try:
        signature = _signature(function)
    except Exception:  # a builtin without one, or with one that does not parse
        return ANYTHING
    if bound:
        parameters = [*signature.parameters.values()]
        if not parameters or parameters[0].kind in (_Kind.KEYWORD_ONLY, _Kind.VAR_KEYWORD):
            return ANYTHING  # it cannot even take the object
        if parameters[0].kind is not _Kind.VAR_POSITIONAL:
            signature = signature.replace(parameters=parameters[1:])
    return Shape(label, signature)


def _signature(function: Any) -> inspect.Signature:
    if isinstance(function, FunctionType):
        # A copy has neither `__wrapped__` nor `__signature__`, which Python does not ask either.
        copy = FunctionType(
            function.__code__, {}, function.__name__, function.__defaults__, function.__closure__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        return inspect.signature(copy)
    if isinstance(function, BuiltinFunctionType):
        return inspect.signature(function)
    raise ValueError("nothing is known for sure of other callables")


def _bare(function: Any) -> Any:
    """Return the function whose results a cache keeps: a cache takes what its function takes."""
    while isinstance(function, functools._lru_cache_wrapper):
        function = function.__wrapped__
    return function


def _counts(signature: inspect.Signature | None) -> frozenset[int]:
    if signature is None:
        return frozenset(range(_MANY + 1))
    required = allowed = 0
    for parameter in signature.parameters.values():
        if parameter.kind is _Kind.VAR_POSITIONAL:
            allowed += _MANY
        elif parameter.kind is _Kind.KEYWORD_ONLY:
            if parameter.default is _Kind.empty:
                return frozenset()  # a call without keywords cannot fit
        elif parameter.kind is not _Kind.VAR_KEYWORD:
            allowed += 1
            required += parameter.default is _Kind.empty
    return frozenset(range(required, allowed + 1))


def _shown(signature: inspect.Signature | None) -> str:
    try:
        text = str(signature)
    except Exception:  # the repr of a default
        return "(...)"
    return text if len(text) <= 300 else f"{text[:300]}...)"


def _given(count: int, kwargs: dict[str, Any]) -> str:
    given = "1 argument" if count == 1 else f"{count or 'no'} arguments"
    return f"{given} and {', '.join(f'{name}=' for name in kwargs)}" if kwargs else given


ANYTHING = Shape()
