"""DERN: who is dropped, who is given which neurons, and what becomes of them, against loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.ops.test_ops_kmeans import slow_kmeans
from core.rows import SMALL, Weights
from methods.merging import World
from moeprune.core.budget import Budget
from moeprune.core.method import Context
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import ROLES, LayerShape
from moeprune.errors import BudgetError
from moeprune.methods.dern import DERN

SHAPE = replace(SMALL, intermediate=7)


def planned(world: World, keep: int, method: DERN = DERN(), **context: Any) -> LayerPlan:
    plan = method.plan_layer(world.view(), Context(Budget(keep=keep), **context))
    plan.check(world.shape)
    return plan


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm() if float(vector.norm()) else vector


def segment(world: World, expert: int, index: int) -> Tensor:
    parts = world.neuron(expert, index)
    return torch.cat([unit(part) for part in parts]) / math.sqrt(len(parts))


def importance(world: World, kind: str, expert: int, index: int) -> float:
    own = world.gates(expert)
    if kind == "equal":
        return 1.0
    if kind == "usage":
        return sum(g for _, g in own)
    energy = sum((g * float(world.rows.h_TEI[t, expert, index])) ** 2 for t, g in own)
    return math.sqrt(energy) * float(world.neuron(expert, index)[-1].norm())


def slow_dern(
    world: World, keep: int, method: DERN
) -> tuple[dict[int, dict[str, Tensor]], dict[tuple[int, int], int]]:
    """The kept experts' matrices, and for each neuron handed on who was given it."""
    experts, size = range(world.shape.experts), range(world.shape.intermediate)
    score = [
        sum(1 if method.criterion == "count" else g for _, g in world.gates(e)) for e in experts
    ]
    kept = sorted(sorted(experts, key=lambda e: -score[e])[:keep])
    owner = {}
    for d in (e for e in experts if e not in kept):
        for i in size:
            own = segment(world, d, i)
            best = {
                e: max(float(own @ segment(world, e, j)) for j in size)
                for e in kept
                if world.shape.group_of(e) == world.shape.group_of(d)
            }
            e = max(best, key=lambda e: best[e])
            if best[e] >= method.threshold and importance(world, method.weights, d, i) > 0:
                owner[d, i] = e
    made = {}
    for e in kept:
        members = [(e, i) for i in size] + [at for at, to in owner.items() if to == e]
        chosen, weights = list(size), [1.0] * len(members)
        if len(members) > len(size):
            weights = [importance(world, method.weights, *at) for at in members]
            weights = [max(w, max(weights) * 1e-9 or 1.0) for w in weights]
            points = torch.stack([segment(world, *at) for at in members]).numpy()
            chosen = slow_kmeans(points, np.array(weights), len(size), method.iterations)
        new = []
        for c in size:
            own = [(at, w) for at, w, n in zip(members, weights, chosen, strict=True) if n == c]
            neuron = []
            for r in range(len(world.shape.roles)):
                parts = [(world.neuron(*at)[r], w) for at, w in own]
                length = sum(w * float(p.norm()) for p, w in parts) / sum(w for _, w in parts)
                way = torch.stack([w * unit(p) for p, w in parts]).sum(dim=0)
                neuron.append(length * unit(way) if len(parts) > 1 else parts[0][0])
            new.append(neuron)
        made[e] = {
            role: torch.stack([neuron[r] for neuron in new], dim=1 if role == "down" else 0)
            for r, role in enumerate(world.shape.roles)
        }
    return made, owner


@pytest.mark.parametrize("weights", ["contribution", "usage", "equal"])
@pytest.mark.parametrize(("criterion", "threshold"), [("gate-mass", -1.0), ("count", 0.4)])
def test_against_loops(weights: str, criterion: str, threshold: float) -> None:
    for seed, keep in ((0, 2), (1, 3), (2, 5)):
        world = World.random(SHAPE, seed, never=[4])
        options: dict[str, Any] = {"weights": weights, "criterion": criterion}
        method = DERN(threshold=threshold, **options)
        made, owner = slow_dern(world, keep, method)
        for router in ("slice", "add"):
            plan = planned(world, keep, replace(method, router=router))
            assert plan.keep == tuple(made)
            received = [sum(to == e for to in owner.values()) for e in range(6)]
            assert list(plan.scores["neurons_received"]) == received
            edited = plan.edited(world.weights)
            for e, matrices in made.items():
                for role in ROLES:
                    found = edited.matrix(e, role).double()
                    torch.testing.assert_close(found, matrices[role], rtol=1e-4, atol=1e-4)
            if router == "slice" or not owner:
                assert plan.router_CE is None
                continue
            assert plan.router_CE is not None
            for e, row in zip(plan.keep, plan.router_CE.tolist(), strict=True):
                shares = [
                    sum(to == e and d == x for (d, _), to in owner.items()) / 7 for x in range(6)
                ]
                shares[e] = 1.0
                assert row == pytest.approx(shares)


