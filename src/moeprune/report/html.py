"""A run's results as one HTML file that needs nothing but a browser, today and in ten years.

No script, no font and no picture is fetched; the heat maps are tables, so that they can be read
aloud, copied and printed. Names come from users, hence autoescaping is on for everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from moeprune.report import heatmaps, marks, measurements, wording
from moeprune.report.reading import check
from moeprune.report.scatter import scatter


@dataclass(frozen=True)
class Warned:
    """A warning, and the results that it is about; none means the whole run."""

    text: str
    results: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Result:
    """The details of one pruned model."""

    anchor: str
    name: str
    gist: str
    facts: tuple[tuple[str, str], ...]
    maps: tuple[heatmaps.HeatMap, ...]
    removals: tuple[heatmaps.Removal, ...]
    planned: bool


def render_report(result: Mapping[str, Any]) -> str:
    """Draw the report of one run.

    Args:
        result: what ``moeprune demo --json`` or ``prune --json`` printed ("moeprune.run/1").
            Measurements that are null or absent are shown as an en dash.

    Returns:
        A complete HTML document.

    Raises:
        MoepruneError: a required key is missing or of the wrong kind; the message names it.
    """
    check(result)
    samples, undrawn = measurements.samples(result)
    environment = Environment(
        loader=PackageLoader("moeprune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        model=result["model"],
        command=result["command"],
        summary=_summary(result),
        finding=_finding(result),
        warnings=_warnings(result),
        table=measurements.table(result),
        chart=scatter(samples),
        undrawn=undrawn,
        usage=heatmaps.usage_map(result),
        results=_results(result),
        provenance=_provenance(result),
        versions=result["versions"],
        light=marks.variables(),
        dark=marks.variables(dark=True),
        steps=marks.STEPS,
    )


def _summary(result: Mapping[str, Any]) -> str:
    """One sentence: what was pruned, by what, on what evidence, measured on what."""
    model, rows = result["model"], result["rows"]
    pruned = [row for row in rows if row["method"] is not None]
    methods = list(dict.fromkeys(row["method"] for row in pruned))
    made = wording.plural(len(pruned), "pruned version")
    by = f" with {wording.listed(methods)}" if methods else ""
    calibration = result.get("calibration")
    tokens = None if calibration is None else wording.number(calibration.get("tokens"))
    basis = "without calibration data" if calibration is None else "after one calibration pass"
    if tokens is not None:
        basis += f" over {wording.whole(tokens)} tokens"
    domains = measurements.table(result).domains
    measured = f", and measured on {wording.listed(domains)} text" if domains else ""
    verb = "was" if len(pruned) == 1 else "were"
    return (
        f"{made} of {model['name']} – an {model['model_type']} model of "
        f"{wording.count(model['parameters'])} parameters with {model['experts']} experts in "
        f"each of {wording.plural(len(model['moe_layers']), 'MoE layer')}, {model['top_k']} of "
        f"them per token – {verb} made{by}, {basis}{measured}."
    ).replace("an " + model["model_type"], _article(model["model_type"]), 1)


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def _finding(result: Mapping[str, Any]) -> str:
    """One sentence: the result that lost least and the one that saved most; empty if unknown."""
    names = {row["name"]: row for row in result["rows"]}
    samples = [sample for sample in measurements.samples(result)[0] if sample.pruned]
    if not samples or len({sample.name for sample in samples}) < len(samples):
        return ""

    def told(name: str, ratio: float) -> str:
        saved = measurements.share(names[name]["bytes"], result["model"]["bytes"])
        return f"{name} ({wording.times(ratio)} at {wording.percent(saved, 0)} of the bytes)"

    closest = min(samples, key=lambda sample: (sample.ratio, sample.bytes))
    smallest = min(samples, key=lambda sample: (sample.bytes, sample.ratio))
    if closest is smallest:
        which = "It changed" if len(samples) == 1 else "Smallest and closest to the original:"
        if len(samples) > 1:
            return f"{which} {told(closest.name, closest.ratio)}."
        return f"Mean perplexity and size: {told(closest.name, closest.ratio)}."
    return (
        f"Closest to the original in perplexity: {told(closest.name, closest.ratio)}; "
        f"smallest on disk: {told(smallest.name, smallest.ratio)}."
    )


def _warnings(result: Mapping[str, Any]) -> tuple[Warned, ...]:
    """The run's warnings, then the results', each text once."""
    about: dict[str, list[tuple[str, str]]] = {str(text): [] for text in result["warnings"]}
    general = set(about)
    for index, row in enumerate(result["rows"]):
        for text in map(str, row.get("warnings") or ()):
            if text not in general:
                about.setdefault(text, []).append((row["name"], f"result-{index}"))
    return tuple(Warned(text, tuple(dict.fromkeys(names))) for text, names in about.items())


def _results(result: Mapping[str, Any]) -> tuple[Result, ...]:
    base = measurements.baseline(result)
    found = []
    for index, row in enumerate(result["rows"]):
        if row["method"] is None:
            continue
        ratio = wording.times(measurements.mean_ratio(row, base))
        found.append(
            Result(
                anchor=f"result-{index}",
                name=row["name"],
                gist=f"{wording.whole(row['experts'])} of {wording.whole(row['experts_before'])} "
                f"experts, {wording.size(row['bytes'])}, perplexity {ratio}",
                facts=_facts(row),
                maps=heatmaps.score_maps(row, result),
                removals=heatmaps.removals(row, result),
                planned=bool(row.get("plan")),
            )
        )
    return tuple(found)


def _facts(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    times = [f"{name} {wording.seconds(value)}" for name, value in row["seconds"].items()]
    seed = row.get("seed")
    return (
        ("Method", row["method"]),
        ("Budget", wording.settings(row.get("budget"))),
        ("Options", wording.settings(row.get("options"))),
        *((("Seed", str(seed)),) if seed is not None else ()),
        ("Time", ", ".join(times) or wording.NOTHING),
        ("Written to", str(row.get("path") or wording.NOTHING)),
    )


def _provenance(result: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    calibration = result.get("calibration") or {}
    domains = calibration.get("domains") or {}
    mix = ", ".join(f"{name} {wording.whole(amount)}" for name, amount in domains.items())
    data = wording.NOTHING
    if calibration:
        data = (
            f"{wording.whole(calibration.get('tokens'))} tokens in "
            f"{wording.whole(calibration.get('sequences'))} sequences"
            f"{f' ({mix})' if mix else ''}, {wording.seconds(calibration.get('seconds'))}"
        )
    seed = result.get("seed")
    return (
        ("Model", f"{result['model']['name']}, {wording.size(result['model']['bytes'])}"),
        ("Model fingerprint", result["model"]["fingerprint"]),
        ("Calibration", data),
        ("Data hash", str(calibration.get("data_hash") or wording.NOTHING)),
        *((("Seed", str(seed)),) if seed is not None else ()),
        ("Whole run", wording.seconds(result["seconds"])),
    )
