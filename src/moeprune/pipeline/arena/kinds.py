"""What kind of thing a plan removes; read off the plan, so that it holds for any method."""

from __future__ import annotations

from moeprune.core.method import Method
from moeprune.core.plan import Plan

DROPPING, NOVICES, MERGING = "dropping", "novices", "merging"
INSIDE, LAYERS, MIXED = "inside", "layers", "mixed"


def kind_of(plan: Plan, method: Method) -> str:
    """Dropping, novices, merging, inside, layers or, where experts and weights go, mixed."""
    layers = plan.layers.values()
    if plan.drop_layers:
        return LAYERS
    if any(layer.replaced for layer in layers):
        return NOVICES
    gone = any(layer.dropped for layer in layers)
    if gone and any(layer.neurons is not None or layer.served_by for layer in layers):
        return MERGING
    inside = any(layer.mask is not None or layer.rebuilds for layer in layers)
    if gone:
        return MIXED if inside else DROPPING
    return INSIDE if inside or method.changes is not None else DROPPING


def removes(plan: Plan, method: Method) -> str:
    """What a ratio is a fraction of, for the table."""
    if not method.chooses_experts and "keep" in method.budgets:
        return method.keeps
    return {
        DROPPING: "experts",
        NOVICES: "experts, by constants",
        MERGING: "experts, by merging",
        INSIDE: "weights",
        LAYERS: "layers",
        MIXED: "experts, weights",
    }[kind_of(plan, method)]
