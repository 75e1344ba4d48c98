"""``compare`` and ``run`` on the command line: what they print, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from running import Run
from support import tree

RECIPE = """\
format: moeprune.recipe/1
model: demo
steps:
  - method: moeits
    budget: {keep: 24}
evaluation: {data: [english.txt], sequences: 1, length: 32}
compute: {dtype: float32, workers: 1}
"""


def test_run_prints_json_and_nothing_else(run: Run, tmp_path: Path, english: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "english.txt").write_bytes(english.read_bytes())
    done = run("run", "recipe.yaml", "--out", "smaller", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["format"] == "moeprune.recipe-run/1"
    assert result["steps"][0]["experts"] == [192, 144]
    assert result["evaluation"]["groups"]["all"]["kl"] > 0
    assert run("run", "recipe.yaml", "--out", "smaller").code == 2


def test_compare_prints_a_table(run: Run, tmp_path: Path, english: Path) -> None:
    args = (
        "compare", "demo", "--methods", "moeits,mone", "--keep", "24,200", "--data", english,
        "--heldout", english, "--sequences", 2, "--length", 32, "--windows", 1, "--window", 32,
        "--workers", 1, "--out", "run",
    )  # fmt: skip
    done = run(*args)
    assert done.code == 0, done.err
    assert "original" in done.out and "keep 24" in done.out and "144/192" in done.out
    assert "layer 0 has 32 experts" in done.err and "4 of 4 cells" in done.err
    again = run(*args, "--json")
    assert len(json.loads(again.out)["cells"]) == 4
    assert "4 of 4 cells were finished before" in again.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("compare", "demo", "--out", "r", "--ratios", "a"), "--ratios: 'a' is no list"),
        (("compare", "demo", "--out", "r", "--ratios", "0.5,0.5"), "twice"),
        (("compare", "demo", "--out", "r", "--ratios", "1.5"), "ratio out of range"),
        (("compare", "demo", "--out", "r", "--ratios", ""), "nothing to compare"),
        (("compare", "demo", "--out", "r", "--methods", "mona"), "unknown method"),
        (("compare", "demo", "--out", "r", "--patterns", "2"), "bad pattern"),
        (("compare", "nowhere/at-all", "--out", "r"), "nowhere"),
        (("compare", "demo", "--out", "r", "--heldout", "no.txt"), "no such text file"),
        (("compare", "demo", "--out", "r", "--calibration-domains", "x"), "no calibration text"),
        (("run", "no.yaml"), "no recipe at"),
        (("run", "recipe.yaml"), "names no output"),
    ],
)
def test_bad_input_changes_nothing(
    args: tuple[str, ...], says: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    before = tree(tmp_path)
    done = run(*args)
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert done.code == 2 and done.out == "" and says in done.err
    assert lines[0].startswith("error: ") and len(lines) <= 2, done.err
    assert tree(tmp_path) == before
