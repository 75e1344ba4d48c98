"""A comparison of methods as a table, a page and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from moeprune.report import atlas, marks, pareto, room, wording
from moeprune.report.page import environment, scripts

COLUMNS = (
    "method", "removes", "asked", "experts", "layers", "on disk", "of original", "parameters",
    "non-zero", "perplexity", "×", "KL", "agree", "plan s", "write s", "measure s", "peak",
)  # fmt: skip
SHORT = (
    "method", "removes", "asked", "experts", "on disk", "of original", "non-zero", "perplexity",
    "KL", "agree", "plan s",
)  # fmt: skip
_MEASURED = ("perplexity", "perplexity_ratio", "loss", "kl", "agreement")

Row = Mapping[str, Any]


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """The cells that were asked for, in their order; those that a seed does not change, once."""
    cells = result["cells"]
    found = [cells[key] for key in result["order"] if key in cells]
    return [row for row in found if row["status"] != "same"]


def measured(result: Mapping[str, Any]) -> list[Row]:
    """Rows with numbers, by size asked for and then by KL; several seeds are one row."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows_of(result):
        if row["status"] == "done":
            key = (row["name"], asked(row), str(row["calibration"]))
            groups.setdefault(key, []).append(row)
    rows = [_over_seeds(group) for group in groups.values()]
    return sorted(rows, key=lambda row: (*_amount(row), _known(row["kl"]), row["name"]))


def _amount(row: Row) -> tuple[str, float]:
    name, value = next(iter(row["budget"].items()))
    order = ("ratio", "keep", "tau", "pattern")
    place = order.index(name) if name in order else len(order)
    return f"{place} {name}", float(value) if isinstance(value, (int, float)) else 0.0


def _known(value: float | None) -> float:
    return float("inf") if value is None else value


def _over_seeds(group: Sequence[Row]) -> Row:
    """The mean over seeds; ``spread`` is the sample standard deviation, where there are several."""
    if len(group) == 1:
        return {**group[0], "seeds": [group[0]["seed"]], "spread": {}}
    merged: dict[str, Any] = {**group[0], "seeds": [row["seed"] for row in group], "spread": {}}
    for name in _MEASURED:
        values = [row[name] for row in group]
        if None in values:
            merged[name] = None
        else:
            merged[name] = statistics.fmean(values)
            merged["spread"][name] = statistics.stdev(values)
    return merged


def asked(row: Row) -> str:
    """A budget in words: ``50%``, ``keep 16``, ``pattern 2:4``."""
    name, value = next(iter(row["budget"].items()))
    return f"{value:.0%}" if name == "ratio" and round(value * 100) == value * 100 else (
        f"{name} {value}"
    )  # fmt: skip


def title(row: Row, texts: Sequence[str] = ()) -> str:
    """What a row is called in the picture."""
    text = f", {row['calibration']}" if len(texts) > 1 and row["calibration"] else ""
    return f"{row['name']} {asked(row)}{text}"


