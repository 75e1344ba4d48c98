"""The expert atlas: layers by experts, what each expert served, and what became of it.

The page's script gets numbers and texts as JSON and puts texts on the page as text, never as
markup; here the JSON is made such that it cannot end the element that holds it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from moeprune.report import marks, wording

_FATES = {"keep": "k", "replaced": "n", "dropped": "d"}
_DIGITS = 4


def payload(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the script needs to know; None where no layer is known expert by expert."""
    atlas, usage = result.get("atlas") or {}, result.get("usage") or {}
    rows = [row for row in result["rows"] if row.get("plan")]
    served = atlas.get("layers") or {}
    plans = [row["plan"] for row in rows]
    indices = sorted({int(i) for table in (served, usage, *plans) for i in table})
    if not indices:
        return None
    experts = int(result["model"]["experts"])
    return {
        "experts": experts,
        "top_k": result["model"]["top_k"],
        "layers": indices,
        "usage": [_known(_shares(served, usage, i), experts) for i in indices],
        "count": [_part(served, i, "count") for i in indices],
        "gate": [_part(served, i, "gate") for i in indices],
        "domains": [str(name) for name in atlas.get("domains") or ()],
        "served": [_part(served, i, "domains") for i in indices],
        "tokens": [visible(str(text)) for text in atlas.get("tokens") or ()],
        "typical": [_part(served, i, "tokens") for i in indices],
        "rows": [_row(row, indices, experts) for row in rows],
    }


def shown(drawn: Mapping[str, Any] | None, left_out: Sequence[str]) -> dict[str, Any]:
    """What templates need for the atlas, from what ``payload`` returned, and the page's colours.

    ``left_out`` says what is missing of it.
    """
    return {
        "atlas": drawn,
        "grid": None if drawn is None else grid(drawn),
        "data": None if drawn is None else script(drawn),
        "choices": [] if drawn is None else choices(drawn),
        "left_out": left_out,
        "light": marks.variables(),
        "dark": marks.variables(dark=True),
        "steps": marks.STEPS,
        "sides": marks.SIDES,
    }


def script(value: Any) -> Markup:
    """JSON that can stand in a script element: it holds no ``<``, ``>`` or ``&``."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def visible(token: str) -> str:
    """A token with its white space to be seen, and nothing that could turn the line around."""
    shown = token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in shown)


def _row(row: Mapping[str, Any], indices: Sequence[int], experts: int) -> dict[str, Any]:
    names = dict.fromkeys(n for entry in row["plan"].values() for n in entry.get("scores") or {})
    entries = [row["plan"].get(str(index)) for index in indices]
    return {
        "name": str(row["name"]),
        "method": str(row["method"]),
        "fates": ["" if entry is None else _fates(entry, experts) for entry in entries],
        "into": [(entry or {}).get("merged") or {} for entry in entries],
        "scores": {
            str(name): [
                _known(((entry or {}).get("scores") or {}).get(name) or (), experts)
                for entry in entries
            ]
            for name in names
        },
    }


def _fates(entry: Mapping[str, Any], experts: int) -> str:
    """One letter per expert: kept, weights masked, novice, merged, dropped; ``-`` for unknown."""
    letters = ["-"] * experts
    for name, letter in _FATES.items():
        for expert in entry[name]:
            letters[expert] = "w" if letter == "k" and entry.get("masked") else letter
    for expert in entry.get("merged") or {}:
        if int(expert) < experts:
            letters[int(expert)] = "m"
    return "".join(letters)


def _shares(
    served: Mapping[str, Any], usage: Mapping[str, Any], index: int
) -> Sequence[float | None]:
    if str(index) in usage:
        return usage[str(index)]  # type: ignore[no-any-return]
    counts = (served.get(str(index)) or {}).get("count") or ()
    return [count / max(1, sum(counts)) for count in counts]


def _part(served: Mapping[str, Any], index: int, name: str) -> Any:
    return (served.get(str(index)) or {}).get(name) or []


def _known(values: Sequence[Any], experts: int) -> list[float | None]:
    """Numbers to a few digits; None for what is not known."""
    found: list[float | None] = []
    for value in values[:experts]:
        number = wording.number(value)
        found.append(None if number is None else float(f"{number:.{_DIGITS}g}"))
    return found + [None] * (experts - len(found)) if found else []


@dataclass(frozen=True)
class GridRow:
    """One layer of the grid before any script runs: shade and text of every expert's usage."""

    layer: int
    cells: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Grid:
    """Layers downwards, experts to the right; ``every`` how many columns an id is printed."""

    rows: tuple[GridRow, ...]
    experts: int
    every: int
    top: str


def grid(drawn: Mapping[str, Any]) -> Grid:
    """The usage of every expert as shades of the ramp, from what ``payload`` returned."""
    experts = drawn["experts"]
    top = max((v for line in drawn["usage"] for v in line if v is not None), default=0.0)
    rows = []
    for layer, line in zip(drawn["layers"], drawn["usage"], strict=True):
        cells = []
        for value in line or [None] * experts:
            step = marks.shade(value, 0.0, top)
            cells.append(("c" if step is None else f"c{step}", wording.percent(value)))
        rows.append(GridRow(layer, tuple(cells)))
    return Grid(tuple(rows), experts, 1 if experts <= 40 else 8, wording.percent(top))


def choices(drawn: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Measures to colour by, in groups: what the script reads, and what people read."""
    scored = any(row["scores"] for row in drawn["rows"])
    plain = [("usage", "usage: share of slots")] if any(drawn["usage"]) or not scored else []
    if any(drawn["gate"]):
        plain.append(("gate", "mean gate weight"))
    if any(drawn["served"]):
        plain.append(("special", "specialisation"))
    groups = [("", [(json.dumps([name]), text) for name, text in plain])] if plain else []
    if any(drawn["served"]):
        affinities = [
            (json.dumps(["domain", place]), f"affinity to {name}")
            for place, name in enumerate(drawn["domains"])
        ]
        groups.append(("domains", affinities))
    for place, row in enumerate(drawn["rows"]):
        if row["scores"]:
            # no spaces: the script compares the beginning of the value
            values = [
                (
                    json.dumps(["score", place, name], separators=(",", ":")),
                    f"{name} ({row['name']})",
                )
                for name in row["scores"]
            ]
            groups.append((f"scores of {row['name']}", values))
    return groups
