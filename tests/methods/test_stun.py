"""STUN against its description in plain loops, and what it writes to disk."""

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

from core.toy_block import Toy
from moeprune.core.accumulators import Routing
from moeprune.core.budget import Budget
from moeprune.core.method import Context, LayerView
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError, MoepruneError
from moeprune.methods.stun import STUN
from moeprune.pipeline import stages
from support import experts_masked, logits, matrices, open_stock

COMPUTE = stages.Compute(dtype="float32", workers=2)
SHAPE = LayerShape(layer=0, experts=8, top_k=2, hidden=8, intermediate=12)
NEEDS = ("routing",)


def slow_distance(view: LayerView, coactivation: float) -> list[list[float]]:
    rows = view.router_rows().double()
    E = len(rows)
    apart = [[math.dist(a.tolist(), b.tolist()) for b in rows] for a in rows]
    if not coactivation:
        whole = math.sqrt(sum(v * v for row in rows.tolist() for v in row))
        return [[d / whole for d in line] for line in apart]
    together = view.need().part(Routing).together_EE.tolist()
    pairs = [together[i][j] for i in range(E) for j in range(E) if i != j]
    mean = sum(pairs) / len(pairs)
    return [
        [apart[i][j] - (coactivation * together[i][j] / mean if i != j else 0) for j in range(E)]
        for i in range(E)
    ]


@pytest.mark.parametrize("coactivation", [0.0, 0.7])
def test_distances_are_those_of_a_loop(coactivation: float) -> None:
    view = Toy(SHAPE).view(NEEDS)
    found = torch.from_numpy(STUN(coactivation=coactivation).distances(view))
    expected = torch.tensor(slow_distance(view, coactivation), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def slow_nearest(view: LayerView, members: list[int]) -> int:
    vectors = {
        e: torch.cat([view.weights.matrix(e, r).double().reshape(-1) for r in view.shape.roles])
        for e in members
    }
    centre = torch.stack(list(vectors.values())).mean(dim=0)
    if len(members) <= 2:
        return members[0]
    return min(members, key=lambda e: float((vectors[e] - centre).norm()))


@pytest.mark.parametrize("coactivation", [0.0, 0.7])
@pytest.mark.parametrize("keep", [2, 3, 5, 8])
def test_of_each_cluster_the_member_nearest_to_the_mean_stays(
    coactivation: float, keep: int
) -> None:
    view = Toy(SHAPE).view(NEEDS)
    layer = STUN(coactivation=coactivation).plan_layer(view, Context(Budget(keep=keep)))
    of = layer.scores["cluster"]
    assert len(layer.keep) == keep
    for expert in layer.keep:
        members = [e for e in range(8) if of[e] == expert]
        assert expert in members
        assert slow_nearest(view, members) == expert


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(8)), st.integers(2, 8), st.sampled_from([0.0, 0.7]))
def test_permuted_experts_permute_the_clusters(
    order: list[int], keep: int, coactivation: float
) -> None:
    method, context = STUN(coactivation=coactivation), Context(Budget(keep=keep))
    plain = method.plan_layer(Toy(SHAPE).view(NEEDS), context)
    other = method.plan_layer(Toy(SHAPE).permuted(order).view(NEEDS), context)

    def clusters(of: tuple[float | None, ...], names: list[int]) -> set[frozenset[int]]:
        return {frozenset(names[e] for e in range(8) if of[e] == rep) for rep in of}

    found = clusters(other.scores["cluster"], order)
    assert found == clusters(plain.scores["cluster"], list(range(8)))
    # of two members neither is nearer to their mean, and the lower id stays
    larger = {e for cluster in found if len(cluster) != 2 for e in cluster}
    assert {order[e] for e in other.keep} & larger == set(plain.keep) & larger


