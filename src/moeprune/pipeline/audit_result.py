"""The numbers of an audit, as they stand in ``moeprune.audit/1``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeprune.core.ops.prunability import tokens_wanted
from moeprune.core.ops.super_experts import super_experts
from moeprune.core.plan_diff import spearman
from moeprune.evaluation.damage import Damage
from moeprune.models.branches import Branch
from moeprune.pipeline.audit_layers import COVERED, MASK, LayerFinding, cut, finite

SHARE = 0.9
"""Of the experts, that should be covered."""

BALANCED = 0.5
"""Below this load-balance score a model counts as balanced here; its source names no number."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Cells:
    """Which branch of the walk stands for what.

    Attributes:
        branches: the edited versions of the model.
        ratios: of the experts.
        mask_ratio: of the weights, where they are zeroed.
        one: branch by layer and ratio, experts of that layer alone.
        every: branch by ratio, experts of all layers.
        masked: branch by layer, weights of that layer alone; None stands for all layers.
    """

    branches: list[Branch]
    ratios: tuple[float, ...]
    mask_ratio: float
    one: dict[tuple[int, float], int]
    every: dict[float, int]
    masked: dict[int | None, int]

    @classmethod
    def of(
        cls, layers: Sequence[int], ratios: tuple[float, ...], single: int, masked: int
    ) -> Cells:
        """All branches: at most ``single`` layers one at a time, ``masked`` of them by weights."""
        some = spread(layers, single)
        few = spread(some, masked)
        mask_ratio = min(ratios, key=lambda ratio: (abs(ratio - 0.5), ratio))
        one = {(layer, ratio): i for i, (layer, ratio) in enumerate(_pairs(some, ratios))}
        branches = [Branch({layer: cut(ratio)}) for layer, ratio in one]
        every = {ratio: len(branches) + i for i, ratio in enumerate(ratios)}
        branches += [Branch(dict.fromkeys(layers, cut(ratio))) for ratio in ratios]
        alone: dict[int | None, int] = {layer: len(branches) + i for i, layer in enumerate(few)}
        branches += [Branch({layer: MASK}) for layer in few]
        alone[None] = len(branches)
        branches.append(Branch(dict.fromkeys(layers, MASK)))
        return cls(branches, ratios, mask_ratio, one, every, alone)


def _pairs(layers: Sequence[int], ratios: Sequence[float]) -> list[tuple[int, float]]:
    return [(layer, ratio) for layer in layers for ratio in ratios]


def spread(layers: Sequence[int], most: int) -> list[int]:
    """At most so many of ``layers``, evenly, the first and the last among them."""
    if len(layers) <= most:
        return list(layers)
    if most < 2:
        return list(layers[:most])
    places = np.linspace(0, len(layers) - 1, most).round().astype(int)
    return [layers[i] for i in places]


def result_of(
    found: Mapping[int, LayerFinding],
    cells: Cells,
    damage: Damage,
    squares: Sequence[float],
    max_loss: float,
) -> Json:
    """Everything but what was asked for and the sentences.

    Args:
        found: by layer.
        cells, damage: what was tried, and what came of it.
        squares: by decoder layer, the mean squared norm of the state behind it.
        max_loss: the rise of the loss that is acceptable, nats per token.
    """
    supers = super_experts({layer: one.largest for layer, one in found.items()})
    streams = {
        (layer, ratio): error / squares[layer] if squares[layer] else math.nan
        for layer, one in found.items()
        for ratio, error in one.error.items()
    }
    scale, order = _predictor(streams, cells, damage)
    layers = {
        str(layer): {
            **one.facts,
            "super": sorted(supers.get(layer, ())),
            "damage": {
                f"{ratio:g}": _cell(one, ratio, streams.get((layer, ratio)), scale, cells, damage)
                if ratio in one.removed
                else {"refused": one.refused[ratio]}
                for ratio in cells.ratios
            },
        }
        for layer, one in sorted(found.items())
    }
    possible = [r for r in cells.ratios if all(r in one.removed for one in found.values())]
    return {
        "usage": _usage(found),
        "coverage": _coverage(found),
        "layers": layers,
        "predictor": {**order, "kl_per_unit": scale},
        "model_damage": {f"{r:g}": _whole(found, r, cells, damage) for r in possible},
        "recommendation": _recommendation(possible, cells, damage, max_loss),
        "advice": _advice(found, cells, damage),
    }


