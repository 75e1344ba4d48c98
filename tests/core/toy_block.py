"""A block of plain tensors whose experts can be run: what subset searches are tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.rows import Weights, collected, random_rows, random_weights
from moeprune.core.method import LayerView
from moeprune.core.replay import NEEDS
from moeprune.core.shapes import LayerShape


@dataclass(frozen=True)
class PlainBlock:
    """Experts of plain tensors."""

    weights: Weights
    gated_inputs: bool = False

    def hidden(self, expert: int, x_SH: Tensor) -> Tensor:
        gate_SI = x_SH @ self.weights.by_role["gate"][expert].T
        up_SI = x_SH @ self.weights.by_role["up"][expert].T
        return torch.nn.functional.silu(gate_SI) * up_SI

    def outputs(self, expert: int, x_SH: Tensor) -> Tensor:
        return self.hidden(expert, x_SH) @ self.weights.by_role["down"][expert].T


@dataclass(frozen=True)
class Toy:
    """One layer with a softmax router, for any order of its experts.

    Attributes:
        order: which of the original experts stands at each place.
    """

    shape: LayerShape
    tokens: int = 120
    seed: int = 0
    never: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def places(self) -> list[int]:
        return list(self.order or range(self.shape.experts))

    def permuted(self, order: Sequence[int]) -> Toy:
        return replace(self, order=tuple(order))

    def view(self, needs: Sequence[str] = NEEDS) -> LayerView:
        weights = random_weights(self.shape, self.seed)
        rows = random_rows(self.shape, self.tokens, self.seed, weights, self.never)
        place = torch.empty(self.shape.experts, dtype=torch.long)
        place[self.places] = torch.arange(self.shape.experts)
        logits_TE = rows.logits_TR[:, self.places]
        rows = replace(
            rows,
            index_TK=place[rows.index_TK],
            logits_TR=logits_TE,
            f_TEH=rows.f_TEH[:, self.places],
            h_TEI=rows.h_TEI[:, self.places],
        )
        weights = Weights({role: w[self.places] for role, w in weights.by_role.items()})
        statistics = collected(self.shape, rows, needs=needs)
        router_RH = torch.randn(
            self.shape.experts,
            self.shape.hidden,
            generator=torch.Generator().manual_seed(self.seed + 77),
        )
        return LayerView(
            self.shape,
            statistics,
            weights,
            lambda: PlainBlock(weights),
            router=lambda: {"gate.weight": router_RH[self.places]},
        )


def slow_error(toy: Toy, kept: Sequence[int], norm: str = "frobenius") -> float:
    """|Z - Z_D| in float64, token by token, expert by expert."""
    view = toy.view()
    sample = view.need().parts["sample"]
    z_SE = sample.z_SR.double()  # type: ignore[attr-defined]
    x_SH = sample.x_SH  # type: ignore[attr-defined]
    block = view.need_block()
    E, K = toy.shape.experts, toy.shape.top_k
    outputs = [block.outputs(e, x_SH).double() for e in range(E)]
    squares = []
    for s in range(len(z_SE)):
        made = []
        for left in (range(E), kept):
            probability = {e: float(z_SE[s, e].exp()) for e in left}
            total = sum(probability.values())
            chosen = sorted(probability, key=lambda e: -probability[e])[:K]
            parts = [probability[e] / total * outputs[e][s] for e in chosen]
            made.append(torch.stack(parts).sum(dim=0))
        squares.append(float((made[0] - made[1]).square().sum()))
    if norm == "token":
        return sum(square**0.5 for square in squares)
    return float(sum(squares) ** 0.5)
