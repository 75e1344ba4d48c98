"""Plans: a method, a budget and what is known about the model become a decision."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moeprune.core.budget import Budget
from moeprune.core.constraints import Constraints
from moeprune.core.method import Context, Method, make_method
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.residual import NAME as RESIDUAL
from moeprune.core.targets import Target
from moeprune.errors import BudgetError, MoepruneError, PlanError, UnsupportedModelError
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.checks import check_novices
from moeprune.models.counts import kernel_warnings
from moeprune.models.editing import Writing
from moeprune.models.layout import DiskTensor, expert_layout
from moeprune.models.plan_weights import WeightsFolder
from moeprune.models.store import (
    StatisticsStore,
    read_plan,
    refuse_existing_plan,
    same_model,
    versions,
    write_plan,
)
from moeprune.pipeline.asking import FixedExperts, accept, resolve
from moeprune.pipeline.deciding import Decider
from moeprune.pipeline.inputs import (
    Compute,
    Note,
    Progress,
    Source,
    Text,
    code_of,
    describe_model,
    model_name,
    say,
    silent,
)
from moeprune.pipeline.sharing import drop_others, kept_by
from moeprune.pipeline.views import Views
from moeprune.work import refuse_finished, work_folder

STAGE = "plan"


def plan(  # noqa: PLR0913  (what decides a plan, and where it goes)
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
    out: Source | None = None,
    force: bool = False,
    note: Note = say,
) -> Plan:
    """Decide what happens to every expert.

    A method that scores on calibration text reads ``statistics``; one that edits a layer before
    the next is observed (``sequential``) walks the model over ``text`` instead. With ``uniform``
    every layer keeps the same number, the mean of what the method would keep, rounded up. A
    ``Target`` is met by the least removal whose checkpoint, written as ``writing`` says, fits.
    Calls that differ in budget and seed alone may share a ``memo``: what a method found for one
    budget it need not find again.

    With ``out`` the plan is written there, replacing another one if ``force``; what is decided is
    kept in ``<out>.plan`` until it is, and the same call goes on from it.

    Raises:
        MoepruneError: anything the user can mend.
    """
    ranks = compute.ranks
    if out is not None and ranks.first:
        refuse_finished(Path(out), STAGE, force=force, refuse=refuse_existing_plan)
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
    with ExitStack() as stack:
        if out is not None:
            identity = _identity(decider, budget, store, fixed.to_json(constraints.protect_super))
            place = kept_by(Path(out), STAGE, ranks, {**identity, "writing": asdict(writing)})
            decider.folder = stack.enter_context(work_folder(*place, force, note))
            force = force or decider.folder.announced
            if ranks.first:
                refuse_existing_plan(out, force)
        try:
            result = _decided(
                decider, budget, fixed, store, model_name(source), constraints.protect_super,
                writing,
            )  # fmt: skip
        except (BudgetError, PlanError, UnsupportedModelError):
            if (folder := decider.folder) is not None:
                for name in folder.names():  # the same question would fail again
                    folder.remove(name)
            raise
        if out is not None and decider.folder is not None and ranks.first:
            refuse_existing_plan(out, force)  # hours may have passed
            decider.folder.announce()
            write_plan(result, out, force)
            if any(layer.stored is not None for layer in result.layers.values()):
                result = read_plan(out)  # matrices that were kept go with their folder
        ranks.barrier()  # what the others keep is needed until then
    if out is not None and ranks.first:
        drop_others(Path(out), STAGE)
    return result


def _identity(
    decider: Decider, budget: Budget | Target, store: StatisticsStore | None, fixed: dict[str, Any]
) -> dict[str, Any]:
    """What decides a plan, for ``work_folder``."""
    method, model = decider.method, decider.model
    read = data.describe(decider.domains) if method.sequential else {}
    return {
        "model": model.checkpoint.fingerprint,
        "code": code_of(model.checkpoint),
        "method": method.name,
        "options": method.options(),
        "budget": budget.to_json() if isinstance(budget, Budget) else asdict(budget),
        "constraints": fixed,
        "uniform": decider.uniform,
        "statistics": None if store is None else store.summary["sha256"],
        "text": read.get("hash"),
        "length": read.get("length"),
        "seed": decider.context.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": versions(),
    }


def _decided(
    decider: Decider,
    budget: Budget | Target,
    fixed: FixedExperts,
    store: StatisticsStore | None,
    name: str,
    protect_super: bool,
    writing: Writing,
) -> Plan:
    chosen, model = decider.method, decider.model
    layout = expert_layout(model)
    asked_for: dict[str, Any] = {}
    if isinstance(budget, Target):
        budget, asked_for = resolve(
            budget, chosen, model, writing, lambda tried: decider.layers(tried, lambda text: None)
        )
    warnings: list[str] = []
    layers = fixed.heeded(decider.layers(budget, warnings.append), chosen.name)
    check_novices(model, layers)
    warnings += [*kernel_warnings(model, layers), *_table_warnings(layout, layers)]
    context = replace(decider.context, budget=budget, warn=warnings.append)
    dropped = _dropped_layers(chosen, store, context)
    result = Plan(
        layers=layers,
        method=chosen.name,
        options=chosen.options(),
        budget={
            **budget.to_json(),
            **({"uniform": True} if decider.uniform else {}),
            **asked_for,
            **fixed.to_json(protect_super),
        },
        model=describe_model(model, name),
        statistics=decider.facts if store is None else store.summary,
        seed=context.seed,
        warnings=tuple(dict.fromkeys(warnings)),  # a layer may be planned more than once
        versions=versions(),
        drop_layers=dropped,
    )
    result.check({index: site.shape for index, site in model.sites.items()})
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
