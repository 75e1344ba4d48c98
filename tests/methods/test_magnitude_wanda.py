"""Magnitude and Wanda: masks against independent ones, on disk, and as `verify` sees them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.rows import SMALL, collected, random_rows, random_weights, view_of
from methods.test_moe_pruner import (
    COMPUTE,
    ROLES,
    WEIGHTS,
    expected_pruned,
    pruned_by,
    same_masks,
)
from moeprune.core.budget import Budget
from moeprune.core.method import Context, Method
from moeprune.core.ops.masks import matrix_keep_mask, prune_count
from moeprune.core.plan import MaskEdit, Plan
from moeprune.errors import BudgetError, PlanError
from moeprune.methods.magnitude import Magnitude
from moeprune.methods.moe_pruner import MoEPruner
from moeprune.methods.wanda import Wanda
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.layout import DiskExperts, expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.pipeline import stages
from moeprune.pipeline.verification import verify
from support import tensor_digests

ROWS = random_rows(SMALL, 200, weights=WEIGHTS)
NEEDS = Wanda.needs


def lowest_of_matrix(weight_OI: Tensor, count: int) -> Tensor:
    """True where pruned, by a loop over sorted (|w|, row, column)."""
    keys = [
        (math.inf if math.isnan(w) else abs(w), row, column)
        for row, line in enumerate(weight_OI.tolist())
        for column, w in enumerate(line)
    ]
    pruned = torch.zeros(weight_OI.shape, dtype=torch.bool)
    for _, row, column in sorted(keys)[:count]:
        pruned[row, column] = True
    return pruned


def plan_by(method: Method, budget: Budget) -> dict[tuple[str, int], Tensor]:
    statistics = collected(SMALL, ROWS, [70], NEEDS) if method.needs else None
    return pruned_by(method.plan_layer(view_of(SMALL, statistics, WEIGHTS), Context(budget)))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.0]), min_size=1, max_size=24),
    st.floats(0, 1),
    st.integers(1, 3),
)
def test_matrix_masks_are_exact_and_stable(values: list[float], ratio: float, rows: int) -> None:
    weight = torch.tensor([values] * rows)
    count = prune_count(weight.numel(), ratio)
    pruned = ~matrix_keep_mask(weight, None, ratio)
    assert int(pruned.sum()) == count
    assert torch.equal(pruned, lowest_of_matrix(weight, count))


def test_matrix_masks_treat_every_matrix_alone() -> None:
    weight = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    together = matrix_keep_mask(weight, scale, 0.4)
    for e in range(3):
        assert torch.equal(together[e], matrix_keep_mask(weight[e], scale[e], 0.4))
        assert torch.equal(~together[e], lowest_of_matrix(weight[e] * scale[e], 16))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.7])
def test_magnitude_takes_the_lowest_of_each_matrix(ratio: float) -> None:
    for (role, e), pruned in plan_by(Magnitude(), Budget(ratio=ratio)).items():
        weight = WEIGHTS.matrix(e, role)
        assert torch.equal(pruned, lowest_of_matrix(weight, math.floor(weight.numel() * ratio)))


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_magnitude_by_row(ratio: float) -> None:
    for (role, e), pruned in plan_by(Magnitude(scope="row"), Budget(ratio=ratio)).items():
        weight = WEIGHTS.matrix(e, role)
        count = math.floor(weight.shape[1] * ratio)
        expected = torch.cat([lowest_of_matrix(row[None], count) for row in weight])
        assert torch.equal(pruned, expected)


@pytest.mark.parametrize("method", [Magnitude(), Wanda(propagate="dense")])
def test_patterns(method: Method) -> None:
    for pruned in plan_by(method, Budget(pattern=(2, 4))).values():
        assert set(pruned.reshape(-1, 4).sum(dim=1).tolist()) == {2}
    with pytest.raises(BudgetError, match="2:5 does not fit"):
        plan_by(method, Budget(pattern=(2, 5)))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_wanda_equals_the_slow_one(ratio: float) -> None:
    found = plan_by(Wanda(propagate="dense"), Budget(ratio=ratio))
    assert same_masks(found, expected_pruned(ROWS, gated=False, ratio=ratio))


@pytest.mark.parametrize("budget", [Budget(ratio=0.5), Budget(pattern=(2, 4))])
def test_constant_gates_make_wanda_and_moe_pruner_one(budget: Budget) -> None:
    constant = replace(ROWS, gate_TK=torch.full_like(ROWS.gate_TK, 0.37))
    view = view_of(SMALL, collected(SMALL, constant, needs=NEEDS), WEIGHTS)
    one, two = (
        pruned_by(kind(propagate="dense").plan_layer(view, Context(budget)))
        for kind in (Wanda, MoEPruner)
    )
    assert same_masks(one, two)
    gated = view_of(SMALL, collected(SMALL, ROWS, needs=NEEDS), WEIGHTS)
    other = pruned_by(MoEPruner(propagate="dense").plan_layer(gated, Context(budget)))
    assert not same_masks(one, other)


def test_permuting_experts_permutes_the_masks() -> None:
    order = torch.randperm(SMALL.experts, generator=torch.Generator().manual_seed(3))
    inverse = torch.argsort(order)
    moved_weights = type(WEIGHTS)({role: w[order] for role, w in WEIGHTS.by_role.items()})
    moved = replace(
        ROWS,
        index_TK=inverse[ROWS.index_TK],
        h_TEI=ROWS.h_TEI[:, order],
        f_TEH=ROWS.f_TEH[:, order],
    )
    for method in (Wanda(propagate="dense"), Magnitude()):
        before = plan_by(method, Budget(ratio=0.5))
        view = view_of(SMALL, collected(SMALL, moved, [70], NEEDS), moved_weights)
        after = pruned_by(method.plan_layer(view, Context(Budget(ratio=0.5))), moved_weights)
        for role in ROLES:
            for new, old in enumerate(order.tolist()):
                assert torch.equal(after[role, new], before[role, old])


def test_an_experts_dead_columns_are_guarded() -> None:
    few = random_rows(SMALL, 60, seed=1, weights=WEIGHTS, never=[0])
    layer = Wanda(propagate="dense").plan_layer(
        view_of(SMALL, collected(SMALL, few, needs=NEEDS), WEIGHTS), Context(Budget(ratio=0.5))
    )
    assert "experts [0" in layer.notes[0]
    assert not pruned_by(layer)["up", 0][:, : SMALL.hidden // 2].all()


def test_the_group_is_part_of_the_plan_file() -> None:
    weights = random_weights(SMALL)
    layer = Magnitude().plan_layer(view_of(SMALL, None, weights), Context(Budget(ratio=0.5)))
    plan = Plan({0: layer}, "magnitude", {}, {}, {"fingerprint": "f"}, {}, 0)
    assert Plan.from_json(plan.to_json(None), {}).layers[0].mask == layer.mask
    assert layer.mask is not None and layer.mask.group == "matrix"
    for bad in (MaskEdit(0.5, None, group="column"), MaskEdit(None, (2, 4), group="matrix")):
        with pytest.raises(PlanError, match="compete within"):
            replace(layer, mask=bad).check(SMALL)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "dbrx", "llama4_text"])
def test_magnitude_on_disk(model_type: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Fused, transposed and interleaved matrices: gate and up are matrices of their own."""
    source = tiny(model_type)
    plan = stages.plan(source, "magnitude", Budget(ratio=0.3), compute=COMPUTE)
    sizes = stages.apply(source, plan, tmp_path / "out")
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    model, zeros = LayeredModel(before), 0
    layout = expert_layout(model)
    for site in model.sites.values():
        old, new = DiskExperts(before, layout, site), DiskExperts(after, layout, site)
        for e in range(site.shape.experts):
            for role in site.shape.roles:
                weight, masked = old.matrix(e, role), new.matrix(e, role)
                pruned = lowest_of_matrix(weight, math.floor(weight.numel() * 0.3))
                assert torch.equal(masked, weight.masked_fill(pruned, 0.0))
                zeros += int(pruned.sum())
    assert sizes.nonzero[0] - sizes.nonzero[1] == zeros
    assert sizes.bytes[0] == sizes.bytes[1]
    result = verify(tmp_path / "out", against=source)
    assert result.passed(), result.findings


def test_ratio_zero_is_the_identity(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("olmoe")
    plan = stages.plan(source, "magnitude", Budget(ratio=0.0), compute=COMPUTE)
    stages.apply(source, plan, tmp_path / "out")
    assert tensor_digests(source) == tensor_digests(tmp_path / "out")


def test_wanda_walks_by_default(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    """The sequential plan differs from the dense one behind the first layer only."""
    source = tiny("mixtral")
    stages.calibrate(source, tmp_path / "statistics", text, NEEDS, COMPUTE)
    half = Budget(ratio=0.5)
    dense = stages.plan(source, Wanda(propagate="dense"), half, tmp_path / "statistics")
    pruned = stages.plan(source, Wanda(), half, text=text, compute=COMPUTE)
    same = []
    for index in sorted(dense.layers):
        one, two = dense.layers[index].mask, pruned.layers[index].mask
        assert one is not None and two is not None
        assert one.scale_in_EH is not None and two.scale_in_EH is not None
        same.append(torch.equal(one.scale_in_EH, two.scale_in_EH))
    assert same == [True, False, False, False]
