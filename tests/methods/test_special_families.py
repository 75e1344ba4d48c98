"""Every method, from text to a checkpoint that stock classes open, on families with quirks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from families import experts_modules
from moeprune.core.budget import Budget
from moeprune.errors import UnsupportedModelError
from moeprune.methods.mone import MoNE
from moeprune.models import quirks, runtime
from moeprune.pipeline import stages
from support import expert_count, layer_of, logits, matrices, open_stock

Tiny = Callable[[str], Path]

special = pytest.mark.parametrize(
    "model_type", ["dbrx", "deepseek_v4", "llama4_text", "longcat_flash", "zaya"]
)


@special
@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_moe_pruner(
    propagate: str, model_type: str, tiny: Tiny, text: stages.Text, tmp_path: Path
) -> None:
    """Half of every row is zero, whichever way the inputs' norms were measured."""
    model, statistics = tiny(model_type), None
    if propagate == "dense":
        statistics = tmp_path / "statistics"
        stages.calibrate(model, statistics, text)
    options = {"propagate": propagate}
    plan = stages.plan(model, "moe-pruner", Budget(ratio=0.5), statistics, text, options)
    for layer in plan.layers.values():
        assert layer.mask is not None and layer.mask.scale_in_EH is not None
        assert (layer.mask.scale_in_EH.sum(dim=1) > 0).sum() >= 6
    stages.apply(model, plan, tmp_path / "out")
    opened = open_stock(tmp_path / "out")
    for experts in experts_modules(opened).values():
        for expert in range(expert_count(experts)):
            for matrix in matrices(experts, expert).values():
                assert ((matrix == 0).sum(dim=1) == matrix.shape[1] // 2).all()
    assert logits(opened).isfinite().all()


@special
def test_moeits(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    plan = stages.plan(tiny(model_type), "moeits", Budget(keep=5))
    stages.apply(tiny(model_type), plan, tmp_path / "out")
    opened = open_stock(tmp_path / "out")
    assert {expert_count(experts) for experts in experts_modules(opened).values()} == {5}
    assert logits(opened).isfinite().all()
    redirected = [text for text in plan.warnings if "choose experts by token id" in text]
    assert [text.split(" choose")[0] for text in redirected] == (
        ["layers 0"] if model_type == "deepseek_v4" else []
    )


@special
def test_mone(model_type: str, tiny: Tiny, text: stages.Text, tmp_path: Path) -> None:
    stages.calibrate(tiny(model_type), tmp_path / "statistics", text, MoNE.needs)
    arguments = (tiny(model_type), "mone", Budget(keep=5), tmp_path / "statistics")
    if model_type in quirks.NOVICES_REFUSED:
        with pytest.raises(
            UnsupportedModelError, match=r"cannot be replaced by constants: (its|all)"
        ):
            stages.plan(*arguments)
        return
    plan = stages.plan(*arguments)
    assert not any("choose experts by token id" in text for text in plan.warnings)
    stages.apply(tiny(model_type), plan, tmp_path / "out")
    opened = runtime.load(tmp_path / "out")
    for name, experts in experts_modules(opened).items():
        assert len(experts.novice_value) == len(plan.layers[layer_of(name)].replaced) == 3
    assert logits(opened).isfinite().all()
