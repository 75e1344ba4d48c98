"""What a run's result says of plans and statistics, as JSON types (``moeprune.run/1``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moeprune.core.accumulators import Routing
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.plan import Plan
from moeprune.errors import PlanError
from moeprune.models.store import StatisticsStore


def usage(store: StatisticsStore) -> dict[str, list[float]]:
    """Share of the routed slots that each expert served, by layer."""
    found = {}
    for index in store.layers:
        count_E = store.layer(index).part(Routing).count_E.double()
        found[str(index)] = (count_E / count_E.sum()).tolist()
    return found


def calibration(store: StatisticsStore) -> dict[str, Any]:
    """What was read."""
    data = store.manifest["data"]
    return {
        **{key: data[key] for key in ("tokens", "sequences", "domains")},
        "data_hash": data["hash"],
    }


def plan_facts(plan: Plan) -> dict[str, Any]:
    """What happens to every expert, by layer."""
    found = {}
    for index, layer in sorted(plan.layers.items()):
        merged = _merged(layer)
        found[str(index)] = {
            "keep": list(layer.keep),
            "replaced": list(layer.replaced),
            "dropped": [expert for expert in layer.dropped if str(expert) not in merged],
            "scores": {key: list(values) for key, values in layer.scores.items()},
            "notes": list(layer.notes),
            **({"merged": merged} if merged else {}),
            **({"masked": True} if layer.mask is not None else {}),
        }
    return found


def layers_of(data: dict[str, Any]) -> dict[str, Any]:
    """``plan_facts`` of a plan's JSON without its vectors, which a checkpoint does not keep.

    Experts that were rebuilt into others cannot be told from dropped ones by it.
    """
    found = {}
    try:
        for index, layer in data["layers"].items():
            stay = {*layer["keep"], *layer["replaced"]}
            gone = [expert for expert in range(layer["experts"]) if expert not in stay]
            answers = layer.get("served_by")
            found[index] = {
                "keep": layer["keep"],
                "replaced": layer["replaced"],
                "dropped": [] if answers else gone,
                "scores": layer.get("scores") or {},
                "notes": layer.get("notes") or [],
                **({"merged": {str(e): [answers[e]] for e in gone}} if answers else {}),
                **({"masked": True} if layer.get("mask") else {}),
            }
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise PlanError(f"the plan is damaged: {error!r}") from error
    return found


def measured(evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an evaluation (``moeprune.evaluation/1``) says in a row; nothing without one."""
    if not evaluation:
        return {}
    domains = evaluation.get("domains") or {}
    against = {d: s["against"] for d, s in domains.items() if isinstance(s.get("against"), dict)}
    return {
        "perplexity": {name: score.get("perplexity") for name, score in domains.items()},
        **{key: evaluation.get(key) for key in ("loss", "kl", "agreement")},
        **({"against": against} if against else {}),
        **{k: evaluation[k] for k in ("tasks", "generation", "efficiency") if k in evaluation},
    }


def _merged(layer: LayerPlan) -> dict[str, list[int]]:
    """For each expert that lives on in others: the kept ones that it went into."""
    into: dict[int, set[int]] = {}
    if layer.neurons is not None:
        pairs_N2 = torch.unique(layer.neurons.index_N4[:, [2, 0]], dim=0).tolist()
        for old, position in pairs_N2:
            into.setdefault(old, set()).add(layer.keep[position])
    if layer.served_by is not None:
        for old, answer in enumerate(layer.served_by):
            into.setdefault(old, set()).add(answer)
    gone = set(layer.dropped)
    return {str(old): sorted(new) for old, new in sorted(into.items()) if old in gone}
