"""What all methods that merge experts share: cores, groups, alignment, and the plan they make.

A group is a core and the experts that join it. The group becomes one expert, under the core's id:
the weighted sum of its members' neurons, put in the core's order. Axes: E experts, I neurons.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from moeprune.core.accumulators import TokenSample
from moeprune.core.budget import Budget, experts_to_remove, lowest, removable
from moeprune.core.edits import ExpertWeights, Neurons
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.method import Context, LayerView
from moeprune.core.ops.matching import (
    best_assignment,
    correlations,
    cosines,
    distances,
    inner_products,
)
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError

Router = Literal["slice", "mean", "original"]
"""``slice`` keeps the core's row, ``mean`` averages the rows of a group with the weights of its
experts, ``original`` keeps all rows: a token that chooses a member is answered by its group."""

Align = Literal["none", "weights", "activations", "both"]
"""``weights``: inner products of neurons (arXiv 2310.01334); ``activations``: correlation of
neurons on sampled tokens; ``both``: distance of unit weights plus distance of unit activations."""

_THREADS = max(1, min(4, os.cpu_count() or 1))


@dataclass(frozen=True)
class Groups:
    """Who joins whom.

    Attributes:
        core_of: for each old expert the core of its group; a core's own is itself.
        share_E: what part of its group's average each expert is; sums to 1 in every group, float64.
    """

    core_of: tuple[int, ...]
    share_E: Tensor

    @classmethod
    def weighted(cls, core_of: Sequence[int], use_E: Tensor) -> Groups:
        """Shares proportional to ``use_E``; equal where all of a group's are 0.

        A use that is not a positive number counts as 0, so that expert gives its group nothing.
        """
        use_E = torch.nan_to_num(use_E.double().cpu(), nan=0.0, posinf=0.0).clamp(min=0)
        core_E = torch.tensor(core_of)
        total_E = torch.zeros_like(use_E).index_add_(0, core_E, use_E)[core_E]
        size_E = torch.bincount(core_E, minlength=len(core_of))[core_E]
        share_E = torch.where(total_E > 0, use_E / total_E.clamp(min=1e-300), 1 / size_E.double())
        return cls(tuple(core_of), share_E)

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores, ascending."""
        return tuple(sorted(set(self.core_of)))

    def givers(self, core: int) -> list[int]:
        """The experts of a group that give it something: the core first, then ascending."""
        group = [e for e, c in enumerate(self.core_of) if c == core and self.share_E[e] > 0]
        return sorted(group, key=lambda e: (e != core, e))


def free_shape(shape: LayerShape, router: Router) -> LayerShape:
    """The shape that limits what may be merged: a router that stays whole sets no limits."""
    return replace(shape, groups=1, top_groups=1, top_k=1) if router == "original" else shape


def experts_kept(budget: Budget, shape: LayerShape, router: Router, floor: int = 0) -> int:
    """How many experts (groups) remain in a layer.

    Raises:
        BudgetError: fewer than the router needs, or none.
    """
    free = free_shape(shape, router)
    if budget.keep is not None and not experts_to_remove(budget, free) < shape.experts:
        raise BudgetError(f"--keep {budget.keep}: at least one expert must stay to merge into")
    return shape.experts - removable(budget, free, floor)


