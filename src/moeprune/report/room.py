"""A page stays below 6 MB: what grows with experts is left out where it must, and named.

First the scores of the last results go, then what became of their single experts, then what experts
served. Tables of sizes and losses stay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

MOST = 6_000_000
"""Bytes of a page."""
_FULL, _AIM = 0.92, 0.97  # a page that is left so full is not drawn again
_SCORE, _ID, _LINE, _PAIR, _TOKEN = 9, 4, 250, 3, 14  # characters on a page, roughly

Row = Mapping[str, Any]
Draw = Callable[[Sequence[Row], Mapping[str, Any], Sequence[str]], str]
"""Draws rows, an atlas and sentences about what is missing of them."""

LEFT_OUT = "left_out"


@dataclass(frozen=True)
class _Cut:
    """Something that can be left out, and about how many characters it takes."""

    what: str
    row: int
    size: int


def fitted(rows: Sequence[Row], atlas: Mapping[str, Any] | None, draw: Draw) -> str:
    """The page with as much of ``rows`` and ``atlas`` as leaves it room.

    Args:
        rows: results; of those with a ``plan`` this and its scores can be left out. A row that lost
            its plan has ``left_out``.
        atlas: what experts served and ``routing``, as in a run's result.
        draw: draws the page.
    """
    whole = atlas or {}
    cuts = list(_cuts(rows, whole))
    taken_C = [0, *accumulate(cut.size for cut in cuts)]  # characters of the first cuts, roughly

    def drawn(count: int) -> tuple[str, int]:
        page = draw(*_without(rows, whole, cuts[:count]))
        return page, len(page.encode())

    low, high, hopeless = 0, len(cuts), taken_C[-1] > 2 * MOST
    large = taken_C[-1]
    if not hopeless:
        page, large = drawn(0)
        if large <= MOST or not cuts:
            return page
    page, small = drawn(high)
    if hopeless:  # not worth drawing whole
        large += small
    while small < _FULL * MOST and high - low > 1:
        # sizes are taken to go from `large` to `small` as the estimates do
        wanted = (large - _AIM * MOST) / (large - small) * (taken_C[high] - taken_C[low])
        count = min(max(bisect_left(taken_C, taken_C[low] + wanted), low + 1), high - 1)
        other, size = drawn(count)
        if size > MOST:
            low, large = count, size
        else:
            high, small, page = count, size, other
    return page


def _cuts(rows: Sequence[Row], atlas: Mapping[str, Any]) -> Iterator[_Cut]:
    """Everything that can go, the first to go first."""
    planned = [place for place, row in enumerate(rows) if row.get("plan")]
    for place in reversed(planned):
        tables = [entry.get("scores") or {} for entry in rows[place]["plan"].values()]
        numbers = sum(len(values) for table in tables for values in table.values())
        if numbers:
            yield _Cut("scores", place, _SCORE * numbers)
    for place in reversed(planned):
        yield _Cut("plan", place, sum(map(_entry, rows[place]["plan"].values())))
    layers = list((atlas.get("layers") or {}).values())
    for what, each in (("tokens", _TOKEN), ("domains", _PAIR)):
        lists = [part for entry in layers for part in entry.get(what) or ()]
        if lists:
            yield _Cut(what, -1, each * sum(map(len, lists)))


def _entry(entry: Mapping[str, Any]) -> int:
    """One layer of a plan: a letter for every expert, ids of those that went, and a line."""
    gone = sum(len(entry.get(name) or ()) for name in ("replaced", "dropped", "merged"))
    return len(entry["keep"]) + gone * _ID + _LINE


def _without(
    rows: Sequence[Row], atlas: Mapping[str, Any], cuts: Iterable[_Cut]
) -> tuple[list[Row], dict[str, Any], list[str]]:
    """What is drawn, and what is said about the rest."""
    gone: dict[str, list[int]] = {}
    for cut in cuts:
        gone.setdefault(cut.what, []).append(cut.row)
    plans, scores = set(gone.get("plan", ())), set(gone.get("scores", ()))
    drawn = [
        {**row, "plan": None, LEFT_OUT: True}
        if place in plans
        else _unscored(row)
        if place in scores
        else row
        for place, row in enumerate(rows)
    ]
    return (
        drawn,
        _trimmed(atlas, gone, {rows[place]["name"] for place in plans}),
        [
            *_said("Scores", [rows[place] for place in sorted(scores - plans)]),
            *_said("What became of single experts", [rows[place] for place in sorted(plans)]),
            *(
                f"What would make this page too large was left out: {words} of experts."
                for what, words in (("tokens", "typical tokens"), ("domains", "domains"))
                if what in gone
            ),
        ],
    )


def _unscored(row: Row) -> Row:
    plan = {layer: {**entry, "scores": {}} for layer, entry in row["plan"].items()}
    return {**row, "plan": plan}


def _trimmed(atlas: Mapping[str, Any], gone: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    whole = {what for what in ("tokens", "domains") if what in gone}
    found = dict(atlas)
    if whole:
        found["layers"] = {
            index: {name: part for name, part in entry.items() if name not in whole}
            for index, entry in atlas["layers"].items()
        }
    if "tokens" in whole:
        found["tokens"] = []  # their texts
    routing = atlas.get("routing")
    if names and routing:
        rows = {name: row for name, row in routing["rows"].items() if name not in names}
        found["routing"] = {**routing, "rows": rows}
    return found


def _said(what: str, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    names = ", ".join(str(row["name"]) for row in rows)
    return [
        f"{what} that would make this page too large were left out: {names}; their plans hold them."
    ]
