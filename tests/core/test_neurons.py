"""Neurons: identity, permutation, merging, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.rows import SMALL, Weights, random_weights
from moeprune.core.edits import ExpertWeights, Neurons
from moeprune.core.plan import LayerPlan
from moeprune.errors import PlanError

WEIGHTS = random_weights(SMALL)
EVERY = tuple(range(SMALL.experts))


def output(weights: ExpertWeights, expert: int, x_TH: Tensor) -> Tensor:
    gate, up, down = (weights.matrix(expert, role).double() for role in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x_TH @ gate.T) * (x_TH @ up.T)) @ down.T


def edited(neurons: Neurons, keep: tuple[int, ...] = EVERY) -> ExpertWeights:
    return LayerPlan(0, SMALL.experts, keep, neurons=neurons).edited(WEIGHTS)


def test_all_neurons_are_the_identity_bit_for_bit() -> None:
    rows = torch.arange(SMALL.intermediate).expand(SMALL.experts, -1)
    for expert in EVERY:
        for role in SMALL.roles:
            made = edited(Neurons.of_rows(rows, EVERY)).matrix(expert, role)
            assert torch.equal(made, WEIGHTS.matrix(expert, role))


@given(st.permutations(range(SMALL.intermediate)))
@settings(max_examples=15, deadline=None)
def test_permuting_neurons_leaves_the_function(order: list[int]) -> None:
    rows = torch.tensor(order).expand(SMALL.experts, -1)
    x_TH = torch.randn(5, SMALL.hidden, generator=torch.Generator().manual_seed(0)).double()
    for expert in (0, 3):
        made = output(edited(Neurons.of_rows(rows, EVERY)), expert, x_TH)
        torch.testing.assert_close(made, output(WEIGHTS, expert, x_TH))


def test_merging_two_identical_experts_by_halves_is_that_expert() -> None:
    twins = Weights({role: w[[0, 0, 2, 3, 4, 5]] for role, w in WEIGHTS.by_role.items()})
    neuron = torch.arange(SMALL.intermediate)
    index = torch.cat(
        [torch.stack((neuron * 0, neuron, neuron * 0 + e, neuron), dim=1) for e in (0, 1)]
    ).int()
    merged = Neurons(SMALL.intermediate, index, torch.full((len(index), 3), 0.5))
    assert merged.shares(0) == {0: 0.5, 1: 0.5}
    for role in SMALL.roles:
        assert torch.equal(merged.matrix(0, role, twins), twins.matrix(0, role))


def test_lists_of_different_lengths_leave_zeros_behind() -> None:
    neurons = Neurons.of_lists([torch.tensor([4, 7]), torch.tensor([1])], (2, 5), 3)
    layer = LayerPlan(0, 6, (2, 5), neurons=neurons)
    layer.check(SMALL)
    up = layer.edited(WEIGHTS).matrix(5, "up")
    assert torch.equal(up[0], WEIGHTS.matrix(5, "up")[1])
    assert not up[1:].any()
    down = layer.edited(WEIGHTS).matrix(2, "down")
    assert torch.equal(down[:, :2], WEIGHTS.matrix(2, "down")[:, [4, 7]])


def test_router_rows_do_not_go_with_novices() -> None:
    layer = LayerPlan(
        0, 6, (0, 1), (2, 3, 4, 5), novices_NH=torch.zeros(4, 8), router_CE=torch.zeros(2, 6)
    )
    with pytest.raises(PlanError, match="replaced"):
        layer.check(SMALL)
