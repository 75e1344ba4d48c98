"""Where config.json says which experts are novices, and what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeprune.core.plan import Plan
from moeprune.errors import PlanError
from moeprune.models.sites import MoESite


def set_novices(config: dict[str, Any], sites: Mapping[int, MoESite], plan: Plan) -> None:
    """List the replaced experts of ``plan`` in ``config``, and the rank of their maps if any.

    Raises:
        PlanError: maps of different ranks; a configuration says one.
    """
    text = config.get("text_config")  # with towers, the language model's part
    part = text if isinstance(text, dict) else config
    replaced = {index: layer for index, layer in sorted(plan.layers.items()) if layer.replaced}
    part["approximate_experts"] = {str(i): list(layer.replaced) for i, layer in replaced.items()}
    ranks = {
        (layer.novices_NH.shape[1] // sites[index].shape.hidden - 1) // 2
        for index, layer in replaced.items()
        if layer.novices_NH is not None
    }
    if len(ranks) > 1:
        raise PlanError(
            f"the plan replaces experts by maps of ranks {', '.join(map(str, sorted(ranks)))}",
            "plan with one rank for all layers",
        )
    part.pop("approximate_rank", None)
    if ranks != {0}:
        part["approximate_rank"] = ranks.pop()