def choose_cores(
    scores: Sequence[float],
    counts: Sequence[int],
    keep: int,
    shape: LayerShape,
    pinned: Collection[int] = (),
    forbidden: Collection[int] = (),
) -> list[int]:
    """The ``keep`` experts with the highest scores, ascending; pinned first, forbidden last.

    Ties and routing groups as in ``budget.lowest``.
    """
    ranked = [
        math.inf if e in pinned else -math.inf if e in forbidden else score
        for e, score in enumerate(scores)
    ]
    gone = set(lowest(ranked, counts, shape.experts - keep, shape))
    cores = [e for e in range(shape.experts) if e not in gone]
    for group in range(shape.groups):
        own = [e for e in range(shape.experts) if shape.group_of(e) == group]
        free = [e for e in own if e not in forbidden]
        check_cores(len(free), len(set(pinned) & set(own)), keep // shape.groups, shape)
    return cores


def check_cores(free: int, pinned: int, keep: int, shape: LayerShape) -> None:
    """Raise ``BudgetError`` unless ``keep`` of ``free`` experts can stay and all pinned do."""
    if not pinned <= keep <= free:
        what = f"{pinned} are pinned" if keep < pinned else f"only {free} are not forbidden"
        raise BudgetError(
            f"layer {shape.layer}: {keep} experts are to stay, but {what}"
            + (" in a routing group" if shape.groups > 1 else ""),
            "change the budget, or pin and forbid fewer experts",
        )


def join_most_similar(
    similarity_EE: Tensor, cores: Sequence[int], shape: LayerShape
) -> tuple[int, ...]:
    """Each other expert joins the core most similar to it in its routing group.

    Of equally similar cores the lowest id; a similarity that is not a number is the lowest.
    """
    similarity = torch.nan_to_num(similarity_EE.double().cpu(), nan=-math.inf).tolist()
    found = []
    for e in range(shape.experts):
        near = [c for c in cores if shape.group_of(c) == shape.group_of(e)]
        found.append(e if e in near else max(near, key=lambda c: (similarity[e][c], -c)))
    return tuple(found)


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


def merged_neurons(groups: Groups, order: Mapping[int, Tensor], width: int) -> Neurons:
    """The list of neurons that makes every group's weighted average."""
    identity = torch.arange(width)
    index, factor = [], []
    for position, core in enumerate(groups.cores):
        givers = groups.givers(core)
        for e in givers:
            # an expert that nobody joins is not touched, in whatever order others are aligned
            neuron_I = identity if givers == [core] else order[e]
            column = [torch.full((width,), position), identity, torch.full((width,), e), neuron_I]
            index.append(torch.stack(column, dim=1))
            factor.append(torch.full((width, 3), float(groups.share_E[e])))
    return Neurons(width, torch.cat(index).to(torch.int32), torch.cat(factor).float())


def router_rows(groups: Groups) -> Tensor:
    """Rows of a group's average router row over the old ones, float32 [C, E]."""
    rows_CE = torch.zeros(len(groups.cores), len(groups.core_of), dtype=torch.float64)
    for e, core in enumerate(groups.core_of):
        rows_CE[groups.cores.index(core), e] = groups.share_E[e]
    return rows_CE.float()


def merged_plan(
    shape: LayerShape,
    groups: Groups,
    order: Mapping[int, Tensor],
    router: Router,
    scores: Mapping[str, Sequence[float]],
    notes: tuple[str, ...] = (),
) -> LayerPlan:
    """The plan of one layer; nothing is edited where every expert is its own group."""
    cores = groups.cores
    own = {
        **{name: tuple(map(float, values)) for name, values in scores.items()},
        "joins": tuple(map(float, groups.core_of)),
        "share": tuple(groups.share_E.tolist()),
    }
    if len(cores) == shape.experts:
        return LayerPlan(shape.layer, shape.experts, cores, scores=own, notes=notes)
    touched = any(groups.givers(core) != [core] for core in cores)
    return LayerPlan(
        layer=shape.layer,
        experts=shape.experts,
        keep=cores,
        scores=own,
        notes=notes,
        neurons=merged_neurons(groups, order, shape.intermediate) if touched else None,
        router_CE=router_rows(groups) if router == "mean" else None,
        served_by=groups.core_of if router == "original" else None,
    )


def protected(context: Context, layer: int) -> tuple[frozenset[int], frozenset[int]]:
    """The experts of a layer that must be cores, and those that must not."""
    pinned = getattr(context, "pinned", {}).get(layer, frozenset())
    forbidden = getattr(context, "forbidden", {}).get(layer, frozenset())
    return frozenset(pinned), frozenset(forbidden)
