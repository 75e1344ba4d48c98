"""``--mtp`` of the commands that write a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from families import save_tiny
from heads import attach, head_of, read_all
from running import Run

HEAD = "model.layers.4."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shelf = tmp_path_factory.mktemp("mtp")
    source = save_tiny("glm4_moe", shelf / "bare")
    return attach(source, shelf / "model", head_of(source, HEAD))


def written(directory: Path) -> set[str]:
    return {name for name in read_all(directory) if name.startswith(HEAD)}


def test_prune_and_apply(run: Run, model: Path, tmp_path: Path) -> None:
    prune = ("prune", model, "--method", "moeits", "--keep", 6, "--json", "--out")
    kept = run(*prune, tmp_path / "kept")
    assert kept.code == 0, kept.err
    before, after = written(model), written(tmp_path / "kept")
    assert before - after == {name for name in before if "experts.6." in name or ".7." in name}
    assert after < before
    # 8 experts of three matrices, router rows and correction bias; the rest is copied
    assert json.loads(kept.out)["attached"] == {"pruned": 26, "copied": len(before) - 26}
    plan = ("plan", model, "--method", "moeits", "--keep", 6, "--out", tmp_path / "plan.json")
    assert run(*plan).code == 0
    apply = ("apply", model, "--plan", tmp_path / "plan.json", "--out", tmp_path / "gone")
    done = run(*apply, "--mtp", "drop")
    assert done.code == 0, done.err
    assert f"dropped {len(before)}" in done.out
    assert not written(tmp_path / "gone")
    config = json.loads((tmp_path / "gone" / "config.json").read_text())
    assert (config["num_nextn_predict_layers"], config["n_routed_experts"]) == (0, 6)


@pytest.mark.parametrize("command", ["prune", "apply"])
def test_unknown_choice(command: str, run: Run, model: Path, tmp_path: Path) -> None:
    options = ("--method", "moeits", "--keep", 6) if command == "prune" else ("--plan", "x.json")
    (tmp_path / "x.json").write_text("{}")
    done = run(command, model, *options, "--out", tmp_path / "out", "--mtp", "keep")
    assert done.code == 2
    assert done.err.splitlines() == [
        "error: unknown --mtp 'keep'",
        "did you mean 'keep-pruned'? known: drop, keep-pruned",
    ]
    assert not (tmp_path / "out").exists()
