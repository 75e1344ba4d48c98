"""The orders in which the neurons of an expert's members are merged.

Axes: I neurons, S sampled tokens.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moeprune.core.accumulators import TokenSample
from moeprune.core.edits import ExpertWeights
from moeprune.core.merging import Groups
from moeprune.core.method import LayerView
from moeprune.core.ops.matching import (
    best_assignment,
    correlations,
    cosines,
    distances,
    inner_products,
)

Align = Literal["none", "weights", "activations", "both"]
"""``weights``: inner products of neurons (arXiv 2310.01334); ``activations``: correlation of
neurons on sampled tokens; ``both``: distance of unit weights plus distance of unit activations."""

_THREADS = max(1, min(4, os.cpu_count() or 1))


def rows_per_neuron(weights: ExpertWeights, expert: int, roles: Sequence[str]) -> list[Tensor]:
    """An expert's matrices with one row per neuron: gate and up as they are, down transposed."""
    found = [weights.matrix(expert, role) for role in roles]
    return [m.T if role == "down" else m for role, m in zip(roles, found, strict=True)]


@dataclass
class Aligner:
    """Finds the orders of neurons; one pair of experts per thread in memory, and a gain [I, I]."""

    view: LayerView
    how: Align
    _hidden: dict[int, Tensor] = field(default_factory=dict)

    def orders(self, pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
        """For each pair (anchor, member): the member's neuron that belongs at each of the anchor's.

        Returns:
            int64 [I] by pair.
        """
        if self.how == "none" or not pairs:
            return {pair: torch.arange(self.view.shape.intermediate) for pair in pairs}
        found: dict[tuple[int, int], Tensor] = {}
        ordered = sorted(pairs)  # members of one anchor follow each other
        with ThreadPoolExecutor(_THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for start in range(0, len(ordered), _THREADS):
                some = ordered[start : start + _THREADS]
                self._run_experts({e for pair in some for e in pair})
                found |= zip(some, pool.map(self._order, some), strict=True)
        self._hidden.clear()
        return found

    def _run_experts(self, experts: Collection[int]) -> None:
        """Keep the activations of these experts only: experts run one at a time, in this thread."""
        if self.how not in ("activations", "both"):
            return
        x_SH = self.view.need().part(TokenSample).x_SH
        block = self.view.need_block()
        for gone in set(self._hidden) - set(experts):
            del self._hidden[gone]
        for e in sorted(set(experts) - set(self._hidden)):
            self._hidden[e] = block.hidden(e, x_SH).cpu()

    def _order(self, pair: tuple[int, int]) -> Tensor:
        anchor, member = pair
        if self.how == "activations":
            return best_assignment(correlations(self._hidden[anchor], self._hidden[member]))
        one, two = (rows_per_neuron(self.view.weights, e, self.view.shape.roles) for e in pair)
        if self.how == "weights":
            return best_assignment(inner_products(one, two))
        by_weights = distances(cosines(one, two))
        h_one, h_two = self._hidden[anchor].T, self._hidden[member].T
        return best_assignment(-(by_weights + distances(cosines([h_one], [h_two]))))


def align_groups(
    groups: Groups, view: LayerView, how: Align, anchor: int | None = None
) -> dict[int, Tensor]:
    """For every expert that gives to a group of several, its neuron at each of the core's.

    Args:
        groups: who joins whom.
        view: the layer.
        how: what neurons are compared by.
        anchor: all experts are aligned to this one, and so to each other; None aligns members to
            their core.

    Returns:
        int64 [I] by expert, also for cores: the identity where ``anchor`` is None.
    """
    several = [givers for core in groups.cores if (givers := groups.givers(core)) != [core]]
    identity = torch.arange(view.shape.intermediate)
    pairs: list[tuple[int, int]] = []
    found: dict[int, Tensor] = {}
    for givers in several:
        core = groups.core_of[givers[0]]
        to = core if anchor is None else anchor
        pairs += [(to, e) for e in givers if e != to]
        found |= {to: identity} if to in givers else {}
    orders = Aligner(view, how).orders(pairs)
    return found | {member: order for (_, member), order in orders.items()}
