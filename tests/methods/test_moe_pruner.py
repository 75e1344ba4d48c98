"""MoE-Pruner: its masks against independent ones, its propagation against a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.rows import SMALL, Rows, Weights, collected, random_rows, random_weights, view_of
from methods.conftest import calibration_ids, experts_of, hidden_and_output, watch
from moeprune.core.budget import Budget
from moeprune.core.method import Context
from moeprune.core.plan import LayerPlan, MaskEdit, Plan
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import BudgetError
from moeprune.methods.moe_pruner import MoEPruner
from moeprune.models import memory_edits
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.layout import DiskExperts, expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.sites import MoESite
from moeprune.pipeline import deciding, stages
from support import open_stock, tensor_digests

HALF = Budget(ratio=0.5)
NEEDS = MoEPruner.needs
ROLES = ("gate", "up", "down")
WEIGHTS = random_weights(SMALL)
ROWS = random_rows(SMALL, 200, weights=WEIGHTS)


def scores_of(weight_OI: Tensor, rows_nI: Tensor, gate_n: Tensor | None) -> NDArray[np.float64]:
    """|W| * norm of the (gated) inputs, in float64."""
    x = rows_nI.double().numpy()
    g = 1.0 if gate_n is None else gate_n.double().numpy()[:, None]
    return np.abs(weight_OI.double().numpy()) * np.sqrt(((g * x) ** 2).sum(axis=0))


def lowest_of_rows(score: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """True where pruned: the ``count`` lowest of each row, ties in column order."""
    pruned = np.zeros(score.shape, bool)
    for row, order in enumerate(np.argsort(score, axis=1, kind="stable")):
        pruned[row, order[:count]] = True
    return pruned


def expected_pruned(rows: Rows, gated: bool, ratio: float) -> dict[tuple[str, int], Tensor]:
    """What an independent float64 Wanda (or, gated, MoE-Pruner) prunes, by matrix."""
    found = {}
    for e in range(SMALL.experts):
        tokens, slots = torch.nonzero(rows.index_TK == e, as_tuple=True)
        gate_n = rows.gate_TK[tokens, slots] if gated else None
        for role in ROLES:
            inputs = rows.h_TEI[tokens, e] if role == "down" else rows.x_TH[tokens]
            score = scores_of(WEIGHTS.matrix(e, role), inputs, gate_n)
            count = math.floor(score.shape[1] * ratio)
            found[role, e] = torch.from_numpy(lowest_of_rows(score, count))
    return found


def planned(
    statistics: LayerStatistics, budget: Budget = HALF, weights: Weights = WEIGHTS, **options: int
) -> LayerPlan:
    method = MoEPruner(propagate="dense", **options)
    return method.plan_layer(view_of(SMALL, statistics, weights), Context(budget))


def pruned_by(layer: LayerPlan, weights: Weights = WEIGHTS) -> dict[tuple[str, int], Tensor]:
    """What the plan's mask zeroes."""
    assert layer.mask is not None
    found = {}
    for e in range(layer.experts):
        for role in ROLES:
            found[role, e] = layer.edited(weights).matrix(e, role) == 0
    return found


def same_masks(one: dict[tuple[str, int], Tensor], two: dict[tuple[str, int], Tensor]) -> bool:
    assert set(one) == set(two)
    return all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_constant_gates_give_wandas_masks(ratio: float) -> None:
    constant = replace(ROWS, gate_TK=torch.full_like(ROWS.gate_TK, 0.37))
    found = pruned_by(planned(collected(SMALL, constant, [70], NEEDS), Budget(ratio=ratio)))
    assert same_masks(found, expected_pruned(ROWS, gated=False, ratio=ratio))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_gates_enter_as_equation_9_says(ratio: float) -> None:
    found = pruned_by(planned(collected(SMALL, ROWS, [70], NEEDS), Budget(ratio=ratio)))
    assert same_masks(found, expected_pruned(ROWS, gated=True, ratio=ratio))
    assert not same_masks(found, expected_pruned(ROWS, gated=False, ratio=ratio))


@pytest.mark.parametrize("factor", [0.125, 3.0])
def test_scaling_one_experts_gates_changes_nothing(factor: float) -> None:
    gate_TK = torch.where(ROWS.index_TK == 2, ROWS.gate_TK * factor, ROWS.gate_TK)
    scaled = collected(SMALL, replace(ROWS, gate_TK=gate_TK), needs=NEEDS)
    assert same_masks(pruned_by(planned(scaled)), pruned_by(planned(collected(SMALL, ROWS))))


