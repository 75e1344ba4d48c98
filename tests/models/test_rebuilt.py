"""Rebuilt experts on disk and in memory, compared with references made by hand, over families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edit_kinds import KINDS, chosen, narrowing, plan_of
from families import experts_modules, load_tiny, moe_model_types, token_ids
from moeprune import load
from moeprune.core.plan import Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import MoepruneError, PlanError, UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.memory_edits import edit_in_memory
from moeprune.models.surgery import apply_plan
from moeprune.models.walk import Batch, Walk
from support import aligned, layer_of, logits, matrices, open_stock

Tiny = Callable[[str], Path]
EDITABLE = [name for name in moe_model_types() if name not in quirks.REFUSED]
WIDTHS_SHARED = {
    "cohere2_moe", "deepseek_v4", "hunyuan_v1_moe", "inkling_text", "jamba", "llama4_text",
    *quirks.NOVICES_REFUSED,
}  # fmt: skip
"""Families in which the key of the experts' width sizes something else as well."""

editable = pytest.mark.parametrize("model_type", EDITABLE)


def walked(checkpoint: Checkpoint, plan: Plan) -> list[Tensor]:
    """Logits of two walks: through the layers as the plan edits them, and through the original."""
    model = LayeredModel(checkpoint)
    found: list[Tensor] = []
    for edited in (True, False):

        def visit(site: object, statistics: object, edited: bool = edited) -> bool:
            if edited:
                edit_in_memory(model, site, plan.layers[site.shape.layer])  # type: ignore[attr-defined, arg-type]
            return edited

        ids = token_ids(2, 24)
        with Walk(model, [Batch(ids, torch.arange(ids.numel()).view_as(ids))], 1) as walk:
            walk.layers(("routing",), visit)  # type: ignore[arg-type]
            walk.logits(lambda index, out: found.append(out))
    return found


@pytest.mark.parametrize("kind", KINDS)
@editable
def test_memory_is_disk(model_type: str, kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """A walk through layers edited in memory computes what the written checkpoint does."""
    checkpoint, plan = plan_of(tiny(model_type), KINDS[kind])
    try:
        sizes = apply_plan(checkpoint, plan, tmp_path / "out")
    except MoepruneError as error:
        assert model_type in (WIDTHS_SHARED if "narrow" in kind else quirks.NOVICES_REFUSED), error
        assert not list(tmp_path.iterdir())
        return
    result = Checkpoint.open(tmp_path / "out")
    assert sizes.parameters[1] == result.numel
    assert sizes.bytes[1] == result.nbytes
    expected = logits(aligned(load(tmp_path / "out", dtype=torch.float32)))
    original = logits(load_tiny(checkpoint.path))
    edited, again = walked(checkpoint, plan)
    torch.testing.assert_close(edited, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, original, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(edited, original, atol=1e-3)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "aria_text", "dbrx", "deepseek_v2"])
def test_narrowed_is_zeroed(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    """A neuron that is gone and one whose down column is zero do the same: nothing."""
    checkpoint, plan = plan_of(tiny(model_type), narrowing)
    apply_plan(checkpoint, plan, tmp_path / "out")
    original = load_tiny(checkpoint.path)
    for name, experts in experts_modules(original).items():
        layer = plan.layers[layer_of(name)]
        assert layer.neurons is not None
        keep_CJ = chosen(
            LayerShape(layer.layer, layer.experts, 1, 1, len(matrices(experts, 0)["down"].T)),
            layer.keep,
            layer.neurons.width,
        )
        for expert in layer.keep:
            down = matrices(experts, expert)["down"]
            gone = [j for j in range(down.shape[1]) if j not in keep_CJ[expert].tolist()]
            down.data[:, gone] = 0
    expected = logits(original)
    found = logits(aligned(load(tmp_path / "out", dtype=torch.float32)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_generated_code_opens_and_saves(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    """In transformers alone, and again after save_pretrained."""
    checkpoint, plan = plan_of(tiny(model_type), KINDS["answer-offsets-narrow"])
    apply_plan(checkpoint, plan, tmp_path / "out")
    ours = load(tmp_path / "out", dtype=torch.float32)
    stock = open_stock(tmp_path / "out", trust_remote_code=True)
    expected = logits(aligned(ours))
    torch.testing.assert_close(logits(stock), expected, rtol=0, atol=1e-6)
    with pytest.raises(NotImplementedError, match="experts_served_by"):
        type(stock).is_backend_compatible()
    ours.save_pretrained(tmp_path / "again")
    before = {k: i.shape for k, i in Checkpoint.open(tmp_path / "out").tensors.items()}
    after = {k: i.shape for k, i in Checkpoint.open(tmp_path / "again").tensors.items()}
    assert before == after
    again = aligned(load(tmp_path / "again", dtype=torch.float32))
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)


def test_layers_of_different_widths_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint, plan = plan_of(tiny("mixtral"), narrowing)
    first = replace(plan.layers[0], neurons=None)
    mixed = replace(plan, layers={**plan.layers, 0: first})
    with pytest.raises(PlanError, match="one width"):
        apply_plan(checkpoint, mixed, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_width_that_sizes_something_else_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint, plan = plan_of(tiny("jamba"), narrowing)
    with pytest.raises(UnsupportedModelError, match="also sizes"):
        apply_plan(checkpoint, plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())
