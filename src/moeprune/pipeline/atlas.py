"""What every expert served, and how evenly the routers use them before and after.

Part of a run's result; the report draws it. From the statistics of the calibration, without another
walk; only the routing of the results is measured by a short walk of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moeprune.core.accumulators import Routing, Served
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import MoepruneError
from moeprune.models import data
from moeprune.models.loading import LayeredModel
from moeprune.models.store import StatisticsStore
from moeprune.models.walk import Walk
from moeprune.pipeline.inputs import Progress, silent

_MOST = 12  # tokens named per expert
_NAMED = 60_000  # tokens named in all: the page holds them
_LEAST = 3  # slots: what was seen once or twice is typical of nothing
SHORT = 3072  # tokens by which the routing of results is measured


def atlas(store: StatisticsStore, tokenizer: Any = None) -> dict[str, Any]:
    """What the experts of ``store`` served.

    A token's lift is (its share of the expert's slots) / (its share of all slots of the layer),
    both among all tokens. Named are the tokens with the largest n·ln(lift), n the slots of the
    expert that they took: their part in how far the expert's tokens diverge from the text.

    Args:
        store: statistics with ``routing``, and ``served`` for domains and tokens.
        tokenizer: to spell tokens; without one they are numbers.

    Returns:
        ``domains``; ``tokens``, a table of texts; ``layers`` by index with, per expert, ``count``
        of slots, ``gate`` (mean weight), ``domains`` (slots by domain) and ``tokens`` (lists of
        place in the table, slots, lift).
    """
    names = {data.domain_key(name): name for name in store.manifest["data"]["domains"]}
    most = max(3, min(_MOST, _NAMED // max(1, _experts(store))))
    table: dict[int, int] = {}
    layers = {str(i): _layer(store.layer(i), names, table, most) for i in store.layers}
    return {
        "domains": list(names.values()),
        "tokens": [_spelt(tokenizer, token) for token in table],
        "layers": layers,
    }


def _experts(store: StatisticsStore) -> int:
    return len(store.layers) * int(store.manifest["model"]["experts"])


def _layer(
    statistics: LayerStatistics, names: Mapping[int, str], table: dict[int, int], most: int
) -> dict[str, Any]:
    routing = statistics.part(Routing)
    gate_E = routing.gate_E / routing.count_E.clamp(min=1)
    found: dict[str, Any] = {
        "count": routing.count_E.tolist(),
        "gate": [float(f"{gate:.4g}") for gate in gate_E.tolist()],
    }
    served = statistics.parts.get(Served.name)
    if not isinstance(served, Served) or not len(served.domain_D):
        return found
    rows = dict(zip(served.domain_D.tolist(), served.count_DE, strict=True))
    nothing_E = torch.zeros_like(routing.count_E)
    by_domain_ED = torch.stack([rows.get(key, nothing_E) for key in names], dim=1)
    return found | {
        "domains": by_domain_ED.tolist(),
        "tokens": _typical(served, routing.count_E, table, most),
    }


def _typical(
    served: Served, count_E: Tensor, table: dict[int, int], most: int
) -> list[list[list[float]]]:
    """By expert, the tokens that take more of its slots than of the layer's."""
    count_ME = served.count_ME.double()
    if not len(count_ME):
        return [[] for _ in count_E]
    of_expert_ME = count_ME / count_E.clamp(min=1)
    of_layer_M1 = count_ME.sum(dim=1, keepdim=True) / count_E.sum().clamp(min=1)
    lift_ME = of_expert_ME / of_layer_M1.clamp(min=1e-30)
    part_ME = count_ME * lift_ME.clamp(min=1e-30).log()
    part_ME[(count_ME < _LEAST) | (lift_ME <= 1)] = 0.0
    order_ME = torch.argsort(part_ME, dim=0, descending=True, stable=True)[:most]
    found: list[list[list[float]]] = []
    for expert in range(len(count_E)):
        entries = []
        for row in order_ME[:, expert].tolist():
            if part_ME[row, expert] > 0:
                place = table.setdefault(int(served.token_M[row]), len(table))
                lift = float(f"{float(lift_ME[row, expert]):.3g}")
                entries.append([place, int(count_ME[row, expert]), lift])
        found.append(entries)
    return found


def _spelt(tokenizer: Any, token: int) -> str:
    """A token as text; its own spelling where it is a part of a character."""
    if tokenizer is None:
        return f"#{token}"
    text = str(tokenizer.decode([token]))
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        text = str(tokenizer.convert_ids_to_tokens(token))
    return text.encode("utf-8", "replace").decode()  # halves of characters are not JSON


def routing(
    models: Mapping[str, LayeredModel],
    domains: Sequence[data.Domain],
    workers: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """How many experts every router uses in effect: exp(H) of the shares of its slots.

    H is the entropy, in nats, of the experts' shares of a layer's routed slots over the same few
    thousand tokens for all models. E experts used alike give E, one used alone gives 1. Slots of
    novices are not counted. A model whose routing cannot be observed is left out.

    Returns:
        ``tokens``, and ``rows``: by name and layer [effective experts, experts].
    """
    batches = data.batches(_few(domains))
    rows: dict[str, Any] = {}
    for number, (name, model) in enumerate(models.items()):
        found: dict[str, list[float]] = {}

        def note(
            site: Any, statistics: LayerStatistics, into: dict[str, list[float]] = found
        ) -> bool:
            count_E = statistics.part(Routing).count_E
            into[str(statistics.shape.layer)] = [_effective(count_E), len(count_E)]
            return False

        try:
            with Walk(model, batches, workers) as walk:
                walk.layers([Routing.name], note)
            rows[name] = found
        except MoepruneError:
            pass
        progress("routing before and after", number + 1, len(models))
    return {"tokens": sum(batch.ids_BL.numel() for batch in batches), "rows": rows}


def _few(domains: Sequence[data.Domain]) -> list[data.Domain]:
    """The first sequences of each domain, at least one of each."""
    length = domains[0].ids_NL.shape[1]
    each = max(1, math.ceil(SHORT / length / len(domains)))
    return [replace(domain, ids_NL=domain.ids_NL[:each]) for domain in domains]


def _effective(count_E: Tensor) -> float:
    share_E = count_E.double() / count_E.sum().clamp(min=1)
    entropy = float(-torch.special.xlogy(share_E, share_E).sum())
    return float(f"{math.exp(entropy):.4g}")
