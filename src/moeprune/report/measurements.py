"""The table of results: every measurement of a row, with its ratio to the unpruned model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprune.report import intervals, wording
from moeprune.report.scatter import Sample

_DRAWABLE = 1e30  # a perplexity ratio beyond this has no place on an axis


@dataclass(frozen=True)
class Entry:
    """One table cell: the number, and beneath it how it compares to the unpruned model.

    Attributes:
        range: the difference with its interval.
        note: what that means, in words.
    """

    main: str
    sub: str = ""
    worst: bool = False
    range: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One model of the table; ``anchor`` is where its details stand, empty for the unpruned one."""

    name: str
    anchor: str
    facts: tuple[Entry, ...]
    perplexity: tuple[Entry, ...]
    rest: tuple[Entry, ...]
    loss: Entry


@dataclass(frozen=True)
class Table:
    """The rows, and the domains that head the perplexity columns."""

    domains: tuple[str, ...]
    rows: tuple[Row, ...]
    zeroed: bool
    worst: bool
    ranges: bool


def table(result: Mapping[str, Any]) -> Table:
    """The measurements of all rows; domains in the order in which the rows first name them."""
    rows = result["rows"]
    domains = tuple(dict.fromkeys(str(name) for row in rows for name in row["perplexity"]))
    drawn = tuple(
        _row(index, row, domains, baseline(result), result["model"])
        for index, row in enumerate(rows)
    )
    return Table(
        domains=domains,
        rows=drawn,
        zeroed=any(_has_zeros(row) for row in rows if row["method"] is not None),
        worst=any(entry.worst for row in drawn for entry in row.perplexity),
        ranges=any(entry.range for row in drawn for entry in row.perplexity),
    )


def baseline(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The unpruned model's row, if it was measured."""
    return next((row for row in result["rows"] if row["method"] is None), None)


def ratios(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, float]:
    """Perplexity relative to the unpruned model, for the domains where both are known."""
    found = {}
    for domain, value in row["perplexity"].items():
        mine = wording.number(value)
        other = None if base is None else wording.number(base["perplexity"].get(domain))
        if mine is not None and other is not None and mine > 0 and other > 0:
            found[str(domain)] = mine / other
    return found


def mean_ratio(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> float | None:
    """Geometric mean of the ratios; None unless every measured domain has one."""
    values = ratios(row, base)
    if not values or len(values) < len(row["perplexity"]):
        return None
    return math.exp(sum(map(math.log, values.values())) / len(values))


def samples(result: Mapping[str, Any]) -> tuple[list[Sample], list[str]]:
    """What the chart can show, and the names of the rows that it cannot."""
    base = baseline(result)
    drawn, missing = [], []
    for row in result["rows"]:
        ratio, size = mean_ratio(row, base), wording.number(row["bytes"])
        if ratio is None or size is None or not 1 / _DRAWABLE < ratio < _DRAWABLE:
            missing.append(row["name"])
        else:
            drawn.append(Sample(row["name"], size, ratio, row["method"] is not None))
    return drawn, missing


def total_seconds(row: Mapping[str, Any]) -> float | None:
    """Seconds of all stages together; None if none was timed."""
    known = [s for s in map(wording.number, row["seconds"].values()) if s is not None]
    return sum(known) if known else None


def share(value: Any, whole: Any) -> float | None:
    """``value / whole`` where both are known."""
    part, total = wording.number(value), wording.number(whole)
    return None if part is None or not total else part / total


def _row(
    index: int,
    row: Mapping[str, Any],
    domains: Sequence[str],
    base: Mapping[str, Any] | None,
    model: Mapping[str, Any],
) -> Row:
    pruned = row["method"] is not None

    def of_model(value: Any, whole: Any) -> str:
        known = share(value, whole)
        return wording.percent(known, 0) if pruned and known is not None else ""

    agreement = wording.number(row.get("agreement"))
    ratio = mean_ratio(row, base)
    return Row(
        name=row["name"],
        anchor=f"result-{index}" if pruned else "",
        facts=(
            Entry(
                wording.whole(row["experts"]),
                f"of {wording.whole(row['experts_before'])}" if pruned else "",
            ),
            Entry(
                wording.count(row["parameters"]), of_model(row["parameters"], model["parameters"])
            ),
            Entry(
                wording.count(row["nonzero_parameters"]),
                of_model(row["nonzero_parameters"], model["parameters"]),
            ),
            Entry(wording.size(row["bytes"]), of_model(row["bytes"], model["bytes"])),
        ),
        perplexity=_perplexities(row, domains, base),
        rest=(
            Entry(wording.significant(row.get("kl")), range=_bounds(row, "kl")),
            Entry(wording.percent(agreement), range=_bounds(row, "agreement")),
            Entry(wording.seconds(total_seconds(row))),
            Entry(wording.size(row.get("peak_memory_bytes"))),
        ),
        loss=Entry(wording.times(ratio)),
    )


def _bounds(row: Mapping[str, Any], name: str) -> str:
    """The interval over all domains, where the row has it."""
    entry = intervals.difference(row, intervals.ALL, name)
    return intervals.bounds(entry, percent=name == "agreement")


def _perplexities(
    row: Mapping[str, Any], domains: Sequence[str], base: Mapping[str, Any] | None
) -> tuple[Entry, ...]:
    known = ratios(row, base) if row is not base else {}
    worst = max(known, key=lambda domain: known[domain], default=None)
    if worst is None or len(known) < 2 or known[worst] <= 1:
        worst = None  # with one domain there is nothing to single out, and a gain is no loss
    return tuple(
        Entry(
            wording.significant(row["perplexity"].get(domain)),
            wording.times(known[domain]) if domain in known else "",
            domain == worst,
            intervals.interval(intervals.difference(row, domain)),
            intervals.verdict(row, domain),
        )
        for domain in domains
    )


def _has_zeros(row: Mapping[str, Any]) -> bool:
    filled = share(row["nonzero_parameters"], row["parameters"])
    return filled is not None and filled < 0.99
