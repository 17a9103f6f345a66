"""Baggage: the context variables that travel with each call, for both sides.

A `ContextVar` cannot be pickled, so it goes by the name under which its module has it; what
travels with a call is its value. Only values that are set in the caller travel; each keeps its
default, or what worker code has set, otherwise.
"""

from __future__ import annotations

import contextvars
import pickle
import sys
from contextvars import ContextVar, Token
from typing import Any, Callable

from ..errors import CallMismatch, ConfigError
from . import wire

_UNSET = object()
_MAIN = ("__main__", "__mp_main__")  # multiprocessing has it twice


class Baggage:
    """The variables of one pool, by their names. Travels to the workers, and is opened there."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.paths = paths
        self._variables: dict[str, ContextVar[Any]] = {}
        self._unpacked: dict[str, Any] = {}  # in a worker: of the call under way

    def __reduce__(self) -> tuple[Any, ...]:
        return Baggage, (self.paths,)

    def open(self) -> None:
        """Find the variables.

        Raises:
            ImportError, AttributeError, TypeError: there is none of that name.
            ValueError: two have the same name.
        """
        for path in self.paths:
            variable = wire.find(path)
            if not isinstance(variable, ContextVar):
                raise TypeError(f"{path} is a {type(variable).__name__} and no ContextVar")
            if self._variables.setdefault(variable.name, variable) is not variable:
                raise ValueError(f"two variables are named {variable.name!r}")

    def values(self) -> dict[str, Any]:
        """Return what is set here and now, by the variables' names.

        In a thread of worker code that has no value of its own: what the call under way brought.
        """
        found = dict(self._unpacked)
        for name, variable in self._variables.items():
            value = variable.get(_UNSET)
            if value is not _UNSET:
                found[name] = value
        return found

    def pack(self) -> bytes:
        """Return the values as a call brings them, behind their length in 4 bytes.

        Raises:
            CallMismatch: one cannot be pickled.
        """
        values = self.values()
        try:
            data = pickle.dumps(values, 5)
        except Exception as problem:
            raise _unpicklable(values, problem) from problem
        return len(data).to_bytes(4, "big") + data

    def unpack(self, data: bytes | memoryview) -> list[tuple[ContextVar[Any], Token[Any]]]:
        """Set what a call brought; return what undoes that."""
        self._unpacked = values = pickle.loads(data)
        return [
            (variable, variable.set(values[name]))
            for name, variable in self._variables.items()
            if name in values
        ]

    def put_away(self, tokens: list[tuple[ContextVar[Any], Token[Any]]]) -> None:
        """Undo what a call brought."""
        self._unpacked = {}
        for variable, token in tokens:
            variable.reset(token)

    def run_with(self, values: dict[str, Any], function: Callable[..., object], *args: Any) -> None:
        """Call a function as if the variables had these values."""

        def run() -> None:
            for name in self._variables.keys() & values.keys():
                self._variables[name].set(values[name])
            function(*args)

        contextvars.copy_context().run(run)


def baggage_of(variables: tuple[Any, ...], starts_by_fork: bool) -> Baggage | None:
    """Return the baggage of a pool's option `context`; None: its calls travel without.

    Raises:
        ConfigError: a worker could not find a variable.
    """
    if not variables:
        return None
    baggage = Baggage(tuple(_path_of(variable) for variable in variables))
    try:
        baggage.open()
    except Exception as problem:
        raise _refusal(variables, f"{type(problem).__name__}: {problem}") from problem
    if not starts_by_fork and any(path.startswith("__main__:") for path in baggage.paths):
        why = wire.why_main_unreachable()
        if why is not None:
            raise _refusal(variables, why)
    return baggage


def _path_of(variable: Any) -> str:
    """Return "module:name" of a variable: where it is found, or as it was given."""
    if isinstance(variable, str):
        return variable
    modules = {name: module for name, module in sys.modules.items() if name not in _MAIN}
    modules["__main__"] = sys.modules["__main__"]  # last, and by the name that workers know as well
    for module_name, module in modules.items():
        for name, value in tuple(getattr(module, "__dict__", {}).items()):
            if value is variable:
                return f"{module_name}:{name}"
    raise _refusal(
        variable, 'no module has it; keep it in one, or name it, as in "package.module:Class.name"'
    )


def _refusal(value: Any, why: str) -> ConfigError:
    return ConfigError(f"context={value!r}: {why}", option="context", value=value)


def _unpicklable(values: dict[str, Any], problem: Exception) -> CallMismatch:
    for name, value in values.items():
        try:
            pickle.dumps(value, 5)
        except Exception as own:
            return CallMismatch(
                f"the context variable {name!r}, a {type(value).__name__}, cannot be sent to a "
                f"worker: {own}; nothing was sent; keep plain data in it"
            )
    return CallMismatch(f"the context variables cannot be sent to a worker: {problem}")
