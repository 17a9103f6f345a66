"""A strict reader of the OpenMetrics text format, as of its specification 1.0.0.

What it does not accept is an AssertionError that says why. It knows what minipool uses: gauges,
counters, histograms and summaries, without timestamps and exemplars.
"""

from __future__ import annotations

import math
import re
from typing import Dict, Tuple

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
SAMPLE = re.compile(rf"({NAME})\{{((?:{LABEL}(?:,{LABEL})*)?)\}} (\S+)")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|\+Inf")
SUFFIXES = {
    "gauge": {""},
    "counter": {"_total"},
    "histogram": {"_bucket", "_count", "_sum"},
    "summary": {"_count", "_sum"},
}
ESCAPES = {r"\n": "\n", r"\"": '"', r"\\": "\\"}

Labels = Tuple[Tuple[str, str], ...]
Families = Dict[str, Dict[Tuple[str, Labels], float]]  # name -> (suffix, labels) -> value


def parse(text: str) -> Families:
    """Return every sample of every family."""
    assert text.endswith("\n# EOF\n"), "the end is missing"
    lines = text.split("\n")[:-2]
    families: Families = {}
    kinds: dict[str, str] = {}
    about: dict[str, set[str]] = {}
    current = ""
    for line in lines:
        if line.startswith("#"):
            word, name, rest = _described(line)
            if name != current:
                assert name not in families, f"{name} is told in two places"
                current, families[name], about[name] = name, {}, set()
            assert not families[name], f"{line}: comes after samples"
            assert word not in about[name], f"{line}: told twice"
            about[name].add(word)
            if word == "TYPE":
                assert rest in SUFFIXES, line
                kinds[name] = rest
            elif word == "UNIT":
                assert name.endswith(f"_{rest}"), f"{line}: the name does not end with it"
            continue
        suffix, labels, value = _sample(line, current)
        assert suffix in SUFFIXES[kinds[current]], f"{line}: not of a {kinds[current]}"
        series = families[current]
        assert (suffix, labels) not in series, f"{line}: told twice"
        series[suffix, labels] = value
    for name, series in families.items():
        assert not any(
            other != name and other in {name + suffix for suffix in SUFFIXES[kinds[name]]}
            for other in families
        ), f"a sample of {name} has the name of another family"
        _check(name, kinds[name], series)
    return families


def _described(line: str) -> tuple[str, str, str]:
    found = re.fullmatch(rf"# (TYPE|UNIT|HELP) ({NAME}) (.*)", line)
    assert found, f"{line}: neither a description nor a sample"
    if found[1] == "HELP":
        assert not re.search(r'(?<!\\)(\\\\)*\\(?![n"\\])', found[3]), f"{line}: wrong escape"
    return found[1], found[2], found[3]


def _sample(line: str, family: str) -> tuple[str, Labels, float]:
    found = SAMPLE.fullmatch(line)
    assert found, f"{line}: no sample"
    name, inside, number = found[1], found[2], found.groups()[-1]
    assert name.startswith(family), f"{line}: not of {family}"
    assert NUMBER.fullmatch(number), f"{line}: no number"
    labels = [(match[1], match[2]) for match in re.finditer(LABEL, inside)]
    assert len({key for key, _ in labels}) == len(labels), f"{line}: a label twice"
    plain = tuple((k, re.sub(r"\\.", lambda m: ESCAPES[m[0]], v)) for k, v in labels)
    return name[len(family) :], plain, float(number.replace("Inf", "inf"))


def _check(name: str, kind: str, series: dict[tuple[str, Labels], float]) -> None:
    if kind != "gauge":
        assert all(value >= 0 for value in series.values()), f"{name}: a count below nothing"
    if kind != "histogram":
        return
    of_one: dict[Labels, list[tuple[float, float]]] = {}
    for (suffix, labels), value in series.items():
        if suffix == "_bucket":
            rest = tuple(pair for pair in labels if pair[0] != "le")
            (bound,) = (float(v.replace("Inf", "inf")) for k, v in labels if k == "le")
            of_one.setdefault(rest, []).append((bound, value))
            assert value == int(value)
    for labels, buckets in of_one.items():
        assert buckets == sorted(buckets), f"{name}: bounds or counts are out of order"
        counts = [count for _, count in buckets]
        assert counts == sorted(counts), f"{name}: buckets do not add up"
        assert buckets[-1] == (math.inf, series["_count", labels]), f"{name}: the last is not all"
        assert ("_sum", labels) in series
