"""The command that writes plans for servers. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli import output
from moeprune.cli.options import AsJson, Force


def plan_export(
    plan: Annotated[Path, typer.Argument(help="Output of **moeprune plan**; it deletes experts.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    profile: Annotated[
        str, typer.Option("--format", help="moeprune, riy or ascend; see docs/serving.md.")
    ] = "moeprune",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the kept experts of a plan for servers that prune while they load a checkpoint.

    Example: `moeprune plan-export plan.json --out profile.json`
    """
    from moeprune.pipeline.exporting import plan_export as export

    path = export(plan, out, profile, force)
    if as_json:
        output.print_json({"path": str(path), "profile": profile})
    else:
        output.OUT.print(f"written: {path}", markup=False, soft_wrap=True)
