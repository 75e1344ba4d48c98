"""The demo run with two small cells: what it says and what it wrote are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import moeprune
from families import token_ids
from moeprune import Budget, Compute, Text, evaluate, read_plan
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.store import StatisticsStore
from moeprune.pipeline import demo as pipeline_demo
from moeprune.pipeline.demo import Cell, demo
from moeprune.report import wording
from support import tree

CELLS = (
    Cell("novices", "mone", Budget(ratio=0.75)),
    Cell("fewer", "moeits", Budget(keep=20)),
)
FLOAT32 = Compute(dtype="float32", workers=1)
HELDOUT = Text(sequences=1, length=24)

Made = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def made(english: Path, shelf: Path) -> Made:
    out = shelf / "demo-out"
    steps: list[str] = []
    result = demo(
        out,
        CELLS,
        Text((str(english),), 6, 64),
        HELDOUT,
        FLOAT32,
        command="moeprune demo <test>",
        progress=lambda what, done, total: steps.append(what),
        pairs=10,
    )
    assert {"walking", "novices: planning", "fewer: writing", "evaluating", "blimp_sample"} <= set(
        steps
    )
    return out, result


def test_files(made: Made) -> None:
    out, _ = made
    assert {path.name for path in out.iterdir()} == {
        "statistics",
        "demo.json",
        "report.html",
        "novices",
        "novices.plan.json",
        "novices.plan.safetensors",
        "fewer",
        "fewer.plan.json",
    }
    assert [path.name for path in out.parent.glob(".*")] == []


def test_result_is_what_stands_in_the_file(made: Made) -> None:
    out, result = made
    assert json.loads((out / "demo.json").read_text(encoding="utf-8")) == result
    assert result["format"] == "moeprune.run/1"
    assert result["model"]["fingerprint"] == Checkpoint.open("demo").fingerprint
    assert result["calibration"]["tokens"] == 6 * 64
    assert [row["name"] for row in result["rows"]] == ["original", "novices", "fewer"]


def numbers(folder: Path) -> tuple[int, int]:
    """Values and bytes of all tensors, read with the safetensors library."""
    values = size = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                values += tensor.numel()
                size += tensor.numel() * tensor.element_size()
    return values, size


def test_rows_are_what_was_written(made: Made) -> None:
    out, result = made
    folders = {"original": Checkpoint.open("demo").path, **{c.name: out / c.name for c in CELLS}}
    for row in result["rows"]:
        assert (row["parameters"], row["bytes"]) == numbers(folders[row["name"]])
        assert row["nonzero_parameters"] == row["parameters"]
        assert row["experts_before"] == 192
    original, novices, fewer = result["rows"]
    assert [row["experts"] for row in result["rows"]] == [192, 48, 120]
    assert original["plan"] is None and original["path"] is None
    for row in (novices, fewer):
        assert row["path"] == str(out / row["name"])
        written = read_plan(out / f"{row['name']}.plan.json")
        assert row["method"] == written.method and row["budget"] == written.budget
        assert row["warnings"] == list(written.warnings)
        for index, layer in written.layers.items():
            shown = row["plan"][str(index)]
            assert shown["keep"] == list(layer.keep)
            assert shown["replaced"] == list(layer.replaced)
            assert shown["dropped"] == list(layer.dropped)


def test_measurements_are_those_of_evaluate(made: Made) -> None:
    out, result = made
    for row in result["rows"][1:]:
        again = evaluate(out / row["name"], "demo", HELDOUT, FLOAT32)
        perplexity = {name: score["perplexity"] for name, score in again["domains"].items()}
        assert row["perplexity"] == pytest.approx(perplexity, rel=1e-6)
        total = again["groups"]["all"]
        assert row["kl"] == pytest.approx(total["kl"], rel=1e-5)
        assert row["agreement"] == total["agreement"]
        assert row["against"].keys() == {*perplexity, "all"}
        whole = row["against"]["all"]
        assert whole["kl"]["value"] == pytest.approx(row["kl"], rel=1e-9)
        assert whole["loss"] == total["against"]["loss"]
    assert len(perplexity) == 10
    original = result["rows"][0]
    assert original["kl"] is None and "against" not in original
    assert original["loss"] < min(row["loss"] for row in result["rows"][1:])


def test_usage_is_that_of_the_statistics(made: Made) -> None:
    out, result = made
    store = StatisticsStore.open(out / "statistics")
    assert result["usage"].keys() == {str(index) for index in range(6)}
    for index in store.layers:
        count_E = store.layer(index).to_tensors()["routing.count_E"]
        assert result["usage"][str(index)] == pytest.approx((count_E / count_E.sum()).tolist())


def test_checkpoints_open(made: Made) -> None:
    out, _ = made
    for cell in CELLS:
        with torch.no_grad():
            logits = moeprune.load(out / cell.name)(token_ids(1, 6)).logits
        assert logits.shape == (1, 6, 6144) and torch.isfinite(logits).all()
    stock, info = AutoModelForCausalLM.from_pretrained(out / "fewer", output_loading_info=True)
    assert not any(info.values())
    assert stock.config.num_experts == 20


def test_report_shows_the_numbers(made: Made) -> None:
    out, result = made
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "moeprune demo &lt;test&gt;" in html
    assert result["model"]["fingerprint"] in html
    assert result["calibration"]["data_hash"] in html
    for row in result["rows"]:
        assert row["name"] in html
        assert wording.size(row["bytes"]) in html
        for domain, value in row["perplexity"].items():
            assert domain in html and wording.significant(value) in html


def test_nothing_is_left_of_a_failure(
    tmp_path: Path, english: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def fails(result: dict[str, Any]) -> str:
        [work] = tmp_path.glob(".*.partial")
        seen.append({path.name for path in work.iterdir()})
        raise RuntimeError("in the middle")

    monkeypatch.setattr(pipeline_demo, "render_report", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        demo(tmp_path / "out", CELLS[:1], Text((str(english),), 1, 16), HELDOUT, FLOAT32)
    assert seen and {"statistics", "novices", "demo.json"} <= seen[0]
    assert tree(tmp_path) == {}


def test_existing_output_is_kept(tmp_path: Path, english: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo.json").write_text("{}")
    before = tree(tmp_path)
    text = Text((str(english),), 1, 16)
    with pytest.raises(moeprune.MoepruneError, match="output exists"):
        demo(tmp_path / "out", CELLS[:1], text, HELDOUT, FLOAT32)
    assert tree(tmp_path) == before
