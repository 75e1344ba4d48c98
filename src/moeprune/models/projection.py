"""Statistics of a model turned into those of the model that a plan makes of it, without a walk.

Sums over the tokens of an expert that stays are sliced out. That is exact as a slice and no more:
the tokens are those that the model before routed to that expert. What the smaller model would
route elsewhere, and what its earlier layers would change in the inputs, was not observed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moeprune.core.accumulators import Accumulator
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.shapes import LayerShape
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import MoepruneError
from moeprune.files import json_bytes, sha256_bytes
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.store import PathLike, StatisticsStore, writing_statistics

_AGAIN = "use statistics: recompute"


def project_layer(
    statistics: LayerStatistics, plan: LayerPlan, shape: LayerShape
) -> LayerStatistics:
    """The sums of the experts that ``plan`` keeps, in their new order.

    Every axis of experts is indexed; the names of the fields say which those are.

    Args:
        statistics: of the layer before.
        plan: what happens to it; only deleted experts and masks can be projected.
        shape: of the layer after.

    Raises:
        MoepruneError: the edit is not one whose statistics are a slice.
    """
    before = statistics.shape
    same = (before.hidden, before.intermediate) == (shape.hidden, shape.intermediate)
    other = plan.replaced or plan.rebuilds or plan.answers or plan.router_CE is not None
    if other or len(plan.keep) != shape.experts or not same:
        raise MoepruneError(
            f"layer {plan.layer}: statistics can be projected only where experts are deleted or "
            "masked",
            _AGAIN,
        )
    keep = torch.tensor(plan.keep)
    parts: dict[str, Accumulator] = {}
    for name, part in statistics.parts.items():
        fields = {}
        for field, tensor in part.tensors():
            sliced = tensor
            for axis, letter in enumerate(field.rpartition("_")[2]):
                if letter == "E":
                    sliced = sliced.index_select(axis, keep)
            fields[field] = sliced
        parts[name] = type(part)(**fields)
    return LayerStatistics(shape, statistics.tokens, parts)


def project_statistics(
    source: PathLike, plan: Plan, checkpoint: PathLike, out: PathLike, trust: bool = False
) -> StatisticsStore:
    """Statistics for ``checkpoint``, which ``plan`` made of the model that ``source`` observed.

    The manifest says so: ``data.projected`` holds the hashes of the statistics and of the plan.

    Raises:
        MoepruneError: an edit whose statistics are no slice.
    """
    store = StatisticsStore.open(Path(source))
    model = LayeredModel(Checkpoint.open(checkpoint, trust))
    if sorted(model.sites) != store.layers:
        raise MoepruneError("statistics cannot be projected where layers were removed", _AGAIN)
    manifest = store.manifest
    shape = next(iter(model.sites.values())).shape
    described: Mapping[str, Any] = {
        **manifest["model"],
        "name": Path(checkpoint).name,
        "fingerprint": model.checkpoint.fingerprint,
        "experts": shape.experts,
    }
    plan_hash = sha256_bytes(json_bytes(plan.to_json(None)))
    history = [*manifest["data"].get("projected", ()), [store.summary["sha256"], plan_hash]]
    header = {
        "model": described,
        "data": {**manifest["data"], "projected": history},
        "dtype": manifest["dtype"],
        "collect": manifest["collect"],
    }
    with writing_statistics(Path(out), header) as save_layer:
        for index, site in sorted(model.sites.items()):
            before = store.layer(index)
            whole = LayerPlan(index, before.shape.experts, tuple(range(before.shape.experts)))
            save_layer(project_layer(before, plan.layers.get(index, whole), site.shape))
    return StatisticsStore.open(Path(out))
