"""The command ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli import output
from moeprune.cli.options import (
    AsJson,
    Dtype,
    Force,
    Workers,
)
from moeprune.cli.task_tables import sample_rows


def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything.")] = Path("demo-out"),
    dtype: Dtype = "float32",
    workers: Workers = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compress the embedded model six ways and report what was lost; takes about two minutes.

    Example: `moeprune demo --out demo-out`
    """
    from moeprune.pipeline.demo import REPORT
    from moeprune.pipeline.demo import demo as run
    from moeprune.pipeline.stages import Compute

    with output.progress_bars() as progress:
        result = run(
            out,
            compute=Compute("cpu", dtype, workers),
            force=force,
            command=output.command_line(),
            progress=progress,
        )
    if as_json:
        output.print_json(result)
        return
    output.print_rows("what was kept, lost and spent", output.run_rows(result["rows"]))
    output.print_rows("held-out perplexity by domain", output.perplexity_rows(result["rows"]))
    output.print_rows("minimal pairs (BLiMP), share right; chance 0.5", sample_rows(result["rows"]))
    for row in result["rows"]:
        output.tell_warnings(f"{row['name']}: {text}" for text in row["warnings"])
    output.tell_report(out / REPORT, result["seconds"])