def test_a_token_routed_elsewhere_changes_nothing() -> None:
    """Tokens that do not select an expert leave its sums and masks as they are, to the bit."""
    extra = random_rows(SMALL, 40, seed=4, weights=WEIGHTS, never=[1, 4])
    before = collected(SMALL, ROWS, needs=NEEDS)
    after = collected(SMALL, ROWS, needs=NEEDS)
    extra.feed(after)
    assert after.tokens == before.tokens + 40
    one, two = before.to_tensors(), after.to_tensors()
    for name in one:
        for e in (1, 4):
            assert torch.equal(one[name][e], two[name][e]), name
        assert not torch.equal(one[name], two[name])
    first, second = pruned_by(planned(before)), pruned_by(planned(after))
    for role in ROLES:
        for e in (1, 4):
            assert torch.equal(first[role, e], second[role, e])


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.99])
def test_every_row_loses_exactly_its_share(ratio: float) -> None:
    for (role, _), pruned in pruned_by(
        planned(collected(SMALL, ROWS), Budget(ratio=ratio))
    ).items():
        width = SMALL.intermediate if role == "down" else SMALL.hidden
        assert set(pruned.sum(dim=1).tolist()) == {math.floor(ratio * width)}


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2)])
def test_patterns_are_exact_and_take_the_lowest(n: int, m: int) -> None:
    layer = planned(collected(SMALL, ROWS, needs=NEEDS), Budget(pattern=(n, m)))
    assert layer.mask is not None and layer.mask.pattern == (n, m) and layer.mask.ratio is None
    for (role, e), pruned in pruned_by(layer).items():
        tokens, slots = torch.nonzero(ROWS.index_TK == e, as_tuple=True)
        inputs = ROWS.h_TEI[tokens, e] if role == "down" else ROWS.x_TH[tokens]
        score = scores_of(WEIGHTS.matrix(e, role), inputs, ROWS.gate_TK[tokens, slots])
        expected = lowest_of_rows(score.reshape(-1, m), n).reshape(score.shape)
        assert torch.equal(pruned, torch.from_numpy(expected))


def test_a_pattern_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BudgetError, match="2:5 does not fit rows of 8 and 12 weights"):
        planned(collected(SMALL, ROWS), Budget(pattern=(2, 5)))


def test_dead_and_rare_experts_fall_back_as_documented() -> None:
    """METHODS 2.3: gate and up by the layer's input norm, down by magnitude."""
    few = random_rows(SMALL, 60, seed=1, weights=WEIGHTS, never=[0])
    counts = [int((few.index_TK == e).sum()) for e in range(SMALL.experts)]
    floor = sorted(counts)[2]  # expert 0 saw none, another one fewer than the floor
    layer = planned(collected(SMALL, few, needs=NEEDS), min_tokens=floor)
    rare = [e for e in range(SMALL.experts) if counts[e] < floor]
    assert len(rare) == 2 and 0 in rare
    assert layer.notes[0].startswith(f"experts {rare} saw fewer than {floor} tokens")
    assert layer.scores["tokens"] == tuple(float(n) for n in counts)
    found, plain = pruned_by(layer), expected_pruned(few, gated=True, ratio=0.5)
    all_x = few.x_TH.repeat_interleave(SMALL.top_k, dim=0)
    for e in range(SMALL.experts):
        for role in ROLES:
            if e not in rare:
                expected = plain[role, e]
            elif role == "down":
                magnitude = WEIGHTS.matrix(e, role).abs().double().numpy()
                expected = torch.from_numpy(lowest_of_rows(magnitude, 6))
            else:
                score = scores_of(WEIGHTS.matrix(e, role), all_x, None)
                expected = torch.from_numpy(lowest_of_rows(score, 4))
            assert torch.equal(found[role, e], expected), (role, e)
    assert not planned(collected(SMALL, few, needs=NEEDS), min_tokens=0).notes
    assert "experts [0]" in planned(collected(SMALL, few, needs=NEEDS), min_tokens=1).notes[0]


def test_nothing_else_changes() -> None:
    layer = planned(collected(SMALL, ROWS, needs=NEEDS))
    assert layer.keep == tuple(range(6)) and layer.replaced == () and layer.novices_NH is None
    layer.check(SMALL)


# propagation --------------------------------------------------------------------------------------

COMPUTE = stages.Compute(dtype="float32", workers=2)


