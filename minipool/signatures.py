"""Signatures: what goes into a program and what comes out, and which values fit."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Tuple

from .errors import ConfigError

#: What a field may be -> the types of its values. True and False are no numbers.
FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "list": (list, tuple),
    "object": (Mapping,),  # a dict, or what else is a mapping
    "any": (object,),
}


class Field(NamedTuple):
    """One input or output of a program. What is not required may be left out, or be None."""

    name: str
    type: str = "any"  #: one of FIELD_TYPES
    required: bool = True


class Misfit(NamedTuple):
    """All that is wrong with some values: names of fields, and what is wrong with their values."""

    missing: List[str]
    unknown: List[str]
    wrong: Dict[str, str]

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"missing {', '.join(map(repr, self.missing))}")
        if self.unknown:
            parts.append(f"unknown {', '.join(map(repr, self.unknown))}")
        parts += [f"wrong {name!r} ({what})" for name, what in self.wrong.items()]
        return "; ".join(parts)


class Signature:
    """What a program takes and returns. Without outputs, what it returns is not looked at.

    Raises:
        ConfigError: a field is of no known type, or is there twice.
    """

    def __init__(self, inputs: Iterable[Field] = (), outputs: Iterable[Field] = ()) -> None:
        self.inputs = _checked_fields("inputs", inputs)
        self.outputs = _checked_fields("outputs", outputs)

    def as_lists(self) -> List[List[Tuple[Any, ...]]]:
        """Return it as plain data, which a store may keep: inputs, outputs."""
        return [[tuple(field) for field in fields] for fields in (self.inputs, self.outputs)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Signature):
            return NotImplemented
        return (self.inputs, self.outputs) == (other.inputs, other.outputs)

    def __hash__(self) -> int:
        return hash((self.inputs, self.outputs))

    def __repr__(self) -> str:
        return f"Signature(inputs={list(self.inputs)}, outputs={list(self.outputs)})"

    def __str__(self) -> str:
        text = f"({listed(self.inputs)})"
        return f"{text} -> {listed(self.outputs)}" if self.outputs else text


def _checked_fields(which: str, fields: Iterable[Field]) -> Tuple[Field, ...]:
    checked = tuple(fields)
    seen = set()
    for field in checked:
        if not isinstance(field, Field):
            wrong, why = field, "is no Field; give Field(name, type)"
        elif not isinstance(field.name, str) or not field.name or field.name in seen:
            wrong, why = field.name, "is no name, or is there twice; give each a name of its own"
        elif field.type not in FIELD_TYPES:
            wrong = field.type
            why = f"is the type of {field.name!r}; give one of {', '.join(FIELD_TYPES)}"
        else:
            seen.add(field.name)
            continue
        raise ConfigError(f"{which}: {wrong!r} {why}", option=which, value=wrong)
    return checked


def listed(fields: Tuple[Field, ...]) -> str:
    return ", ".join(f"{f.name}: {f.type}{'' if f.required else '?'}" for f in fields)


def misfit_of(fields: Tuple[Field, ...], values: Mapping[Any, Any]) -> Misfit | None:
    """Return all that is wrong with some values, or None."""
    by_name = {field.name: field for field in fields}
    found = Misfit(
        missing=[f.name for f in fields if f.required and f.name not in values],
        unknown=[name if isinstance(name, str) else repr(name)
                 for name in values if name not in by_name],
        wrong={},
    )  # fmt: skip
    for name, value in values.items():
        field = by_name.get(name)
        if field is not None and not _fits(field, value):
            found.wrong[name] = f"{type(value).__name__}, not {field.type}"
    return found if any(found) else None


def _fits(field: Field, value: Any) -> bool:
    if value is None and not field.required:
        return True
    if isinstance(value, bool) and field.type in ("integer", "number"):
        return False
    return isinstance(value, FIELD_TYPES[field.type])
