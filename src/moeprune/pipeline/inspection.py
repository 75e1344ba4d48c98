"""What a checkpoint is, without reading its weights."""

from __future__ import annotations

from typing import Any

from moeprune.errors import MoepruneError
from moeprune.models.attached import KEEP_PRUNED, find_attached
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.layout import expert_layout, refuse
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.quantised import parameters
from moeprune.pipeline.inputs import Source, model_name


def inspect(source: Source) -> dict[str, Any]:
    """What a checkpoint is, without reading its weights."""
    checkpoint = Checkpoint.open(source)
    model = LayeredModel(checkpoint)
    heads: list[str] = []
    try:
        refuse(model)
        heads = sorted(find_attached(model, expert_layout(model), KEEP_PRUNED, False).heads)
        reason = None
    except MoepruneError as error:
        reason = error.problem
    if not model.sites and reason is not None and "dense" in reason:
        refuse(model)
    facts: dict[str, Any] = {
        "name": model_name(source),
        "path": str(checkpoint.path),
        "architecture": (checkpoint.config.get("architectures") or ["?"])[0],
        "model_type": text_config(model.config).model_type,
        "layers": len(model.layers),
        "moe_layers": sorted(model.sites),
        "parameters": (numel := parameters(checkpoint)),
        "bytes": checkpoint.nbytes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantisation.method,
        "fingerprint": checkpoint.fingerprint,
        "attached": heads,
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
            "active_parameters": numel - idle,
        }
    return facts
