"""What an audit finds out about one MoE layer while the walk stands at it, and what it tries there.

Axes: E experts, H width of the block, S sampled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moeprune.core.accumulators import Outputs, Routing, TokenSample
from moeprune.core.budget import Budget, lowest
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.ops.prunability import cut_error, jaccard_by_chance, load_balance
from moeprune.core.ops.redundancy import output_similarity, weight_redundancy
from moeprune.core.resampling import resamples, stability
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import BudgetError
from moeprune.models.block import LoadedBlock
from moeprune.models.loading import LayeredModel
from moeprune.models.memory_edits import LoadedExperts
from moeprune.models.sites import MoESite
from moeprune.pipeline.views import Views

COVERED = 256
"""Tokens that an expert should see before a score of it is worth something."""

RESAMPLES = 20
COMPARED = 32  # experts whose weights are compared, each with each
_SIMILAR_TOKENS = 128  # on which all experts run

MASK = "weights"
"""The name of the edit that zeroes weights."""


def cut(ratio: float) -> str:
    """The name of the edit that takes away that share of the experts."""
    return f"experts {ratio:g}"


def finite(value: float) -> float | None:
    """For JSON."""
    return value if math.isfinite(value) else None


@dataclass
class LayerFinding:
    """What is known of one layer.

    Attributes:
        facts: as they stand in the result.
        counts: tokens of each expert.
        tokens: seen by the layer.
        largest: largest |activation| of each expert's output.
        removed: experts that go, by ratio.
        error: by ratio, squared error of the block's output per token that the cut makes.
        refused: by ratio, why there is no such cut.
    """

    facts: dict[str, Any]
    counts: list[int]
    tokens: int
    largest: list[float]
    removed: dict[float, int] = field(default_factory=dict)
    error: dict[float, float] = field(default_factory=dict)
    refused: dict[float, str] = field(default_factory=dict)


class LayerAuditor:
    """Looks at every MoE layer of a walk once, and decides what its branches do there.

    Args:
        model: that is walked.
        views: what methods see.
        method: chooses and replaces experts; its plans only keep, replace and delete.
        masking: zeroes weights, or None if that is not tried.
        ratios: of experts.
        mask_ratio: of weights.
        part_of: for every observed batch, the part of the text that it belongs to.
        seed: of whatever is random.
        read: statistics that were collected before, by layer; None if this walk collects them.
    """

    def __init__(
        self,
        model: LayeredModel,
        views: Views,
        method: Method,
        masking: Method | None,
        ratios: Sequence[float],
        mask_ratio: float,
        part_of: Sequence[int],
        seed: int,
        read: Callable[[int], LayerStatistics] | None = None,
    ) -> None:
        self._model, self._views, self._method, self._masking = model, views, method, masking
        self._ratios, self._mask_ratio = ratios, mask_ratio
        self._part_of, self._seed, self._read = part_of, seed, read
        self._parts: dict[int, LayerStatistics] = {}
        self.found: dict[int, LayerFinding] = {}

    @property
    def kept(self) -> set[str]:
        """Accumulators of the parts of the text that choices are made from."""
        return {Routing.name, Outputs.name, *self._method.needs} - {TokenSample.name}

    def part(self, site: MoESite, index: int, statistics: LayerStatistics) -> None:
        """Keep the sums of one batch, as far as choices are made from them."""
        parts = {name: part for name, part in statistics.parts.items() if name in self.kept}
        small = LayerStatistics(statistics.shape, statistics.tokens, parts)
        number = self._part_of[index]
        if number in self._parts:
            self._parts[number].merge(small)
        else:
            self._parts[number] = deepcopy(small)  # the sums themselves are added up by the walk

    def decide(self, site: MoESite, statistics: LayerStatistics | None) -> dict[str, LayerPlan]:
        """Look at a layer and say what is tried there."""
        index = site.shape.layer
        if statistics is None:
            assert self._read is not None, "nothing was observed, and no statistics were read"
            statistics = self._read(index)
        block = LoadedBlock(self._model, site)
        view = replace(self._views.view(site, statistics), block=lambda: block)
        routing, outputs = statistics.part(Routing), statistics.part(Outputs)
        finding = LayerFinding(
            {}, routing.count_E.tolist(), statistics.tokens, outputs.max_E.tolist()
        )
        self.found[index] = finding
        edits = self._cuts(view, finding)
        finding.facts = {
            "layer": index,
            **_usage(statistics),
            "weights": self._weights(site),
            "outputs": _outputs(view, block),
            "stability": self._stability(view, edits),
        }
        self._parts = {}
        if self._masking is not None:
            context = Context(Budget(ratio=self._mask_ratio), self._seed)
            edits[MASK] = self._masking.plan_layer(view, context)
        return edits

    def _cuts(self, view: LayerView, finding: LayerFinding) -> dict[str, LayerPlan]:
        edits = {}
        statistics = view.need()
        for ratio in self._ratios:
            try:
                plan = self._method.plan_layer(view, Context(Budget(ratio=ratio), self._seed))
            except BudgetError as error:
                finding.refused[ratio] = error.problem
                continue
            squared = cut_error(plan, statistics.part(Routing), statistics.part(Outputs))
            finding.removed[ratio] = plan.experts - len(plan.keep)
            finding.error[ratio] = squared / max(1, statistics.tokens)
            if finding.removed[ratio]:
                edits[cut(ratio)] = plan
        return edits

    def _weights(self, site: MoESite) -> dict[str, Any] | None:
        count, loaded = site.shape.experts, LoadedExperts(site)
        step = max(1.0, count / COMPARED)
        some = [int(i * step) for i in range(min(count, COMPARED))]
        found = weight_redundancy(
            lambda expert, role: loaded.matrix(expert, role).cpu(),
            some,
            site.shape.roles,
            self._seed,
        )
        return None if found is None else {**asdict(found), "closest": list(found.closest)}

    def _stability(
        self, view: LayerView, edits: Mapping[str, LayerPlan]
    ) -> dict[str, dict[str, Any]] | None:
        """By ratio: how much the kept experts move under resampling, of the method and by count."""
        parts = [self._parts[number] for number in sorted(self._parts)]
        if len(parts) < 2:
            return None
        samples = resamples(parts, RESAMPLES, self._seed)
        found = {}
        for ratio in self._ratios:
            plan = edits.get(cut(ratio))
            if plan is None:
                continue
            choices = {
                self._method.name: self._chooser(view, ratio),
                "frequency": _by_count(len(plan.keep)),
            }
            found[f"{ratio:g}"] = {
                "chance": jaccard_by_chance(plan.experts, len(plan.keep)),
                **{
                    name: asdict(stability(view.need(), samples, choose))
                    for name, choose in choices.items()
                },
            }
        return found

    def _chooser(
        self, view: LayerView, ratio: float
    ) -> Callable[[LayerStatistics], tuple[int, ...]]:
        def keep(statistics: LayerStatistics) -> tuple[int, ...]:
            context = Context(Budget(ratio=ratio), self._seed)
            return self._method.plan_layer(replace(view, statistics=statistics), context).keep

        return keep


def _by_count(kept: int) -> Callable[[LayerStatistics], list[int]]:
    """Keep the experts that most tokens were routed to."""

    def keep(statistics: LayerStatistics) -> list[int]:
        counts, shape = statistics.part(Routing).count_E.tolist(), statistics.shape
        free = replace(shape, groups=1, top_groups=1)
        gone = lowest(list(map(float, counts)), counts, shape.experts - kept, free)
        return _others(shape.experts, gone)

    return keep


def _others(experts: int, gone: Iterable[int]) -> list[int]:
    left = set(gone)
    return [expert for expert in range(experts) if expert not in left]


def _usage(statistics: LayerStatistics) -> dict[str, Any]:
    routing, shape = statistics.part(Routing), statistics.shape
    counts = routing.count_E.tolist()
    return {
        "experts": shape.experts,
        "top_k": shape.top_k,
        "tokens": statistics.tokens,
        "counts": counts,
        "load_balance": load_balance(routing.top1_E),
        "dead": [expert for expert, count in enumerate(counts) if not count],
        "uncovered": sum(count < COVERED for count in counts),
    }


def _outputs(view: LayerView, block: LoadedBlock) -> dict[str, Any] | None:
    statistics = view.need()
    sample = statistics.parts.get(TokenSample.name)
    x_SH = sample.x_SH[:_SIMILAR_TOKENS] if isinstance(sample, TokenSample) else None
    found = output_similarity(
        statistics.part(Outputs).mean_EH,
        lambda expert, some_SH: block.outputs(expert, some_SH).cpu(),
        x_SH,
    )
    return None if found is None else asdict(found)
