"""SparseGPT (arXiv 2301.00774): prune weights inside experts, and update those that stay."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeprune.core.accumulators import HiddenGram, InputGram, Routing
from moeprune.core.budget import Budget
from moeprune.core.column_norms import check_pattern
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.ops.masks import matrix_keep_mask, nm_keep_mask
from moeprune.core.ops.sparsegpt import inverse_factor, sparsegpt
from moeprune.core.plan import LayerPlan
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import MoepruneError

GRAMS = ("input-gram", "hidden-gram")


@dataclass(frozen=True)
class SparseGPT(Method):
    """Optimal-brain-surgeon weight pruning with a Hessian of its own for each expert and input.

    ``H = sum x x^T`` over the tokens routed to the expert, x the input of that matrix (gate and up
    share one). With ``U^T U = (H + 0.01 mean(diag H) 1)^-1`` a weight scores ``w^2 / U_jj^2``; in
    blocks of 128 columns the lowest of all rows go (``--ratio``), or n of every m consecutive ones
    of a row (``--pattern n:m``), and the columns behind make up for each that goes.

    Options:
        propagate: ``pruned`` prunes a layer before the next one is observed; ``dense`` takes the
            Hessians of the unpruned model from statistics (``--collect
            routing,input-gram,hidden-gram``: experts * (H^2 + I^2) * 4 bytes on disk per layer).
        min_tokens: an expert that saw fewer tokens loses the smallest |W| of each matrix instead,
            and nothing is updated. (The source would zero one that saw none.)
        memory: GiB that the Hessians of one layer may take with ``propagate=pruned``; where all
            experts need more, the layer runs again for every part of them.
    """

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = (
        "zero weights inside experts and update the others (OBS); file and speed stay"
    )
    source: ClassVar[str] = "arXiv 2301.00774"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "pattern")
    needs: ClassVar[tuple[str, ...]] = ("routing", *GRAMS)
    changes: ClassVar[str | None] = "zeroes and updates weights"

    propagate: Literal["pruned", "dense"] = "pruned"
    min_tokens: Annotated[int, Field(ge=0)] = 16
    memory: Annotated[float, Field(gt=0)] = 4.0

    @property
    def sequential(self) -> bool:
        """Whether a layer must be edited before the next one is observed."""
        return self.propagate == "pruned"

    @property
    def observes(self) -> tuple[str, ...]:
        """Hessians are asked for part by part."""
        return ("routing",) if self.sequential else self.needs

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer, and store its new matrices."""
        shape = view.shape
        check_pattern(context.budget, shape)
        count_E = view.need().part(Routing).count_E
        everyone = tuple(range(shape.experts))
        plan = LayerPlan(
            layer=shape.layer,
            experts=shape.experts,
            keep=everyone,
            scores={"tokens": tuple(float(n) for n in count_E.tolist())},
        )
        if context.budget.ratio == 0:
            return plan
        rare = {e for e in everyone if int(count_E[e]) < self.min_tokens}
        made: dict[tuple[int, str], Tensor] = {}

        def prune(expert: int, grams: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
            try:
                return _prune(view, expert, grams, context.budget)
            except ValueError as error:
                raise MoepruneError(
                    f"layer {shape.layer}, expert {expert}: {error}",
                    "are the weights and activations of this model finite in this dtype?",
                ) from error

        # one core per expert: the numbers do not depend on how many there are
        workers = torch.get_num_threads()
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for part in self._parts(view):
                jobs = {
                    e: pool.submit(prune, e, None if e in rare else grams)
                    for e, grams in part.items()
                }
                for expert, job in jobs.items():
                    made |= {(expert, role): new for role, new in job.result().items()}
                    context.progress(len(made), shape.experts * len(shape.roles), "updating")
        notes: tuple[str, ...] = ()
        if rare:
            notes = (
                f"experts {sorted(rare)} saw fewer than {self.min_tokens} tokens: their smallest "
                "weights are zero, and none is updated",
            )
        return LayerPlan(
            plan.layer,
            plan.experts,
            plan.keep,
            scores=plan.scores,
            notes=notes,
            stored=context.store(shape.layer, made),
        )

    def _parts(self, view: LayerView) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """The Hessians of gate and up, and of down, by expert; some experts at a time."""
        if not self.sequential:
            yield _grams(view.need(), tuple(range(view.shape.experts)))
            return
        for part in view.observe_parts(GRAMS, int(self.memory * 2**30)):
            yield _grams(part, part.chosen)


def _grams(
    statistics: LayerStatistics, experts: tuple[int, ...]
) -> dict[int, tuple[Tensor, Tensor]]:
    inputs = statistics.part(InputGram).gram_EHH
    hidden = statistics.part(HiddenGram).gram_EII
    return {expert: (inputs[row], hidden[row]) for row, expert in enumerate(experts)}


def _prune(
    view: LayerView, expert: int, grams: tuple[Tensor, Tensor] | None, budget: Budget
) -> dict[str, Tensor]:
    """The new matrices of one expert by role; by magnitude without Hessians."""
    made: dict[str, Tensor] = {}
    factors: dict[int, Tensor] = {}
    for role in view.shape.roles:
        weight_OI = view.weights.matrix(expert, role)
        if grams is None:
            if budget.pattern is not None:
                keep_OI = nm_keep_mask(weight_OI, None, *budget.pattern)
            else:
                keep_OI = matrix_keep_mask(weight_OI, None, budget.ratio or 0.0)
            made[role] = weight_OI * keep_OI
            continue
        which = int(role == "down")
        gram_II = grams[which]
        if which not in factors:
            factors[which] = inverse_factor(gram_II)
        made[role] = sparsegpt(
            weight_OI.to(gram_II.device),
            factors[which],
            gram_II.diagonal() == 0,
            budget.ratio,
            budget.pattern,
        )
    return {role: weight.float().cpu() for role, weight in made.items()}