def _cell(
    one: LayerFinding,
    ratio: float,
    stream: float | None,
    scale: float | None,
    cells: Cells,
    damage: Damage,
) -> Json:
    layer = int(one.facts["layer"])
    branch = cells.one.get((layer, ratio))
    stream = None if stream is None else finite(stream)
    measured = None
    if branch is not None:
        measured = {
            "kl": damage.kl_interval(branch).to_json(),
            "loss": damage.loss(branch).interval().to_json(),
        }
    return {
        "removed": one.removed[ratio],
        "stream_error": stream,
        "kl_predicted": None if scale is None or stream is None else scale * stream,
        "measured": measured,
    }


def _predictor(
    streams: Mapping[tuple[int, float], float], cells: Cells, damage: Damage
) -> tuple[float | None, Json]:
    """KL per unit of stream error, and how well the two agree in order, over measured cells."""
    pairs = [
        (streams[cell], damage.kl(branch).value)
        for cell, branch in cells.one.items()
        if cell in streams
    ]
    pairs = [(x, kl) for x, kl in pairs if math.isfinite(x) and math.isfinite(kl)]
    ratios = [math.log(kl / x) for x, kl in pairs if x > 0 and kl > 0]
    scale = math.exp(float(np.median(ratios))) if ratios else None
    rho = spearman([x for x, _ in pairs], [kl for _, kl in pairs])
    return scale, {"cells": len(pairs), "spearman": rho}


def _whole(found: Mapping[int, LayerFinding], ratio: float, cells: Cells, damage: Damage) -> Json:
    branch = cells.every[ratio]
    alone = [damage.kl(b).value for (_, r), b in cells.one.items() if r == ratio]
    complete = len(alone) == len(found)
    return {
        "removed": sum(one.removed[ratio] for one in found.values()),
        "experts": sum(len(one.counts) for one in found.values()),
        "kl": damage.kl_interval(branch).to_json(),
        "loss": damage.loss(branch).interval().to_json(),
        "kl_sum_of_layers": finite(math.fsum(alone)) if complete else None,
    }


def _usage(found: Mapping[int, LayerFinding]) -> Json:
    score = float(np.mean([one.facts["load_balance"] for one in found.values()]))
    return {
        "load_balance": score,
        "balanced": score < BALANCED,
        "dead": sum(len(one.facts["dead"]) for one in found.values()),
        "experts": sum(len(one.counts) for one in found.values()),
    }


def _coverage(found: Mapping[int, LayerFinding]) -> Json:
    counts = {layer: one.counts for layer, one in found.items()}
    tokens = max(one.tokens for one in found.values())
    fewer = sum(count < COVERED for layer in counts.values() for count in layer)
    return {
        "tokens": tokens,
        "wanted": COVERED,
        "fewer": fewer,
        "share": fewer / sum(len(layer) for layer in counts.values()),
        "target_share": SHARE,
        "tokens_for_target": tokens_wanted(counts, tokens, COVERED, SHARE),
    }


def _recommendation(
    possible: Sequence[float], cells: Cells, damage: Damage, max_loss: float
) -> Json:
    """The largest ratio that stays below ``max_loss``, and whether it lies between those tried."""
    if not possible:
        return {"max_loss": max_loss, "ratio": None, "where": "unknown"}
    branches = [cells.every[ratio] for ratio in possible]
    found = damage.largest_ratio(branches, possible, max_loss)
    where = "between"
    if found.value >= possible[-1]:
        where = "above"
    elif found.value < possible[0]:
        where = "below"
    return {"max_loss": max_loss, "ratio": found.to_json(), "where": where}


def _advice(found: Mapping[int, LayerFinding], cells: Cells, damage: Damage) -> Json:
    """The founding paper's advice (arXiv 2410.12013) against what was measured here."""
    ratio = cells.mask_ratio
    balanced = _usage(found)["balanced"]
    result: Json = {
        "ratio": ratio,
        "threshold": BALANCED,
        "advised": "weights" if balanced else "experts",
        "layers": {},
        "model": None,
        "holds": None,
        "order": None,
    }
    if any(ratio not in one.removed for one in found.values()):
        return result
    for layer, branch in cells.masked.items():
        experts = cells.every[ratio] if layer is None else cells.one[layer, ratio]
        entry = {
            "experts": damage.kl_interval(experts).to_json(),
            "weights": damage.kl_interval(branch).to_json(),
            "difference": damage.kl_difference(experts, branch).interval().to_json(),
        }
        if layer is None:
            result["model"] = entry
        else:
            balance = found[layer].facts["load_balance"]
            result["layers"][str(layer)] = {"load_balance": balance, **entry}
    low, high = (result["model"]["difference"][end] for end in ("low", "high"))
    if low is not None and (low > 0 or high < 0):
        gentler = "weights" if low > 0 else "experts"
        result["holds"] = gentler == result["advised"]
    rows = result["layers"].values()
    result["order"] = spearman(
        [row["load_balance"] for row in rows], [row["difference"]["value"] for row in rows]
    )
    return result
