"""What became of the experts of every layer, in words: the atlas as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprune.report import wording


@dataclass(frozen=True)
class Removal:
    """What one layer lost; ``share`` is of the calibration's routed slots."""

    layer: str
    kept: str
    novices: str
    merged: str
    dropped: str
    share: str
    even: str


def removals(row: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[Removal, ...]:
    """What each layer lost, and a last line for all; empty if every expert of the plan stays."""
    plan = _by_layer(row.get("plan"))
    if not any(entry["replaced"] or entry["dropped"] or _merged(entry) for _, entry in plan):
        return ()
    usage = result.get("usage") or {}
    lines, shares, gone = [], [], []
    for layer, entry in plan:
        removed = [*entry["replaced"], *_merged(entry), *entry["dropped"]]
        share = served(removed, usage.get(str(layer)))
        even = len(removed) / max(1, len(removed) + len(entry["keep"]))
        shares.append(share)
        gone.append(len(removed))
        lines.append(
            Removal(
                layer=str(layer),
                kept=wording.whole(len(entry["keep"])),
                novices=wording.ids(entry["replaced"]),
                merged=wording.ids(_merged(entry)),
                dropped=wording.ids(entry["dropped"]),
                share=wording.percent(share),
                even=wording.percent(even),
            )
        )
    if len(lines) > 1:
        lines.append(_total([entry for _, entry in plan], shares, sum(gone)))
    return tuple(lines)


def remarks(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The plan's notes, each with its layer."""
    return tuple(
        f"layer {layer}: {note}"
        for layer, entry in _by_layer(row.get("plan"))
        for note in entry.get("notes") or ()
    )


def served(experts: Iterable[int], shares: Sequence[Any] | None) -> float | None:
    """Share of a layer's routed slots that these experts served; None where it is not known."""
    values = (
        [wording.number(shares[e]) if e < len(shares) else None for e in experts]
        if shares
        else None
    )
    if values is None or None in values:
        return None
    return sum(value for value in values if value is not None)


def _total(
    entries: Sequence[Mapping[str, Any]], shares: Sequence[float | None], removed: int
) -> Removal:
    # every layer routes the same number of slots, so the mean of the shares is the share
    known = [share for share in shares if share is not None]
    mean = sum(known) / len(known) if known and len(known) == len(shares) else None

    kept = sum(len(entry["keep"]) for entry in entries)
    return Removal(
        layer="all",
        kept=wording.whole(kept),
        novices=wording.plural(sum(len(entry["replaced"]) for entry in entries), "expert"),
        merged=wording.plural(sum(len(_merged(entry)) for entry in entries), "expert"),
        dropped=wording.plural(sum(len(entry["dropped"]) for entry in entries), "expert"),
        share=wording.percent(mean),
        even=wording.percent(removed / max(1, removed + kept)),  # layers may differ in size
    )


def _merged(entry: Mapping[str, Any]) -> list[int]:
    """Experts that live on in others."""
    return sorted(int(expert) for expert in entry.get("merged") or {})


def _by_layer(table: Mapping[str, Any] | None) -> list[tuple[int, Any]]:
    return sorted((int(layer), value) for layer, value in (table or {}).items())
