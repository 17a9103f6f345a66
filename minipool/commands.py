"""Commands: calls that are written down, to be made later on every worker of a pool."""

from __future__ import annotations

from typing import Any, Dict, Iterable, NamedTuple, Tuple


class Command(NamedTuple):
    """One call: what to run, and with what."""

    target: Any  #: a method's name, or a function
    args: Tuple[Any, ...] = ()
    kwargs: Dict[str, Any] = {}


def commands_of(given: Any) -> tuple[Command, ...]:
    """Return commands from what a user wrote: `["load", ("predict", (3,)), (prime, (), {"n": 2})]`.

    Raises:
        ValueError: it is no list of such; the text says what to give.
    """
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ValueError("give a list of commands, each a target or (target, args, kwargs)")
    return tuple(_command(each) for each in given)


def _command(given: Any) -> Command:
    if isinstance(given, str) or callable(given):
        return Command(given)
    if isinstance(given, (tuple, list)) and 1 <= len(given) <= 3:
        command = Command(*given)
        named = isinstance(command.target, str) or callable(command.target)
        lists = isinstance(command.args, (tuple, list)) and isinstance(command.kwargs, dict)
        if named and lists:
            return command._replace(args=tuple(command.args), kwargs=dict(command.kwargs))
    raise ValueError(f"{given!r} is no command; give a target or (target, args, kwargs), such as "
                     f'("predict", (3,))')  # fmt: skip
