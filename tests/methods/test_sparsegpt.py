"""SparseGPT as a method: its own Hessian per expert, rare experts, parts, and what is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.ops.test_ops_sparsegpt import textbook
from core.rows import SMALL, Rows, Weights, collected, random_rows, random_weights, view_of
from methods.conftest import calibration_ids, experts_of, hidden_and_output, watch
from methods.test_magnitude_wanda import lowest_of_matrix
from moeprune.core.budget import Budget
from moeprune.core.method import Context
from moeprune.core.partial import PartialStatistics
from moeprune.core.plan import LayerPlan
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import BudgetError, MoepruneError
from moeprune.methods.sparsegpt import GRAMS, SparseGPT
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import token_keys
from moeprune.models.layout import DiskExperts, expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.sites import MoESite
from moeprune.models.walk import Batch, Walk
from moeprune.pipeline import stages
from moeprune.pipeline.verification import verify
from support import matrices, open_stock

NEEDS = SparseGPT.needs
WEIGHTS = random_weights(SMALL)
ROWS = random_rows(SMALL, 240, weights=WEIGHTS)
ROLES = ("gate", "up", "down")


@dataclass(frozen=True)
class InMemory:
    """Stored matrices without a file."""

    matrices: Mapping[tuple[int, str], Tensor]
    roles: tuple[str, ...] = ROLES
    reference: Mapping[str, Any] = None  # type: ignore[assignment]

    def matrix(self, expert: int, role: str) -> Tensor:
        return self.matrices[expert, role]


def planned(
    statistics: LayerStatistics, budget: Budget, weights: Weights = WEIGHTS, **options: Any
) -> LayerPlan:
    context = Context(budget, store=lambda layer, matrices: InMemory(matrices))
    method = SparseGPT(propagate="dense", **options)
    return method.plan_layer(view_of(SMALL, statistics, weights), context)


def inputs_of(rows: Rows, expert: int, role: str) -> Tensor:
    tokens, _ = torch.nonzero(rows.index_TK == expert, as_tuple=True)
    return rows.h_TEI[tokens, expert] if role == "down" else rows.x_TH[tokens]


@pytest.mark.parametrize("budget", [Budget(ratio=0.5), Budget(ratio=0.7), Budget(pattern=(2, 4))])
def test_every_expert_has_a_hessian_of_its_own(budget: Budget) -> None:
    layer = planned(collected(SMALL, ROWS, [70], NEEDS), budget)
    assert layer.keep == tuple(range(6)) and layer.mask is None and layer.stored is not None
    for e in range(6):
        for role in ROLES:
            expected = textbook(
                WEIGHTS.matrix(e, role).double().numpy(),
                inputs_of(ROWS, e, role).double().numpy(),
                budget.ratio,
                budget.pattern,
            )
            found = layer.stored.matrix(e, role).double().numpy()
            assert np.array_equal(found == 0, expected == 0), (e, role)
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)


def test_outputs_are_nearer_than_with_magnitude() -> None:
    layer = planned(collected(SMALL, ROWS, needs=NEEDS), Budget(ratio=0.5))
    assert layer.stored is not None
    found = lost = 0.0
    for e in range(6):
        for role in ROLES:
            weight, x_nI = WEIGHTS.matrix(e, role), inputs_of(ROWS, e, role)
            plain = weight.masked_fill(lowest_of_matrix(weight, weight.numel() // 2), 0.0)
            found += float(((layer.stored.matrix(e, role) - weight) @ x_nI.T).square().sum())
            lost += float(((plain - weight) @ x_nI.T).square().sum())
    assert found < 0.8 * lost


def test_rare_experts_lose_their_smallest_weights() -> None:
    few = random_rows(SMALL, 60, seed=1, weights=WEIGHTS, never=[0])
    layer = planned(collected(SMALL, few, needs=NEEDS), Budget(ratio=0.5), min_tokens=1)
    assert layer.notes[0].startswith("experts [0] saw fewer than 1 tokens")
    assert layer.stored is not None
    for role in ROLES:
        weight = WEIGHTS.matrix(0, role)
        pruned = lowest_of_matrix(weight, weight.numel() // 2)
        assert torch.equal(layer.stored.matrix(0, role), weight.masked_fill(pruned, 0.0))
    layer = planned(collected(SMALL, few, needs=NEEDS), Budget(pattern=(2, 4)), min_tokens=1)
    assert layer.stored is not None
    zeros = layer.stored.matrix(0, "up").reshape(-1, 4) == 0
    assert set(zeros.sum(dim=1).tolist()) == {2}


def test_ratio_zero_stores_nothing() -> None:
    layer = planned(collected(SMALL, ROWS, needs=NEEDS), Budget(ratio=0.0))
    assert layer.stored is None and layer.keep == tuple(range(6))


def test_permuting_experts_permutes_the_matrices() -> None:
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    moved = replace(
        ROWS,
        index_TK=torch.argsort(order)[ROWS.index_TK],
        h_TEI=ROWS.h_TEI[:, order],
        f_TEH=ROWS.f_TEH[:, order],
    )
    weights = Weights({role: w[order] for role, w in WEIGHTS.by_role.items()})
    before = planned(collected(SMALL, ROWS, needs=NEEDS), Budget(ratio=0.5)).stored
    after = planned(collected(SMALL, moved, needs=NEEDS), Budget(ratio=0.5), weights).stored
    assert before is not None and after is not None
    for new, old in enumerate(order.tolist()):
        for role in ROLES:
            assert torch.equal(after.matrix(new, role), before.matrix(old, role))


def test_a_pattern_that_does_not_fit_and_weights_that_are_not_finite() -> None:
    with pytest.raises(BudgetError, match="2:5 does not fit"):
        planned(collected(SMALL, ROWS, needs=NEEDS), Budget(pattern=(2, 5)))
    broken = replace(ROWS, x_TH=ROWS.x_TH.clone().fill_(torch.inf))
    with pytest.raises(MoepruneError, match="layer 0, expert 0: the inputs' Gram matrix is not"):
        planned(collected(SMALL, broken, needs=NEEDS), Budget(ratio=0.5))


def test_partial_statistics_are_rows_of_the_whole() -> None:
    whole = collected(SMALL, ROWS, [70], GRAMS)
    part = PartialStatistics.of(SMALL, GRAMS, (4, 1))
    ROWS.feed(part)
    for name, sums in part.to_tensors().items():
        torch.testing.assert_close(sums, whole.to_tensors()[name][[4, 1]], rtol=1e-5, atol=1e-3)
    assert part.tokens == whole.tokens
    assert part.nbytes == 2 * 4 * (SMALL.hidden**2 + SMALL.intermediate**2)


# the walk -----------------------------------------------------------------------------------------

COMPUTE = stages.Compute(dtype="float32", workers=2)


@pytest.mark.parametrize("limit", [1, 200_000, 1 << 30])
def test_parts_of_a_walk_equal_the_whole(
    limit: int, tiny: Callable[[str], Path], text: stages.Text
) -> None:
    """Whatever the limit, the same sums, bit for bit, and the layer is left as it was."""
    source = tiny("mixtral")
    model = COMPUTE.open(Checkpoint.open(source))
    ids = calibration_ids(source, text)
    batches = [Batch(part, token_keys(part)) for part in ids.split(4)]
    parts: list[int] = []

    def check(site: MoESite, statistics: LayerStatistics) -> bool:
        seen = list(walk.observe_parts(site, GRAMS, limit))
        parts.append(len(seen))
        assert [e for part in seen for e in part.chosen] == list(range(8))
        whole = statistics.to_tensors()
        for part in seen:
            for name, sums in part.to_tensors().items():
                assert torch.equal(sums, whole[name][list(part.chosen)])
        return False

    with Walk(model, batches, 2) as walk:
        walk.layers(GRAMS, check)
        logits = torch.cat([walk.logits_of(i) for i in range(len(batches))])
    model = COMPUTE.open(Checkpoint.open(source))
    with Walk(model, batches, 2) as walk:
        walk.layers()
        assert torch.equal(logits, torch.cat([walk.logits_of(i) for i in range(len(batches))]))
    one = 4 * (32**2 + 48**2) * 4  # bytes of one expert, of four that are held
    assert parts == [-(-8 // max(1, min(8, limit // one)))] * 4


def test_sequential_plans_on_disk(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    """The first layer is that of the textbook; zeros are counted; what is written verifies."""
    source = tiny("mixtral")
    plan = stages.plan(source, SparseGPT(), Budget(ratio=0.5), text=text, compute=COMPUTE)
    reference = open_stock(source)
    seen = watch(reference, calibration_ids(source, text))[0]
    experts = experts_of(reference, 0)
    stored = plan.layers[0].stored
    assert stored is not None
    for e in (0, 3):
        tokens, _ = torch.nonzero(seen.index_TK == e, as_tuple=True)
        assert len(tokens) >= 16
        with torch.no_grad():
            h_nI, _ = hidden_and_output(experts, e, seen.x_TH[tokens])
        for role, x_nI in (("up", seen.x_TH[tokens]), ("down", h_nI)):
            old = matrices(experts, e)[role].detach().double().numpy()
            expected = textbook(old, x_nI.double().numpy(), 0.5)
            found = stored.matrix(e, role).double().numpy()
            assert (np.equal(found == 0, expected == 0)).mean() > 0.999
            np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-3)
    sizes = stages.apply(source, plan, tmp_path / "out")
    written, zeros = LayeredModel(Checkpoint.open(tmp_path / "out")), 0
    layout = expert_layout(written)
    for site in written.sites.values():
        weights = DiskExperts(written.checkpoint, layout, site)
        for e in range(8):
            for role in ROLES:
                zero = int((weights.matrix(e, role) == 0).sum())
                assert zero == weights.matrix(e, role).numel() // 2
                zeros += zero
    assert sizes.parameters[0] == sizes.parameters[1]
    assert sizes.nonzero[0] - sizes.nonzero[1] == zeros
    assert verify(tmp_path / "out").passed()
    again = stages.plan(
        source, SparseGPT(memory=1e-4), Budget(ratio=0.5), text=text, compute=COMPUTE
    )
    for index, layer in plan.layers.items():
        one, two = layer.stored, again.layers[index].stored
        assert one is not None and two is not None
        assert one.reference == two.reference, "the limit of memory should change nothing"


def test_later_layers_see_pruned_ones(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    source = tiny("mixtral")
    stages.calibrate(source, tmp_path / "statistics", text, NEEDS, COMPUTE)
    half = Budget(pattern=(2, 4))
    dense = stages.plan(source, SparseGPT(propagate="dense"), half, tmp_path / "statistics")
    pruned = stages.plan(source, SparseGPT(), half, text=text, compute=COMPUTE)
    same = []
    for index in sorted(dense.layers):
        one, two = dense.layers[index].stored, pruned.layers[index].stored
        assert one is not None and two is not None
        same.append(torch.equal(one.matrix(0, "up"), two.matrix(0, "up")))
    assert same == [True, False, False, False]
