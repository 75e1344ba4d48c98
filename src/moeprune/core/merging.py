"""What methods that merge experts share: cores, groups, and the plan that they make.

A group is a core and the experts that join it. The group becomes one expert, under the core's id:
the weighted sum of its members' neurons, put in the core's order. Axes: E experts, C cores, I
neurons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeprune.core.budget import Budget, least_kept, removable
from moeprune.core.edits import Neurons
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.ranking import Ranking
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError

Router = Literal["slice", "mean", "original"]
"""``slice`` keeps the core's row, ``mean`` averages the rows of a group with the weights of its
experts, ``original`` keeps all rows: a token that chooses a member is answered by its group."""


Scores = Mapping[str, tuple[float | None, ...]]


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


def untouched(shape: LayerShape, scores: Scores) -> LayerPlan:
    """The plan of a layer in which no expert joins another."""
    return LayerPlan(shape.layer, shape.experts, tuple(range(shape.experts)), scores=scores)


def merged_plan(
    shape: LayerShape,
    groups: Groups,
    order: Mapping[int, Tensor],
    router: Router,
    scores: Scores,
    notes: tuple[str, ...] = (),
) -> LayerPlan:
    """The plan of one layer in which at least one expert joins another."""
    cores = groups.cores
    own: Scores = {
        **scores,
        "joins": tuple(map(float, groups.core_of)),
        "share": tuple(groups.share_E.tolist()),
    }
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


@dataclass(frozen=True)
class Merger(Ranking):
    """Base of the methods that merge the experts with the lowest scores into the others.

    Options:
        router: ``slice`` keeps the cores' rows; ``mean`` averages the rows of a group with the
            weights of its experts; ``original`` keeps all rows, so that members still collect
            tokens for their group: such checkpoints need the code that travels with them.
        floor: never keep fewer experts than this, nor, unless the router stays whole, than top-k.
    """

    changes: ClassVar[str | None] = "merges experts"
    gone: ClassVar[str] = "merged"

    router: Router = "slice"
    floor: Annotated[int, Field(ge=0)] = 0

    def routed_shape(self, shape: LayerShape) -> LayerShape:
        """A router that stays whole sets no limits."""
        return free_shape(shape, self.router)

    def least(self, shape: LayerShape, multiple_of: int) -> int:
        """What the router needs, and the user's floor; one expert to merge into."""
        return least_kept(shape, self.floor, multiple_of)

    def quota(self, shape: LayerShape, budget: Budget) -> int:
        """How many experts are merged into others in every layer.

        Raises:
            BudgetError: fewer would remain than the router needs, or none.
        """
        return mergeable(budget, shape, self.floor)


def mergeable(budget: Budget, shape: LayerShape, floor: int) -> int:
    """How many experts of a layer can join others.

    Raises:
        BudgetError: fewer would remain than the router needs, or none.
    """
    if budget.keep == 0:
        raise BudgetError("--keep 0: at least one expert must stay to merge into", "use --keep 1")
    return removable(budget, shape, floor)
