"""What kind of thing a plan removes; read off the plan, so that it holds for any method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeprune.core.method import Method

DROPPING, NOVICES, MERGING = "dropping", "novices", "merging"
INSIDE, LAYERS, MIXED = "inside", "layers", "mixed"

KINDS = {
    DROPPING: "experts",
    NOVICES: "experts, by constants",
    MERGING: "experts, by merging",
    INSIDE: "weights",
    LAYERS: "layers",
    MIXED: "experts, weights",
}
"""By kind, what a ratio counts."""

_LAYER_WORDS = ("skipped", "removed_layers", "dropped_layers")
_MERGE_WORDS = ("merged", "merge", "groups", "clusters", "mixed", "sources")
_INSIDE_WORDS = (
    "mask", "neurons", "narrow", "narrowed", "width", "widths", "channels", "low_rank", "ranks",
)  # fmt: skip


def kind_of(plan: Mapping[str, Any], method: Method) -> str:
    """The kind of a plan in JSON, unless the method says it itself."""
    if method.kind is not None and method.kind in KINDS:
        return method.kind
    layers = [entry for entry in plan["layers"].values() if isinstance(entry, dict)]
    if any(plan.get(word) or any(entry.get(word) for entry in layers) for word in _LAYER_WORDS):
        return LAYERS
    if any(entry.get(word) for entry in layers for word in _MERGE_WORDS):
        return MERGING
    if any(entry["replaced"] for entry in layers):
        return NOVICES
    gone = any(len(entry["keep"]) < entry["experts"] for entry in layers)
    inside = any(entry.get(word) for entry in layers for word in _INSIDE_WORDS)
    if gone:
        return MIXED if inside else DROPPING
    return INSIDE if inside or method.changes is not None else DROPPING


def removes(kind: str, plan: Mapping[str, Any], method: Method) -> str:
    """What the method's ratio is a fraction of, for the table."""
    if method.removes is not None:
        return method.removes
    if kind == INSIDE and not any("mask" in entry for entry in plan["layers"].values()):
        return "neurons"
    return KINDS[kind]
