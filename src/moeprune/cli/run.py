"""The command ``run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from moeprune.cli import output
from moeprune.cli.options import AsJson, Force, Trust


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, for example recipe.yaml.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Directory for the new checkpoint; default: as the recipe says."),
    ] = None,
    keep_steps: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="New directory for the checkpoints between the steps."),
    ] = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Do the steps of a recipe, each on what the one before wrote.

    Example: `moeprune run recipe.yaml --out smaller`
    """
    from moeprune.pipeline.recipes.run import run as do

    with output.progress_bars() as progress:
        result = do(
            recipe, out, force, keep_steps, trust_remote_code, progress, output.command_line()
        )
    for number, step in enumerate(result["steps"]):
        output.tell_warnings(f"step {number + 1}: {text}" for text in step["warnings"])
    if as_json:
        output.print_json(result)
        return
    rows = [_row(number, step) for number, step in enumerate(result["steps"])]
    output.print_rows(f"wrote {result['path']}", rows)
    measured = result["evaluation"]
    if measured is not None:
        total = measured["groups"]["all"]
        output.OUT.print(
            f"perplexity {total['perplexity']:.4g}, KL {total['kl']:.4g}, "
            f"agreement {total['agreement']:.1%}"
        )
    output.tell_report(Path(result["path"]) / "report.html")


def _row(number: int, step: dict[str, Any]) -> dict[str, str]:
    seconds = f"{sum(step['seconds'].values()):.1f}"
    if "recover" in step:
        result, held = step["result"], step["result"]["held"]
        gain = "" if held is None else f"{result['measure']} {held[0]:.4f} -> {held[1]:.4f}"
        return {
            "step": f"{number + 1} recover {step['recover']}",
            "asked": f"{step['options']['steps']} steps",
            "observed": gain or "nothing held out",
            "experts": "",
            "bytes": "",
            "non-zero": "",
            "seconds": seconds,
        }
    return {
        "step": f"{number + 1} {step['method']}",
        "asked": ", ".join(f"{name} {value}" for name, value in step["budget"].items()),
        "observed": step["observed"],
        "experts": f"{step['experts'][1]}/{step['experts'][0]}",
        "bytes": f"{step['bytes'][1]:,}",
        "non-zero": f"{step['nonzero'][1]:,}",
        "seconds": seconds,
    }
