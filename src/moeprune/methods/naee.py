"""NAEE (arXiv 2402.14800): delete the subset of experts that changes the layer's output least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from moeprune.core.accumulators import TokenSample
from moeprune.core.budget import removable
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.ops.reconstruction import Norm, Reconstruction
from moeprune.core.ops.subsets import Choice, Found, beam, exhaustive
from moeprune.core.plan import LayerPlan
from moeprune.core.replay import NEEDS, alone, choice_of, reconstruction, skip_threshold
from moeprune.core.skipping import Skipping


@dataclass(frozen=True)
class NAEE(Method):
    """Searches the subset D of experts whose removal minimises ``|Z - Z_D|``.

    Z is the layer's output on the sampled calibration tokens, Z_D its output when the router
    chooses among the others. The outputs of all experts are computed once; a subset is then only a
    matter of gates. Not all of them can be tried when there are many experts: ``greedy`` removes
    one expert after the other, ``beam`` keeps the ``width`` best subsets of every size.

    Options:
        search: ``exhaustive`` tries every subset (the source); ``auto`` does where there are at
            most ``limit``, and is ``beam`` otherwise; ``greedy`` is a beam of width 1.
        width: of the beam.
        limit: the most subsets that are tried exhaustively.
        mode: ``dense`` decides all layers from one pass through the unpruned model;
            ``progressive`` takes a layer's input from the pruned layers before it, and as target
            the layer's output in the unpruned model.
        norm: ``frobenius`` over all sampled tokens together, or the sum over each ``token``'s norm:
            the source sums norms of batches, which is between the two.
        skipping: export, for every layer, the median of second gate / first gate, below which a
            server may skip the second expert (dynamic skipping). Stock classes ignore it.
    """

    name: ClassVar[str] = "naee"
    summary: ClassVar[str] = "drop the subset of experts whose removal changes the output least"
    source: ClassVar[str] = "arXiv 2402.14800"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")
    needs: ClassVar[tuple[str, ...]] = NEEDS
    unedited: ClassVar[str] = "mode=dense"

    search: Literal["auto", "exhaustive", "greedy", "beam"] = "auto"
    width: Annotated[int, Field(ge=1, le=1024)] = 1
    limit: Annotated[int, Field(ge=1, le=10_000_000)] = 100_000
    mode: Literal["dense", "progressive"] = "dense"
    norm: Norm = "frobenius"
    skipping: bool = False

    @property
    def sequential(self) -> bool:
        """Whether a layer must be edited before the next one is observed."""
        return self.mode == "progressive"

    @property
    def compares(self) -> tuple[str, ...]:
        """Accumulators of the unedited model that are read as well."""
        return (TokenSample.name,) if self.sequential else ()

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer."""
        shape = view.shape
        choice = choice_of(view, context, removable(context.budget, shape))
        error = reconstruction(view, context, self.norm)
        exact = self._tries_all(choice, context)
        found = self._search(error, choice, exact)
        kept = tuple(e for e in range(shape.experts) if e not in found.dropped)
        how = "the best of all" if exact else f"found by a beam of width {self._beam}"
        return LayerPlan(
            layer=shape.layer,
            experts=shape.experts,
            keep=kept,
            scores={"alone": alone(error)},
            notes=(f"error of the output {found.loss:.6g}: {how}",),
            skipping=self._skipping(error, kept),
        )

    @property
    def _beam(self) -> int:
        return 1 if self.search == "greedy" else self.width

    def _tries_all(self, choice: Choice, context: Context) -> bool:
        number = choice.subsets()
        if self.search == "exhaustive" and number > self.limit:
            context.warn(
                f"{number} subsets of {choice.remove} of {choice.experts} experts are more than "
                f"limit={self.limit}: searched by a beam of width {self.width}"
            )
        return self.search in ("auto", "exhaustive") and number <= self.limit

    def _search(self, error: Reconstruction, choice: Choice, exact: bool) -> Found:
        if exact:
            return exhaustive(error.losses, choice)
        return beam(error.losses, choice, self._beam)

    def _skipping(self, error: Reconstruction, kept: tuple[int, ...]) -> Skipping | None:
        if not self.skipping:
            return None
        beta = skip_threshold(error.router, kept)
        return None if beta is None else Skipping(beta, error.router.rule.divided)
