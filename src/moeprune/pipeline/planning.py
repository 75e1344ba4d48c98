"""Plans: a method, a budget and what is known about the model become a decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeprune.core.budget import Budget, next_multiple
from moeprune.core.constraints import Constraints
from moeprune.core.method import Context, LayerView, Method, make_method
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.residual import NAME as RESIDUAL
from moeprune.core.statistics import LayerStatistics
from moeprune.core.targets import Target
from moeprune.errors import DataError, MoepruneError
from moeprune.models import data
from moeprune.models.block import BlockLoader, LoadedBlock
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.checks import check_novices
from moeprune.models.counts import kernel_warnings
from moeprune.models.editing import Writing
from moeprune.models.layout import DiskExperts, DiskTensor, expert_layout, read_router
from moeprune.models.loading import LayeredModel
from moeprune.models.memory_edits import edit_in_memory
from moeprune.models.plan_weights import WeightsFolder
from moeprune.models.sites import MoESite
from moeprune.models.store import StatisticsStore, same_model, versions
from moeprune.models.walk import Walk
from moeprune.pipeline.asking import FixedExperts, accept, resolve
from moeprune.pipeline.calibration import observe
from moeprune.pipeline.inputs import (
    Compute,
    Progress,
    Source,
    Text,
    describe_model,
    model_name,
    read_calibration,
    silent,
)


def plan(
    source: Source,
    method: str | Method,
    budget: Budget | Target,
    statistics: Source | None = None,
    text: Text | None = None,
    options: Mapping[str, Any] | None = None,
    compute: Compute = Compute(),
    seed: int = 0,
    progress: Progress = silent,
    uniform: bool = False,
    constraints: Constraints = Constraints(),
    writing: Writing = Writing(),
    memo: dict[Any, Any] | None = None,
) -> Plan:
    """Decide what happens to every expert.

    A method that scores on calibration text reads ``statistics``; one that edits a layer before
    the next is observed (``sequential``) walks the model over ``text`` instead. With ``uniform``
    every layer keeps the same number, the mean of what the method would keep, rounded up. A
    ``Target`` is met by the least removal whose checkpoint, written as ``writing`` says, fits.
    Calls that differ in budget and seed alone may share a ``memo``: what a method found for one
    budget it need not find again.

    Raises:
        MoepruneError: anything the user can mend.
    """
    chosen = method if isinstance(method, Method) else make_method(method, options)
    accept(chosen, budget, constraints)
    if statistics is not None and chosen.sequential:
        raise MoepruneError(
            f"{chosen.name} edits each layer before it observes the next: no statistics fit that",
            f"leave out --statistics, or score the unpruned model with -o {chosen.unedited}",
        )
    checkpoint = Checkpoint.open(source, compute.trust_remote_code)
    model = compute.open(checkpoint)
    layout = expert_layout(model)
    warnings: list[str] = []
    shapes = {index: site.shape for index, site in model.sites.items()}
    read = statistics if chosen.needs or constraints.protect_super else None
    store = _statistics_of(checkpoint, model_name(source), read)
    facts: Mapping[str, Any] = {} if store is None else store.summary
    views = _Views(model, layout, store, progress)
    fixed = FixedExperts.of(constraints, shapes, store)

    def decide(budget: Budget, warn: Callable[[str], None]) -> dict[int, LayerPlan]:
        nonlocal facts
        asked = replace(context, budget=budget, warn=warn)
        if chosen.sequential:
            layers, facts = _plan_sequentially(chosen, model, views, asked, text, compute, progress)
            return layers
        layers = chosen.plan_model(views, asked)
        return _equalised(chosen, layers, views, asked) if uniform else layers

    context = Context(
        Budget(ratio=0.0),
        seed,
        progress=lambda done, total, what: progress(what, done, total),
        memo={} if memo is None else memo,
        store=WeightsFolder(model.dtype).store,
        pinned=fixed.staying,
        forbidden=fixed.forbidden,
    )
    asked_for: dict[str, Any] = {}
    if isinstance(budget, Target):
        budget, asked_for = resolve(
            budget, chosen, model, writing, lambda budget: decide(budget, lambda text: None)
        )
    layers = fixed.heeded(decide(budget, warnings.append), chosen.name)
    check_novices(model, layers)
    warnings += [*kernel_warnings(model, layers), *_table_warnings(layout, layers)]
    dropped: tuple[int, ...] = ()
    if RESIDUAL in chosen.needs:
        if store is None:
            raise MoepruneError(
                f"{chosen.name} needs the residual stream, and there are no statistics",
                f"run moeprune calibrate with --collect {RESIDUAL}, and give it as --statistics",
            )
        dropped = chosen.plan_depth(store.residual(), replace(context, budget=budget))
    result = Plan(
        layers=layers,
        method=chosen.name,
        options=chosen.options(),
        budget={
            **budget.to_json(),
            **({"uniform": True} if uniform else {}),
            **asked_for,
            **fixed.to_json(constraints.protect_super),
        },
        model=describe_model(model, model_name(source)),
        statistics=facts,
        seed=seed,
        warnings=tuple(dict.fromkeys(warnings)),  # a layer may be planned more than once
        versions=versions(),
        drop_layers=dropped,
    )
    result.check(shapes)
    return result


def _statistics_of(
    checkpoint: Checkpoint, name: str, statistics: Source | None
) -> StatisticsStore | None:
    if statistics is None:
        return None
    store = StatisticsStore.open(Path(statistics))
    same_model(store, checkpoint.fingerprint, name)
    return store


def _table_warnings(layout: Mapping[str, DiskTensor], layers: Mapping[int, LayerPlan]) -> list[str]:
    smaller = {index for index, layer in layers.items() if layer.unroutes}
    tables = {tensor.layer for tensor in layout.values() if tensor.role == "table"} & smaller
    if not tables:
        return []
    return [
        f"layers {', '.join(map(str, sorted(tables)))} choose experts by token id: entries of "
        "deleted experts are redirected to the least used of those that stay"
    ]


def _equalised(
    method: Method, layers: dict[int, LayerPlan], views: _Views, context: Context
) -> dict[int, LayerPlan]:
    """``layers``, or if they keep different numbers of experts, a plan that keeps their mean."""
    counts = [len(layer.keep) for layer in layers.values()]
    if len(set(counts)) == 1:
        return layers
    shape = min((view.shape for view in views), key=lambda shape: shape.experts)
    step = math.lcm(shape.groups, context.budget.multiple_of)
    keep = next_multiple(math.ceil(sum(counts) / len(counts)), step, shape)
    context.warn(
        f"{context.budget} keeps between {min(counts)} and {max(counts)} experts per layer; "
        f"made uniform: {keep} in every layer"
    )
    budget = Budget(keep=keep, multiple_of=context.budget.multiple_of)
    return method.per_layer().plan_model(views, replace(context, budget=budget))


def _plan_sequentially(
    method: Method,
    model: LayeredModel,
    views: _Views,
    context: Context,
    text: Text | None,
    compute: Compute,
    progress: Progress,
) -> tuple[dict[int, LayerPlan], dict[str, Any]]:
    if text is None:
        raise MoepruneError(
            f"{method.name} edits each layer before it observes the next, so it walks the model",
            f"give calibration text (--data), or -o {method.unedited} with --statistics",
        )
    domains = read_calibration(model.checkpoint, text)
    layers: dict[int, LayerPlan] = {}
    walks: list[Walk] = []
    dense: dict[int, LayerStatistics] = {}
    if method.compares:

        def keep(site: MoESite, statistics: LayerStatistics) -> bool:
            dense[site.shape.layer] = statistics
            return False

        observe(model, domains, compute, method.compares, keep, progress)

    def visit(site: MoESite, statistics: LayerStatistics) -> bool:
        block = LoadedBlock(model, site)  # the walk has the layer in memory
        view = replace(
            views.view(site, statistics),
            block=lambda: block,
            again=lambda needs, limit: walks[0].observe_parts(site, needs, limit),
            dense=dense.get(site.shape.layer),
        )
        layer = method.plan_layer(view, context)
        layers[site.shape.layer] = layer
        edit_in_memory(model, site, layer)
        return True

    observe(model, domains, compute, method.observes, visit, progress, opened=walks.append)
    described = {**data.describe(domains), "seed": text.seed}
    return layers, {"data": described, "dtype": str(model.dtype).removeprefix("torch.")}


class _Views:
    """One ``LayerView`` after another; can be iterated more than once."""

    def __init__(
        self,
        model: LayeredModel,
        layout: Mapping[str, DiskTensor],
        store: StatisticsStore | None,
        progress: Progress,
    ) -> None:
        self._model, self._layout, self._store = model, dict(layout), store
        self._progress = progress
        self._loader = BlockLoader(model)

    def view(self, site: MoESite, statistics: LayerStatistics | None) -> LayerView:
        experts = DiskExperts(self._model.checkpoint, self._layout, site)
        return LayerView(
            site.shape,
            statistics,
            experts,
            block=lambda: self._loader.block(site),
            router=lambda: read_router(self._model.checkpoint, self._layout, site.shape.layer),
        )

    def __iter__(self) -> Iterator[LayerView]:
        for number, (index, site) in enumerate(sorted(self._model.sites.items())):
            statistics = None if self._store is None else self._store.layer(index)
            if statistics is not None and statistics.shape != site.shape:
                raise DataError(f"the statistics of layer {index} are of another shape of layer")
            yield self.view(site, statistics)
            self._progress("planning", number + 1, len(self._model.sites))
        self._loader.close()
