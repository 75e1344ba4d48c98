"""Geometry of the chart of many methods: divergence against bytes, and who is beaten by nobody.

KL goes through three powers of ten between a plan that loses little and a collapsed model, hence
the logarithmic axis. Only models of the front carry their name; the others say theirs when pointed
at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprune.report import wording
from moeprune.report.scatter import LETTER, LINE, Box, Tick, free_place

WIDTH, HEIGHT = 860.0, 560.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 24.0, 62.0, 50.0
SMALL, LARGE = 3.4, 5.0
_LEAST = 1e-5  # nats; below it is rounding
_LONGEST = 44

COLOURS = {
    "dropping": ("#0067a8", "#6cb8f0"),
    "novices": ("#b8470a", "#f79b62"),
    "merging": ("#00734f", "#4ecf9f"),
    "inside": ("#85409d", "#d39ae8"),
    "layers": ("#7a6200", "#e0c24c"),
    "mixed": ("#4a5560", "#aab4bd"),
}
"""Of a kind of method, on white and on black: at least 4.5 : 1 against the page."""

SHAPES = {
    "dropping": "M-1,0a1,1 0 1,0 2,0a1,1 0 1,0 -2,0Z",
    "novices": "M0,-1.3L1.3,0L0,1.3L-1.3,0Z",
    "merging": "M-.95,-.95H.95V.95H-.95Z",
    "inside": "M0,-1.25L1.2,.85H-1.2Z",
    "layers": "M0,1.25L1.2,-.85H-1.2Z",
    "mixed": "M-.4,-1.2H.4V-.4H1.2V.4H.4V1.2H-.4V.4H-1.2V-.4H-.4Z",
}
"""Of a kind, as a path of unit size: colours alone are not for everybody."""


@dataclass(frozen=True)
class Mark:
    """One model."""

    x: float
    y: float
    kind: str
    tip: str
    front: bool
    size: float


@dataclass(frozen=True)
class Label:
    """The name of a model of the front; ``leader`` says that it needs a line to its mark."""

    x: float
    y: float
    text: str
    anchor: str
    leader: bool
    mark_x: float
    mark_y: float


@dataclass(frozen=True)
class Key:
    """An entry of the legend."""

    x: float
    kind: str
    text: str


@dataclass(frozen=True)
class Chart:
    """Everything the template draws; lengths in pixels from the top left."""

    marks: tuple[Mark, ...]
    labels: tuple[Label, ...]
    keys: tuple[Key, ...]
    line: str
    original: float | None
    original_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def drawable(row: Mapping[str, Any]) -> bool:
    """Whether a row has the two numbers that place it, and is not the original once more."""
    if wording.number(row.get("kl")) is None or wording.number(row.get("bytes")) is None:
        return False
    return bool(row["kl"] != 0 or row.get("bytes_ratio") != 1)


def front(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Positions of the rows that no other beats: none has as few bytes and as little KL, one less.

    Of equal rows the first counts; ascending by bytes.
    """
    order = sorted(
        (i for i, row in enumerate(rows) if drawable(row)),
        key=lambda i: (rows[i]["bytes"], rows[i]["kl"], i),
    )
    found: list[int] = []
    for i in order:
        if not found or rows[i]["kl"] < rows[found[-1]]["kl"]:
            found.append(i)
    return found


