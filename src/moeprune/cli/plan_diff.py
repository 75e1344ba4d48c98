"""The command that compares two plans. Nothing heavy is imported before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moeprune.cli import output
from moeprune.cli.options import AsJson


def plan_diff(
    first: Annotated[Path, typer.Argument(help="Output of **moeprune plan**.")],
    second: Annotated[Path, typer.Argument(help="Another one, for the same model.")],
    as_json: AsJson = False,
) -> None:
    """Compare two plans: experts that both keep, rank correlation of scores, other options.

    Example: `moeprune plan-diff reap.json mone.json`
    """
    from moeprune.pipeline.comparison import plan_diff as compare

    found = compare(first, second)
    if as_json:
        output.print_json(found)
        return
    rows = [
        _row(index, {name: len(layer[name]) for name in _COUNTS}, layer)
        for index, layer in found["layers"].items()
    ]
    rows.append(_row("all", found["all"], found["all"]))
    one, two = found["methods"]
    output.print_rows(f"{first} ({one}) and {second} ({two}): experts kept", rows)
    for name, pair in found["differs"].items():
        entries = pair.items() if isinstance(pair, dict) else [("", pair)]
        for key, (left, right) in entries:
            output.OUT.print(f"{name} {key}".strip() + f": {left} | {right}", markup=False)


_COUNTS = {"both": "both", "only_first": "first only", "only_second": "second only"}


def _row(layer: str, counts: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, str]:
    return {
        "layer": layer,
        **{shown: str(counts[name]) for name, shown in _COUNTS.items()},
        "overlap (Jaccard)": f"{entry['jaccard']:.2f}",
        **{
            f"Spearman, {name}": "–" if value is None else f"{value:.2f}"
            for name, value in entry["spearman"].items()
        },
    }
