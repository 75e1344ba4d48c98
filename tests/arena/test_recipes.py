"""Recipes: what is refused and where, what steps do to each other, what the result says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import save_tiny
from moeprune import Budget, Compute, MoepruneError, Text, apply, calibrate, plan, prune
from moeprune.core.accumulators import LIGHT
from moeprune.core.method import make_method
from moeprune.files import json_bytes, sha256_bytes
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.projection import project_statistics
from moeprune.models.store import StatisticsStore
from moeprune.pipeline.recipes.run import run
from moeprune.pipeline.recipes.schema import load_recipe
from moeprune.pipeline.recipes.yaml_lines import parse
from moeprune.pipeline.verification import verify
from running import page
from support import tree

HEAD = "format: moeprune.recipe/1\nmodel: demo\n"
STEP = "steps:\n  - method: moeits\n    budget: {keep: 24}\n"
ONE = Compute(dtype="float32", workers=1)


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page(tmp_path_factory.mktemp("text"), "english", 9_000)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + "steps:\n  - method: [", "line 4: not YAML"),
        (HEAD + "steps:\n  - method: mone\n", "line 4: steps.0.budget: is missing"),
        (HEAD + STEP + "sed: 1\n", "line 6: sed: there is no such field"),
        (HEAD + STEP + "seed: one\n", "line 6: seed: Input should be a valid integer"),
        (HEAD + STEP + "seed: 1\nseed: 2\n", "line 7: 'seed' stands twice"),
        (HEAD + STEP.replace("moeits", "moeit"), "line 4: unknown method 'moeit'"),
        (HEAD + STEP.replace("keep: 24", "kep: 24"), "line 5: there is no budget 'kep'"),
        (HEAD + STEP.replace("keep: 24", "ratio: 1.5"), "line 5: ratio out of range"),
        (HEAD + STEP.replace("keep: 24", "pattern: 2:4"), "line 5: moeits has no --pattern"),
        (HEAD + STEP.replace("keep: 24", "keep: much"), "line 5: budget keep"),
        (HEAD + STEP + "    options: {bin: 3}\n", "line 4: moeits has no option 'bin'"),
        (HEAD + STEP + "    statistics: project\n", "line 6: the first step has nothing"),
        (HEAD + STEP + "    statistics: guess\n", "line 6: steps.0.statistics: Input should be"),
        (HEAD + STEP + "writing: {mtp: half}\n", "line 6: "),
        (HEAD + "steps: []\n", "line 3: no step"),
        (HEAD.replace("/1", "/2") + STEP, "line 1: format: Input should be"),
        (HEAD + "a: &x 1\nb: *x\n" + STEP, "aliases"),
        ("- 1\n", "a recipe is a mapping"),
    ],
)
def test_mistakes_have_a_line(text: str, says: str, tmp_path: Path) -> None:
    path = recipe(tmp_path, text)
    before = tree(tmp_path)
    with pytest.raises(MoepruneError) as caught:
        run(path, tmp_path / "out")
    assert says in caught.value.problem
    assert tree(tmp_path) == before


def test_scalars_are_read_as_yaml_1_2() -> None:
    text = "a: 2:4\nb: 2e-5\nc: no\nd: true\ne: ~\nf: 010\ng: .5\nh: -3"
    value = parse(text, "x").value
    assert value == {"a": "2:4", "b": 2e-5, "c": "no", "d": True, "e": None, "f": 10, "g": 0.5,
                     "h": -3}  # fmt: skip


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    text = HEAD.replace("demo", "./here") + STEP + "calibration: {data: [a=x.txt]}\n"
    loaded = load_recipe(recipe(tmp_path, text))
    assert loaded.model() == str(tmp_path / "here")
    assert loaded.text().sources == (f"a={tmp_path / 'x.txt'}",)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_one_step_is_prune(tmp_path: Path, english: Path) -> None:
    text = HEAD + (
        f"seed: 3\ncalibration: {{data: [{english}], sequences: 4, length: 64}}\n"
        "compute: {dtype: float32, workers: 1}\n"
        "steps:\n  - method: mone\n    budget: {ratio: 0.5}\n    options: {scope: global}\n"
    )
    run(recipe(tmp_path, text), tmp_path / "a")
    prune("demo", "mone", Budget(ratio=0.5), tmp_path / "b", Text((str(english),), 4, 64),
          {"scope": "global"}, compute=ONE, seed=3)  # fmt: skip
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, english: Path) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("three")
    text = HEAD + (
        f"calibration: {{data: [{english}], sequences: 4, length: 64}}\n"
        "compute: {dtype: float32, workers: 1}\nout: out\n"
        "steps:\n  - method: moeits\n    budget: {keep: 24}\n"
        "  - method: moe-pruner\n    options: {propagate: dense}\n    budget: {pattern: 2:4}\n"
        "    statistics: project\n"
        "  - method: moeits\n    budget: {keep: 16}\n"
    )
    return folder, run(recipe(folder, text), keep=folder / "steps")


def test_steps_compose(three: tuple[Path, Any]) -> None:
    folder, result = three
    assert [step["method"] for step in result["steps"]] == ["moeits", "moe-pruner", "moeits"]
    assert [step["experts"] for step in result["steps"]] == [[192, 144], [144, 144], [144, 96]]
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "out", "steps"}
    assert {path.name for path in (folder / "steps").iterdir()} == {"step-1", "step-2"}
    by_hand = plan(folder / "steps/step-2", "moeits", Budget(keep=16), compute=ONE)
    apply(folder / "steps/step-2", by_hand, folder / "again")
    assert {name: tensor.tolist() for name, tensor in tensors(folder / "again").items()} == {
        name: tensor.tolist() for name, tensor in tensors(folder / "out").items()
    }


def test_provenance_goes_back_to_the_original(three: tuple[Path, Any]) -> None:
    folder, result = three
    record = json.loads((folder / "out/moeprune.json").read_bytes())
    steps = record["steps"]
    assert [s["plan_sha256"] for s in steps] == [s["plan_sha256"] for s in result["steps"]]
    assert steps[0]["base_fingerprint"] == Checkpoint.open("demo").fingerprint
    between = [Checkpoint.open(folder / f"steps/step-{n}").fingerprint for n in (1, 2)]
    assert [step["base_fingerprint"] for step in steps[1:]] == between
    copy = (folder / "out/moeprune_plan.json").read_bytes()
    assert sha256_bytes(copy) == record["plan_sha256"] == steps[-1]["plan_sha256"]
    # the masks are of projected statistics, and say so
    assert result["steps"][1]["observed"] == "the original, projected"
    history = steps[1]["statistics"]["data"]["projected"]
    assert [plan_hash for _, plan_hash in history] == [steps[0]["plan_sha256"]]
    found = verify(folder / "out")
    assert [finding for finding in found.findings if finding.severity == "error"] == []


def test_verify_sees_a_forged_history(three: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = three
    record = json.loads((folder / "out/moeprune.json").read_bytes())
    record["steps"].pop()
    before = (folder / "out/moeprune.json").read_bytes()
    try:
        (folder / "out/moeprune.json").write_bytes(json_bytes(record))
        found = verify(folder / "out", values=False)
    finally:
        (folder / "out/moeprune.json").write_bytes(before)
    assert any("last of its steps" in finding.problem for finding in found.findings)


def test_nonzero_counts_what_earlier_steps_zeroed(three: tuple[Path, Any]) -> None:
    folder, result = three
    stored = sum(int(t.count_nonzero()) for t in tensors(folder / "out").values())
    assert result["steps"][-1]["nonzero"][1] == stored < result["steps"][-1]["parameters"][1]


def test_an_error_names_its_step(tmp_path: Path) -> None:
    text = HEAD + STEP + "  - method: moeits\n    budget: {keep: 30}\n"
    before = tree(tmp_path)
    path = recipe(tmp_path, text)
    with pytest.raises(MoepruneError, match=r"^step 2 \(moeits\): --keep 30"):
        run(path, tmp_path / "deep/out")
    path.unlink()
    assert tree(tmp_path) == before and not (tmp_path / "deep").exists()


def test_projection_slices_every_axis_of_experts(tmp_path: Path) -> None:
    """Against slices by hand; the plan is the reference's only input."""
    folder = save_tiny("qwen2_moe", tmp_path / "m")
    source = StatisticsStore.open(_statistics(folder, tmp_path / "s"))
    made = plan(folder, make_method("moeits"), Budget(keep=3), compute=ONE)
    apply(folder, made, tmp_path / "less")
    after = project_statistics(tmp_path / "s", made, tmp_path / "less", tmp_path / "p")
    for index in source.layers:
        keep = list(made.layers[index].keep)
        old, new = source.layer(index).to_tensors(), after.layer(index).to_tensors()
        assert old.keys() == new.keys()
        for name, tensor in old.items():
            expected = tensor
            if name in ("routing.together_EE", "router.gram_EE"):
                expected = tensor[keep][:, keep]
            elif not name.startswith("sample."):
                expected = tensor[keep]
            assert torch.equal(new[name], expected), name
        assert after.layer(index).tokens == source.layer(index).tokens


