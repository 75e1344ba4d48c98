"""Two plans side by side: which experts both keep, and how alike their scores rank them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeprune.core.plan import LayerPlan, Plan
from moeprune.errors import PlanError

FORMAT = "moeprune.plan-diff/1"


def plan_diff(one: Plan, two: Plan) -> dict[str, Any]:
    """What two plans for models of the same shape decide differently, as JSON types.

    Per layer: experts kept (with their weights) by both, by the first alone, by the second alone;
    ``jaccard``, their number in both divided by their number in either; ``spearman``, by score
    name, the rank correlation over experts of scores that both plans have (None where one of them
    is the same for all experts). ``all`` sums the counts, and takes the means of the correlations.
    ``differs`` lists method, seed, options, budget, model and statistics where they are not equal,
    as pairs (None: not there).

    Raises:
        PlanError: the plans speak of other layers or numbers of experts.
    """
    if set(one.layers) != set(two.layers):
        other = sorted(set(one.layers) ^ set(two.layers))
        raise PlanError(f"only one of the plans speaks of layer {other[0]}")
    layers = {index: _layer(one.layers[index], two.layers[index]) for index in sorted(one.layers)}
    totals = {
        name: sum(len(layer[name]) for layer in layers.values())
        for name in ("both", "only_first", "only_second")
    }
    names = sorted({name for layer in layers.values() for name in layer["spearman"]})
    return {
        "format": FORMAT,
        "methods": [one.method, two.method],
        "differs": _differences(one, two),
        "all": {
            **totals,
            "jaccard": _share(totals["both"], sum(totals.values())),
            "spearman": {
                name: _mean([layer["spearman"].get(name) for layer in layers.values()])
                for name in names
            },
        },
        "layers": {str(index): layer for index, layer in layers.items()},
    }


def _layer(one: LayerPlan, two: LayerPlan) -> dict[str, Any]:
    if one.experts != two.experts:
        raise PlanError(
            f"layer {one.layer} has {one.experts} experts in one plan and {two.experts} in the "
            "other"
        )
    first, second = set(one.keep), set(two.keep)
    return {
        "both": sorted(first & second),
        "only_first": sorted(first - second),
        "only_second": sorted(second - first),
        "jaccard": _share(len(first & second), len(first | second)),
        "spearman": {
            name: spearman(one.scores[name], two.scores[name])
            for name in sorted(set(one.scores) & set(two.scores))
        },
    }


def spearman(one: Sequence[float | None], two: Sequence[float | None]) -> float | None:
    """Spearman's rank correlation over the experts that have both scores; ties share mean ranks.

    None where fewer than two experts have both, or one of the scores is the same for all of them.
    """
    pairs = [(a, b) for a, b in zip(one, two, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return None
    ranks = [_ranks([pair[i] for pair in pairs]) for i in (0, 1)]
    a, b = (rank - rank.mean() for rank in ranks)
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return None if scale == 0 else float(a @ b) / scale


def _ranks(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """0 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    ranks: np.ndarray[Any, np.dtype[np.float64]] = (first + (counts - 1) / 2)[inverse]
    return ranks


def _differences(one: Plan, two: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("method", "seed"):
        pair = [getattr(one, name), getattr(two, name)]
        if pair[0] != pair[1]:
            found[name] = pair
    for name in ("options", "budget"):
        entries = _entries(getattr(one, name), getattr(two, name))
        if entries:
            found[name] = entries
    model = _entries(one.model, two.model)
    if "fingerprint" in model:
        found["model"] = [one.model.get("name"), two.model.get("name")]
    if one.statistics.get("sha256") != two.statistics.get("sha256"):
        found["statistics"] = [one.statistics.get("sha256"), two.statistics.get("sha256")]
    return found


def _entries(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    names = [*one, *(name for name in two if name not in one)]
    return {
        name: [one.get(name), two.get(name)] for name in names if one.get(name) != two.get(name)
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
