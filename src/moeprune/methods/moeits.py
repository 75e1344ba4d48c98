"""MoEITS (arXiv 2604.10603): drop experts whose weights share most information with others'."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moeprune.core.budget import (
    check_fixed,
    least_kept,
    next_multiple,
    removable,
    removal_range,
)
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.ops.binning import MAX_FIXED_BINS
from moeprune.core.ops.elimination import (
    closest_pair_order,
    removals_above,
    threshold,
)
from moeprune.core.ops.nmi import noise_floor, pairwise_nmi
from moeprune.core.plan import LayerPlan
from moeprune.errors import MoepruneError

MATRIX_WEIGHTS = {
    "equal": {"gate": 1 / 3, "up": 1 / 3, "down": 1 / 3},
    "up-down": {"gate": 0.2, "up": 0.4, "down": 0.4},
}
"""Weights of the three matrices: Mixtral and DeepSeekMoE, and Qwen1.5 and DeepSeek-V2-Lite."""

_NOISE_PAIRS = 3
_NOISE_SLACK = 1.1  # NMI of unrelated matrices varies by a few percent from pair to pair


@dataclass(frozen=True)
class MoEITS(Method):
    """Data-free: removes the more central expert of the closest pair, again and again.

    ``M_ij = sum over matrices of w * NMI(A_i, A_j)``, the normalised mutual information of
    index-aligned weights. While a pair is closer than ``mean(M) + tau * IQR(M)`` (``--tau``), or
    until the budget is met (``--ratio``, ``--keep``), of the closest pair the expert with the
    larger row mean goes. Survivors and their router rows are untouched. The order of removal does
    not depend on tau, so a smaller tau always keeps a subset (not where routing is limited to
    groups, each of which must keep the same number).

    Options:
        matrix_weights: ``equal`` (1/3 each) or ``up-down`` (0.2 gate, 0.4 up, 0.4 down).
        threshold: ``off-diagonal`` takes mean and IQR over pairs i != j; ``compat`` over all
            entries with the zero diagonal, as the authors' code does.
        bins: ``auto`` (NumPy's rule, version pinned) or a number of bins over mean +- 4 std.
        floor: never keep fewer experts than this, nor fewer than top-k.
    """

    name: ClassVar[str] = "moeits"
    summary: ClassVar[str] = "drop experts by mutual information between weights; needs no data"
    source: ClassVar[str] = "arXiv 2604.10603"
    budgets: ClassVar[tuple[str, ...]] = ("tau", "ratio", "keep")

    matrix_weights: Literal["equal", "up-down"] = "equal"
    threshold: Literal["off-diagonal", "compat"] = "off-diagonal"
    bins: Annotated[int, Field(ge=2, le=MAX_FIXED_BINS)] | Literal["auto"] = "auto"
    floor: Annotated[int, Field(ge=0)] = 0

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer."""
        shape = view.shape
        remove = None
        if context.budget.tau is None:
            remove = removable(context.budget, shape, self.floor)
        known = context.memo.get((self.name, shape.layer))
        if known is None:
            similarity_EE = self.similarity(view, context)
            known = similarity_EE, self._noise(view, context, similarity_EE)
            context.memo[self.name, shape.layer] = known
        similarity_EE, noise = known
        if noise:
            context.warn(noise)
        gone = self._removals(view, context, similarity_EE, remove)
        rank = {expert: float(i) for i, expert in enumerate(gone)}
        central = similarity_EE.sum(axis=1) / max(1, shape.experts - 1)
        return LayerPlan(
            layer=shape.layer,
            experts=shape.experts,
            keep=tuple(e for e in range(shape.experts) if e not in rank),
            scores={
                "closeness": tuple(float(c) for c in central),
                "removed_at": tuple(rank.get(e) for e in range(shape.experts)),
            },
        )

    def similarity(self, view: LayerView, context: Context) -> NDArray[np.float64]:
        """M, [E, E], symmetric with a zero diagonal."""
        weights = self._weights(view)
        shape = view.shape
        pairs = shape.experts * (shape.experts - 1) // 2
        total: NDArray[np.float64] = np.zeros((shape.experts, shape.experts))
        for number, (role, weight) in enumerate(weights.items()):

            def report(done: int, _: int, offset: int = number * pairs) -> None:
                context.progress(offset + done, pairs * len(weights), f"layer {shape.layer}")

            try:
                nmi_EE = pairwise_nmi(_matrices(view, role), self.bins, progress=report)
            except ValueError as error:  # NaN or infinite weights
                raise MoepruneError(f"layer {shape.layer}, {role} matrices: {error}") from error
            total += weight * nmi_EE
        return total

    def _weights(self, view: LayerView) -> dict[str, float]:
        """Weights of the matrices that exist, summing to 1."""
        chosen = {role: MATRIX_WEIGHTS[self.matrix_weights][role] for role in view.shape.roles}
        total = sum(chosen.values())
        return {role: weight / total for role, weight in chosen.items()}

    def _removals(
        self,
        view: LayerView,
        context: Context,
        similarity_EE: NDArray[np.float64],
        remove: int | None,
    ) -> list[int]:
        """The experts that go, in order; those that the user forbids first."""
        shape = view.shape
        pinned, forbidden = context.pinned_in(shape.layer), context.forbidden_in(shape.layer)

        def order(kept: int) -> list[int]:
            steps = closest_pair_order(similarity_EE, kept, shape.groups, pinned, forbidden)
            return [*sorted(forbidden), *(step.expert for step in steps)]

        if remove is not None:
            check_fixed(remove, shape, pinned, forbidden)
            return order(shape.experts - remove) if remove else []
        least = least_kept(shape, self.floor, context.budget.multiple_of)
        low, high = removal_range(shape, least, context.budget.multiple_of, pinned, forbidden)
        tau = context.budget.tau
        assert tau is not None
        bar = threshold(similarity_EE, tau, offdiagonal=self.threshold == "off-diagonal")
        steps = closest_pair_order(similarity_EE, least, shape.groups, pinned, forbidden)
        gone = removals_above(steps, bar)
        free = closest_pair_order(similarity_EE, 1, 1, pinned, forbidden)
        if len(removals_above(free, bar)) > len(steps):
            context.warn(
                f"layer {shape.layer}: tau {tau:g} would keep fewer than the {least} experts that "
                "the router needs; kept that many"
            )
        # as many as tau removes, rounded to what divides, the same number from every group
        step = math.lcm(shape.groups, context.budget.multiple_of)
        kept = next_multiple(shape.experts - len(forbidden) - len(gone), step, shape)
        wanted = min(max(shape.experts - kept, low), high)
        return order(shape.experts - wanted)[:wanted] if wanted else []

    def _noise(
        self, view: LayerView, context: Context, similarity_EE: NDArray[np.float64]
    ) -> str | None:
        """A warning if no pair is closer than unrelated matrices of this size would be."""
        floors = []
        for pair in range(min(_NOISE_PAIRS, view.shape.experts - 1)):
            floors.append(
                sum(
                    weight
                    * noise_floor(
                        view.weights.matrix(pair, role).numpy(),
                        view.weights.matrix(pair + 1, role).numpy(),
                        context.seed + pair,
                        self.bins,
                    )
                    for role, weight in self._weights(view).items()
                )
            )
        highest = float(similarity_EE.max())
        if floors and highest <= _NOISE_SLACK * max(floors):
            return (
                f"layer {view.shape.layer}: the closest pair of experts has NMI {highest:.4f}, "
                f"unrelated matrices of this size have {max(floors):.4f}: MoEITS has no signal here"
            )
        return None


def _matrices(view: LayerView, role: str) -> Iterator[Any]:
    for expert in range(view.shape.experts):
        yield view.weights.matrix(expert, role).numpy()
