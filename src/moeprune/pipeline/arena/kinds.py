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
_PLAIN = frozenset(
    ("experts", "keep", "replaced", "novice_rows", "scores", "notes", "method", "layer")
)


def kind_of(plan: Mapping[str, Any], method: Method) -> str:
    """The kind of a plan in JSON; a method may say it itself as a class attribute ``kind``."""
    declared = getattr(method, "kind", None)
    if isinstance(declared, str) and declared in KINDS:
        return declared
    layers = [entry for entry in plan["layers"].values() if isinstance(entry, dict)]
    if any(plan.get(word) or any(entry.get(word) for entry in layers) for word in _LAYER_WORDS):
        return LAYERS
    if any(entry.get(word) for entry in layers for word in _MERGE_WORDS):
        return MERGING
    if any(entry["replaced"] for entry in layers):
        return NOVICES
    gone = any(len(entry["keep"]) < entry["experts"] for entry in layers)
    inside = any(value for entry in layers for name, value in entry.items() if name not in _PLAIN)
    if gone:
        return MIXED if inside else DROPPING
    return INSIDE if inside or method.changes is not None else DROPPING


def removes(kind: str, plan: Mapping[str, Any], method: Method) -> str:
    """What the method's ratio is a fraction of, for the table; it may say so as ``removes``."""
    declared = getattr(method, "removes", None)
    if isinstance(declared, str):
        return declared
    if kind == INSIDE and not any("mask" in entry for entry in plan["layers"].values()):
        return "neurons"
    return KINDS[kind]
