"""MoE-I2: importance, shares and ranks against loops; the search against all subsets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.toy_block import Toy, slow_error
from moeprune.core.budget import Budget
from moeprune.core.method import Context
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError
from moeprune.methods.moe_i2 import MoEI2
from moeprune.pipeline import stages
from support import matrices, open_stock

COMPUTE = stages.Compute(dtype="float32", workers=2)
SHAPE = LayerShape(layer=0, experts=6, top_k=2, hidden=8, intermediate=12)


def toys() -> list[Toy]:
    return [Toy(LayerShape(i, 6, 2, 8, 12), tokens=40, seed=i) for i in range(3)]


def test_importance_is_the_error_without_one_expert() -> None:
    toy = toys()[1]
    layer = MoEI2().plan_layer(toy.view(), Context(Budget(keep=3)))
    for expert, found in enumerate(layer.scores["importance"]):
        left = [e for e in range(6) if e != expert]
        assert found == pytest.approx(slow_error(toy, left), rel=1e-5)


def test_the_search_finds_the_best_subset_and_notes_the_next() -> None:
    toy = toys()[0]
    layer = MoEI2(candidates=3).plan_layer(toy.view(), Context(Budget(keep=3)))
    ranked = sorted((slow_error(toy, kept), kept) for kept in combinations(range(6), 3))
    assert layer.keep == ranked[0][1]
    noted = [float(part) for part in layer.notes[0].split(": ")[1].split(", ")]
    assert noted == pytest.approx([loss for loss, _ in ranked[:3]], rel=1e-5)


@pytest.mark.parametrize("relative", [False, True])
def test_layers_keep_in_proportion_to_their_importance(relative: bool) -> None:
    layers = toys()
    weights = []
    for toy in layers:
        total = sum(slow_error(toy, [e for e in range(6) if e != gone]) for gone in range(6))
        view = toy.view()
        sample = view.need().parts["sample"]
        outputs = torch.stack(
            [view.need_block().outputs(e, sample.x_SH) for e in range(6)],  # type: ignore[attr-defined]
            dim=1,
        ).double()
        gates = torch.zeros(40, 6).double()
        gates.scatter_(1, sample.index_SK, sample.gate_SK.double())  # type: ignore[attr-defined]
        norm = float((gates[..., None] * outputs).sum(dim=1).norm())
        weights.append(total / norm if relative else total)
    kept = [2, 2, 2]  # top-k
    while sum(kept) < 9:
        open_layers = [i for i in range(3) if kept[i] < 6]
        kept[max(open_layers, key=lambda i: weights[i] / (kept[i] + 0.5))] += 1
    method = MoEI2(relative=relative, iterations=2)
    plans = method.plan_model([toy.view() for toy in layers], Context(Budget(ratio=0.5)))
    assert [len(plans[i].keep) for i in range(3)] == kept
    even = method.per_layer().plan_model([t.view() for t in layers], Context(Budget(ratio=0.5)))
    assert [len(even[i].keep) for i in range(3)] == [3, 3, 3]


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(6)), st.integers(2, 6))
def test_permuted_experts_permute_the_plan(order: list[int], keep: int) -> None:
    context = Context(Budget(keep=keep))
    plain = MoEI2().plan_layer(Toy(SHAPE).view(), context)
    other = MoEI2().plan_layer(Toy(SHAPE).permuted(order).view(), context)
    assert {order[e] for e in other.keep} == set(plain.keep)
    assert len(other.keep) == keep


def test_the_seed_decides_and_nothing_else() -> None:
    shape = LayerShape(0, 20, 2, 8, 12)
    view = Toy(shape, tokens=40).view()

    def chosen(seed: int) -> tuple[int, ...]:
        method = MoEI2(population=6, iterations=1)
        return method.plan_layer(view, Context(Budget(keep=10), seed)).keep

    assert chosen(1) == chosen(1)
    assert len({chosen(seed) for seed in range(5)}) > 1


def test_pinned_experts_stay_and_forbidden_ones_go() -> None:
    layers = [toy.view() for toy in toys()]
    context = Context(
        Budget(ratio=0.5), pinned={1: frozenset({0, 1, 2})}, forbidden={2: frozenset({3, 4})}
    )
    plans = MoEI2(iterations=2).plan_model(layers, context)
    assert {0, 1, 2} <= set(plans[1].keep) and {3, 4} <= set(plans[2].dropped)
    assert sum(len(plan.keep) for plan in plans.values()) == 9
    crowded = Context(Budget(keep=3), pinned={0: frozenset({0, 1, 2, 3})})
    with pytest.raises(BudgetError, match="pinned"):
        MoEI2().plan_layer(layers[0], crowded)


def test_an_expert_without_tokens_goes_first() -> None:
    view = Toy(SHAPE, never=(4,)).view()
    sample = view.need().parts["sample"]
    sample.gate_SK /= sample.gate_SK.sum(dim=1, keepdim=True)  # type: ignore[attr-defined]
    layer = MoEI2().plan_layer(view, Context(Budget(keep=5)))
    assert layer.dropped == (4,) and layer.scores["importance"][4] == 0.0


def test_ranks_on_disk_are_those_of_the_plan(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    directory = tiny("mixtral")
    stages.calibrate(directory, tmp_path / "stats", text, compute=COMPUTE)
    options = {"rank_ratio": 0.5, "scope": "layer"}
    plan = stages.plan(
        directory, "moe-i2", Budget(keep=4), tmp_path / "stats", options=options, compute=COMPUTE
    )
    stages.save_plan(plan, tmp_path / "plan.json")
    sizes = stages.apply(directory, tmp_path / "plan.json", tmp_path / "small")
    dropped = stages.apply(
        directory,
        stages.plan(
            directory,
            "moe-i2",
            Budget(keep=4),
            tmp_path / "stats",
            options={"scope": "layer"},
            compute=COMPUTE,
        ),
        tmp_path / "whole",
    )
    assert sizes.bytes == dropped.bytes  # the product is stored
    old, new = open_stock(tmp_path / "whole"), open_stock(tmp_path / "small")
    for index, layer in plan.layers.items():
        seen = set()
        for position, expert in enumerate(layer.keep):
            whole = matrices(old.model.layers[index].mlp.experts, position)
            cut = matrices(new.model.layers[index].mlp.experts, position)
            for role, weight in cut.items():
                rank = layer.ranks[role][expert]
                seen.add(rank)
                assert int(torch.linalg.matrix_rank(weight.detach(), rtol=1e-5)) == rank
                u, s, v = torch.linalg.svd(whole[role].detach().double())
                best = (u[:, :rank] * s[:rank]) @ v[:rank]
                torch.testing.assert_close(weight.double(), best, rtol=1e-4, atol=1e-6)
        assert len(seen) > 1
