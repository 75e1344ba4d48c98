"""``audit``: warnings first, pure JSON, and refusals that leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeprune.pipeline import audit_layers
from running import Run

SHORT = ("--sequences", "6", "--length", "32", "--held", "4", "--ratios", "0.5", "--layers", "1")


def test_prints_and_writes(
    run: Run, english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_layers, "COMPARED", 4)  # every pair costs milliseconds
    done = run("audit", "demo", "--data", english, *SHORT, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line.strip()]
    assert lines[0].startswith("warning: ") and "do not trust a score from this text" in lines[0]
    table = next(
        i for i, line in enumerate(lines) if line.startswith("demo (float32), cut by mone")
    )
    assert all(line.startswith("warning: ") for line in lines[:table])
    assert lines[-1].startswith("- usage is imbalanced")
    written = json.loads((tmp_path / "out" / "audit.json").read_bytes())
    assert written["format"] == "moeprune.audit/1" and written["findings"]
    # not again without --force, and before the walk
    done = run("audit", "demo", "--data", english, *SHORT, "--out", tmp_path / "out")
    assert done.code == 2 and "output exists" in done.err and done.out == ""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--ratios", "half"), "bad --ratios 'half'"),
        (("--ratios", "0.5,1"), "above 0 and below 1"),
        (("--max-loss", "0"), "--max-loss must be above 0"),
        (("--held", "0"), "--held must be at least 1"),
        (("--method", "moon"), "unknown method 'moon'"),
        (("--data", "nowhere.txt"), "no such text file"),
        (("--statistics", "nowhere"), "no statistics in nowhere"),
    ],
)
def test_bad_input(run: Run, arguments: tuple[str, ...], problem: str, tmp_path: Path) -> None:
    done = run("audit", "demo", *arguments, "--out", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert problem in done.err and len(done.err.strip().splitlines()) <= 2
    assert not (tmp_path / "out").exists()