def _statistics(folder: Path, out: Path) -> Path:
    """Statistics of a model without tokenizer: sums of random rows."""
    from moeprune.core.statistics import LayerStatistics
    from moeprune.models.loading import LayeredModel
    from moeprune.models.store import writing_statistics
    from moeprune.pipeline.inputs import describe_model

    model = LayeredModel(Checkpoint.open(folder))
    header = {
        "model": describe_model(model, "m"), "dtype": "float32", "collect": sorted(LIGHT),
        "data": {"hash": "x", "tokens": 7, "sequences": 1, "domains": {"a": 1}},
    }  # fmt: skip
    with writing_statistics(out, header) as save:
        for site in model.sites.values():
            statistics = LayerStatistics.empty(site.shape, LIGHT)
            statistics.tokens = 7
            for part in statistics.parts.values():
                for _, tensor in part.tensors():
                    if tensor.numel():
                        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
            save(statistics)
    return out


def test_novices_cannot_be_projected(tmp_path: Path, english: Path) -> None:
    calibrate("demo", tmp_path / "s", Text((str(english),), 2, 64), compute=ONE)
    made = plan("demo", "mone", Budget(ratio=0.5), tmp_path / "s", compute=ONE)
    apply("demo", made, tmp_path / "less")
    with pytest.raises(MoepruneError, match="deleted or masked"):
        project_statistics(tmp_path / "s", made, tmp_path / "less", tmp_path / "p")


def test_a_strange_record_is_no_history(tmp_path: Path) -> None:
    from moeprune.models.surgery import steps_of

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    for text in ("[]", "{", '{"format": "moeprune.checkpoint/2"}'):
        (tmp_path / "moeprune.json").write_text(text)
        assert steps_of(tmp_path) == []
