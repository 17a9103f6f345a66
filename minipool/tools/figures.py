"""Figures: what the bench measured, held against its targets, for people and for programs.

A `Series` is one thing measured in several rounds; its value is the median of the rounds, its
spread goes from the lowest round to the highest. A `Result` compares two series that were
measured alternately, round by round, so that what disturbs the machine disturbs both.
"""

from __future__ import annotations

import statistics
from typing import Any, Iterable, NamedTuple, Optional, Tuple

_SCALES = {  # unit of the value: how people see it
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((1e6, "MB"), (1e3, "kB")),
    "1/s": ((1.0, "/s"),),
    "x": ((1.0, "x"),),
}


class Series(NamedTuple):
    """One thing, measured in several rounds. Units: "s", "B", "1/s", "x", or a plain word."""

    name: str
    about: str
    unit: str
    rounds: Tuple[float, ...]

    @property
    def value(self) -> float:
        return statistics.median(self.rounds)

    def line(self, width: int) -> str:
        """Describe it for people: what, the median, and the spread behind it."""
        low, high = min(self.rounds), max(self.rounds)
        spread = ""
        if len(self.rounds) > 1:
            spread = f"{shown(low, self.unit)} .. {shown(high, self.unit)}"
        return f"{self.about:<{width}} {shown(self.value, self.unit):>10}   {spread:<22}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        low, high = min(self.rounds), max(self.rounds)
        return {
            "name": self.name, "about": self.about, "unit": self.unit, "value": self.value,
            "low": low, "high": high, "rounds": len(self.rounds),
        }  # fmt: skip


class Result(NamedTuple):
    """A figure that has, or stands beside one that has, a target: to be at most so much."""

    series: Series
    target: Optional[float] = None

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "ok" if self.series.value <= self.target else "MISSED"

    def line(self, width: int) -> str:
        """Describe it for people: as its series, with the target beside it."""
        text = self.series.line(width)
        if self.target is None:
            return text
        target = shown(self.target, self.series.unit)
        return f"{text:<{width + 36}} at most {target:>9}: {self.verdict}"

    def as_dict(self) -> dict[str, Any]:
        return {**self.series.as_dict(), "target": self.target, "verdict": self.verdict}


def over(
    name: str, about: str, measured: Series, floor: Series, target: float | None = None
) -> Result:
    """Return how many times the floor was needed, round by round."""
    rounds = tuple(m / f for m, f in zip(measured.rounds, floor.rounds))
    return Result(Series(name, about, "x", rounds), target)


def above(
    name: str, about: str, measured: Series, floor: Series, target: float | None = None
) -> Result:
    """Return how much more than the floor was needed, round by round."""
    rounds = tuple(m - f for m, f in zip(measured.rounds, floor.rounds))
    return Result(Series(name, about, measured.unit, rounds), target)


class Group(NamedTuple):
    """What one part of the bench found."""

    name: str
    about: str
    series: Tuple[Series, ...]
    results: Tuple[Result, ...]
    notes: Tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "series": [series.as_dict() for series in self.series],
            "results": [result.as_dict() for result in self.results],
            "notes": list(self.notes),
        }

    def lines(self) -> Iterable[str]:
        """Describe the group for people."""
        yield f"{self.name}: {self.about}"
        for series in self.series:
            yield f"  {series.line(62)}"
        for result in self.results:
            yield f"  = {result.line(60)}"
        for note in self.notes:
            yield f"  {note}"


def shown(value: float, unit: str) -> str:
    """Write a value in a unit that fits its size, to three digits or so."""
    scales = _SCALES.get(unit)
    if scales is None:
        return f"{value:.3g} {unit}"
    size, name = next((scale for scale in scales if abs(value) >= scale[0]), scales[-1])
    scaled = value / size
    digits = 2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0
    return f"{scaled:.{digits}f} {name}"
