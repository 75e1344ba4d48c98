"""What evaluation adds to a row beside perplexity: tasks, generation, speed and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moeprune.report import wording
from moeprune.report.card import SIZES
from moeprune.report.intervals import bounds, interval, is_interval

_DEEPEST = 4


@dataclass(frozen=True)
class Number:
    """A measurement, its interval, and how it differs from the unpruned model."""

    main: str
    bounds: str = ""
    difference: str = ""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Measurements downwards, results to the right."""

    title: str
    caption: str
    names: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Number, ...]], ...]


Lines = dict[str, Number]
Read = Callable[[Mapping[str, Any], str], Lines]
"""The measurements of one side, "model" or "teacher"; none where it was not measured."""


def sections(result: Mapping[str, Any]) -> tuple[Section, ...]:
    """What was measured; sections that no row has are left out."""
    found = [_section(result, *one) for one in _SECTIONS]
    return tuple(section for section in found if section is not None)


def _section(
    result: Mapping[str, Any], key: str, title: str, caption: str, read: Read
) -> Section | None:
    tables: dict[str, Lines] = {}
    for row in result["rows"]:
        if isinstance(row.get(key), Mapping):
            tables[str(row["name"])] = read(row[key], "model")
            tables[f"original, beside {row['name']}"] = read(row[key], "teacher")
    tables = {name: table for name, table in tables.items() if table}
    measures = dict.fromkeys(measure for table in tables.values() for measure in table)
    if not measures:
        return None
    nothing = Number(wording.NOTHING)
    lines = tuple(
        (measure, tuple(table.get(measure, nothing) for table in tables.values()))
        for measure in measures
    )
    return Section(title, caption, tuple(tables), lines)


def _tasks(section: Mapping[str, Any], side: str) -> Lines:
    return dict(_numbers(section)) if side == "model" else {}


def _generation(section: Mapping[str, Any], side: str) -> Lines:
    """By decoding and measure; see docs/generation.md."""
    found = {}
    decodings = section.get("decodings")
    for decoding in map(_table, decodings if isinstance(decodings, list) else ()):
        for name, cell in _table(decoding.get("measures")).items():
            entry = _table(_table(cell).get(side))
            if is_interval(entry):
                more = cell if side == "model" else {}
                found[f"{decoding.get('name')} · {str(name).replace('_', '-')}"] = Number(
                    wording.significant(entry["value"]),
                    bounds(entry, 3),
                    interval(more.get("against")),
                    str(more.get("verdict") or ""),
                )
    return found


def _efficiency(section: Mapping[str, Any], side: str) -> Lines:
    """Sizes and speeds, with the ratio of speeds; see docs/generation.md."""
    values, ratios = _table(_table(section.get("models")).get(side)), _table(section.get("ratio"))
    found = {}
    for key, words, form in SIZES:
        if values.get(key) is None:
            continue
        value = wording.significant(values[key])
        if form == "count":
            value = (wording.size if key.endswith("bytes") else wording.count)(values[key])
        ratio = _table(ratios.get(key.partition("_")[0])) if side == "model" else {}
        said = f"{wording.times(ratio['value'])} {bounds(ratio, 3)}" if is_interval(ratio) else ""
        found[words.removeprefix("bytes ")] = Number(value, "", said)
    return found


def _numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Number]]:
    if is_interval(value):
        yield (
            " · ".join(path),
            Number(
                wording.significant(value["value"]),
                bounds(value, 3),
                interval(value.get("difference")),
                str(value.get("verdict") or ""),
            ),
        )
    elif isinstance(value, Mapping) and len(path) < _DEEPEST:
        for name, inner in value.items():
            yield from _numbers(inner, (*path, str(name)))
    elif path and wording.number(value) is not None:
        yield " · ".join(path), Number(wording.significant(value))


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


_SECTIONS: tuple[tuple[str, str, str, Read], ...] = (
    ("tasks", "Tasks", "Scores as the evaluation harness counts them", _tasks),
    ("generation", "Generation", "Health of generated text, with intervals", _generation),
    ("efficiency", "Speed and memory", "Measured in alternating turns", _efficiency),
)
"""Their key in a row, title, caption, and how to read them."""
