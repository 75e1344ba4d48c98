"""What the commands print: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

ERR = Console(stderr=True, highlight=False)
OUT = Console(highlight=False)
_TABLE_WIDTH, _WIDEST = 132, 240
_SPENT = {
    "waiting": "waiting for weights",
    "computing": "computing layers",
    "merging": "adding up statistics",
    "hidden": "hidden states to their file",
    "loading": "(loading and converting beside it)",
}


def print_json(value: Any) -> None:
    """A result on stdout, as JSON and nothing else."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def note(text: str) -> None:
    """A message for a person."""
    ERR.print(text, markup=False, soft_wrap=True)


def error(problem: str, hint: str = "") -> None:
    """What is wrong, and what to run instead, a line each."""
    ERR.print(f"error: {_one_line(problem)}", style="bold", markup=False, soft_wrap=True)
    if hint:
        ERR.print(_one_line(hint), markup=False, soft_wrap=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


class Reporter:
    """Shows one bar per named stage; a stage is made when it is first heard of."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """As ``pipeline.stages.Progress``."""
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)

    def describe(self, what: str, text: str) -> None:
        """Say more beside the bar of a stage that was heard of."""
        self._bars.update(self._tasks[what], description=text)


@contextmanager
def progress_bars() -> Iterator[Reporter]:
    """Bars on stderr with the time that remains; nothing where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=ERR, disable=not ERR.is_terminal) as bars:
        yield Reporter(bars)


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    table = Table(title=title, show_header=False, title_justify="left", box=None)
    for key, value in facts.items():
        table.add_row(key, _text(value))
    OUT.print(table)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return str(value)


def print_rows(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """A table whose columns are the keys of the first row."""
    table = Table(title=title, title_justify="left", pad_edge=False, box=SIMPLE)
    for number, key in enumerate(rows[0]):
        table.add_column(key, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row.values())
    # a table is read whole or not at all: rather wide lines than columns of dots
    needed = sum(
        max(len(text) for text in (key, *(row[key] for row in rows))) + 3 for key in rows[0]
    )
    width = min(needed, _WIDEST) if needed > _TABLE_WIDTH else _TABLE_WIDTH
    Console(highlight=False, width=max(OUT.width, width)).print(table)


def run_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The size, quality and cost of each result of a run, for people."""
    found = []
    for row in rows:
        seconds = row["seconds"]
        found.append(
            {
                "model": str(row["name"]),
                "experts": str(row["experts"]),
                "parameters": f"{row['parameters'] / 1e6:.2f} M",
                "non-zero": f"{row['nonzero_parameters'] / 1e6:.2f} M",
                "on disk": f"{row['bytes'] / 1e6:.1f} MB",
                "KL": _number(row["kl"], ".3f"),
                "agree": _number(row["agreement"], ".1%"),
                "plan s": _number(seconds.get("plan"), ".2f"),
                "write s": _number(seconds.get("apply"), ".2f"),
                "walk s": _number(seconds.get("evaluate"), ".1f"),
                "peak (plan, write)": _number(row["peak_memory_bytes"], "bytes"),
            }
        )
    return found


def perplexity_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Perplexity per domain of each result."""
    return [
        {
            "perplexity": str(row["name"]),
            **{domain: _number(value, ".1f") for domain, value in row["perplexity"].items()},
        }
        for row in rows
    ]


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "–"
    return f"{value / 2**20:.0f} MiB" if form == "bytes" else format(value, form)


def tell_default_text(model: str, data: list[str] | None) -> None:
    """Say that the embedded text was read, where the user gave none."""
    if not data and model != "demo":
        note("read the embedded text (six domains); give your own with --data")


def tell_warnings(warnings: Iterable[str]) -> None:
    """Warnings of a plan, one a line."""
    for text in warnings:
        note(f"warning: {text}")


def profile_json(compute: Any) -> dict[str, Any]:
    """Where time went, as part of a result; nothing unless it was counted."""
    return {} if compute.profile is None else {"profile": _profile(compute.profile)}


def _profile(profile: Any) -> dict[str, Any]:
    from moeprune.models.process import bytes_read, peak_memory

    return {
        "seconds": {name: round(value, 3) for name, value in profile.seconds().items()},
        "weight_bytes": profile.bytes,
        "disk_bytes": bytes_read(),
        "peak_memory_bytes": peak_memory(),
        "bound": profile.bound(),
    }


def tell_profile(compute: Any) -> None:
    """A table of where time went, and a sentence, on stderr."""
    if compute.profile is None:
        return
    found = _profile(compute.profile)
    table = Table(title="time", title_justify="left", show_header=False, box=None)
    for name, value in found["seconds"].items():
        table.add_row(_SPENT.get(name, name), f"{value:.2f} s")
    table.add_row("weights loaded", f"{found['weight_bytes'] / 1e6:.1f} MB")
    for name, text in (("disk_bytes", "read from disk"), ("peak_memory_bytes", "peak memory")):
        if found[name] is not None:
            table.add_row(text, f"{found[name] / 1e6:.1f} MB")
    ERR.print(table)
    note(f"bounded by {found['bound']}")


def tell_report(page: Path, seconds: float | None = None) -> None:
    """Which file to open: the last line of what a command prints."""
    spent = "" if seconds is None else f"   ({seconds:.0f} s)"
    OUT.print(f"report: {page}{spent}", soft_wrap=True)


def command_line() -> str:
    """The command that runs, as it can be repeated."""
    return shlex.join(["moeprune", *sys.argv[1:]])


def print_sizes(out: Path, sizes: Any, more: dict[str, Any], as_json: bool) -> None:
    """What an edit did to the size of a model."""
    if sizes.attached:
        more = {"attached": dict(sizes.attached), **more}
    facts = {
        name: list(getattr(sizes, name)) for name in ("experts", "parameters", "nonzero", "bytes")
    }
    if as_json:
        print_json({"path": str(out), **facts, **more})
    else:
        shown = {name: f"{before:,} -> {after:,}" for name, (before, after) in facts.items()}
        print_facts(f"wrote {out}", {**shown, **more})
