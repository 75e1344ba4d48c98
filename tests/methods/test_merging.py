"""M-SMoE, HC-SMoE and REAM: groups and merged weights against slow float64 references."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.rows import SMALL, Weights
from methods.merging import World, assert_merged, groups_of, slow_merge
from moeprune.core.budget import Budget
from moeprune.core.method import Context, Method
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError
from moeprune.methods.hc_smoe import HCSMoE
from moeprune.methods.m_smoe import MSMoE
from moeprune.methods.ream import REAM

SHAPE = replace(SMALL, intermediate=5)
METHODS: list[Method] = [MSMoE(), HCSMoE(), REAM(propagate="dense")]
KINDS = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def planned(world: World, method: Method, keep: int, **context: Any) -> LayerPlan:
    context = {"warn": lambda text: None, **context}
    plan = method.plan_model([world.view()], Context(Budget(keep=keep), **context))
    found = plan[world.shape.layer]
    found.check(world.shape)
    return found


# references ---------------------------------------------------------------------------------------


def slow_usage_groups(world: World, keep: int) -> dict[int, list[int]]:
    counts, z = world.counts(), world.rows.logits_TR.double()
    cores = sorted(sorted(range(6), key=lambda e: (-counts[e], -e))[:keep])
    groups = {core: [core] for core in cores}
    for e in range(6):
        if e not in cores:
            cosine = [float(z[:, e] @ z[:, c] / z[:, e].norm() / z[:, c].norm()) for c in cores]
            groups[cores[cosine.index(max(cosine))]].append(e)
    return groups


def slow_output_groups(world: World, keep: int, linkage: str) -> dict[int, list[int]]:
    mean = [world.output(e).mean(dim=0) for e in range(6)]
    found = [[e] for e in range(6)]
    while len(found) > keep:
        best = None
        for a, b in combinations(found, 2):
            far = [float((mean[i] - mean[j]).norm()) for i in a for j in b]
            d = {"average": sum(far) / len(far), "single": min(far), "complete": max(far)}[linkage]
            if best is None or d < best[0]:
                best = (d, a, b)
        assert best is not None
        found = sorted([c for c in found if c not in best[1:]] + [sorted(best[1] + best[2])])
    groups = {}
    for cluster in found:
        use = [world.counts()[e] for e in cluster]
        use = use if sum(use) else [1] * len(cluster)
        parts = [n * mean[e] for n, e in zip(use, cluster, strict=True)]
        centre = torch.stack(parts).sum(dim=0) / sum(use)
        far = [float((mean[e] - centre).norm()) for e in cluster]
        groups[cluster[far.index(min(far))]] = cluster
    return groups


def slow_saliency(world: World) -> list[float]:
    found = []
    for e in range(6):
        own = world.gates(e)
        total = sum(g * float(world.rows.f_TEH[t, e].double().norm()) for t, g in own)
        found.append(total / max(1, len(own)))
    return found


def slow_absorbed(world: World, keep: int, method: REAM) -> dict[int, list[int]]:
    saliency, z = slow_saliency(world), world.rows.logits_TR.double()
    out = [torch.nn.functional.normalize(world.output(e), dim=1) for e in range(6)]

    def similarity(i: int, j: int) -> float:
        found = 0.0
        if "outputs" in method.similarity:
            found += float((out[i] * out[j]).sum(dim=1).mean())
        if "router" in method.similarity:
            found += float(z[:, i] @ z[:, j] / z[:, i].norm() / z[:, j].norm())
        return found

    cores = sorted(range(6), key=lambda e: -saliency[e])[:keep]
    groups = {core: [core] for core in cores}
    free = [e for e in range(6) if e not in cores]
    if method.grouping == "absorb":
        for core in cores:
            while free and len(groups[core]) < method.group_size:
                groups[core].append(max(free, key=lambda e: similarity(core, e)))
                free.remove(groups[core][-1])
    for e in free:
        groups[max(sorted(cores), key=lambda c: similarity(e, c))].append(e)
    return {core: sorted(group) for core, group in groups.items()}


# grouping and weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("align", ["core", "first", "none"])
@pytest.mark.parametrize("seed", [0, 1])
def test_m_smoe_against_loops(align: str, seed: int) -> None:
    world = World.random(SHAPE, seed, never=[4])
    for keep in range(2, 6):
        plan = planned(world, MSMoE(align=align), keep)  # type: ignore[arg-type]
        groups = slow_usage_groups(world, keep)
        assert groups_of(plan) == {core: sorted(group) for core, group in groups.items()}
        how = "none" if align == "none" else "weights"
        anchor = 0 if align == "first" else None
        assert_merged(world, plan, slow_merge(world, groups, world.counts(), how, anchor))


@pytest.mark.parametrize("linkage", ["average", "single", "complete"])
@pytest.mark.parametrize("align", ["none", "weights", "activations"])
def test_hc_smoe_against_loops(linkage: str, align: str) -> None:
    world = World.random(SHAPE, 2, never=[1])
    for keep in range(2, 6):
        for merge in ("frequency", "average"):
            options: dict[str, Any] = {"linkage": linkage, "align": align, "merge": merge}
            plan = planned(world, HCSMoE(**options), keep)
            groups = slow_output_groups(world, keep, linkage)
            assert groups_of(plan) == groups
            use = world.counts() if merge == "frequency" else [1] * 6
            assert_merged(world, plan, slow_merge(world, groups, use, align))


@pytest.mark.parametrize("similarity", ["outputs+router", "outputs", "router"])
@pytest.mark.parametrize(("grouping", "size"), [("absorb", 16), ("absorb", 2), ("nearest", 16)])
def test_ream_against_loops(similarity: str, grouping: str, size: int) -> None:
    world = World.random(SHAPE, 3, never=[0])
    for keep, align in ((2, "both"), (3, "weights"), (4, "both"), (5, "activations")):
        options: dict[str, Any] = {"similarity": similarity, "grouping": grouping, "align": align}
        method = REAM(propagate="dense", group_size=size, **options)
        plan = planned(world, method, keep)
        groups = slow_absorbed(world, keep, method)
        assert groups_of(plan) == groups
        assert plan.scores["saliency"] == pytest.approx(slow_saliency(world), rel=1e-4)
        assert_merged(world, plan, slow_merge(world, groups, slow_saliency(world), align))


@KINDS
def test_experts_without_a_gate_matrix(method: Method) -> None:
    shape = replace(SHAPE, roles=("up", "down"))
    world = World.random(SHAPE, 5)
    weights = Weights({r: m for r, m in world.weights.by_role.items() if r != "gate"})
    world = replace(world, shape=shape, weights=weights)
    plan = planned(world, method, 3)
    use = slow_saliency(world) if method.name == "ream" else world.counts()
    how = {"ream": "both", "hc-smoe": "none", "m-smoe": "weights"}[method.name]
    assert_merged(world, plan, slow_merge(world, groups_of(plan), use, how))


# properties ---------------------------------------------------------------------------------------


@KINDS
@settings(deadline=None, max_examples=12)
@given(order=st.permutations(range(6)), seed=st.integers(0, 50), keep=st.integers(2, 6))
def test_permuting_experts_permutes_the_plan(
    method: Method, order: list[int], seed: int, keep: int
) -> None:
    world = World.random(SHAPE, seed)
    if len(set(world.counts())) < 6:
        return  # ties break by id
    one, two = planned(world, method, keep), planned(world.permuted(order), method, keep)
    groups = {frozenset(order[e] for e in group) for group in _groups(two)}
    assert groups == {frozenset(group) for group in _groups(one)}
    assert sorted(order[e] for e in two.keep) == list(one.keep)
    for core in two.keep:
        for role in SHAPE.roles:
            torch.testing.assert_close(
                two.edited(world.permuted(order).weights).matrix(core, role),
                one.edited(world.weights).matrix(order[core], role),
                rtol=1e-4,
                atol=1e-5,
            )


def _groups(plan: LayerPlan) -> list[list[int]]:
    return list(groups_of(plan).values()) if "joins" in plan.scores else [[e] for e in plan.keep]


@KINDS
def test_removing_nothing_is_no_edit(method: Method) -> None:
    for budget in (Budget(ratio=0.0), Budget(keep=6), Budget(ratio=0.1)):
        [plan] = method.plan_model([World.random(SHAPE).view()], Context(budget)).values()
        assert plan.keep == tuple(range(6)) and plan.neurons is None
        assert plan.router_CE is None and plan.served_by is None


@KINDS
def test_an_expert_that_nobody_joins_is_not_touched(method: Method) -> None:
    for seed in range(4):
        world = World.random(SHAPE, seed)
        for matrices in world.weights.by_role.values():
            matrices[:, 0, 0] = -0.0
        plan = planned(world, method, 4)
        alone = [core for core, group in groups_of(plan).items() if len(group) == 1]
        assert alone
        for core in alone:
            for role in SHAPE.roles:
                before = world.weights.matrix(core, role)
                after = plan.edited(world.weights).matrix(core, role)
                assert torch.equal(after, before) and bool(after[0, 0].signbit())


@KINDS
def test_dead_experts_give_nothing_and_dead_groups_are_averaged(method: Method) -> None:
    world = World.random(SHAPE, 1, never=[2, 3])
    plan = planned(world, method, 3)
    share = plan.scores["share"]
    for core, group in groups_of(plan).items():
        alive = [e for e in group if e not in (2, 3)]
        for e in set(group) - set(alive):
            assert share[e] == (0 if alive else 1 / len(group))
        assert math.fsum(share[e] or 0 for e in group) == pytest.approx(1)
        assert core in alive or method.name == "hc-smoe" or not alive
    never = World.random(replace(SHAPE, top_k=1), 1, never=[0, 1, 2, 3, 4])
    plan = planned(never, method, 2)
    assert plan.neurons is not None or method.name != "hc-smoe"
    for core, group in groups_of(plan).items():
        if 5 not in group:
            assert [plan.scores["share"][e] for e in group] == [1 / len(group)] * len(group)
        assert core in group


@KINDS
def test_a_duplicate_is_merged_without_loss(method: Method) -> None:
    """Expert 5 is expert 2 with other numbers for its neurons, and the router treats them alike."""
    world = World.random(SHAPE, 7)
    shuffle = torch.tensor([3, 1, 4, 0, 2])
    for role, matrices in world.weights.by_role.items():
        own = matrices[2]
        matrices[5] = own[:, shuffle] if role == "down" else own[shuffle]
    world.rows.f_TEH[:, 5] = world.rows.f_TEH[:, 2]
    world.rows.logits_TR[:, 5] = world.rows.logits_TR[:, 2]
    pairs = [[2, 0], [2, 1], [2, 3], [2, 4], [2, 0], [1, 3], [2, 4], [1, 3], [0, 4], [2, 5]]
    world.rows.index_TK[:] = torch.tensor(pairs).repeat(30, 1)
    world.rows.gate_TK[world.rows.index_TK == 2] *= 10
    world.rows.gate_TK[world.rows.index_TK == 5] *= 0.01
    if method.name == "hc-smoe":
        method = HCSMoE(align="weights")
    for router in ("slice", "mean", "original"):
        some = replace(method, router=router)  # type: ignore[call-arg]
        plan = planned(world, some, 5)
        assert groups_of(plan)[2] == [2, 5]
        for role in SHAPE.roles:
            made = plan.edited(world.weights).matrix(2, role)
            torch.testing.assert_close(made, world.weights.matrix(2, role))


@KINDS
def test_the_router_does_what_the_option_says(method: Method) -> None:
    world = World.random(SHAPE, 4)
    sliced = planned(world, method, 3)
    assert sliced.router_CE is None and sliced.served_by is None
    mean = planned(world, replace(method, router="mean"), 3)  # type: ignore[call-arg]
    assert mean.router_CE is not None and groups_of(mean) == groups_of(sliced)
    for row, (core, group) in zip(mean.router_CE.tolist(), groups_of(mean).items(), strict=True):
        assert core in group
        assert row == pytest.approx(
            [mean.scores["share"][e] if e in group else 0.0 for e in range(6)], rel=1e-6
        )
    whole = planned(world, replace(method, router="original"), 3)  # type: ignore[call-arg]
    assert whole.served_by == tuple(int(e or 0) for e in whole.scores["joins"])
    assert len(planned(world, replace(method, router="original"), 1).keep) == 1  # type: ignore[call-arg]


@KINDS
def test_floors(method: Method) -> None:
    view = World.random(SHAPE).view()
    with pytest.raises(BudgetError, match="but 2 must stay"):
        method.plan_layer(view, Context(Budget(keep=1)))
    with pytest.raises(BudgetError, match="at least one expert must stay"):
        method.plan_layer(view, Context(Budget(keep=0)))
    with pytest.raises(BudgetError, match="the floor is 4"):
        replace(method, floor=4).plan_layer(view, Context(Budget(keep=3)))  # type: ignore[call-arg]


@KINDS
def test_experts_join_in_their_routing_group_only(method: Method) -> None:
    shape = LayerShape(0, experts=8, top_k=2, hidden=8, intermediate=5, groups=2)
    world = World.random(shape, 3)
    for keep in (4, 6):
        plan = planned(world, method, keep)
        for core, group in groups_of(plan).items():
            assert {e // 4 for e in group} == {core // 4}
        assert sum(core < 4 for core in plan.keep) == keep // 2
    with pytest.raises(BudgetError, match="not a multiple"):
        planned(world, method, 5)
    plan = planned(world, replace(method, router="original"), 3)  # type: ignore[call-arg]
    assert len(plan.keep) == 3  # a router that stays whole sets no limits


@KINDS
def test_pinned_experts_are_cores_and_forbidden_ones_are_not(method: Method) -> None:
    for seed in range(5):
        world = World.random(SHAPE, seed)
        fixed = {"pinned": {0: frozenset([0, 5])}, "forbidden": {0: frozenset([1, 2])}}
        for keep in (2, 3, 4):
            plan = planned(world, method, keep, **fixed)
            assert {0, 5} <= set(plan.keep) and not {1, 2} & set(plan.keep)
            assert len(plan.keep) == keep
            assert sorted(e for g in groups_of(plan).values() for e in g) == list(range(6))
        with pytest.raises(BudgetError):
            planned(world, method, 5, **fixed)
    with pytest.raises(BudgetError):
        planned(world, method, 2, pinned={0: frozenset([0, 1, 2])})


@KINDS
def test_what_is_not_a_number_stops_nobody(method: Method) -> None:
    world = World.random(SHAPE, 6)
    world.rows.logits_TR[3, 1] = math.nan
    world.rows.f_TEH[:, 1] = math.nan
    weights = Weights({role: m.clone() for role, m in world.weights.by_role.items()})
    weights.by_role["down"][1] = math.nan
    plan = planned(replace(world, weights=weights), method, 3)
    assert len(plan.keep) == 3
    if method.name == "ream":
        assert 1 not in plan.keep and plan.scores["share"][1] == 0
        made = plan.edited(weights)
        assert all(made.matrix(e, "down").isfinite().all() for e in plan.keep)


@KINDS
def test_equal_things_go_by_id(method: Method) -> None:
    world = World.random(SHAPE)
    for matrix in world.weights.by_role.values():
        matrix[:] = matrix[0]
    world.rows.f_TEH[:] = 0.0
    world.rows.logits_TR[:] = 1.0
    world.rows.gate_TK[:] = 0.5
    world.rows.index_TK[:] = torch.tensor([[0, 1], [2, 3], [4, 5]]).repeat(100, 1)
    groups = groups_of(planned(world, method, 4))
    if method.name == "hc-smoe":
        assert groups == {0: [0, 1, 2], 3: [3], 4: [4], 5: [5]}
    else:  # of equal scores the lower ids go, and of equal cores the lowest takes them
        assert groups == {2: [0, 1, 2], 3: [3], 4: [4], 5: [5]}


def test_global_scope_of_m_smoe_leaves_a_group_in_every_layer() -> None:
    views, counts = [], []
    for layer, never in enumerate(([1, 2, 3], [], [5])):
        world = World.random(replace(SHAPE, layer=layer), layer, never)
        views.append(world.view())
        counts.append(world.counts())
    method = MSMoE(scope="global", router="original")
    plans = method.plan_model(views, Context(Budget(ratio=0.5)))
    usage = {
        (layer, e): 1.0 if own.index(max(own)) == e else n / sum(own)
        for layer, own in enumerate(counts)
        for e, n in enumerate(own)
    }
    best = sorted(usage, key=lambda at: -usage[at])[:9]
    assert {layer: sorted(e for at, e in best if at == layer) for layer in range(3)} == {
        layer: list(plan.keep) for layer, plan in plans.items()
    }
    assert len({len(plan.keep) for plan in plans.values()}) > 1
    assert method.per_layer() == MSMoE(router="original")


def test_layers_of_a_sequential_method_cannot_compete() -> None:
    with pytest.raises(BudgetError, match="they cannot compete"):
        REAM(scope="global").accept(Budget(ratio=0.5))
    REAM(scope="global", propagate="dense").accept(Budget(ratio=0.5))
    assert REAM().sequential and not REAM(propagate="dense").sequential
