"""Stages under a budget write what they write without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from families import save_tiny
from moeprune import Budget, Compute, Text, apply, calibrate, evaluate, plan, recover, training
from moeprune.cli.options import parse_compute
from moeprune.cli.output import profile_json, tell_profile
from moeprune.core.memory import Decision, Sizes
from moeprune.errors import BudgetError, MoepruneError
from moeprune.models import bounds
from moeprune.models.bounds import resident_memory
from moeprune.pipeline.verification import verify
from recovering import with_tokenizer

WIDE = {"vocab_size": 6144, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def teacher(shelf: Path) -> Path:
    return with_tokenizer(save_tiny("qwen3_moe", shelf / "memory", **WIDE))


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Budgets at which everything is given up that can be; gets a line for every walk."""

    def least(sizes: Sizes, budget: int, later: int = 0) -> Decision:
        return Decision(0, False, 1, 3 if sizes.chunks else sizes.experts)

    monkeypatch.setattr(bounds, "decide", least)
    return []


def held(told: list[str], **given: Any) -> Compute:
    return Compute(workers=2, memory=1 << 40, tell=told.append, **given)


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_the_same_statistics_and_pruned_model(
    teacher: Path, english: Path, tight: list[str], tmp_path: Path
) -> None:
    text = Text((str(english),), 12, 32)
    collect = ("routing", "outputs", "router", "residual")
    calibrate(teacher, tmp_path / "a", text, collect, Compute(workers=2))
    calibrate(teacher, tmp_path / "b", text, collect, held(tight))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(tight) == 1
    assert "3 of 8 experts in memory at a time" in tight[0]
    made = plan(teacher, "frequency", Budget(keep=5), tmp_path / "b", compute=held(tight))
    apply(teacher, made, tmp_path / "pruned")
    found = verify(tmp_path / "pruned", teacher, compute=held(tight, dtype="float32"))
    assert found.passed(strict=False), found.findings
    assert found.comparison["logits"]["equal"]
    assert len(tight) == 3  # both models of the comparison


def test_methods_that_edit_while_they_walk(teacher: Path, english: Path, tight: list[str]) -> None:
    text = Text((str(english),), 8, 32)
    budget = Budget(ratio=0.5)
    free = plan(teacher, "ream", budget, None, text, compute=Compute(workers=1))
    bound = plan(teacher, "ream", budget, None, text, compute=held(tight))
    assert bound.to_json(None)["layers"] == free.to_json(None)["layers"]
    assert all("experts in memory at a time" not in line for line in tight)


def test_the_same_evaluation_but_for_rounding(
    teacher: Path, english: Path, tight: list[str]
) -> None:
    text = Text((str(english),), 4, 32)
    free = evaluate(teacher, text=text, compute=Compute(dtype="float32"))
    bound = evaluate(teacher, teacher, text, held(tight, dtype="float32"))
    assert bound["groups"]["all"]["loss"] == pytest.approx(free["groups"]["all"]["loss"], rel=1e-6)
    assert bound["groups"]["all"]["kl"] == 0.0
    assert len(tight) == 2


def test_both_models_are_planned_before_the_first_walk(teacher: Path, english: Path) -> None:
    told: list[str] = []
    one = Compute(memory=1 << 20, tell=told.append)
    with pytest.raises(BudgetError, match="too small"):
        evaluate(teacher, teacher, Text((str(english),), 4, 32), one)
    assert not told


def test_layerwise_recovery(teacher: Path, english: Path, tight: list[str], tmp_path: Path) -> None:
    text = Text((str(english),), 16, 32)
    calibrate(teacher, tmp_path / "s", text, ("routing",), Compute(workers=1))
    apply(teacher, plan(teacher, "frequency", Budget(keep=6), tmp_path / "s"), tmp_path / "student")
    chosen = training("expert-kd", None, {"layerwise": True, "steps": 2, "batch": 4})
    outs = {"free": Compute(), "bound": held(tight)}
    for name, compute in outs.items():
        recover(tmp_path / "student", teacher, tmp_path / name, chosen, text, compute)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in outs]
    assert weights[0] == weights[1]
    assert tight
    with pytest.raises(MoepruneError, match="for training layer by layer"):
        recover(tmp_path / "student", teacher, tmp_path / "no", "expert-kd", text, held(tight))


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compute = parse_compute("auto", "cpu", 0, False, "2GiB", tmp_path, True)
    assert (compute.memory, compute.memory_dir) == (2 << 30, tmp_path)
    found = profile_json(compute)["profile"]
    assert found["bound"] in ("arithmetic", "disk", "memory")
    assert found["peak_memory_bytes"] >= 0.9 * (resident_memory() or 0)
    tell_profile(compute)
    told = capsys.readouterr()
    assert "waiting for weights" in told.err
    assert "bounded by" in told.err
    assert not told.out
    assert profile_json(Compute()) == {}
    with pytest.raises(MoepruneError, match="what has no room"):
        parse_compute("auto", "cpu", 0, memory_dir=tmp_path)
