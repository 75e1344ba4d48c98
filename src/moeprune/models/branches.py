"""A walk that also takes held-out text through edited versions of the model, side by side.

A branch edits some layers and no others. Until the first of them its hidden states are those of the
unedited model, and nothing is computed for it; from there on its own copies of the held-out batches
go on. So the model is read once for all branches, and what the branches of L layers, each edited
alone, cost is half of L walks over the held-out text.

Bounds: hidden states of every branch beyond its first edit, and a third copy of the matrices that
an edit changes, one edit at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moeprune.core.layer_plan import LayerPlan
from moeprune.core.statistics import LayerStatistics
from moeprune.models.lockstep import Job
from moeprune.models.memory_edits import trying
from moeprune.models.sites import MoESite
from moeprune.models.walk import Batch, Walk

Edits = Mapping[str, LayerPlan]
"""Ways to edit a layer, by name; a name without a plan leaves the layer as it is."""


@dataclass(frozen=True)
class Branch:
    """One edited version of the model.

    Attributes:
        edits: by layer, the name of the edit that is made there.
    """

    edits: Mapping[int, str]

    @property
    def first(self) -> int:
        """The first layer that is another one."""
        return min(self.edits)


@dataclass
class BranchedWalk(Walk):
    """Observed batches, held-out batches, and the latter once more for every branch.

    Args:
        held: what goes through the model and through every branch; ``batches`` are observed.
        branches: the edited versions.
        decide: called in every MoE layer, its weights in memory, with the statistics of the
            observed batches (None without such); tells what to do in its branches.
        part: called with every observed batch's own statistics, in order, before ``decide``; they
            are added to afterwards, so whoever keeps them copies them.
        squares: after the walk, by layer the mean squared norm of the held-out tokens' state behind
            it.

    Use it as a ``Walk``; after ``layers``, ``held_logits``.
    """

    held: Sequence[Batch] = ()
    branches: Sequence[Branch] = ()
    decide: Callable[[MoESite, LayerStatistics | None], Edits] = lambda site, statistics: {}
    part: Callable[[MoESite, int, LayerStatistics], None] = lambda site, index, statistics: None
    squares: list[float] = field(default_factory=list)
    shared: ClassVar[bool] = True
    _observed: int = 0

    def __post_init__(self) -> None:
        self._observed = len(self.batches)
        copies = [batch for _ in range(1 + len(self.branches)) for batch in self.held]
        self.batches = [*self.batches, *copies]

    def _observed_jobs(self) -> Sequence[Job]:
        return self._lockstep.jobs[: self._observed]

    def _collected(self, site: MoESite, index: int, statistics: LayerStatistics) -> None:
        self.part(site, index, statistics)

    def _jobs(self, branch: int | None = None) -> list[Job]:
        """The held-out batches of a branch, or of the unedited model."""
        start = self._observed + (0 if branch is None else 1 + branch) * len(self.held)
        return self._lockstep.jobs[start : start + len(self.held)]

    def _run(self, index: int, needs: Sequence[str], visit: Any) -> None:
        site = self.model.sites.get(index)
        watched = self._observed_jobs()
        edits: Edits = {}
        if site is None:
            self._lockstep.run(finished=lambda job: self._step(), jobs=watched)
        else:
            statistics = self._observe(site, needs) if watched else None
            edits = self.decide(site, statistics)
        plain = [*self._jobs()]
        edited: dict[str, list[Job]] = {name: [] for name in edits}
        for number, branch in enumerate(self.branches):
            name = branch.edits.get(index)
            if name is not None and name in edits:
                edited[name] += self._jobs(number)
            elif branch.first < index:
                plain += self._jobs(number)
        self._lockstep.run(finished=lambda job: self._step(), jobs=plain)
        self.squares.append(_mean_square([job.output for job in self._jobs()], self.held))
        for name, jobs in edited.items():
            if jobs and site is not None:
                with trying(self.model, site, edits[name]):
                    self._lockstep.run(finished=lambda job: self._step(), jobs=jobs)
        self._follow(index, edits)

    def _follow(self, index: int, edits: Edits) -> None:
        """Branches that are not edited yet take over what the unedited model has computed."""
        for number, branch in enumerate(self.branches):
            if branch.first < index or branch.edits.get(index) in edits:
                continue
            for job, own in zip(self._jobs(number), self._jobs(), strict=True):
                job.output = own.output
                self._step()

    def held_logits(self, index: int) -> Iterator[Tensor]:
        """Logits [B, L, V] of one held-out batch: of the model, then of every branch in order.

        Each batch can be asked for once, after ``layers``; one is in memory at a time.
        """
        for branch in (None, *range(len(self.branches))):
            yield self._lockstep.finish(self._jobs(branch)[index].index).logits


def _mean_square(outputs: Sequence[Any], batches: Sequence[Batch]) -> float:
    """Mean over tokens of the squared norm of what a decoder layer hands on."""
    total, tokens = 0.0, 0
    for output, batch in zip(outputs, batches, strict=True):
        state = output[0] if isinstance(output, tuple) else output
        total += float(state.float().square().sum(dtype=torch.float64))
        tokens += batch.ids_BL.numel()
    return total / max(1, tokens)
