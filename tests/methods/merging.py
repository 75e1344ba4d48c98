"""What tests of merging methods share: a block that runs, slow merges, permuted worlds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from core.rows import Rows, Weights, collected, random_rows, random_weights
from moeprune.core.method import LayerView
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import ROLES, LayerShape


@dataclass(frozen=True)
class PlainBlock:
    """Experts as functions, without any model."""

    weights: Weights

    def hidden(self, expert: int, x_SH: Tensor) -> Tensor:
        h_SI = x_SH @ self.weights.matrix(expert, "up").T
        if "gate" in self.weights.by_role:
            gate_SI = x_SH @ self.weights.matrix(expert, "gate").T
            h_SI = torch.nn.functional.silu(gate_SI) * h_SI
        return h_SI

    def outputs(self, expert: int, x_SH: Tensor) -> Tensor:
        return self.hidden(expert, x_SH) @ self.weights.matrix(expert, "down").T


@dataclass(frozen=True)
class World:
    """One layer: its weights and what went through it."""

    shape: LayerShape
    weights: Weights
    rows: Rows

    @classmethod
    def random(cls, shape: LayerShape, seed: int = 0, never: Sequence[int] = ()) -> World:
        weights = random_weights(shape, seed)
        return cls(shape, weights, random_rows(shape, 300, seed, weights, never))

    def view(self) -> LayerView:
        statistics = collected(self.shape, self.rows, [70, 71])
        return LayerView(self.shape, statistics, self.weights, lambda: PlainBlock(self.weights))

    def permuted(self, order: Sequence[int]) -> World:
        """The same layer in which old expert ``order[i]`` has the id i."""
        new_id = torch.tensor([list(order).index(e) for e in range(self.shape.experts)])
        where = torch.tensor(order)
        weights = Weights({role: m[where] for role, m in self.weights.by_role.items()})
        rows = Rows(
            self.rows.x_TH,
            new_id[self.rows.index_TK],
            self.rows.gate_TK,
            self.rows.logits_TR[:, where],
            self.rows.key_T,
            self.rows.h_TEI[:, where],
            self.rows.f_TEH[:, where],
        )
        return World(self.shape, weights, rows)

    def counts(self) -> list[int]:
        return [int((self.rows.index_TK == e).sum()) for e in range(self.shape.experts)]

    def gates(self, expert: int) -> list[tuple[int, float]]:
        """The tokens routed to an expert with their gates."""
        found = []
        for t, (ids, gates) in enumerate(zip(self.rows.index_TK, self.rows.gate_TK, strict=True)):
            for e, g in zip(ids.tolist(), gates.tolist(), strict=True):
                if e == expert:
                    found.append((t, g))
        return found

    def sampled(self) -> Tensor:
        """The tokens of the sample, float64; all of them, if there are at most 512."""
        return self.rows.x_TH[torch.argsort(self.rows.key_T)].double()

    def output(self, expert: int) -> Tensor:
        """The output of one expert on the sampled tokens, float64."""
        double = Weights({role: m.double() for role, m in self.weights.by_role.items()})
        return PlainBlock(double).outputs(expert, self.sampled())

    def hidden(self, expert: int) -> Tensor:
        double = Weights({role: m.double() for role, m in self.weights.by_role.items()})
        return PlainBlock(double).hidden(expert, self.sampled())

    def neuron(self, expert: int, index: int) -> list[Tensor]:
        """Gate row, up row and down column of one neuron, float64."""
        return [
            self.weights.matrix(expert, role).double()[:, index]
            if role == "down"
            else self.weights.matrix(expert, role).double()[index]
            for role in self.shape.roles
        ]


def best_order(gain: list[list[float]]) -> tuple[int, ...]:
    """The best permutation; all of them are tried while that is possible."""
    size = len(gain)
    if size <= 5:
        return max(
            permutations(range(size)), key=lambda p: sum(gain[i][j] for i, j in enumerate(p))
        )
    return tuple(linear_sum_assignment(gain, maximize=True)[1].tolist())


def slow_order(world: World, anchor: int, member: int, how: str) -> tuple[int, ...]:
    """Alignment of one pair, gains by loops."""
    size = world.shape.intermediate
    h_a, h_b = world.hidden(anchor), world.hidden(member)

    def gain(i: int, j: int) -> float:
        a, b = torch.cat(world.neuron(anchor, i)), torch.cat(world.neuron(member, j))
        if how == "weights":
            return float(a @ b)
        if how == "activations":
            one, two = (h - h.mean() for h in (h_a[:, i], h_b[:, j]))
            return float(one @ two / one.norm() / two.norm())
        far = (a / a.norm() - b / b.norm()).norm()
        one, two = h_a[:, i], h_b[:, j]
        return -float(far + (one / one.norm() - two / two.norm()).norm())

    if how == "none":
        return tuple(range(size))
    return best_order([[gain(i, j) for j in range(size)] for i in range(size)])


def slow_merge(
    world: World,
    groups: Mapping[int, Sequence[int]],
    use: Sequence[float],
    how: str,
    anchor: int | None = None,
) -> dict[int, dict[str, Tensor]]:
    """Every core's merged matrices, float64."""
    made = {}
    for core, members in groups.items():
        total = sum(use[e] for e in members)
        share = {e: use[e] / total if total else 1 / len(members) for e in members}
        merged = {
            role: torch.zeros_like(world.weights.matrix(core, role), dtype=torch.float64)
            for role in world.shape.roles
        }
        alone = [e for e in members if share[e]] == [core]
        for e in members:
            to = core if anchor is None else anchor
            order = range(world.shape.intermediate)
            if e != to and not alone and share[e]:
                order = slow_order(world, to, e, how)
            for role in world.shape.roles:
                own = world.weights.matrix(e, role).double()
                own = own[:, list(order)] if role == "down" else own[list(order)]
                merged[role] += share[e] * own
        made[core] = merged
    return made


def groups_of(plan: LayerPlan) -> dict[int, list[int]]:
    """The groups that a plan says it made."""
    found: dict[int, list[int]] = {core: [] for core in plan.keep}
    for e, core in enumerate(plan.scores["joins"]):
        assert core is not None
        found[int(core)].append(e)
    return found


def assert_merged(
    world: World, plan: LayerPlan, expected: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """The plan's matrices are the expected ones."""
    plan.check(world.shape)
    assert plan.keep == tuple(sorted(expected))
    edited = plan.edited(world.weights)
    for core, matrices in expected.items():
        for role in [role for role in ROLES if role in world.shape.roles]:
            torch.testing.assert_close(
                edited.matrix(core, role).double(), matrices[role], rtol=1e-5, atol=1e-5
            )