def chart(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], original: Mapping[str, Any] | None
) -> Chart | None:
    """Lay out the chart of all drawable rows; None with fewer than two.

    Args:
        rows: what was measured.
        names: what each is called.
        original: the unpruned model, drawn as a line at its size.
    """
    shown = [i for i, row in enumerate(rows) if drawable(row)]
    if len(shown) < 2:
        return None
    sizes = [float(rows[i]["bytes"]) for i in shown]
    sizes += [] if original is None else [float(original["bytes"])]
    losses = [math.log10(max(_LEAST, rows[i]["kl"])) for i in shown]
    x_axis = _Axis.of(sizes, LEFT, WIDTH - RIGHT, 0.02, 0.14)  # names stand left of their marks
    y_axis = _Axis.of(losses, HEIGHT - BOTTOM, TOP, 0.05, 0.05)
    best = front(rows)
    at = {i: (x_axis(rows[i]["bytes"]), y_axis(math.log10(max(_LEAST, rows[i]["kl"]))))
          for i in shown}  # fmt: skip
    marks = tuple(
        Mark(*at[i], rows[i]["kind"] or "mixed", tip(rows[i], names[i]), i in best,
             LARGE if i in best else SMALL)
        for i in sorted(shown, key=lambda i: i in best)  # the front on top
    )  # fmt: skip
    kinds = [kind for kind in COLOURS if any(mark.kind == kind for mark in marks)]
    return Chart(
        marks=marks,
        labels=_labels([(names[i], *at[i]) for i in best], list(at.values())),
        keys=_keys(kinds),
        line=_steps([at[i] for i in best]),
        original=None if original is None else x_axis(float(original["bytes"])),
        original_label="" if original is None else f"original, {wording.size(original['bytes'])}",
        x_ticks=_byte_ticks(x_axis),
        y_ticks=_power_ticks(y_axis),
    )


def tip(row: Mapping[str, Any], name: str) -> str:
    """What a mark says when pointed at."""
    return (
        f"{name}: {wording.size(row['bytes'])}, KL {wording.significant(row['kl'])}, "
        f"perplexity {wording.times(row.get('perplexity_ratio'))}, "
        f"{wording.percent(row.get('agreement'))} agree"
    )


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(
        cls, values: Sequence[float], start: float, end: float, least: float, before: float
    ) -> _Axis:
        """An axis over ``values`` with a margin of 5 %, and of ``before`` at its beginning."""
        low, high = min(values), max(values)
        least *= max(1.0, abs(high))
        room = high - low
        return cls(low - max(before * room, least), high + max(0.05 * room, least), start, end)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _byte_ticks(axis: _Axis) -> tuple[Tick, ...]:
    rough = (axis.high - axis.low) / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(axis.low / step), math.floor(axis.high / step)
    return tuple(
        Tick(axis(i * step), wording.size(i * step)) for i in range(max(0, first), last + 1)
    )


def _power_ticks(axis: _Axis) -> tuple[Tick, ...]:
    """1, 2 and 5 in every power of ten; only the powers where that would be too many."""
    steps = (1, 2, 5) if axis.high - axis.low < 3.5 else (1,)
    found = []
    for power in range(math.floor(axis.low), math.ceil(axis.high) + 1):
        for step in steps:
            value = math.log10(step) + power
            if axis.low <= value <= axis.high:
                found.append(
                    Tick(axis(value), f"{step * 10.0**power:.10f}".rstrip("0").rstrip("."))
                )
    return tuple(found)


def _labels(
    named: Sequence[tuple[str, float, float]], marks: Sequence[tuple[float, float]]
) -> tuple[Label, ...]:
    """Names of the front where they cover neither a mark nor another name."""
    taken: list[Box] = [(x - 4.5, y - 4.5, x + 4.5, y + 4.5) for x, y in marks]
    frame = (LEFT + 2, TOP, WIDTH - 2, HEIGHT - BOTTOM)
    # below and left of a model of the front there is no other model, and no line
    lines, anchors = [*range(13), *range(-1, -13, -1)], ("end", "start", "middle")
    found = []
    for name, x, y in named:
        text = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
        own = (x - 4.5, y - 4.5, x + 4.5, y + 4.5)
        boxes = [box for box in taken if box != own]
        at_x, at_y, anchor, box = free_place(x, y, LETTER * len(text), boxes, frame, lines, anchors)
        taken.append(box)
        found.append(Label(at_x, at_y, text, anchor, abs(at_y - 4 - y) > LINE + 4, x, y))
    return tuple(found)


def _keys(kinds: Sequence[str]) -> tuple[Key, ...]:
    x, found = LEFT + 6, []
    for kind in kinds:
        found.append(Key(x, kind, kind))
        x += 34 + LETTER * len(kind)
    return tuple(found)


def _steps(points: Sequence[tuple[float, float]]) -> str:
    """The border between what was reached and what was not, as a path of steps."""
    if not points:
        return ""
    path = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for x, y in points[1:]:
        path += f"H{x:.1f}V{y:.1f}"
    return path
