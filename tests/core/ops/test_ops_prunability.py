"""Numbers of an audit against sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moeprune.core.accumulating import BlockRows, ExpertRows
from moeprune.core.accumulators import Outputs, Routing
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.ops.prunability import (
    cut_error,
    jaccard,
    largest_below,
    load_balance,
    tokens_wanted,
)
from moeprune.core.ops.redundancy import output_similarity, weight_redundancy
from moeprune.core.resampling import resamples, stability
from moeprune.core.shapes import LayerShape
from moeprune.core.statistics import LayerStatistics

SHAPE = LayerShape(layer=0, experts=4, top_k=1, hidden=6, intermediate=5)


def statistics(choices: list[int], seed: int = 0) -> tuple[LayerStatistics, torch.Tensor]:
    """Token t goes to expert choices[t] alone, with gate 0.5; also what the experts give."""
    f_TH = torch.randn(len(choices), 6, generator=torch.Generator().manual_seed(seed))
    found = LayerStatistics.empty(SHAPE, ("routing", "outputs"))
    index_T1 = torch.tensor(choices)[:, None]
    gate_T1, zero_TH = torch.full((len(choices), 1), 0.5), torch.zeros(len(choices), 6)
    for expert in sorted(set(choices)):
        rows = (index_T1[:, 0] == expert).nonzero()[:, 0]
        own_nH = f_TH[rows]
        found.add_expert(ExpertRows(expert, own_nH, gate_T1[rows, 0], own_nH, own_nH))
    found.add_block(BlockRows(zero_TH, index_T1, gate_T1, None, torch.arange(len(choices))))
    return found, f_TH


def test_load_balance() -> None:
    assert load_balance(torch.tensor([5, 5, 5, 5])) == 0.0
    assert load_balance(torch.tensor([12, 0, 0, 0])) == pytest.approx(math.sqrt(3))
    assert load_balance(torch.tensor([1, 2, 3])) == pytest.approx(np.std([1, 2, 3]) / 2)
    assert load_balance(torch.tensor([0, 0])) == 0.0


def test_text_that_covers() -> None:
    counts = {0: [100, 50, 10, 0], 3: [100, 40, 20, 5]}
    # three quarters of eight experts are six: the sixth most used saw 10 of 160 tokens
    assert tokens_wanted(counts, 160, 256, 0.75) == pytest.approx(256 * 160 / 10)
    assert tokens_wanted(counts, 160, 256, 0.5) == pytest.approx(256 * 160 / 40)
    assert tokens_wanted(counts, 160, 256, 0.9) is None


def test_error_of_a_cut() -> None:
    """The squared change of the block's output, token by token."""
    choices = [0, 1, 1, 2, 2, 2, 3]
    found, f_TH = statistics(choices)
    routing, outputs = found.part(Routing), found.part(Outputs)
    dropped = LayerPlan(0, 4, (0, 3))
    gone = [t for t, expert in enumerate(choices) if expert in (1, 2)]
    assert cut_error(dropped, routing, outputs) == pytest.approx(
        float((0.5 * f_TH[gone]).square().sum()), rel=1e-5
    )
    v_NH = torch.arange(12.0).view(2, 6) / 10
    replaced = LayerPlan(0, 4, (0, 3), (1, 2), novices_NH=v_NH)
    change = torch.stack([0.5 * (f_TH[t] - v_NH[choices[t] - 1]) for t in gone])
    assert cut_error(replaced, routing, outputs) == pytest.approx(
        float(change.square().sum()), rel=1e-5
    )
    assert cut_error(LayerPlan(0, 4, (0, 1, 2, 3)), routing, outputs) == 0.0


def test_largest_ratio_below_a_limit() -> None:
    ratios = (0.25, 0.5, 0.75)
    assert largest_below(ratios, [0.1, 0.3, 0.9], 0.2) == pytest.approx(0.375)
    assert largest_below(ratios, [0.1, 0.3, 0.9], 0.05) == pytest.approx(0.125)
    assert largest_below(ratios, [0.1, 0.3, 0.9], 1.0) == 0.75
    # a curve that comes down again does not make what lies behind acceptable
    assert largest_below(ratios, [0.1, 0.4, 0.0], 0.3) == pytest.approx(5 / 12)
    assert largest_below(ratios, [-0.1, -0.2, 0.4], 0.2) == pytest.approx(0.625)
    assert largest_below(ratios, [0.1, math.nan, 0.2], 0.3) == 0.25


def test_choices_that_move() -> None:
    """Parts that agree give the same choice always; parts that contradict each other do not."""
    same = [statistics([0, 0, 1, 1, 2])[0] for _ in range(6)]
    other = [statistics([part % 4] * 5)[0] for part in range(8)]

    def busiest(one: LayerStatistics) -> list[int]:
        count_E = one.part(Routing).count_E
        return sorted(torch.argsort(count_E, descending=True, stable=True)[:2].tolist())

    for parts, steady in ((same, True), (other, False)):
        samples = resamples(parts, 20, 0)
        assert {one.tokens for one in samples} == {5 * len(parts)}
        full = LayerStatistics.empty(SHAPE, ("routing", "outputs"))
        for part in parts:
            full.merge(part)
        found = stability(full, samples, busiest)
        assert (found.mean == found.lowest == 1.0) is steady
        assert found.lowest <= found.mean <= 1.0
    assert jaccard((0, 1), (1, 2)) == pytest.approx(1 / 3) and jaccard((), ()) == 1.0


def test_redundancy_of_weights() -> None:
    """A copy stands out of chance, unrelated matrices do not."""
    generator = torch.Generator().manual_seed(0)
    matrices = {(e, r): torch.randn(40, 40, generator=generator) for e in range(5) for r in "ud"}
    found = weight_redundancy(lambda e, r: matrices[e, r], range(5), ("u", "d"), 0)
    assert found is not None and found.above == 0.0 and found.largest < 1.1 * found.floor
    for role in "ud":
        matrices[3, role] = matrices[1, role].clone()
    found = weight_redundancy(lambda e, r: matrices[e, r], range(5), ("u", "d"), 0)
    assert found is not None and found.closest == (1, 3) and found.above == pytest.approx(0.1)
    assert found.largest == pytest.approx(1.0)
    assert weight_redundancy(lambda e, r: matrices[e, r], (0,), ("u",), 0) is None
    matrices[2, "u"][0, 0] = math.nan
    assert weight_redundancy(lambda e, r: matrices[e, r], range(5), ("u", "d"), 0) is None


def test_similar_outputs() -> None:
    means = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [3.0, 0, 0], [0, 0, 0]])
    x_SH = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    signs = (1.0, -1.0, 2.0, 1.0)
    found = output_similarity(means, lambda expert, some_SH: signs[expert] * some_SH, x_SH)
    assert found is not None
    assert (found.mean_median, found.mean_largest) == pytest.approx((0.0, 1.0))
    assert (found.token_median, found.token_largest) == pytest.approx((-1.0, 1.0), abs=1e-5)
    without = output_similarity(means, None, None)
    assert without is not None and without.token_median is None
    assert output_similarity(means[3:], None, None) is None
