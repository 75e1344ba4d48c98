"""The command ``report``."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated, Optional

import typer

from moeprune.cli import output
from moeprune.cli.options import AsJson, Force
from moeprune.errors import MoepruneError


def report(
    run: Annotated[
        Path, typer.Argument(help="What **demo**, **prune**, **compare** or **run** wrote.")
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The page; default: **report.html** in the run's folder."),
    ] = None,
    open_: Annotated[
        str, typer.Option("--open", help="Show it in a browser: **yes** or **no**.")
    ] = "no",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Draw what a run did as one HTML file: quality, plot, atlas of experts, provenance.

    A run that was stopped is drawn as far as it went, with a warning of what is missing.

    Example: `moeprune report demo-out --force`
    """
    from moeprune.pipeline.reporting import report as draw

    if open_ not in ("yes", "no"):
        raise MoepruneError(f"--open is yes or no (got {open_!r})")
    done = draw(run, out, force)
    output.tell_warnings(done.missing)
    if as_json:
        output.print_json({"path": str(done.path), "missing": list(done.missing)})
    else:
        output.tell_report(done.path)
    if open_ == "yes":
        webbrowser.open(done.path.resolve().as_uri())
