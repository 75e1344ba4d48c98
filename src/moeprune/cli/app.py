"""The commands. Nothing heavy is imported before a command runs, so that --help is quick."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from moeprune import __version__
from moeprune.cli import output
from moeprune.cli.models import models
from moeprune.cli.options import (
    AsJson,
    Data,
    Dequantize,
    Device,
    Dtype,
    Force,
    Keep,
    Length,
    Method,
    Model,
    Mtp,
    MultipleOf,
    Options,
    Pad,
    Pattern,
    Ratio,
    Seed,
    Sequences,
    Statistics,
    Tau,
    Trust,
    Uniform,
    Workers,
    parse_budget,
    parse_compute,
    parse_options,
    parse_text,
)
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
_INTERRUPTED = 130


@app.command()
def inspect(model: Model, trust_remote_code: Trust = False, as_json: AsJson = False) -> None:
    """Say what a checkpoint is, without reading its weights.

    Example: `moeprune inspect demo`
    """
    from moeprune.pipeline import stages

    facts = stages.inspect(model, trust_remote_code)
    if as_json:
        output.print_json(facts)
    else:
        hidden = ("name", "can", "reason", "supported")
        shown = {name: value for name, value in facts.items() if name not in hidden}
        output.print_facts(facts["name"], shown | facts["can"])


@app.command()
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for the statistics.")],
    data: Data = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    collect: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Accumulators, comma-separated; default: all but the Gram matrices."),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    workers: Workers = 0,
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Walk the model over text once and save what every method needs.

    Example: `moeprune calibrate demo --out stats --sequences 120 --length 512`
    """
    from moeprune.core.accumulators import LIGHT
    from moeprune.pipeline import stages

    names = LIGHT if collect is None else tuple(name.strip() for name in collect.split(","))
    with output.progress_bars() as progress:
        store = stages.calibrate(
            model,
            out,
            parse_text(data, sequences, length, seed),
            names,
            parse_compute(dtype, device, workers, trust_remote_code),
            force,
            progress,
        )
    output.tell_default_text(model, data)
    if as_json:
        output.print_json({"path": str(out), **store.manifest})
    else:
        facts = {"layers": store.layers, **store.manifest["data"]}
        output.print_facts(f"statistics in {out}", facts)


@app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Outputs of **moeprune calibrate**.")],
    out: Annotated[Path, typer.Option(help="Directory for the sum.")],
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Add up statistics of one model over different text, exactly.

    Example: `moeprune merge stats-en stats-de --out stats`
    """
    from moeprune.models.store import merge_statistics

    store = merge_statistics(sources, out, force)
    if as_json:
        output.print_json({"path": str(out), **store.manifest})
    else:
        output.print_facts(f"statistics in {out}", store.manifest["data"])


@app.command()
def plan(
    model: Model,
    method: Method,
    out: Annotated[Path, typer.Option(help="The plan, for example plan.json.")],
    ratio: Ratio = None,
    keep: Keep = None,
    tau: Tau = None,
    pattern: Pattern = None,
    multiple_of: MultipleOf = 1,
    uniform: Uniform = False,
    option: Options = None,
    statistics: Statistics = None,
    data: Data = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    workers: Workers = 0,
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Decide what happens to every expert; nothing is written but the plan.

    Example: `moeprune plan demo --method mone --ratio 0.5 --statistics stats --out plan.json`
    """
    from moeprune.models.store import refuse_existing_plan
    from moeprune.pipeline import stages

    refuse_existing_plan(out, force)
    with output.progress_bars() as progress:
        made = stages.plan(
            model,
            method,
            parse_budget(ratio, keep, tau, pattern, multiple_of),
            statistics,
            parse_text(data, sequences, length, seed),
            parse_options(option),
            parse_compute(dtype, device, workers, trust_remote_code),
            seed,
            progress,
            uniform,
        )
    stages.save_plan(made, out, force)
    if statistics is None and made.statistics:
        output.tell_default_text(model, data)
    output.tell_warnings(made.warnings)
    if as_json:
        output.print_json({"path": str(out), **made.to_json(None)})
    else:
        budget = ", ".join(f"{name} {value}" for name, value in made.budget.items())
        rows = [
            {
                "layer": str(index),
                "kept": str(len(layer.keep)),
                "novices": str(len(layer.replaced)),
                "deleted": str(len(layer.dropped)),
            }
            for index, layer in sorted(made.layers.items())
        ]
        output.print_rows(f"{made.method}, {budget} -> {out}", rows)


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Option(help="Output of **moeprune plan**.")],
    out: Annotated[Path, typer.Option(help="Directory for the new checkpoint.")],
    pad: Pad = False,
    mtp: Mtp = "keep-pruned",
    dequantize: Dequantize = False,
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the checkpoint that a plan describes, editing tensors on disk.

    Example: `moeprune apply demo --plan plan.json --out smaller`
    """
    from moeprune.pipeline import stages

    with output.progress_bars() as progress:
        writing = stages.Writing(pad, mtp, dequantize)
        sizes = stages.apply(model, plan, out, force, progress, writing, trust_remote_code)
    output.print_sizes(out, sizes, {}, as_json)


@app.command()
def prune(
    model: Model,
    method: Method,
    out: Annotated[Path, typer.Option(help="Directory for the new checkpoint.")],
    ratio: Ratio = None,
    keep: Keep = None,
    tau: Tau = None,
    pattern: Pattern = None,
    multiple_of: MultipleOf = 1,
    uniform: Uniform = False,
    pad: Pad = False,
    option: Options = None,
    statistics: Statistics = None,
    data: Data = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    workers: Workers = 0,
    mtp: Mtp = "keep-pruned",
    dequantize: Dequantize = False,
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Calibrate, plan and apply in one go.

    Example: `moeprune prune demo --method mone --ratio 0.5 --out smaller`
    """
    from moeprune.pipeline import stages

    with output.progress_bars() as progress:
        done = stages.prune(
            model,
            method,
            parse_budget(ratio, keep, tau, pattern, multiple_of),
            out,
            parse_text(data, sequences, length, seed),
            parse_options(option),
            statistics,
            parse_compute(dtype, device, workers, trust_remote_code),
            seed,
            force,
            progress,
            uniform,
            stages.Writing(pad, mtp, dequantize),
        )
    if statistics is None and done.plan.statistics:
        output.tell_default_text(model, data)
    output.tell_warnings(done.plan.warnings)
    more = {
        "seconds": {name: round(value, 2) for name, value in done.seconds.items()},
        "peak_memory_bytes": done.peak_memory_bytes,
    }
    output.print_sizes(out, done.sizes, more, as_json)


