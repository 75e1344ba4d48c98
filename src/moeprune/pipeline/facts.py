"""What a run's result says of plans and statistics, as JSON types (``moeprune.run/1``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moeprune.core.accumulators import Routing
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.plan import Plan
from moeprune.errors import PlanError
from moeprune.evaluation.summary import ALL
from moeprune.models.store import StatisticsStore

_SECTIONS = ("findings", "tasks", "generation", "efficiency")
_LARGEST = 700.0  # its exp is the largest power of ten that a float holds


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
    domains, every = _domains(evaluation), _table(_table(evaluation.get("groups")).get(ALL))
    against = {**domains, ALL: every}
    against = {name: _table(score.get("against")) for name, score in against.items()}
    against = {name: pair for name, pair in against.items() if pair}
    return {
        "perplexity": {name: score.get("perplexity") for name, score in domains.items()},
        **{key: every.get(key) for key in ("loss", "kl", "agreement")},
        **({"against": against} if against else {}),
        **{key: evaluation[key] for key in _SECTIONS if evaluation.get(key)},
    }


def measured_original(name: str, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The original in a row: its own evaluation, or its perplexity from others' beside it.

    That is exp(loss - d), d the mean difference of a loss from the original's over the same tokens.
    Nothing where the evaluations are not ``of_one_text``: no ratio could be made of them.

    Args:
        name: the original's; other teachers are no original.
        evaluations: all that rows are measured by.
    """
    if not of_one_text(evaluations):
        return {}
    own = next((one for one in evaluations if one.get("model") == name), None)
    if own is not None:
        return measured(own)
    beside = next((one for one in evaluations if one.get("teacher") == name), {})
    found = {}
    for domain, score in _domains(beside).items():
        gap = _table(_table(score.get("against")).get("loss")).get("value")
        loss = score.get("loss")
        if isinstance(gap, float) and isinstance(loss, float) and loss - gap < _LARGEST:
            found[domain] = math.exp(loss - gap)
    return {"perplexity": found}


def of_one_text(evaluations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether evaluations read the same tokens in the same dtype."""
    return len({f"{_table(e.get('data')).get('hash')} {e.get('dtype')}" for e in evaluations}) == 1


def _domains(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {str(d): _table(score) for d, score in _table(evaluation.get("domains")).items()}


def _table(value: Any) -> Mapping[str, Any]:
    """A part of somebody's file, if it is of our form."""
    return value if isinstance(value, Mapping) else {}


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
