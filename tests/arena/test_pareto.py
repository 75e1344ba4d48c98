"""The picture: who is on the front, and that names cover nothing."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.report import marks, pareto
from moeprune.report.scatter import LETTER

SIZES = st.integers(1_000_000, 30_000_000)
LOSSES = st.floats(1e-6, 20)
ROWS = st.lists(st.tuples(SIZES, LOSSES, st.sampled_from(sorted(pareto.COLOURS))), max_size=120)


def rows(values: list[tuple[int, float, str]]) -> list[dict[str, Any]]:
    return [
        {"bytes": size, "kl": kl, "kind": kind, "perplexity_ratio": 1.1, "agreement": 0.5}
        for size, kl, kind in values
    ]


@given(ROWS)
def test_front_by_definition(values: list[tuple[int, float, str]]) -> None:
    given_rows = rows(values)
    found = pareto.front(given_rows)
    for i, row in enumerate(given_rows):
        beaten = any(
            (o["bytes"], o["kl"]) != (row["bytes"], row["kl"])
            and o["bytes"] <= row["bytes"] and o["kl"] <= row["kl"]
            for o in given_rows
        )  # fmt: skip
        first = [(r["bytes"], r["kl"]) for r in given_rows].index((row["bytes"], row["kl"])) == i
        assert (i in found) == (not beaten and first)


@given(ROWS)
def test_everything_is_inside_and_front_is_named(values: list[tuple[int, float, str]]) -> None:
    given_rows = rows(values)
    chart = pareto.chart(given_rows, [f"m{i} 50%" for i in range(len(values))], None)
    if len(values) < 2:
        assert chart is None
        return
    assert chart is not None and len(chart.marks) == len(values)
    for mark in chart.marks:
        assert chart.left <= mark.x <= chart.right and chart.top <= mark.y <= chart.bottom
    assert len(chart.labels) == len(pareto.front(given_rows))


def test_names_do_not_overlap() -> None:
    """As crowded as 35 methods at three sizes are."""
    values = [
        (round(size * 1e6 + number * 3e4), 10 ** (-3 + step + number / 12), "dropping")
        for step, size in enumerate((20, 15, 9.5)) for number in range(35)
    ]  # fmt: skip
    chart = pareto.chart(rows(values), [f"weighted-frequency {i}%" for i in range(105)], None)
    assert chart is not None
    boxes = []
    for label in chart.labels:
        width = LETTER * len(label.text)
        start = {"start": 0.0, "middle": width / 2, "end": width}[label.anchor]
        boxes.append((label.x - start, label.y - 11, label.x - start + width, label.y + 3))
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_unknown_numbers_are_not_drawn() -> None:
    known = rows([(1, 1.0, "dropping"), (2, 0.5, "inside")])
    known.append({"bytes": 3, "kl": None, "kind": "inside"})
    assert pareto.front(known) == [0, 1]
    chart = pareto.chart(known, ["a", "b", "c"], None)
    assert chart is not None and len(chart.marks) == 2


@pytest.mark.parametrize("kind", sorted(pareto.COLOURS))
def test_colours_can_be_seen(kind: str) -> None:
    light, dark = pareto.COLOURS[kind]
    assert marks.contrast(light, marks.LIGHT["page"]) >= 4.5
    assert marks.contrast(dark, marks.DARK["page"]) >= 4.5
    assert kind in pareto.SHAPES


def test_the_picture_stands_alone(compared: tuple[Any, dict[str, Any]]) -> None:
    out, _ = compared
    root = ET.parse(out / "pareto.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = (out / "pareto.svg").read_text(encoding="utf-8")
    page = (out / "compare.html").read_text(encoding="utf-8")
    for content in (text.replace("http://www.w3.org/2000/svg", ""), page.replace(
        "http://www.w3.org/2000/svg", "")):  # fmt: skip
        assert "http://" not in content and "https://" not in content
        assert "src=" not in content and "<link" not in content
    assert "<script" not in text
    assert "mone pattern 2:4, moeits pattern 2:4, mone:scope=global pattern 2:4: has no" in page
