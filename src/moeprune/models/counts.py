"""How many experts each layer of the new checkpoint holds, and where its config.json says so.

Stock classes build every layer with one number. Layers of different sizes are either padded, where
the router has a bias that keeps a pad from ever being chosen, or written as they are, with
``per_layer_config`` in config.json and a generated class that resizes the layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import PlanError, UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.sites import count_key

Slots = tuple[int | None, ...]
"""The old expert of each new one, in order; None is a pad."""

PAD_BIAS = -1e9
"""A pad's router bias: no sum of scores reaches it, and unlike -inf it survives arithmetic."""


def kept_counts(shapes: Mapping[int, LayerShape], plan: Plan) -> dict[int, int]:
    """Experts that each layer's router selects among after ``plan``."""
    return {
        index: shape.experts
        - (
            len(plan.layers[index].dropped)
            if index in plan.layers and plan.layers[index].unroutes
            else 0
        )
        for index, shape in shapes.items()
    }


def refuse_uneven(model: LayeredModel, counts: Mapping[int, int], pad: bool) -> None:
    """Raise unless layers of these sizes can be written for this model, padded if ``pad``.

    Raises:
        PlanError: the layers differ and the family cannot express that; the hint says what can.
    """
    least, most = min(counts.values()), max(counts.values())
    if least == most:
        return
    kind = text_config(model.config).model_type
    said = f"the plan keeps between {least} and {most} experts per layer"
    equal = f"plan with --uniform or --keep {least}"
    if pad and kind not in quirks.PADDABLE:
        raise PlanError(
            f"{said}; padding is not exact for {kind}: its router has no bias that is added to "
            "independent scores before the top-k",
            f"leave out --pad (the result then needs trust_remote_code or moeprune), or {equal}",
        )
    if not pad and kind in quirks.UNEVEN_REFUSED:
        more = " or apply with --pad" if kind in quirks.PADDABLE else ""
        raise PlanError(f"{said}; {kind} cannot: {quirks.UNEVEN_REFUSED[kind]}", equal + more)


def kernel_warnings(model: LayeredModel, layers: Mapping[int, LayerPlan]) -> list[str]:
    """Sentences for the user where a server's kernels know certain numbers of experts only."""
    kind = text_config(model.config).model_type
    known = quirks.KERNEL_COUNTS.get(kind, frozenset())
    counts = {layer.experts - len(layer.dropped) for layer in layers.values() if layer.unroutes}
    odd = sorted(counts - known)
    if not known or not odd:
        return []
    return [
        f"vLLM's router kernel for {kind} knows {', '.join(map(str, sorted(known)))} experts, not "
        f"{', '.join(map(str, odd))}: the result opens in transformers only"
    ]


def padded_slots(keep: tuple[int, ...], shape: LayerShape, count: int) -> Slots:
    """``keep`` with pads to ``count`` experts; with routing groups each is padded at its end."""
    slots: list[int | None] = []
    for group in range(shape.groups):
        inside = [e for e in keep if shape.group_of(e) == group]
        slots += [*inside, *[None] * (count // shape.groups - len(inside))]
    return tuple(slots)


def set_counts(model: LayeredModel, counts: Mapping[int, int]) -> dict[str, Any]:
    """A copy of config.json in which layer ``i`` has ``counts[i]`` experts.

    Raises:
        UnsupportedModelError: the number of experts is not where it should be.
    """
    config = copy.deepcopy(model.checkpoint.config)
    before = {index: site.shape.experts for index, site in model.sites.items()}
    if before == dict(counts):
        return config
    most = max(counts.values())
    part = _set_expert_count(config, max(before.values()), most)
    smaller = {index: count for index, count in sorted(counts.items()) if count != most}
    if text_config(model.config).model_type in quirks.OWN_COUNTS:
        part.pop("experts_per_layer", None)
        if smaller:
            part["experts_per_layer"] = {str(index): count for index, count in smaller.items()}
        return config
    if not smaller and "per_layer_config" not in part:
        return config
    key = count_key(model.config)
    entries = {int(i): dict(e) for i, e in (part.pop("per_layer_config", None) or {}).items()}
    for index in counts:
        entries.setdefault(index, {}).pop(key, None)
    for index, count in smaller.items():
        entries[index][key] = count
    if any(entries.values()):
        part["per_layer_config"] = {str(i): entries[i] for i in sorted(entries) if entries[i]}
    if smaller:
        # transformers refuses to read the one number of such a configuration otherwise
        part["allow_global_per_layer_attribute_access"] = True
    return config


def _set_expert_count(config: dict[str, Any], before: int, after: int) -> dict[str, Any]:
    """Returns the part of the configuration that holds the number."""
    # with towers, what counts is the language model's part
    for part in (config.get("text_config"), config, config.get("ffn_config")):
        if not isinstance(part, dict):
            continue
        keys = [key for key in quirks.EXPERT_COUNT_KEYS if key in part]
        if keys and all(part[key] == before for key in keys):
            part.update(dict.fromkeys(keys, after))
            return part
    raise UnsupportedModelError(
        f"config.json does not say {before} experts under any of "
        f"{', '.join(quirks.EXPERT_COUNT_KEYS)}"
    )