def test_experts_without_a_gate_matrix_and_with_routing_groups() -> None:
    shape = LayerShape(0, 8, 2, hidden=8, intermediate=4, groups=2, roles=("up", "down"))
    world = World.random(replace(shape, roles=ROLES), 3)
    weights = Weights({r: m for r, m in world.weights.by_role.items() if r != "gate"})
    world = replace(world, shape=shape, weights=weights)
    method = DERN(threshold=-1.0)
    score = planned(world, 4, method).scores["gate_mass"]
    kept = planned(world, 4, method).keep
    for group in (range(4), range(4, 8)):
        best = sorted(group, key=lambda e: -(score[e] or 0))[:2]
        assert sorted(best) == [e for e in kept if e in group]
    plan = planned(world, 4, method)
    assert plan.neurons is not None
    for position, _, expert, _ in plan.neurons.index_N4.tolist():
        assert kept[position] // 4 == expert // 4


def test_neurons_of_a_duplicate_come_home() -> None:
    """Expert 5 is expert 2 in another order, and less used: nothing changes without it."""
    world = World.random(SHAPE, 1)
    shuffle = torch.tensor([3, 1, 4, 0, 2, 6, 5])
    for role, matrices in world.weights.by_role.items():
        own = matrices[2]
        matrices[5] = own[:, shuffle] if role == "down" else own[shuffle]
    world.rows.gate_TK[world.rows.index_TK == 5] *= 0.01
    plan = planned(world, 5)
    assert plan.keep == (0, 1, 2, 3, 4)
    assert plan.scores["neurons_received"] == (0, 0, 7, 0, 0, 0)
    edited = plan.edited(world.weights)
    for e in plan.keep:
        for role in ROLES:
            before = world.weights.matrix(e, role)
            if e == 2:
                torch.testing.assert_close(edited.matrix(e, role), before)
            else:
                assert torch.equal(edited.matrix(e, role), before)


def test_removing_nothing_is_no_edit() -> None:
    for budget in (Budget(ratio=0.0), Budget(keep=6)):
        plan = DERN().plan_layer(World.random(SHAPE).view(), Context(budget))
        assert plan.keep == tuple(range(6))
        assert plan.neurons is None and plan.router_CE is None


def test_dead_experts_hand_nothing_on() -> None:
    world = World.random(SHAPE, 2, never=[1, 3])
    plan = planned(world, 4)
    assert plan.keep == (0, 2, 4, 5) and plan.neurons is None
    plan = planned(world, 4, DERN(weights="equal", threshold=-1.0))
    assert sum(x or 0 for x in plan.scores["neurons_received"]) == 14


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(6)), seed=st.integers(0, 50), keep=st.integers(2, 6))
def test_permuting_experts_permutes_the_plan(order: list[int], seed: int, keep: int) -> None:
    world = World.random(SHAPE, seed)
    one, two = planned(world, keep), planned(world.permuted(order), keep)
    assert sorted(order[e] for e in two.keep) == list(one.keep)
    for core in two.keep:
        torch.testing.assert_close(
            two.edited(world.permuted(order).weights).matrix(core, "down"),
            one.edited(world.weights).matrix(order[core], "down"),
            rtol=1e-4,
            atol=1e-4,
        )


def test_floors_pins_and_numbers_that_are_none() -> None:
    world = World.random(SHAPE, 4)
    with pytest.raises(BudgetError, match="but 2 must stay"):
        planned(world, 1)
    fixed = {"pinned": {0: frozenset([0, 1])}, "forbidden": {0: frozenset([4])}}
    plan = planned(world, 3, **fixed)
    assert {0, 1} <= set(plan.keep) and 4 not in plan.keep
    gone = next(e for e in range(6) if e not in plan.keep)
    world.weights.by_role["down"][gone, 0, 0] = math.nan
    plan = planned(world, 3, DERN(threshold=-1.0), **fixed)
    edited = plan.edited(world.weights)
    assert all(edited.matrix(e, "down").isfinite().all() for e in plan.keep)