def cells_of(row: Row, texts: Sequence[str] = ()) -> dict[str, str]:
    """One line of the table."""
    seconds = row["seconds"]
    name = row["name"] + (f" ({row['calibration']})" if len(texts) > 1 else "")
    values = (
        name, row["removes"], asked(row),
        f"{row['experts']}/{row['experts_before']}", str(row["layers"]),
        wording.size(row["bytes"]), wording.percent(row["bytes_ratio"]),
        wording.count(row["parameters"]), wording.count(row["nonzero_parameters"]),
        _spread(row, "perplexity", 4), wording.significant(row["perplexity_ratio"], 4),
        _spread(row, "kl", 3), wording.percent(row["agreement"]),
        *(wording.significant(seconds.get(stage)) for stage in ("plan", "apply", "evaluate")),
        wording.size(row.get("peak_memory_bytes")),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _spread(row: Row, name: str, digits: int) -> str:
    own = wording.significant(row[name], digits)
    interval = (row.get("against") or {}).get(name)
    if interval and len(row.get("seeds", ())) < 2 and None not in interval.values():
        ends = (wording.significant(interval[end], digits) for end in ("low", "high"))
        return f"{own} ({' to '.join(ends)})"
    return own if name not in row["spread"] else (
        f"{own} ± {wording.significant(row['spread'][name], 2)} ({len(row['seeds'])} seeds)"
    )  # fmt: skip


def table_rows(result: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """The original, then everything that was measured; some columns of it."""
    texts = result["texts"]
    lines = [cells_of(row, texts) for row in measured(result)]
    return [{name: line[name] for name in columns}
            for line in (original_cells(result["original"]), *lines)]  # fmt: skip


def original_cells(original: Row) -> dict[str, str]:
    """The line of the unpruned model."""
    blank = {
        "removes": wording.NOTHING, "budget": {"ratio": 0.0}, "seconds": {}, "spread": {},
        "calibration": "", "kl": None, "agreement": None,
    }  # fmt: skip
    line = cells_of({**original, **blank, "perplexity_ratio": 1.0})
    return line | {"asked": wording.NOTHING}


def refusals(result: Mapping[str, Any]) -> list[str]:
    """What could not be done, and why; cells with the same reason on one line."""
    reasons: dict[str, list[str]] = {}
    for row in rows_of(result):
        if row["status"] in ("refused", "failed"):
            reason = row["reason"] if row["status"] == "refused" else f"failed: {row['reason']}"
            reason = reason.removeprefix(f"{row['method']} ")  # the same reason for many methods
            reasons.setdefault(reason, []).append(title(row, result["texts"]))
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


@dataclass(frozen=True)
class Matrix:
    """Perplexity by calibration text and evaluation domain, of one method with one budget."""

    name: str
    domains: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def matrices(result: Mapping[str, Any]) -> Iterator[Matrix]:
    """Domains of calibration by domains of evaluation, if there are several texts."""
    if len(result["texts"]) < 2 or not result.get("original"):
        return
    domains = tuple(result["original"]["domains"])
    groups: dict[str, list[Row]] = {}
    for row in measured(result):
        if row["calibration"]:
            groups.setdefault(title(row), []).append(row)
    for name, rows in groups.items():
        order = sorted(rows, key=lambda row: result["texts"].index(row["calibration"]))
        lines = tuple(
            (row["calibration"], tuple(_perplexity(row, domain) for domain in domains))
            for row in order
        )
        base = tuple(_perplexity(result["original"], domain) for domain in domains)
        yield Matrix(name, domains, (("original", base), *lines))


def _perplexity(row: Row, domain: str) -> str:
    return wording.significant(row["domains"][domain]["perplexity"])


def render(result: Mapping[str, Any], plans: Sequence[Row] = ()) -> tuple[str, str]:
    """The page and the picture; the picture is empty if fewer than two models were measured.

    ``plans`` are rows of the atlas: name, method and what the plan does, as in a run's result.
    """
    templates = environment()
    rows = measured(result)
    names = [title(row, result["texts"]) for row in rows]
    chart = pareto.chart(rows, names, result.get("original"))
    picture = ""
    if chart is not None:
        picture = templates.get_template("pareto.svg.j2").render(
            chart=chart,
            description="; ".join(pareto.tip(rows[i], names[i]) for i in pareto.front(rows)),
            colours=pareto.COLOURS,
            shapes=pareto.SHAPES,
            light=marks.LIGHT,
            dark=marks.DARK,
        )
    best = {names[i] for i in pareto.front(rows)}

    def draw(drawable: Sequence[Row], shown: Mapping[str, Any], left_out: Sequence[str]) -> str:
        return templates.get_template("compare.html.j2").render(
            model=result["model"],
            command=result["command"],
            columns=COLUMNS,
            lines=[
                (cells_of(row, result["texts"]), row["kind"], name in best)
                for row, name in zip(rows, names, strict=True)
            ],
            original=original_cells(result["original"]),
            picture=Markup(picture.partition("?>")[2] or picture),  # made above
            refusals=refusals(result),
            matrices=list(matrices(result)),
            warnings=[(title(row), text) for row in rows for text in row.get("warnings", ())],
            facts=_facts(result),
            versions=result["versions"],
            colours=pareto.COLOURS,
            **atlas.shown(atlas.payload({**result, "rows": drawable, "atlas": shown}), left_out),
            **scripts("theme.js", "atlas.js"),
        )

    return room.fitted(plans, result.get("atlas"), draw), picture


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, heldout = result["model"], result["heldout"]
    texts = [
        (f"Calibration text {name}", f"{wording.whole(facts['tokens'])} tokens, "
         f"{wording.settings(facts['domains'])}, {wording.seconds(facts['seconds'])}")
        for name, facts in result["calibrations"].items()
    ]  # fmt: skip
    return [
        ("Model", f"{model['name']}, {model['model_type']}, {wording.size(model['bytes'])}"),
        ("Model fingerprint", model["fingerprint"]),
        *texts,
        ("Held-out text", f"{wording.whole(heldout['tokens'])} tokens in "
         f"{wording.plural(heldout['sequences'], 'window')}, {heldout['hash']}"),
        ("Measured in", result["identity"]["dtype"]),
        ("Whole run", wording.seconds(result["seconds"])),
    ]  # fmt: skip