def test_pinned_experts_stay_and_forbidden_ones_go() -> None:
    view = Toy(SHAPE).view(NEEDS)
    plain = STUN().plan_layer(view, Context(Budget(keep=4)))
    context = Context(
        Budget(keep=4),
        pinned={0: frozenset(plain.dropped[:2])},
        forbidden={0: frozenset(plain.keep[:1])},
    )
    layer = STUN().plan_layer(view, context)
    assert set(plain.dropped[:2]) <= set(layer.keep) and plain.keep[0] in layer.dropped
    assert len(layer.keep) == 4 and layer.scores["cluster"][plain.keep[0]] is None
    with pytest.raises(BudgetError, match="pinned"):
        STUN().plan_layer(view, Context(Budget(keep=4), pinned={0: frozenset(range(6))}))


def test_groups_keep_equal_numbers() -> None:
    shape = LayerShape(0, 8, 2, 8, 12, groups=2, top_groups=1)
    layer = STUN().plan_layer(Toy(shape).view(NEEDS), Context(Budget(keep=4)))
    assert [shape.group_of(e) for e in layer.keep] == [0, 0, 1, 1]


def test_one_threshold_for_all_layers() -> None:
    views = [Toy(LayerShape(i, 8, 2, 8, 12), seed=i).view(NEEDS) for i in range(3)]
    close = views[1].router_rows() * 0.01  # by itself all is close in this layer
    views[1] = replace(views[1], router=lambda: {"gate.weight": close})
    method = STUN(scope="global", coactivation=0.01)
    plans = method.plan_model(views, Context(Budget(ratio=0.25)))
    assert sum(len(layer.dropped) for layer in plans.values()) == 6
    assert len(plans[1].dropped) == 6  # top-k experts stay
    even = method.per_layer().plan_model(views, Context(Budget(ratio=0.25)))
    assert [len(layer.dropped) for layer in even.values()] == [2, 2, 2]
    with pytest.raises(BudgetError, match="cannot save 21"):
        method.plan_model(views, Context(Budget(ratio=0.9)))


def test_a_router_without_one_matrix_is_refused() -> None:
    view = Toy(SHAPE).view(NEEDS)
    without = LayerView(view.shape, view.statistics, view.weights)
    with pytest.raises(MoepruneError, match="layer 0: its router has 0 matrices"):
        STUN().plan_layer(without, Context(Budget(keep=4)))


def test_dropped_experts_are_never_chosen_again(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    directory = tiny("mixtral")
    stages.calibrate(directory, tmp_path / "stats", text, ("routing",), COMPUTE)
    plan = stages.plan(directory, "stun", Budget(keep=3), tmp_path / "stats", compute=COMPUTE)
    stages.apply(directory, plan, tmp_path / "small")
    model = open_stock(directory)
    with experts_masked(model, {index: layer.keep for index, layer in plan.layers.items()}):
        expected = logits(model)
    assert torch.equal(logits(open_stock(tmp_path / "small")), expected)


def test_merged_experts_and_router_rows_are_means(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    directory = tiny("mixtral")
    stages.calibrate(directory, tmp_path / "stats", text, ("routing",), COMPUTE)
    options = {"merge_max_clusters": 3}
    plan = stages.plan(
        directory, "stun", Budget(keep=3), tmp_path / "stats", options=options, compute=COMPUTE
    )
    stages.save_plan(plan, tmp_path / "plan.json")
    stages.apply(directory, tmp_path / "plan.json", tmp_path / "small")
    old, new = open_stock(directory), open_stock(tmp_path / "small")
    for index, layer in plan.layers.items():
        blocks = [model.model.layers[index].mlp for model in (old, new)]
        for position, expert in enumerate(layer.keep):
            members = [e for e in range(8) if layer.scores["cluster"][e] == expert]

            def mean(tensors: list[Tensor]) -> Tensor:
                return torch.stack(tensors).mean(dim=0)

            made = matrices(blocks[1].experts, position)
            for role, weight in made.items():
                parts = [matrices(blocks[0].experts, e)[role] for e in members]
                torch.testing.assert_close(weight, mean(parts))
            rows = [blocks[0].gate.weight[e] for e in members]
            torch.testing.assert_close(blocks[1].gate.weight[position], mean(rows))
    larger = stages.plan(
        directory, "stun", Budget(keep=4), tmp_path / "stats", options=options, compute=COMPUTE
    )
    assert all(layer.neurons is None for layer in larger.layers.values())
