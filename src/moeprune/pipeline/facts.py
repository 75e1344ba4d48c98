"""What a run's result says of plans and statistics, as JSON types (``moeprune.run/1``)."""

from __future__ import annotations

from typing import Any

from moeprune.core.accumulators import Routing
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.plan import Plan
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


def _merged(layer: LayerPlan) -> dict[str, list[int]]:
    """For each expert that lives on in others: the kept ones that it went into."""
    into: dict[int, set[int]] = {}
    if layer.neurons is not None:
        pairs_N2 = layer.neurons.index_N4[:, [2, 0]].unique(dim=0).tolist()
        for old, position in pairs_N2:
            into.setdefault(old, set()).add(layer.keep[position])
    if layer.served_by is not None:
        for old, answer in enumerate(layer.served_by):
            into.setdefault(old, set()).add(answer)
    gone = set(layer.dropped)
    return {str(old): sorted(new) for old, new in sorted(into.items()) if old in gone}
