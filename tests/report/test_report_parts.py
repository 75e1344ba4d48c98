"""Colours, charts, numbers in words: what the page is made of, without the page."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
from fake_run import fake_run

import moeprune.report
from moeprune.report import marks, measurements, scatter, wording


@pytest.mark.parametrize("dark", [False, True])
def test_the_ramp_is_monotone_and_marks_on_it_are_visible(dark: bool) -> None:
    levels = [marks.luminance(colour) for colour in marks.ramp(dark)]
    assert len(set(levels)) == marks.STEPS
    assert levels == sorted(levels, reverse=not dark)
    assert all(marks.contrast(c, marks.ink(c)) >= 4.5 for c in marks.ramp(dark))


@pytest.mark.parametrize("palette", [marks.LIGHT, marks.DARK])
def test_text_has_enough_contrast(palette: dict[str, str]) -> None:
    for text in ("text", "muted", "accent", "alert"):
        for ground in ("page", "panel"):
            assert marks.contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
    for text in ("text", "alert"):
        assert marks.contrast(palette[text], palette["alert-page"]) >= 4.5


def test_shades_are_monotone_and_cover_the_ramp() -> None:
    steps = [marks.shade(i / 100, 0.0, 1.0) for i in range(101)]
    assert steps == sorted(s for s in steps if s is not None)
    assert set(steps) == set(range(marks.STEPS))
    assert marks.shade(None, 0, 1) is None and marks.shade(math.nan, 0, 1) is None
    assert marks.shade(3.0, 3.0, 3.0) == marks.STEPS // 2


def test_chart_places_marks_in_order_and_labels_apart() -> None:
    samples, missing = measurements.samples(fake_run())
    chart = scatter.scatter(samples)
    assert chart is not None and missing == []
    by_size = sorted(zip(samples, chart.points, strict=True), key=lambda pair: pair[0].bytes)
    assert [p.x for _, p in by_size] == sorted(p.x for p in chart.points)
    by_loss = sorted(zip(samples, chart.points, strict=True), key=lambda pair: pair[0].ratio)
    assert [p.y for _, p in by_loss] == sorted((p.y for p in chart.points), reverse=True)
    assert "×1.00" in [tick.label for tick in chart.y_ticks]
    assert len({(round(p.label_x), round(p.label_y)) for p in chart.points}) == len(samples)
    for point in chart.points:
        assert chart.left <= point.x <= chart.right and chart.top <= point.y <= chart.bottom


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.0004, 30.0, 1e12])
def test_chart_survives_any_ratio(ratio: float) -> None:
    same = [scatter.Sample(f"model {i}" * 9, 1e6, ratio, i > 0) for i in range(12)]
    chart = scatter.scatter(same)
    assert chart is not None and len(chart.points) == 12
    assert scatter.scatter(same[:1]) is None
    positions = [tick.at for tick in chart.y_ticks]
    assert positions == sorted(positions, reverse=True)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (wording.significant(9.999), "10.0"),
        (wording.significant(0.0208), "0.0208"),
        (wording.significant(12345.6), "12 346"),
        (wording.significant(3e-9), "3.00e−09"),
        (wording.significant(-0.5), "−0.500"),
        (wording.significant(0), "0"),
        (wording.significant("x"), "–"),
        (wording.significant(True), "–"),
        (wording.count(12_722_880), "12.7 M"),
        (wording.count(30_532_122_624), "30.5 B"),
        (wording.count(999_999), "1.00 M"),
        (wording.size(512), "512 B"),
        (wording.size(25_445_760), "25.4 MB"),
        (wording.times(1.1367), "×1.14"),
        (wording.times(9.999), "×10.0"),
        (wording.seconds(95.1), "95.1 s"),
        (wording.seconds(125), "2 min 05 s"),
        (wording.seconds(3725), "1 h 02 min"),
        (wording.ids([10, 0, 1, 2, 3, 7, 8]), "0–3, 7, 8, 10"),
        (wording.ids([7, 8]), "7, 8"),
        (wording.ids([]), "–"),
        (wording.listed(["a", "b", "c"]), "a, b and c"),
        (wording.settings({"ratio": 0.5, "roles": ["up", "gate"]}), "ratio=0.5, roles=up gate"),
    ],
)
def test_wording(shown: str, expected: str) -> None:
    assert shown.replace(wording.THIN, " ") == expected


def test_geometric_mean_needs_every_domain() -> None:
    base = {"perplexity": {"a": 10.0, "b": 10.0}}
    assert measurements.mean_ratio({"perplexity": {"a": 20.0, "b": 5.0}}, base) == pytest.approx(1)
    assert measurements.mean_ratio({"perplexity": {"a": 20.0, "b": None}}, base) is None
    assert measurements.mean_ratio({"perplexity": {"a": 20.0}}, None) is None


def test_the_report_knows_nothing_of_models() -> None:
    for path in Path(str(moeprune.report.__file__)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moeprune"):
                below = ("moeprune.errors", "moeprune.markdown", "moeprune.report")
                assert node.module.startswith(below)


def test_one_domain_at_most_is_singled_out_and_never_a_gain() -> None:
    base = {"a": 10.0, "b": 10.0}
    run = fake_run()
    run["rows"] = run["rows"][:4]
    cases = (base, {"a": 12.0, "b": 12.0}, {"a": 9.0, "b": 8.0}, {"a": 10.0, "b": 11.0})
    for row, values in zip(run["rows"], cases, strict=True):
        row["perplexity"] = values
    marked = [sum(e.worst for e in row.perplexity) for row in measurements.table(run).rows]
    assert marked == [0, 1, 0, 1]
