"""The report's opening in words: what was done, how it came out, and what to beware of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeprune.report import measurements, wording
from moeprune.report.scatter import Sample


@dataclass(frozen=True)
class Warned:
    """A warning, with names and anchors of the results it is about; none means the whole run."""

    text: str
    results: tuple[tuple[str, str], ...]


def anchor(index: int, row: Mapping[str, Any]) -> str:
    """Where the details of a row stand; the unpruned model has none."""
    return "" if row["method"] is None else f"result-{index}"


def opening(result: Mapping[str, Any]) -> str:
    """One sentence: what was pruned, by what, on what evidence, and measured on what."""
    model = result["model"]
    pruned = [row for row in result["rows"] if row["method"] is not None]
    domains = list(dict.fromkeys(str(name) for row in result["rows"] for name in row["perplexity"]))
    measured = f" on {wording.listed(domains)} text" if domains else ""
    facts = (
        f"{model['model_type']}, {wording.count(model['parameters'])} parameters, "
        f"{wording.plural(len(model['moe_layers']), 'MoE layer')} of {model['experts']} experts, "
        f"{model['top_k']} selected per token"
    )
    if not pruned:
        return f"This run measured {model['name']} ({facts}) as it is{measured}."
    methods = wording.listed(list(dict.fromkeys(row["method"] for row in pruned)))
    them = "it" if len(pruned) == 1 else "them"
    compared = f"and compared {them} with the original{measured}"
    if not domains:
        compared = "and did not measure what was lost"
    return (
        f"This run made {wording.plural(len(pruned), 'pruned version')} of {model['name']} "
        f"({facts}) with {methods}, {_basis(result)}, {compared}."
    )


def finding(result: Mapping[str, Any]) -> str:
    """One sentence: the result that lost least and the one that saved most; empty if unknown."""
    samples = [sample for sample in measurements.samples(result)[0] if sample.pruned]
    if not samples:
        return ""
    whole = result["model"]["bytes"]
    closest = min(samples, key=lambda sample: (sample.ratio, sample.bytes))
    smallest = min(samples, key=lambda sample: (sample.bytes, sample.ratio))
    if closest is not smallest:
        return (
            f"Closest to the original: {_told(closest, whole)}. "
            f"Smallest on disk: {_told(smallest, whole)}."
        )
    lead = "Closest to the original and smallest on disk: " if len(samples) > 1 else ""
    return f"{lead}{_told(closest, whole)}."


def warned(result: Mapping[str, Any]) -> tuple[Warned, ...]:
    """The run's warnings, then the results', each text once."""
    about: dict[str, list[tuple[str, str]]] = {str(text): [] for text in result["warnings"]}
    general = set(about)
    for index, row in enumerate(result["rows"]):
        for text in map(str, row.get("warnings") or ()):
            if text not in general:
                about.setdefault(text, []).append((row["name"], anchor(index, row)))
    return tuple(Warned(text, tuple(dict.fromkeys(names))) for text, names in about.items())


def _basis(result: Mapping[str, Any]) -> str:
    calibration = result.get("calibration")
    if calibration is None:
        return "without calibration data"
    tokens = calibration.get("tokens")
    over = f" over {wording.whole(tokens)} tokens" if wording.number(tokens) is not None else ""
    return f"after one calibration pass{over}"


def _told(sample: Sample, whole: Any) -> str:
    share = measurements.share(sample.bytes, whole)
    part = "" if share is None else f" ({wording.percent(share, 0)} of the original)"
    loss = wording.times(sample.ratio)
    return f"{sample.name}, {loss} perplexity in {wording.size(sample.bytes)}{part}"
