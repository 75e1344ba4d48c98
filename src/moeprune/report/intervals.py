"""Measured differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeprune.report import wording

ALL = "all"
"""Under this name evaluation puts all domains together."""


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
    if not is_interval(entry):
        return ""
    # lines may break before the bracket, and not in it
    return f"{signed(entry['value'], digits)} {bounds(entry, digits)}"


def bounds(entry: Any, digits: int = 2, percent: bool = False) -> str:
    """``[0.024, 0.038]``, or as per cent ``[97.1, 98.2] %``; empty where there is none."""
    if not is_interval(entry):
        return ""
    ends = [wording.number(entry[key]) for key in ("low", "high")]
    if percent:
        low, high = (wording.percent(end).removesuffix(f"{wording.THIN}%") for end in ends)
    else:
        low, high = (wording.significant(end, digits) for end in ends)
    return f"[{low},\N{NO-BREAK SPACE}{high}]" + (f"{wording.THIN}%" if percent else "")


def verdicts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """By result, what the differences over all domains mean, and who lost more than the others."""
    found = []
    for row in result["rows"]:
        told = row.get("findings")
        texts = [verdict(row, ALL), *map(str, told if isinstance(told, list) else ())]
        found += [(str(row["name"]), text) for text in texts if text]
    return found


def is_interval(entry: Any) -> bool:
    """Whether this is an interval as evaluation writes it."""
    return isinstance(entry, Mapping) and {"value", "low", "high"} <= set(entry)


def difference(row: Mapping[str, Any], domain: str, name: str = "loss") -> Any:
    """The interval of one measure on one domain, if the row has it."""
    against = row.get("against")
    part = against.get(domain) if isinstance(against, Mapping) else None
    return part.get(name) if isinstance(part, Mapping) else None


def verdict(row: Mapping[str, Any], domain: str) -> str:
    """What the difference on a domain means, in the words of the evaluation."""
    return str(difference(row, domain, "verdict") or "")
