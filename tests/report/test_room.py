"""A page that would be too large: what is left out of it, in which order, and that it says so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from fake_run import fake_run

from moeprune.report import room
from moeprune.report.html import render_report


def test_many_results_of_a_very_large_model_stay_below_six_megabytes() -> None:
    run = fake_run(layers=60, experts=256)
    run["model"]["moe_layers"] = list(range(60))
    for place in range(100):
        run["rows"].append({**run["rows"][1], "name": f"again-{place}"})
        run["atlas"]["routing"]["rows"][f"again-{place}"] = {str(i): [99.5, 256] for i in range(60)}
    page = render_report(run)
    assert 4_000_000 < len(page.encode()) <= room.MOST == 6_000_000
    assert "Scores that would make this page too large were left out: " in page
    assert "What became of single experts that would make this page too large" in page
    assert "again-99; their plans hold them" in page
    table = page.partition('aria-label="Measurements')[2] or page
    assert all(f"again-{place}" in table for place in range(100)), "its sizes and losses stay"
    assert "Left out: this page would be too large. The plan holds it." in page


def test_what_matters_least_is_left_out_first(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_run(layers=2, experts=8)

    def draw(rows: Sequence[Any], shown: Mapping[str, Any], left_out: Sequence[str]) -> str:
        planned = {row["name"] for row in rows if row.get("plan")}
        assert set(shown["routing"]["rows"]) >= planned
        return json.dumps([list(rows), shown, list(left_out)])

    sizes, told = [], list[str]()
    whole = len(draw(run["rows"], run["atlas"], ()))
    for most in range(whole, 0, -300):
        monkeypatch.setattr(room, "MOST", most)
        page = room.fitted(run["rows"], run["atlas"], draw)
        left = json.loads(page)[2]
        sizes.append((len(page), most))
        told.extend(text for text in left if text not in told)
    assert sizes[0][0] == whole
    least = min(size for size, _ in sizes)
    assert least < 0.7 * whole and all(size <= most or size == least for size, most in sizes)
    kinds = [text.partition(" that")[0].partition(" would")[0] for text in told]
    assert list(dict.fromkeys(kinds)) == ["Scores", "What became of single experts", "What"]
    assert "moeits-50; their plans hold them." in told[0] and "mone-25" not in told[0]
    assert told[-1].endswith("domains of experts.") and "typical" in told[-2]
    assert all(row.get("plan") for row in run["rows"][1:]), "the run itself is as it was"
