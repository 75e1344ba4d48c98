"""Geometry of the chart of size against loss: where points, ticks and labels stand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moeprune.report import wording

WIDTH, HEIGHT = 760.0, 380.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 24.0, 18.0, 50.0
RADIUS = 4.5

LETTER = 6.7  # mean advance of a 12 px system font, rounded up
LINE = 14.0
_LONGEST = 30
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Sample:
    """One model to draw: its size on disk and its perplexity relative to the unpruned model's."""

    name: str
    bytes: float
    ratio: float
    pruned: bool


@dataclass(frozen=True)
class Tick:
    """A grid line: its position on the axis in pixels, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Point:
    """A mark with its label; ``leader`` says that the label stands far enough to need a line."""

    x: float
    y: float
    label: str
    label_x: float
    label_y: float
    anchor: str
    leader: bool
    tip: str
    pruned: bool


@dataclass(frozen=True)
class Scatter:
    """Everything the template draws; lengths in pixels from the top left.

    Attributes:
        front: a path along the models that no other beats.
    """

    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    front: str = ""
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM
    radius: float = RADIUS


def scatter(samples: Sequence[Sample]) -> Scatter | None:
    """Lay out the chart; None with fewer than two samples, where there is nothing to compare."""
    if len(samples) < 2:
        return None
    x_low, x_high = _widen([sample.bytes for sample in samples], 0.02)
    y_low, y_high = _widen([math.log(sample.ratio) for sample in samples] + [0.0], 0.01)

    def to_x(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def to_y(ratio: float) -> float:
        share = (math.log(ratio) - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    marks = [(to_x(sample.bytes), to_y(sample.ratio)) for sample in samples]
    return Scatter(
        points=_labelled(samples, marks),
        x_ticks=_linear_ticks(x_low, x_high, to_x),
        y_ticks=_log_ticks(math.exp(y_low), math.exp(y_high), to_y),
        front=_front(samples, marks),
    )


def _front(samples: Sequence[Sample], marks: Sequence[tuple[float, float]]) -> str:
    """A stepped path along the models that no other beats in both bytes and perplexity."""
    order = sorted(range(len(samples)), key=lambda i: (samples[i].bytes, samples[i].ratio))
    path, lowest = "", math.inf
    for i in order:
        if samples[i].ratio < lowest:
            lowest = samples[i].ratio
            x, y = marks[i]
            path += f"H{x:.1f}V{y:.1f}" if path else f"M{x:.1f},{y:.1f}"
    return path if "V" in path else ""


def _widen(values: Sequence[float], least: float) -> tuple[float, float]:
    """The range of the values with a margin of 8 %; equal values get a range all the same."""
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), least * max(1.0, abs(high)))
    return low - margin, high + margin


def _linear_ticks(low: float, high: float, place: Callable[[float], float]) -> tuple[Tick, ...]:
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return tuple(
        Tick(place(i * step), wording.size(i * step)) for i in range(first, last + 1) if i >= 0
    )


def _log_ticks(low: float, high: float, place: Callable[[float], float]) -> tuple[Tick, ...]:
    """Round factors on both sides of one, none closer than 28 pixels to its neighbour."""
    chosen = [1.0]
    for factor in _round_factors():
        if factor > high:
            break
        if place(chosen[-1]) - place(factor) >= 28:
            chosen.append(factor)
    lowest = 1.0
    for factor in (0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.2, 0.1):
        if low <= factor and place(factor) - place(lowest) >= 28:
            chosen.append(factor)
            lowest = factor
    return tuple(Tick(place(factor), wording.times(factor)) for factor in sorted(chosen))


def _round_factors() -> Iterator[float]:
    yield from (1.01, 1.02, 1.05, 1.1, 1.2, 1.5)
    power = 1.0
    while True:
        yield from (2 * power, 3 * power, 5 * power, 10 * power)
        power *= 10


def _labelled(samples: Sequence[Sample], marks: Sequence[tuple[float, float]]) -> tuple[Point, ...]:
    """Place labels one after another where they cover neither a mark nor an earlier label."""
    reach = RADIUS + 2
    taken: list[Box] = [(x - reach, y - reach, x + reach, y + reach) for x, y in marks]
    points = []
    for own, (sample, (x, y)) in enumerate(zip(samples, marks, strict=True)):
        name = sample.name if len(sample.name) <= _LONGEST else sample.name[: _LONGEST - 1] + "…"
        label_x, label_y, anchor, box = free_place(
            x, y, LETTER * len(name), [b for i, b in enumerate(taken) if i != own]
        )
        taken.append(box)
        points.append(
            Point(
                x=x,
                y=y,
                label=name,
                label_x=label_x,
                label_y=label_y,
                anchor=anchor,
                leader=abs(label_y - 4 - y) > LINE + 4,
                tip=f"{sample.name}: {wording.size(sample.bytes)}, {wording.times(sample.ratio)}",
                pruned=sample.pruned,
            )
        )
    return tuple(points)


_FRAME = (LEFT + 2, 0.0, WIDTH, HEIGHT - BOTTOM)


def free_place(
    x: float,
    y: float,
    width: float,
    taken: Sequence[Box],
    frame: Box = _FRAME,
    lines: Sequence[int] = (0, -1, 1, -2, 2, -3, 3, -4, 4),
    anchors: Sequence[str] = ("start", "end", "middle"),
) -> tuple[float, float, str, Box]:
    """Text position, anchor and covered box of the first free place; the first place if none is.

    Args:
        x, y: the mark.
        width: of the text.
        taken: boxes that must not be covered.
        frame: the text stays inside.
        lines: how many lines below the mark to try, in this order.
        anchors: on which side of the mark to try, in this order.
    """
    places = []
    for line in lines:
        base = y + 4 + line * LINE
        for anchor in anchors:
            at = {"start": x + 9, "end": x - 9, "middle": x}[anchor]
            if anchor == "middle" and line == 0:
                continue
            start = {"start": at, "end": at - width, "middle": at - width / 2}[anchor]
            box = (start, base - 11, start + width, base + 3)
            places.append((at, base, anchor, box))
    for place in places:
        left, top, right, bottom = place[3]
        inside = left >= frame[0] and top >= frame[1] and right <= frame[2] and bottom <= frame[3]
        if inside and not any(
            left < b[2] and b[0] < right and top < b[3] and b[1] < bottom for b in taken
        ):
            return place
    return places[0]