@pytest.fixture(scope="module", params=["mixtral", "olmoe"])
def model(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    return tiny(request.param)


@pytest.fixture(scope="module")
def dense(model: Path, text: stages.Text, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    statistics = tmp_path_factory.mktemp("dense") / "statistics"
    stages.calibrate(model, statistics, text, NEEDS, COMPUTE)
    method = MoEPruner(propagate="dense")
    return stages.plan(model, method, HALF, statistics, compute=COMPUTE)


@pytest.fixture(scope="module")
def in_memory(model: Path, text: stages.Text) -> tuple[Plan, dict[tuple[int, str], Tensor]]:
    """The sequential plan, and where each layer's weights were zero when the walk went on."""
    zeros: dict[tuple[int, str], Tensor] = {}

    def spy(loaded: LayeredModel, site: MoESite, layer: LayerPlan) -> None:
        memory_edits.edit_in_memory(loaded, site, layer)
        for name in ("gate_up_proj", "down_proj"):
            zeros[layer.layer, name] = getattr(site.experts, name) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deciding, "edit_in_memory", spy)
        return stages.plan(model, MoEPruner(), HALF, text=text, compute=COMPUTE), zeros


@pytest.fixture(scope="module")
def pruned(in_memory: tuple[Plan, dict[tuple[int, str], Tensor]]) -> Plan:
    return in_memory[0]


def scales(plan: Plan, layer: int) -> tuple[Tensor, Tensor]:
    mask = plan.layers[layer].mask
    assert isinstance(mask, MaskEdit)
    assert mask.scale_in_EH is not None and mask.scale_mid_EI is not None
    return mask.scale_in_EH, mask.scale_mid_EI


def test_only_the_first_layer_is_the_same_for_both_propagations(dense: Plan, pruned: Plan) -> None:
    first, *later = sorted(dense.layers)
    assert len(later) == 3
    for one, two in zip(scales(dense, first), scales(pruned, first), strict=True):
        assert torch.equal(one, two)
    for layer in later:
        for one, two in zip(scales(dense, layer), scales(pruned, layer), strict=True):
            assert (one - two).abs().max() > 1e-3 * two.abs().max()
    assert dense.statistics["data"]["hash"] == pruned.statistics["data"]["hash"]


def test_pruned_propagation_equals_a_plain_loop(
    model: Path, text: stages.Text, pruned: Plan
) -> None:
    """For each layer: run the whole model with its pruned prefix, sum, and prune the layer."""
    reference = open_stock(model)
    ids_NL = calibration_ids(model, text)
    trusted = 0
    for layer in sorted(pruned.layers):
        seen = watch(reference, ids_NL)[layer]
        x_TH, index_TK, gate_TK = seen.x_TH, seen.index_TK, seen.gate_TK
        experts = experts_of(reference, layer)
        scale_in_EH, scale_mid_EI = scales(pruned, layer)
        for e in range(experts.num_experts):
            tokens, slots = torch.nonzero(index_TK == e, as_tuple=True)
            gate_n1 = gate_TK[tokens, slots][:, None].double()
            with torch.no_grad():
                h_nI, _ = hidden_and_output(experts, e, x_TH[tokens])
            into_H = (gate_n1 * x_TH[tokens].double()).square().sum(dim=0).sqrt()
            into_I = (gate_n1 * h_nI.double()).square().sum(dim=0).sqrt()
            if len(tokens) < 16:
                into_H = (x_TH.double().square().sum(dim=0) * index_TK.shape[1]).sqrt()
                into_I = torch.ones_like(into_I)
            trusted += len(tokens) >= 16
            torch.testing.assert_close(scale_in_EH[e].double(), into_H, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(scale_mid_EI[e].double(), into_I, rtol=1e-4, atol=1e-6)
            # prune by the plan's own scales: a near tie must not make the prefixes differ
            for weight, scale in (
                (experts.gate_up_proj.data[e], scale_in_EH[e]),
                (experts.down_proj.data[e], scale_mid_EI[e]),
            ):
                score = (weight.abs() * scale).double().numpy()
                weight[torch.from_numpy(lowest_of_rows(score, score.shape[1] // 2))] = 0.0
    assert trusted > 20  # of 32 experts


def test_masks_on_disk_are_those_used_in_memory(
    model: Path, in_memory: tuple[Plan, dict[tuple[int, str], Tensor]], tmp_path: Path
) -> None:
    plan, zeros = in_memory
    assert len(zeros) == 8
    sizes = stages.apply(model, plan, tmp_path / "out")
    after = open_stock(tmp_path / "out")
    for (layer, name), expected in zeros.items():
        weight = getattr(experts_of(after, layer), name)
        assert torch.equal(weight == 0, expected)
        assert set((weight == 0).sum(dim=-1).reshape(-1).tolist()) == {weight.shape[-1] // 2}
    assert sizes.parameters[0] == sizes.parameters[1]
    assert sizes.nonzero[0] - sizes.nonzero[1] == sum(int(z.sum()) for z in zeros.values())
    before, now = tensor_digests(model), tensor_digests(tmp_path / "out")
    changed = {name for name in before if before[name] != now[name]}
    assert set(before) == set(now)
    assert changed and all(".experts." in name for name in changed)
    assert len(changed) == 4 * 8 * 3


def test_two_to_four_on_disk(dense: Plan, model: Path, tmp_path: Path, text: stages.Text) -> None:
    stages.calibrate(model, tmp_path / "statistics", text, NEEDS, COMPUTE)
    method = MoEPruner(propagate="dense")
    plan = stages.plan(model, method, Budget(pattern=(2, 4)), tmp_path / "statistics")
    for one, two in zip(scales(plan, 0), scales(dense, 0), strict=True):
        assert torch.equal(one, two)  # the budget is no part of the statistics
    stages.apply(model, plan, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    layered = LayeredModel(checkpoint)
    layout = expert_layout(layered)
    for site in layered.sites.values():
        weights = DiskExperts(checkpoint, layout, site)
        for e in range(8):
            for role in ROLES:
                quads = weights.matrix(e, role).reshape(-1, 4)
                assert set((quads == 0).sum(dim=1).tolist()) == {2}
