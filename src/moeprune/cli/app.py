"""The command line: its commands and what becomes of their errors."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from moeprune import __version__
from moeprune.cli import output, together
from moeprune.cli.audit import audit
from moeprune.cli.compare import compare
from moeprune.cli.demo import demo
from moeprune.cli.evaluate import evaluate
from moeprune.cli.listings import inspect, methods, models
from moeprune.cli.plan_diff import plan_diff
from moeprune.cli.plan_export import plan_export
from moeprune.cli.recover import recover
from moeprune.cli.report import report
from moeprune.cli.run import run
from moeprune.cli.stages import apply, calibrate, merge, plan, prune
from moeprune.cli.verify import verify
from moeprune.errors import MoepruneError

app = typer.Typer(
    name="moeprune",
    help="Make Mixture-of-Experts language models smaller, from disk, and prove what was lost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

_UsageError: Any = typer.BadParameter.__bases__[0]  # typer exports no name for it
_INTERRUPTED, _TERMINATED = 130, 143

for command in (
    inspect,
    audit,
    calibrate,
    merge,
    plan,
    plan_diff,
    plan_export,
    apply,
    prune,
    evaluate,
    compare,
    run,
    report,
    recover,
    verify,
    models,
    methods,
    demo,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""
    together.begin(context.invoked_subcommand)


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """SIGTERM ends the block as Ctrl-C does; a second one ends the process at once.

    Gives the signals that came.
    """
    came: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Entry point: errors that the user can mend are one or two lines and exit code 2."""
    try:
        with _terminable() as came, together.session():
            code = app(prog_name="moeprune", standalone_mode=False)
            if code == _INTERRUPTED:
                raise KeyboardInterrupt  # other processes are not told that this one is done
    except KeyboardInterrupt:
        output.note("interrupted; what was not finished was not kept")
        sys.exit(_TERMINATED if came else _INTERRUPTED)
    except _UsageError as error:
        if problem := error.format_message():  # empty: no command was given, and help was shown
            context = error.ctx
            output.error(problem, f"see {context.command_path if context else 'moeprune'} --help")
        sys.exit(2)
    except MoepruneError as error:
        output.error(error.problem, error.hint)
        sys.exit(2)
    except OSError as error:
        culprit = "" if error.filename is None else f": {error.filename}"
        output.error(f"{error.strerror or error}{culprit}")
        sys.exit(2)
    sys.exit(code or 0)
