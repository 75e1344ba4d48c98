"""Recoveries as steps of a recipe: the bytes of the commands, and what is refused and where."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from moeprune import Budget, Compute, MoepruneError, prune, recover, training
from moeprune.cli.run import _row
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.repeat import recover_command
from moeprune.pipeline.inputs import Text
from moeprune.pipeline.recipes.run import run
from moeprune.pipeline.recipes.schema import load_recipe
from moeprune.pipeline.verification import verify
from support import tree

ONE = Compute(dtype="float32", workers=1)
SHORT = {"steps": 2, "batch": 4, "holdout": 0.1, "learning_rate": 0.01}
FORMS: dict[str, dict[str, Any]] = {
    "expert-kd": {"train": ["experts", "routers"]},
    "router-kd": {"layerwise": True, "target": "dense-inputs"},
    "lora": {"preset": "moeits", "rank": 2, "holdout": 0.0, "teacher": None},
}
FIRST = "  - method: moeits\n    budget: {keep: 5}\n"


def write(folder: Path, model: Path, text: Text, steps: str, more: str = "") -> Path:
    (source,) = text.sources
    path = folder / "recipe.yaml"
    path.write_text(
        f"format: moeprune.recipe/1\nmodel: {model}\nseed: 3\n"
        f"calibration: {{data: [{source}], sequences: 4, length: 32}}\n"
        f"compute: {{dtype: float32, workers: 1}}\n{more}steps:\n{steps}",
        encoding="utf-8",
    )
    return path


def step(how: str, **options: Any) -> str:
    lines = [f"      {name}: {json.dumps(value)}\n" for name, value in options.items()]
    return f"  - recover: {how}\n    options:\n{''.join(lines)}"


def told(folder: Path) -> Any:
    """moeprune.json without what a clock says."""
    record = json.loads((folder / "moeprune.json").read_bytes())
    for one in record["recovered"]:
        del one["seconds"]
        for layer in one["layers"]:
            del layer["seconds"]
    return record


@pytest.mark.parametrize("how", FORMS)
def test_one_recipe_is_two_commands(how: str, teacher: Path, text: Text, tmp_path: Path) -> None:
    if how == "lora":
        pytest.importorskip("peft")
    options = {**SHORT, **FORMS[how]}
    asked = step(how, **options, sequences=20, length=32)
    result = run(write(tmp_path, teacher, text, FIRST + asked), tmp_path / "out")
    prune(teacher, "moeits", Budget(keep=5), tmp_path / "less", compute=ONE, seed=3)
    master = options.pop("teacher", teacher)
    chosen = training(how, options.pop("preset", None), {**options, "seed": 3})
    by_hand = Text(text.sources, 20, 32, 3)
    recover(tmp_path / "less", master, tmp_path / "same", chosen, by_hand)
    ours, theirs = tree(tmp_path / "out"), tree(tmp_path / "same")
    clocked = {"moeprune.json", "moeprune_recovery.jsonl"}
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= clocked
    assert told(tmp_path / "out") == told(tmp_path / "same")
    assert ours["model.safetensors"] != tree(tmp_path / "less")["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "out", "less", "same"}
    assert [s.get("method") or s["recover"] for s in result["steps"]] == ["moeits", how]
    assert result["steps"][1]["teacher"] == (master and "teacher")
    assert result["steps"][1]["result"]["steps"] == told(tmp_path / "out")["recovered"][0]["steps"]


@pytest.fixture(scope="module")
def middle(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, text: Text
) -> tuple[Path, dict[str, Any]]:
    """Deleted, recovered, masked, recovered again."""
    folder = tmp_path_factory.mktemp("middle")
    steps = (
        FIRST
        + step("router-kd", **SHORT, sequences=20, length=32)
        + "  - method: magnitude\n    budget: {ratio: 0.5}\n"
        + step("expert-kd", **SHORT, layerwise=True, sequences=20, length=32)
    )
    path = write(folder, teacher, text, steps, "out: out\n")
    return folder, run(path, keep=folder / "between", command="moeprune run recipe.yaml")


def test_a_recovery_in_the_middle(middle: tuple[Path, dict[str, Any]]) -> None:
    folder, result = middle
    assert [s.get("method") or s["recover"] for s in result["steps"]] == [
        "moeits", "router-kd", "magnitude", "expert-kd",
    ]  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "out", "between"}
    assert {p.name for p in (folder / "between").iterdir()} == {"step-1", "step-2", "step-3"}
    report = json.loads((folder / "out/moeprune_run.json").read_bytes())
    way = "moeits + recover router-kd + magnitude + recover expert-kd"
    assert report["rows"][1]["method"] == way
    row = _row(1, result["steps"][1])
    assert row["step"] == "2 recover router-kd" and row["observed"].startswith("kl ")


def test_provenance_of_all_steps(middle: tuple[Path, dict[str, Any]], teacher: Path) -> None:
    folder, result = middle
    record = json.loads((folder / "out/moeprune.json").read_bytes())
    bases = [Checkpoint.open(path).fingerprint for path in (teacher, folder / "between/step-2")]
    assert [one["method"] for one in record["steps"]] == ["moeits", "magnitude"]
    assert [one["base_fingerprint"] for one in record["steps"]] == bases
    assert [(r["how"], r["after_steps"]) for r in record["recovered"]] == [
        ("router-kd", 1), ("expert-kd", 2),
    ]  # fmt: skip
    assert {r["teacher_fingerprint"] for r in record["recovered"]} == {bases[0]}
    assert result["steps"][1]["options"] == record["recovered"][0]["options"]
    again = recover_command(record["recovered"][1])
    assert "--layerwise" in again and not {"--rank", "--kl-weight"} & set(again.split())
    # the masks are those of the plan that was made on the recovered model
    masked = verify(folder / "between/step-3", against=folder / "between/step-2")
    assert [f for f in masked.findings if f.severity == "error"] == []
    assert not [why for why in masked.skipped.values() if "trained" in why]
    healed = verify(folder / "out", against=folder / "between/step-2")
    assert [why for why in healed.skipped.values() if "trained after" in why]


MISTAKES = {
    "line 9: unknown way to recover 'expertkd'": step("expertkd", steps=2),
    "line 12: unknown option 'learning-rate' of recovery": (
        "  - recover: lora\n    options:\n      steps: 2\n      learning-rate: 1\n"
    ),
    "line 12: steps: Input should be": step("full", batch=2, steps="many"),
    "line 11: --steps must be": step("full", steps=0),
    "step 2 (recover router-kd): router-kd learns from": step("router-kd", teacher=None),
    "line 11: unknown group of parameters 'expert'": step("full", train="experts,expert", steps=2),
    "line 12: --target dense-inputs is for": step("expert-kd", steps=2, target="dense-inputs"),
    "line 11: no preset 'moeits' for full": step("full", preset="moeits"),
    "line 11: a step writes a checkpoint": step("lora", adapter=True),
    "line 11: mix: Input should be": step("full", mix={"english": -1}),
    "line 10: steps.1.budget: there is no such field": (
        "  - recover: full\n    budget: {keep: 4}\n"
    ),
    "line 11: the step before trains": (
        "  - recover: full\n  - {method: moe-pruner, budget: {ratio: 0.5},\n"
        "     statistics: project}\n"
    ),
    "step 2 (recover full): processes: 2": step("full", processes=2),
    "step 2 (recover full): no such text file": step("full", data="missing.txt"),
    "step 2 (recover full): teacher and student differ": step("full", teacher="demo"),
    "step 3 (recover expert-kd): expert-kd pairs": FIRST + step("expert-kd", steps=2),
}


@pytest.mark.parametrize("says", MISTAKES)
def test_mistakes(says: str, teacher: Path, text: Text, tmp_path: Path) -> None:
    path = write(tmp_path, teacher, text, FIRST + MISTAKES[says])
    before = tree(tmp_path)
    with pytest.raises(MoepruneError) as caught:
        run(path, tmp_path / "out")
    assert says in caught.value.problem
    if "learning-rate" in says:
        assert "did you mean 'learning_rate'?" in caught.value.hint
    assert tree(tmp_path) == before


def test_a_recovery_first(teacher: Path, text: Text, tmp_path: Path) -> None:
    path = write(tmp_path, teacher, text, step("full", steps=2) + FIRST)
    with pytest.raises(MoepruneError, match="line 7: the first step has nothing"):
        run(path, tmp_path / "out")


def test_no_peft(
    teacher: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the first step works."""
    path = write(tmp_path, teacher, text, FIRST + step("lora", preset="moeits"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "moeprune.recovery.lora.find_spec", lambda name: None if name == "peft" else find(name)
    )
    monkeypatch.setattr("moeprune.pipeline.steps.Steps._run", lambda self, work: pytest.fail())
    with pytest.raises(MoepruneError, match=r"step 2 \(recover lora\): lora needs peft") as caught:
        run(path, tmp_path / "out")
    assert "pip install" in caught.value.hint


def test_a_recovery_that_fails_leaves_nothing(teacher: Path, text: Text, tmp_path: Path) -> None:
    options = {**SHORT, "learning_rate": 9.0, "steps": 50, "clip": 0.0, "weight_decay": 9.0}
    path = write(tmp_path, teacher, text, FIRST + step("full", **options, sequences=20, length=32))
    before = tree(tmp_path)
    with pytest.raises(MoepruneError) as caught:
        run(path, tmp_path / "out")
    assert "not finite at step" in caught.value.problem
    assert caught.value.problem.endswith("; nothing was kept")
    assert caught.value.hint == "try a smaller --learning-rate or --dtype float32"
    assert tree(tmp_path) == before


def test_defaults_are_those_of_the_recipe(teacher: Path, text: Text, tmp_path: Path) -> None:
    asked = "  - recover: expert-kd\n"
    own = step("full", data=["a=dataset:x:y", "teacher-samples"], teacher="./t", mix={"a": 2},
               seed=5, train="experts, routers")  # fmt: skip
    path = write(tmp_path, teacher, text, FIRST + asked + own)
    _, plain, other = load_recipe(path).steps()
    assert plain.text == Text(text.sources, 600, 512, 3) and plain.teacher is None
    assert plain.training == training("expert-kd", None, {"seed": 3})
    assert other.text == Text(("a=dataset:x:y", "teacher-samples"), 600, 512, 5, (("a", 2.0),))
    assert other.teacher == str(tmp_path / "t")
    assert other.training == training("full", None, {"seed": 5, "train": ("experts", "routers")})
