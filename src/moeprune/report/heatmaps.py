"""Heat maps of layers by experts, and what became of every expert, in words beside the shades."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprune.report import marks, wording

KEPT, NOVICE, DROPPED = "kept", "novice", "dropped"


@dataclass(frozen=True)
class Cell:
    """One expert of one layer.

    Attributes:
        style: class names of the shade and of the mark that shows its fate.
        text: what a screen reader says.
        tip: what a pointer shows.
    """

    style: str
    text: str
    tip: str


@dataclass(frozen=True)
class HeatRow:
    """One layer; ``notes`` are columns of text at the right."""

    layer: int
    cells: tuple[Cell | None, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeatMap:
    """Layers downwards, experts to the right; ``low`` and ``high`` label the ends of the ramp."""

    caption: str
    experts: int
    rows: tuple[HeatRow, ...]
    low: str
    high: str
    heads: tuple[str, ...] = ()
    label_every: int = 1


@dataclass(frozen=True)
class Removal:
    """What one layer lost; ``share`` is of the calibration's routed slots."""

    layer: str
    kept: str
    novices: str
    dropped: str
    share: str
    even: str


def usage_map(result: Mapping[str, Any]) -> HeatMap | None:
    """How often the calibration's tokens selected each expert; None if it was not counted."""
    usage = _by_layer(result.get("usage"))
    shares = {layer: [wording.number(v) for v in values] for layer, values in usage}
    known = [v for values in shares.values() for v in values if v is not None]
    if not known:
        return None
    experts = max(len(values) for values in shares.values())
    top = max(known)
    return HeatMap(
        caption="Share of each layer's routed slots that each expert served",
        experts=experts,
        rows=tuple(_usage_row(layer, values, top) for layer, values in shares.items()),
        low="0",
        high=f"{wording.percent(top)} (an even share is {wording.percent(1 / experts)})",
        heads=("busiest quarter of experts serves", "ids never selected"),
        label_every=_label_every(experts),
    )


def score_maps(row: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[HeatMap, ...]:
    """One heat map per score of a result's plan; without scores, one that shows the fates only.

    None is made for a plan that keeps every expert and scores none.
    """
    plan = _by_layer(row.get("plan"))
    names = list(dict.fromkeys(n for _, entry in plan for n in entry.get("scores") or {}))
    removes = any(entry["replaced"] or entry["dropped"] for _, entry in plan)
    if not names and not removes:
        return ()
    usage = result.get("usage") or {}
    experts = result["model"]["experts"]
    return tuple(
        HeatMap(
            caption=f"Score “{name}” and fate of every expert" if name else "Fate of every expert",
            experts=experts,
            rows=tuple(
                _score_row(layer, entry, name, usage.get(str(layer)) or (), experts)
                for layer, entry in plan
            ),
            low="lowest score in its layer" if name else "",
            high="highest",
            label_every=_label_every(experts),
        )
        for name in names or [""]
    )


def removals(row: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[Removal, ...]:
    """What each layer lost, and a last line for all; empty if every expert of the plan stays."""
    plan = _by_layer(row.get("plan"))
    if not any(entry["replaced"] or entry["dropped"] for _, entry in plan):
        return ()
    usage = result.get("usage") or {}
    lines, shares, evens = [], [], []
    for layer, entry in plan:
        removed = [*entry["replaced"], *entry["dropped"]]
        share = served(removed, usage.get(str(layer)))
        even = len(removed) / max(1, len(removed) + len(entry["keep"]))
        shares.append(share)
        evens.append(even)
        lines.append(
            Removal(
                layer=str(layer),
                kept=wording.whole(len(entry["keep"])),
                novices=wording.ids(entry["replaced"]),
                dropped=wording.ids(entry["dropped"]),
                share=wording.percent(share),
                even=wording.percent(even),
            )
        )
    if len(lines) > 1:
        lines.append(_total([entry for _, entry in plan], shares, evens))
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
    entries: Sequence[Mapping[str, Any]], shares: Sequence[float | None], evens: Sequence[float]
) -> Removal:
    # every layer routes the same number of slots, so the mean of the shares is the share
    known = [share for share in shares if share is not None]
    mean = sum(known) / len(known) if known and len(known) == len(shares) else None

    def counted(name: str) -> str:
        return wording.whole(sum(len(entry[name]) for entry in entries))

    return Removal(
        layer="all",
        kept=counted("keep"),
        novices=wording.plural(sum(len(entry["replaced"]) for entry in entries), "expert"),
        dropped=wording.plural(sum(len(entry["dropped"]) for entry in entries), "expert"),
        share=wording.percent(mean),
        even=wording.percent(sum(evens) / len(evens)),
    )


def _usage_row(layer: int, values: Sequence[float | None], top: float) -> HeatRow:
    cells = []
    for expert, value in enumerate(values):
        step = marks.shade(value, 0.0, top)
        text = wording.percent(value)
        even = wording.times(None if value is None else value * len(values))
        cells.append(
            Cell(
                _style(step), text, f"layer {layer}, expert {expert}: {text}, {even} an even share"
            )
        )
    known = sorted((value for value in values if value is not None), reverse=True)
    quarter = sum(known[: max(1, len(known) // 4)]) if known else None
    idle = [expert for expert, value in enumerate(values) if value == 0]
    notes = (wording.percent(quarter, 0), wording.ids(idle) if idle else "none")
    return HeatRow(layer, tuple(cells), notes)


def _score_row(
    layer: int, entry: Mapping[str, Any], name: str, usage: Sequence[Any], experts: int
) -> HeatRow:
    scores = [wording.number(v) for v in (entry.get("scores") or {}).get(name) or ()]
    known = [score for score in scores if score is not None]
    fates = dict.fromkeys(entry["keep"], KEPT)
    fates |= dict.fromkeys(entry["replaced"], NOVICE)
    fates |= dict.fromkeys(entry["dropped"], DROPPED)
    cells: list[Cell | None] = []
    for expert in range(experts):
        fate = fates.get(expert)
        if fate is None:
            cells.append(None)
            continue
        score = scores[expert] if expert < len(scores) else None
        step = marks.shade(score, min(known, default=0.0), max(known, default=0.0))
        shown = "no score" if score is None else wording.significant(score)
        share = wording.percent(usage[expert] if expert < len(usage) else None)
        tip = f"layer {layer}, expert {expert}: {fate}, {name} {shown}, usage {share}"
        if not name:
            tip = f"layer {layer}, expert {expert}: {fate}, usage {share}"
        cells.append(Cell(_style(step, fate), f"{fate} {shown}" if name else fate, tip))
    return HeatRow(layer, tuple(cells))


def _style(step: int | None, fate: str = KEPT) -> str:
    shade = "c" if step is None else f"c{step}"
    return {KEPT: shade, NOVICE: f"{shade} n", DROPPED: f"{shade} d"}[fate]


def _by_layer(table: Mapping[str, Any] | None) -> list[tuple[int, Any]]:
    return sorted((int(layer), value) for layer, value in (table or {}).items())


def _label_every(experts: int) -> int:
    """Every how many columns the expert id is printed; narrow columns have no room for all."""
    return 1 if experts <= 40 else 8
