"""How evenly the routers use the experts, layer by layer, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprune.report import wording


@dataclass(frozen=True)
class Line:
    """One layer; ``effective`` by result, "of experts" as the second text."""

    layer: str
    busiest: str
    idle: str
    effective: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Balance:
    """The lines, and the names of the results that head the columns."""

    names: tuple[str, ...]
    lines: tuple[Line, ...]
    tokens: str


def balance(result: Mapping[str, Any]) -> Balance | None:
    """Usage and routing entropy by layer; None if neither was measured."""
    usage = result.get("usage") or {}
    routing = (result.get("atlas") or {}).get("routing") or {}
    rows = {str(name): by_layer for name, by_layer in (routing.get("rows") or {}).items()}
    indices = sorted({int(i) for table in (usage, *rows.values()) for i in table})
    if not indices:
        return None
    lines = []
    for index in indices:
        busiest, idle = _usage(usage.get(str(index)) or ())
        effective = tuple(_effective(by_layer.get(str(index))) for by_layer in rows.values())
        lines.append(Line(str(index), busiest, idle, effective))
    return Balance(tuple(rows), tuple(lines), wording.whole(routing.get("tokens")))


def _usage(values: Sequence[Any]) -> tuple[str, str]:
    """What the busiest quarter of the experts serves, and who is never selected."""
    known = sorted((v for v in map(wording.number, values) if v is not None), reverse=True)
    quarter = sum(known[: max(1, len(known) // 4)]) if known else None
    idle = [expert for expert, value in enumerate(values) if value == 0]
    nobody = "none" if known else wording.NOTHING
    return wording.percent(quarter, 0), wording.ids(idle) if idle else nobody


def _effective(entry: Any) -> tuple[str, str]:
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        return wording.NOTHING, ""
    return wording.significant(entry[0]), f"of {wording.whole(entry[1])}"
