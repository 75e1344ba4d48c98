"""A run's results as one HTML file that needs nothing but a browser.

Nothing is fetched, and a Content-Security-Policy forbids it. The atlas is a table that can be
read aloud and printed; the script makes it tell of single experts. Names come from
users, hence autoescaping is on for everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprune.report import (
    atlas,
    balance,
    intervals,
    measurements,
    removals,
    room,
    sections,
    summary,
    wording,
)
from moeprune.report.page import environment, scripts
from moeprune.report.reading import check
from moeprune.report.scatter import scatter


@dataclass(frozen=True)
class Result:
    """The details of one pruned model."""

    anchor: str
    name: str
    gist: str
    made: str
    times: str
    place: int | None
    removals: tuple[removals.Removal, ...]
    merges: bool
    instead: str
    remarks: tuple[str, ...]


def render_report(result: Mapping[str, Any]) -> str:
    """Draw the report of one run.

    Args:
        result: what ``moeprune demo --json`` printed, or any other ``moeprune.run/1``.
            Measurements that are null or absent are shown as an en dash.

    Returns:
        A complete HTML document.

    Raises:
        MoepruneError: a required key is missing or of the wrong kind; the message names it.
    """
    check(result)

    def draw(rows: Sequence[Any], shown: Mapping[str, Any], left_out: Sequence[str]) -> str:
        return _page({**result, "rows": rows, "atlas": shown}, left_out)

    return room.fitted(result["rows"], result.get("atlas"), draw)


def _page(result: Mapping[str, Any], left_out: Sequence[str]) -> str:
    """Of all that the result holds; ``left_out`` says what it does not hold any more."""
    samples, undrawn = measurements.samples(result)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            model=result["model"],
            command=result["command"],
            opening=summary.opening(result),
            finding=summary.finding(result),
            warnings=summary.warned(result),
            table=measurements.table(result),
            chart=scatter(samples),
            undrawn=undrawn,
            verdicts=intervals.verdicts(result),
            balance=balance.balance(result),
            sections=sections.sections(result),
            seen=set((result.get("calibration") or {}).get("domains") or ()),
            results=_results(result),
            origin=_origin(result),
            settings=_settings(result),
            versions=result["versions"],
            **atlas.shown(atlas.payload(result), left_out),
            **scripts("theme.js", "atlas.js"),
        )
    )


def _results(result: Mapping[str, Any]) -> tuple[Result, ...]:
    base = measurements.baseline(result)
    found = []
    places = [index for index, row in enumerate(result["rows"]) if row.get("plan")]
    for index, row in enumerate(result["rows"]):
        if row["method"] is None:
            continue
        ratio = measurements.mean_ratio(row, base)
        experts = f"{wording.whole(row['experts'])} of {wording.whole(row['experts_before'])}"
        times = [f"{name} {wording.seconds(value)}" for name, value in row["seconds"].items()]
        found.append(
            Result(
                anchor=summary.anchor(index, row),
                name=row["name"],
                gist=f"{experts} experts · {wording.size(row['bytes'])} · "
                f"perplexity {wording.times(ratio)}",
                made=f"{row['method']}, {wording.settings(row.get('budget'))}",
                times=", ".join(times) or wording.NOTHING,
                place=places.index(index) if index in places else None,
                removals=removals.removals(row, result),
                merges=any(entry.get("merged") for entry in (row.get("plan") or {}).values()),
                instead=_instead(row),
                remarks=removals.remarks(row),
            )
        )
    return tuple(found)


def _instead(row: Mapping[str, Any]) -> str:
    """What stands in place of a list of removed experts, where the plan removes none."""
    if row.get(room.LEFT_OUT):
        return f"{wording.NOTHING} Left out: this page would be too large. The plan holds it."
    if not row.get("plan"):
        return f"{wording.NOTHING} This result carries no plan."
    filled = measurements.share(row["nonzero_parameters"], row["parameters"])
    zeros = 0.0 if filled is None else 1 - filled
    return f"Every expert stays; {wording.percent(zeros)} of the model's parameters are zero."


def _origin(result: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Names and values of what the run started from."""
    model, calibration = result["model"], result.get("calibration") or {}
    data = wording.NOTHING
    if calibration:
        data = (
            f"{wording.whole(calibration.get('tokens'))} tokens in "
            f"{wording.whole(calibration.get('sequences'))} sequences, "
            f"{wording.seconds(calibration.get('seconds'))}"
        )
    domains = calibration.get("domains") or {}
    seed = result.get("seed")
    return (
        ("Model", f"{model['name']}, {model['model_type']}, {wording.size(model['bytes'])}"),
        ("Model fingerprint", model["fingerprint"]),
        ("Calibration", data),
        *((("Sequences by domain", wording.settings(domains)),) if domains else ()),
        ("Data hash", str(calibration.get("data_hash") or wording.NOTHING)),
        *((("Seed", str(seed)),) if seed is not None else ()),
        ("Whole run", wording.seconds(result["seconds"])),
    )


def _settings(result: Mapping[str, Any]) -> tuple[tuple[str, str, str, str, str], ...]:
    """Name, method, budget, options and place of every pruned model."""
    found = []
    for row in result["rows"]:
        if row["method"] is None:
            continue
        options = dict(row.get("options") or {})
        if row.get("seed") is not None:
            options["seed"] = row["seed"]
        budget, place = wording.settings(row.get("budget")), row.get("path") or wording.NOTHING
        found.append((row["name"], row["method"], budget, wording.settings(options), str(place)))
    return tuple(found)
