"""Whether a plan can be carried out on a model; asked before the first byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moeprune.core.budget import least_kept
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import PlanError, UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.counts import (
    kept_counts,
    refuse_uneven,
)
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.width import new_width


def check_plan(model: LayeredModel, plan: Plan, pad: bool = False) -> None:
    """Raise ``PlanError`` unless ``plan`` was made for this model and can be carried out on it."""
    fingerprint = plan.model.get("fingerprint")
    if fingerprint != model.checkpoint.fingerprint:
        raise PlanError(
            f"the plan was made for another model ({plan.model.get('name')}, "
            f"fingerprint {str(fingerprint)[:12]}) than {model.checkpoint.path.name} "
            f"({model.checkpoint.fingerprint[:12]})",
            "plan again for this model, or give the model that the plan names",
        )
    shapes = {index: site.shape for index, site in model.sites.items()}
    plan.check(shapes)
    _check_depth(model, plan)
    check_novices(model, plan.layers)
    for index, shape in shapes.items():
        layer = plan.layers.get(index)
        if layer is not None and layer.replaced and not layer.keep:
            raise PlanError(
                f"plan, layer {index}: all experts are replaced by constants",
                "keep the weights of at least one expert in every layer",
            )
        if layer is not None and layer.unroutes:
            _check_router(layer, shape)
        if layer is not None and layer.stored is not None:
            _check_stored(layer, shape)
    new_width(model, plan.layers)
    refuse_uneven(model, kept_counts(shapes, plan), pad)


def _check_depth(model: LayeredModel, plan: Plan) -> None:
    dropped, layers = plan.drop_layers, len(model.layers)
    if not dropped:
        return
    if list(dropped) != sorted(set(dropped)) or not 0 <= dropped[0] <= dropped[-1] < layers:
        raise PlanError(f"plan: 'drop_layers' must be ascending ids of {layers} decoder layers")
    if len(dropped) == layers:
        raise PlanError("plan: 'drop_layers' leaves no layer", "keep at least one")
    whole = {
        index: LayerPlan(index, p.experts, tuple(range(p.experts)), scores=p.scores)
        for index, p in plan.layers.items()
    }
    if any(replace(p, notes=()) != whole[index] for index, p in plan.layers.items()):
        raise PlanError(
            "a plan that drops layers cannot edit the experts of others",
            "make it two steps: apply one, plan the other for the result",
        )


def check_novices(model: LayeredModel, layers: Mapping[int, LayerPlan]) -> None:
    """Raise ``UnsupportedModelError`` if this family's experts cannot become or have constants."""
    kind = text_config(model.config).model_type
    reason = quirks.NOVICES_REFUSED.get(kind)
    if reason is not None and any(layer.answers for layer in layers.values()):
        raise UnsupportedModelError(
            f"experts of {kind} cannot answer for others, nor have constants in their outputs: "
            f"{reason}",
            "delete experts instead (moeits), or zero weights (moe-pruner)",
        )
    if reason is not None and any(layer.replaced for layer in layers.values()):
        raise UnsupportedModelError(
            f"experts of {kind} cannot be replaced by constants: {reason}",
            "delete experts instead (moeits), or zero weights (moe-pruner)",
        )


def _check_router(layer: LayerPlan, shape: LayerShape) -> None:
    where = f"plan, layer {layer.layer}"
    if layer.replaced:
        raise PlanError(f"{where}: deleting and replacing experts cannot be mixed")
    remain, least = len(layer.keep), least_kept(shape)
    if remain < least:
        raise PlanError(f"{where}: {remain} experts remain, its router needs {least}")
    per_group = [sum(shape.group_of(e) == g for e in layer.keep) for g in range(shape.groups)]
    if len(set(per_group)) > 1:
        raise PlanError(
            f"{where}: {per_group} experts remain in the {shape.groups} routing groups",
            "keep the same number in every group",
        )


def _check_stored(layer: LayerPlan, shape: LayerShape) -> None:
    where = f"plan, layer {layer.layer}"
    assert layer.stored is not None
    width = layer.width(shape.intermediate)
    for role in layer.stored.roles:
        if role not in shape.roles:
            raise PlanError(f"{where}: this model's experts have no {role!r} matrix")
        wanted = (shape.hidden, width) if role == "down" else (width, shape.hidden)
        for expert in layer.keep:
            found = layer.stored.shape(expert, role)
            if found != wanted:
                raise PlanError(
                    f"{where}: the {role!r} matrix that the plan brings for expert {expert} is "
                    f"{list(found)}, not {list(wanted)}"
                )
