"""An audit in words: what to beware of, and what was found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from moeprune.evaluation.intervals import FEWEST, counted

_STEADY = 0.8  # mean overlap below which a choice of experts is called unsteady
_PIECES = "independent pieces of text"
_UNCOVERED = 0.1  # share of experts with too few tokens that is worth a warning

Json = Mapping[str, Any]


def judged(result: Json) -> dict[str, list[str]]:
    """``warnings`` and ``findings``, a sentence each."""
    return {"warnings": [*_warnings(result)], "findings": [*_findings(result)]}


def _warnings(result: Json) -> Iterator[str]:
    coverage = result["coverage"]
    if coverage["share"] > _UNCOVERED:
        yield (
            f"{coverage['share']:.0%} of experts saw fewer than {coverage['wanted']} tokens: do "
            f"not trust a score from this text; {_more_text(result)}"
        )
    dead = {layer: one["dead"] for layer, one in result["layers"].items() if one["dead"]}
    if dead:
        yield f"{_count(dead)} saw no token of this text: {_listed(dead)}"
    supers = {layer: one["super"] for layer, one in result["layers"].items() if one["super"]}
    if supers:
        yield (
            f"extreme outputs, on which later layers may depend, come from {_count(supers)}: "
            f"{_listed(supers)}; keep with --protect-super"
        )
    yield from _unsteady(result)
    if result["statistics"] is not None:
        yield (
            "the statistics were given: whether the choice of experts would change with other text "
            "is unknown, and the held-out sample may be text that they were collected on"
        )
    measured = next(iter(result["model_damage"].values()), None)
    if measured is not None and measured["kl"]["items"] < FEWEST:
        yield (
            f"damage was measured on {counted(measured['kl']['items'], _PIECES)}: too few for an "
            "interval that can be trusted; give more text or a larger --held"
        )
    refused = {
        ratio: cell["refused"]
        for one in result["layers"].values()
        for ratio, cell in one["damage"].items()
        if "refused" in cell
    }
    for ratio, why in refused.items():
        yield f"ratio {ratio} was not tried: {why}"


def _more_text(result: Json) -> str:
    coverage = result["coverage"]
    needed, length = coverage["tokens_for_target"], result["data"]["calibration"]["length"]
    if needed is None:
        return "so many saw none at all that no amount of it is known to be enough: use other text"
    return (
        f"about {math.ceil(needed / max(1, length))} sequences of {length} tokens would give "
        f"{coverage['target_share']:.0%} of experts {coverage['wanted']}"
    )


def _unsteady(result: Json) -> Iterator[str]:
    name = result["method"]["name"]
    for ratio in result["model_damage"]:
        means = [
            one["stability"][ratio][name]["mean"]
            for one in result["layers"].values()
            if one["stability"] and ratio in one["stability"]
        ]
        if means and sum(means) / len(means) < _STEADY:
            yield (
                f"with other text of the same kind {name} would keep other experts: at ratio "
                f"{ratio} the overlap is {sum(means) / len(means):.0%}; calibrate on more"
            )


def _findings(result: Json) -> Iterator[str]:
    usage = result["usage"]
    yield (
        f"load-balance score {usage['load_balance']:.2f} (standard deviation over mean of first "
        f"choices per expert): {'balanced' if usage['balanced'] else 'imbalanced'}"
    )
    yield from _redundancy(result)
    yield from _damage(result)
    yield from _recommended(result)
    yield from _advice(result)


def _redundancy(result: Json) -> Iterator[str]:
    weights = [one["weights"] for one in result["layers"].values() if one["weights"]]
    if weights:
        above = sum(one["above"] for one in weights) / len(weights)
        silent = sum(one["above"] == 0 for one in weights)
        yield (
            f"weights: {above:.1%} of pairs of experts share more information than unrelated "
            f"matrices of this size do; in {silent} of {len(weights)} layers none does"
        )
    outputs = [one["outputs"] for one in result["layers"].values() if one["outputs"]]
    tokens = [one["token_largest"] for one in outputs if one["token_largest"] is not None]
    if tokens:
        yield (
            f"outputs: the two most similar experts of any layer have a mean cosine of "
            f"{max(tokens):.2f} on the same tokens, the median pair of a layer at most "
            f"{max(one['token_median'] for one in outputs if one['token_median'] is not None):.2f}"
        )


def _damage(result: Json) -> Iterator[str]:
    for ratio, whole in result["model_damage"].items():
        cells = {
            layer: one["damage"][ratio]["measured"]["kl"]["value"]
            for layer, one in result["layers"].items()
            if one["damage"][ratio].get("measured")
        }
        known = {layer: kl for layer, kl in cells.items() if kl is not None}
        if len(known) > 1 and max(known.values()) > 0:
            worst, best = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
            yield (
                f"cut by {float(ratio):.0%} alone, layer {worst} costs most (KL "
                f"{known[worst]:.2g}) and layer {best} least ({known[best]:.2g}); all layers "
                f"together cost KL {_number(whole['kl'])}, loss {_number(whole['loss'], '+')}"
            )
    rho = result["predictor"]["spearman"]
    if rho is not None:
        yield (
            f"statistics alone put {result['predictor']['cells']} layers and ratios in an order "
            f"that agrees with the damage measured on the held-out sample: Spearman {rho:.2f}"
        )


def _recommended(result: Json) -> Iterator[str]:
    wanted = result["recommendation"]
    ratio = wanted["ratio"]
    if ratio is None or ratio["value"] is None:
        return
    limit, items = wanted["max_loss"], ratio["items"]
    name = result["method"]["name"]
    tried = [float(one) for one in result["model_damage"]]
    if wanted["where"] == "above":
        text = f"at least {tried[-1]:.0%} of the experts can go, the most that was tried"
    else:
        text = f"about {ratio['value']:.0%} of the experts can go"
        if wanted["where"] == "below":
            text += f", less than the least that was tried ({tried[0]:.0%})"
    yield (
        f"{text} ({ratio['level']:.0%} interval {ratio['low']:.0%} to {ratio['high']:.0%}, "
        f"{counted(items, _PIECES)}) before the loss rises by {limit:g} nats per token, with "
        f"{name}, the same share in every layer, nothing trained afterwards, on text like this; "
        "between the ratios tried this is a straight line, not a measurement"
    )


def _advice(result: Json) -> Iterator[str]:
    advice = result["advice"]
    if advice["model"] is None:
        return
    usage, model = result["usage"], advice["model"]
    kind = "balanced" if usage["balanced"] else "imbalanced"
    kls = f"KL {_number(model['weights'])} against {_number(model['experts'])}"
    verdict = {
        True: "here that holds",
        False: "here it does not hold",
        None: "here the sample shows no difference",
    }[advice["holds"]]
    yield (
        f"usage is {kind}, for which arXiv 2410.12013 advises to prune {advice['advised']}; "
        f"{verdict}: {advice['ratio']:.0%} of the experts' weights zeroed against as many in whole "
        f"experts taken away, {kls} (zeroed weights stay in the file)"
    )


def _number(interval: Json, sign: str = "") -> str:
    return "unknown" if interval["value"] is None else f"{interval['value']:{sign}.3g}"


def _count(by_layer: Mapping[str, list[int]]) -> str:
    count = sum(len(experts) for experts in by_layer.values())
    return f"{count} expert{'s' if count > 1 else ''}"


def _listed(by_layer: Mapping[str, list[int]], most: int = 6) -> str:
    parts = [
        f"layer {layer}: {', '.join(map(str, experts[:most]))}{' …' if len(experts) > most else ''}"
        for layer, experts in by_layer.items()
    ]
    return "; ".join(parts[:most]) + (" …" if len(parts) > most else "")
