"""Plans: a method, a budget and what is known about the model become a decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeprune.core.budget import Budget
from moeprune.core.constraints import Constraints
from moeprune.core.method import Context, Method, make_method
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.residual import NAME as RESIDUAL
from moeprune.core.targets import Target
from moeprune.errors import MoepruneError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.checks import check_novices
from moeprune.models.counts import kernel_warnings
from moeprune.models.editing import Writing
from moeprune.models.layout import DiskTensor, expert_layout
from moeprune.models.plan_weights import WeightsFolder
from moeprune.models.store import StatisticsStore, same_model, versions
from moeprune.pipeline.asking import FixedExperts, accept, resolve
from moeprune.pipeline.deciding import Decider
from moeprune.pipeline.inputs import (
    Compute,
    Progress,
    Source,
    Text,
    describe_model,
    model_name,
    silent,
)
from moeprune.pipeline.views import Views


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
    shapes = {index: site.shape for index, site in model.sites.items()}
    read = statistics if chosen.needs or constraints.protect_super else None
    store = _statistics_of(checkpoint, model_name(source), read)
    fixed = FixedExperts.of(constraints, shapes, store)
    context = Context(
        Budget(ratio=0.0),
        seed,
        progress=lambda done, total, what: progress(what, done, total),
        memo={} if memo is None else memo,
        store=WeightsFolder(model.dtype).store,
        pinned=fixed.staying,
        forbidden=fixed.forbidden,
    )
    views = Views(model, layout, store, progress)
    decider = Decider(chosen, model, views, context, text, compute, progress, uniform)
    asked_for: dict[str, Any] = {}
    if isinstance(budget, Target):
        budget, asked_for = resolve(
            budget, chosen, model, writing, lambda tried: decider.layers(tried, lambda text: None)
        )
    warnings: list[str] = []
    layers = fixed.heeded(decider.layers(budget, warnings.append), chosen.name)
    check_novices(model, layers)
    warnings += [*kernel_warnings(model, layers), *_table_warnings(layout, layers)]
    context = replace(context, budget=budget, warn=warnings.append)
    dropped = _dropped_layers(chosen, store, context)
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
        statistics=decider.facts if store is None else store.summary,
        seed=seed,
        warnings=tuple(dict.fromkeys(warnings)),  # a layer may be planned more than once
        versions=versions(),
        drop_layers=dropped,
    )
    result.check(shapes)
    return result


def _dropped_layers(
    method: Method, store: StatisticsStore | None, context: Context
) -> tuple[int, ...]:
    """Decoder layers that go as a whole."""
    if RESIDUAL not in method.needs:
        return ()
    if store is None:
        raise MoepruneError(
            f"{method.name} needs the residual stream, and there are no statistics",
            f"run moeprune calibrate with --collect {RESIDUAL}, and give it as --statistics",
        )
    return method.plan_depth(store.residual(), context)


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
