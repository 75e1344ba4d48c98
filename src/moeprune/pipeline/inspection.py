"""What a checkpoint is, without reading its weights."""

from __future__ import annotations

from typing import Any

from moeprune.errors import MoepruneError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.layout import expert_layout, refuse
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.pipeline.inputs import Source, model_name


def inspect(source: Source, trust_remote_code: bool = False) -> dict[str, Any]:
    """What a checkpoint is, without reading its weights."""
    checkpoint = Checkpoint.open(source, trust_remote_code)
    model = LayeredModel(checkpoint)
    try:
        refuse(model)
        expert_layout(model)
        reason = None
    except MoepruneError as error:
        reason = error.problem
    if not model.sites and reason is not None and "dense" in reason:
        refuse(model)
    facts: dict[str, Any] = {
        "name": model_name(source),
        "path": str(checkpoint.path),
        "architecture": _architecture(checkpoint),
        "model_type": text_config(model.config).model_type,
        "layers": len(model.layers),
        "moe_layers": sorted(model.sites),
        "parameters": checkpoint.numel,
        "bytes": checkpoint.nbytes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": checkpoint.fingerprint,
        "supported": reason is None,
        "reason": reason,
    }
    if model.sites:
        shapes = [site.shape for site in model.sites.values()]
        routed = sum(shape.experts * shape.expert_parameters for shape in shapes)
        idle = sum((shape.experts - shape.top_k) * shape.expert_parameters for shape in shapes)
        facts |= {
            "experts": shapes[0].experts,
            "top_k": shapes[0].top_k,
            "groups": shapes[0].groups,
            "hidden": shapes[0].hidden,
            "intermediate": shapes[0].intermediate,
            "expert_parameters": routed,
            "active_parameters": checkpoint.numel - idle,
        }
    return facts


def _architecture(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else "?"