@app.command()
def evaluate(
    model: Model,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The model that it was made from, for KL and agreement."),
    ] = None,
    data: Data = None,
    sequences: Annotated[int, typer.Option(help="Windows per domain; 0 takes all.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    workers: Workers = 0,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure held-out perplexity per domain and, against a teacher, KL and agreement.

    Example: `moeprune evaluate smaller --teacher demo`
    """
    from moeprune.pipeline import stages

    with output.progress_bars() as progress:
        result = stages.evaluate(
            model,
            teacher,
            parse_text(data, sequences, length, 0),
            parse_compute(dtype, device, workers, trust_remote_code),
            progress,
        )
    if as_json:
        output.print_json(result)
        return
    names = ("tokens", "perplexity", "bits_per_byte", "kl", "agreement")
    rows = [
        {
            "domain": domain,
            **{name: "–" if score[name] is None else f"{score[name]:.4g}" for name in names},
        }
        for domain, score in result["domains"].items()
    ]
    output.print_rows(f"{result['model']} ({result['dtype']})", rows)
    if result["kl"] is not None:
        output.OUT.print(f"all: KL {result['kl']:.4f}, agreement {result['agreement']:.1%}")


app.command()(verify)
app.command()(models)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods with their sources, budgets and options.

    Example: `moeprune methods`
    """
    from dataclasses import fields

    from moeprune.core.method import methods as known

    listed = [
        {
            "name": name,
            "summary": kind.summary,
            "source": kind.source,
            "budgets": list(kind.budgets),
            "needs": list(kind.needs),
            "options": {field.name: field.default for field in fields(kind)},
        }
        for name, kind in known().items()
    ]
    if as_json:
        output.print_json(listed)
        return
    for entry in listed:
        name = str(entry.pop("name"))
        output.print_facts(name, entry)


@app.command()
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

    command = shlex.join(["moeprune", *sys.argv[1:]])
    with output.progress_bars() as progress:
        result = run(
            out,
            compute=Compute("cpu", dtype, workers),
            force=force,
            command=command,
            progress=progress,
        )
    if as_json:
        output.print_json(result)
        return
    output.print_rows("what was kept, lost and spent", output.run_rows(result["rows"]))
    output.print_rows("held-out perplexity by domain", output.perplexity_rows(result["rows"]))
    for row in result["rows"]:
        output.tell_warnings(f"{row['name']}: {text}" for text in row["warnings"])
    output.OUT.print(f"report: {out / REPORT}   ({result['seconds']:.0f} s)", soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point: errors that the user can mend are one or two lines and exit code 2."""
    try:
        code = app(prog_name="moeprune", standalone_mode=False)
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
    if code == _INTERRUPTED:
        output.note("interrupted; nothing was kept")
    sys.exit(code or 0)
