"""A MoE block of plain tensors: what accumulators are fed in tests, without any model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moeprune.core.accumulators import ACCUMULATORS, BlockRows, ExpertRows
from moeprune.core.method import LayerView
from moeprune.core.shapes import LayerShape
from moeprune.core.statistics import LayerStatistics

SMALL = LayerShape(layer=0, experts=6, top_k=2, hidden=8, intermediate=12)


@dataclass(frozen=True)
class Weights:
    """Expert matrices by role, each [E, outputs, inputs]."""

    by_role: Mapping[str, Tensor]

    def matrix(self, expert: int, role: str) -> Tensor:
        return self.by_role[role][expert]


@dataclass(frozen=True)
class Rows:
    """Everything a block sees and computes for T tokens.

    ``h_TEI`` and ``f_TEH`` hold every expert's values for every token, routed or not.
    """

    x_TH: Tensor
    index_TK: Tensor
    gate_TK: Tensor
    logits_TR: Tensor
    key_T: Tensor
    h_TEI: Tensor
    f_TEH: Tensor

    def part(self, tokens: slice | Sequence[int] | Tensor) -> Rows:
        return Rows(*(getattr(self, name)[tokens] for name in self.__dataclass_fields__))

    def feed(self, statistics: LayerStatistics) -> None:
        """One batch, as the walk feeds it: hit experts in order, then the block."""
        for expert in range(statistics.shape.experts):
            tokens, slots = torch.nonzero(self.index_TK == expert, as_tuple=True)
            if len(tokens):
                statistics.add_expert(
                    ExpertRows(
                        expert,
                        self.x_TH[tokens],
                        self.gate_TK[tokens, slots],
                        self.h_TEI[tokens, expert],
                        self.f_TEH[tokens, expert],
                    )
                )
        statistics.add_block(
            BlockRows(self.x_TH, self.index_TK, self.gate_TK, self.logits_TR, self.key_T)
        )


def random_weights(shape: LayerShape, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    sizes = dict.fromkeys(shape.roles, (shape.intermediate, shape.hidden))
    sizes["down"] = (shape.hidden, shape.intermediate)
    return Weights(
        {
            role: torch.randn(shape.experts, *size, generator=generator)
            for role, size in sizes.items()
        }
    )


def random_rows(
    shape: LayerShape,
    tokens: int,
    seed: int = 0,
    weights: Weights | None = None,
    never: Iterable[int] = (),
) -> Rows:
    """Tokens of random inputs; experts in ``never`` are selected by none of them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    weights = weights or random_weights(shape)
    x_TH = torch.randn(tokens, shape.hidden, generator=generator)
    logits_TE = torch.randn(tokens, shape.experts, generator=generator)
    logits_TE[:, list(never)] = -torch.inf
    prob_TK, index_TK = logits_TE.softmax(dim=1).topk(shape.top_k)
    up_TEI = torch.einsum("th,eih->tei", x_TH, weights.by_role["up"])
    gate_TEI = torch.einsum("th,eih->tei", x_TH, weights.by_role["gate"])
    h_TEI = torch.nn.functional.silu(gate_TEI) * up_TEI
    f_TEH = torch.einsum("tei,ehi->teh", h_TEI, weights.by_role["down"])
    key_T = torch.randperm(tokens, generator=generator) * 7 - tokens
    finite_TE = logits_TE.clamp(min=-30.0)
    return Rows(x_TH, index_TK, prob_TK, finite_TE, key_T, h_TEI, f_TEH)


def collected(
    shape: LayerShape, rows: Rows, cuts: Iterable[int] = (), needs: Iterable[str] = ACCUMULATORS
) -> LayerStatistics:
    """Statistics of ``rows`` fed in batches that end at ``cuts``."""
    statistics = LayerStatistics.empty(shape, needs)
    for batch in batches(rows, cuts):
        batch.feed(statistics)
    return statistics


def batches(rows: Rows, cuts: Iterable[int]) -> list[Rows]:
    ends = [0, *sorted(cuts), len(rows.x_TH)]
    return [rows.part(slice(a, b)) for a, b in pairwise(ends) if b > a]


def view_of(
    shape: LayerShape, statistics: LayerStatistics | None, weights: Weights | None = None
) -> LayerView:
    return LayerView(shape, statistics, weights or random_weights(shape))
