"""Measured differences with their intervals, and sections that evaluation may add to a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moeprune.report import wording

ALL = "all"
"""Under this name evaluation puts all domains together."""

_DEEPEST = 4


def signed(value: Any, digits: int = 2) -> str:
    """A difference with its sign: ``+0.031``."""
    known = wording.number(value)
    if known is None:
        return wording.NOTHING
    text = wording.significant(known, digits)
    return f"+{text}" if known > 0 else text


def interval(entry: Any, digits: int = 2) -> str:
    """``+0.031 [0.024, 0.038]``; empty where there is none.

    Args:
        entry: {"value", "low", "high", ...}, as evaluation writes it.
        digits: significant ones.
    """
    if not _is_interval(entry):
        return ""
    # lines may break before the bracket, and not in it
    return f"{signed(entry['value'], digits)} {bounds(entry, digits)}"


def bounds(entry: Any, digits: int = 2, percent: bool = False) -> str:
    """``[0.024, 0.038]``, or as per cent ``[97.1, 98.2] %``; empty where there is none."""
    if not _is_interval(entry):
        return ""
    ends = [wording.number(entry[key]) for key in ("low", "high")]
    if percent:
        low, high = (wording.percent(end).removesuffix(f"{wording.THIN}%") for end in ends)
    else:
        low, high = (wording.significant(end, digits) for end in ends)
    return f"[{low},\N{NO-BREAK SPACE}{high}]" + (f"{wording.THIN}%" if percent else "")


def verdicts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """By result, what the differences over all domains together mean."""
    found = [(str(row["name"]), verdict(row, ALL)) for row in result["rows"]]
    return [(name, text) for name, text in found if text]


def _is_interval(entry: Any) -> bool:
    return isinstance(entry, Mapping) and {"value", "low", "high"} <= set(entry)


def difference(row: Mapping[str, Any], domain: str, name: str = "loss") -> Any:
    """The interval of one measure on one domain, if the row has it."""
    against = row.get("against")
    part = against.get(domain) if isinstance(against, Mapping) else None
    return part.get(name) if isinstance(part, Mapping) else None


def verdict(row: Mapping[str, Any], domain: str) -> str:
    """What the difference on a domain means, in the words of the evaluation."""
    return str(difference(row, domain, "verdict") or "")


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

    names: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Number, ...]], ...]


def section(result: Mapping[str, Any], key: str) -> Section | None:
    """Everything with a number under ``row[key]``, whatever its names; None if no row has it."""
    rows = [row for row in result["rows"] if isinstance(row.get(key), Mapping)]
    tables = [dict(_numbers(row[key])) for row in rows]
    names = dict.fromkeys(name for table in tables for name in table)
    if not names:
        return None
    lines = tuple(
        (name, tuple(table.get(name, Number(wording.NOTHING)) for table in tables))
        for name in names
    )
    return Section(tuple(str(row["name"]) for row in rows), lines)


def _numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Number]]:
    if _is_interval(value):
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
