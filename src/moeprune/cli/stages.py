"""The commands of the stages. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from moeprune.cli import output, together
from moeprune.cli.options import (
    AsJson,
    Data,
    Dequantize,
    Device,
    Dtype,
    Forbid,
    Force,
    Keep,
    Length,
    Memory,
    MemoryDir,
    Method,
    Mix,
    Model,
    Mtp,
    MultipleOf,
    Options,
    Pad,
    Pattern,
    Pin,
    Profiled,
    ProtectSuper,
    Ratio,
    Seed,
    Sequences,
    Statistics,
    TargetBytes,
    TargetParams,
    Tau,
    Trust,
    Uniform,
    Workers,
    parse_budget,
    parse_compute,
    parse_constraints,
    parse_options,
    parse_text,
)


def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for the statistics.")],
    data: Data = None,
    mix: Mix = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    collect: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Accumulators, comma-separated; default: all but Gram ones and residual."
        ),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    workers: Workers = 0,
    memory: Memory = None,
    memory_dir: MemoryDir = None,
    profile: Profiled = False,
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
    compute = parse_compute(dtype, device, workers, trust_remote_code, memory, memory_dir, profile)
    with output.progress_bars() as progress:
        store = stages.calibrate(
            model,
            out,
            parse_text(data, sequences, length, seed, mix),
            names,
            compute,
            force,
            progress,
            output.note,
        )
    if not together.ranks().first:
        return
    output.tell_default_text(model, data)
    output.tell_profile(compute)
    if as_json:
        output.print_json({"path": str(out), **store.manifest, **output.profile_json(compute)})
    else:
        facts = {"layers": store.layers, **store.manifest["data"]}
        output.print_facts(f"statistics in {out}", facts)


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


def plan(
    model: Model,
    method: Method,
    out: Annotated[Path, typer.Option(help="The plan, for example plan.json.")],
    ratio: Ratio = None,
    keep: Keep = None,
    tau: Tau = None,
    pattern: Pattern = None,
    target_bytes: TargetBytes = None,
    target_params: TargetParams = None,
    multiple_of: MultipleOf = 1,
    uniform: Uniform = False,
    pin: Pin = None,
    forbid: Forbid = None,
    protect_super: ProtectSuper = False,
    option: Options = None,
    statistics: Statistics = None,
    data: Data = None,
    mix: Mix = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    workers: Workers = 0,
    memory: Memory = None,
    memory_dir: MemoryDir = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Decide what happens to every expert; nothing is written but the plan.

    Example: `moeprune plan demo --method mone --ratio 0.5 --statistics stats --out plan.json`
    """
    from moeprune.pipeline import stages

    with output.progress_bars() as progress:
        made = stages.plan(
            model,
            method,
            parse_budget(ratio, keep, tau, pattern, multiple_of, target_bytes, target_params),
            statistics,
            parse_text(data, sequences, length, seed, mix),
            parse_options(option),
            parse_compute(dtype, device, workers, trust_remote_code, memory, memory_dir),
            seed,
            progress,
            uniform,
            parse_constraints(pin, forbid, protect_super),
            out=out,
            force=force,
            note=output.note,
        )
    if not together.ranks().first:
        return
    if statistics is None and made.statistics:
        output.tell_default_text(model, data)
    output.tell_warnings(made.warnings)
    if as_json:
        output.print_json({"path": str(out), **made.to_json(None)})
    else:
        budget = ", ".join(
            f"{name} {value}" for name, value in made.budget.items() if not isinstance(value, dict)
        )
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


def prune(
    model: Model,
    method: Method,
    out: Annotated[Path, typer.Option(help="Directory for the new checkpoint.")],
    ratio: Ratio = None,
    keep: Keep = None,
    tau: Tau = None,
    pattern: Pattern = None,
    target_bytes: TargetBytes = None,
    target_params: TargetParams = None,
    multiple_of: MultipleOf = 1,
    uniform: Uniform = False,
    pad: Pad = False,
    pin: Pin = None,
    forbid: Forbid = None,
    protect_super: ProtectSuper = False,
    option: Options = None,
    statistics: Statistics = None,
    data: Data = None,
    mix: Mix = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    workers: Workers = 0,
    memory: Memory = None,
    memory_dir: MemoryDir = None,
    profile: Profiled = False,
    mtp: Mtp = "keep-pruned",
    dequantize: Dequantize = False,
    trust_remote_code: Trust = False,
    routing: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--routing/--no-routing",
            help="Measure for the report how evenly experts are used before and after, by a short "
            "walk of both models; default: if the text is read for the method.",
        ),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Calibrate, plan and apply in one go.

    Example: `moeprune prune demo --method mone --ratio 0.5 --out smaller`
    """
    from moeprune.pipeline import stages

    compute = parse_compute(dtype, device, workers, trust_remote_code, memory, memory_dir, profile)
    with output.progress_bars() as progress:
        done = stages.prune(
            model,
            method,
            parse_budget(ratio, keep, tau, pattern, multiple_of, target_bytes, target_params),
            out,
            parse_text(data, sequences, length, seed, mix),
            parse_options(option),
            statistics,
            compute,
            seed,
            force,
            progress,
            uniform,
            stages.Writing(pad, mtp, dequantize),
            parse_constraints(pin, forbid, protect_super),
            output.command_line(),
            routing,
        )
    if statistics is None and done.plan.statistics:
        output.tell_default_text(model, data)
    output.tell_warnings(done.plan.warnings)
    more = {
        "seconds": {name: round(value, 2) for name, value in done.seconds.items()},
        "peak_memory_bytes": done.peak_memory_bytes,
    }
    output.tell_profile(compute)
    if as_json:
        more |= output.profile_json(compute)
    output.print_sizes(out, done.sizes, more, as_json)
    if not as_json:
        output.tell_report(out / "report.html")
