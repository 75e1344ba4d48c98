"""The command ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from moeprune.cli import output
from moeprune.cli.options import (
    AsJson,
    Data,
    Device,
    Memory,
    MemoryDir,
    Model,
    Trust,
    Workers,
    parse_compute,
)
from moeprune.errors import MoepruneError

if TYPE_CHECKING:
    from moeprune.pipeline.arena.run import Grid


def compare(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory of the run; a run in it is continued.")],
    methods: Annotated[
        str, typer.Option(help="**all**, or a,b:option=value,option=value,c.")
    ] = "all",
    ratios: Annotated[str, typer.Option(help="Fractions to remove.")] = "0.25,0.5,0.75",
    keep: Annotated[str, typer.Option(help="Experts to keep per layer; instead of ratios.")] = "",
    patterns: Annotated[str, typer.Option(help="N:M patterns, beside the others.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of random methods.")] = "0",
    calibration_domains: Annotated[
        str, typer.Option(help="Texts to calibrate on: domains, or domains joined by +, or all.")
    ] = "",
    sequences: Annotated[str, typer.Option(help="Calibration sequences in all; several.")] = "",
    length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens per calibration sequence; 2048, of demo 512."),
    ] = None,
    data: Data = None,
    heldout: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Text to measure on: **[name=]file**; repeat for more domains."),
    ] = None,
    windows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Held-out windows per domain, 0 for all; 64, of demo 16."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep them in the run's folder.")
    ] = False,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="auto, float32, bfloat16 or float16; auto, of demo float32."),
    ] = None,
    device: Device = "cpu",
    workers: Workers = 0,
    memory: Memory = None,
    memory_dir: MemoryDir = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes that share the cells, and the cores.")
    ] = 1,
    ray: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The **--jobs** run on a Ray cluster: its address, **auto**, or **local**."
        ),
    ] = None,
    trust_remote_code: Trust = False,
    force: Annotated[bool, typer.Option("--force", help="Start afresh.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods: one calibration, every plan applied and measured alike.

    Stop it and run it again: finished cells stay. What a method's ratio counts stands in the
    column "removes". Zeroed weights save no byte of a dense file, and no time in today's servers.

    Example: `moeprune compare demo --methods mone,moeits,mone:scope=global --ratios 0.5 --out run`
    """
    from moeprune.pipeline.arena.lanes import Fan
    from moeprune.pipeline.arena.run import compare as run
    from moeprune.pipeline.inputs import Text

    demo = model == "demo"
    text = Text(tuple(data or ()), 120 if demo else 128, length or (512 if demo else 2048))
    count = windows if windows is not None else (16 if demo else 64)
    grid = _grid(methods, ratios, keep, patterns, seeds, calibration_domains, sequences)
    with output.progress_bars() as progress:
        result = run(
            model,
            out,
            grid,
            text,
            Text(tuple(heldout or ()), count, window),
            parse_compute(
                dtype or ("float32" if demo else "auto"),
                device,
                workers,
                trust_remote_code,
                memory,
                memory_dir,
            ),
            force=force,
            keep_checkpoints=keep_checkpoints,
            command=output.command_line(),
            progress=progress,
            say=output.note,
            fan=Fan(jobs, ray) if jobs > 1 or ray else None,
        )
    if as_json:
        output.print_json(result)
        return
    from moeprune.report.arena import SHORT, refusals, table_rows

    output.print_rows("methods on one calibration, measured alike", table_rows(result, SHORT))
    for line in refusals(result):
        output.note(line)
    output.tell_report(out / "compare.html", result["seconds"])


def _grid(
    methods: str, ratios: str, keep: str, patterns: str, seeds: str, domains: str, sequences: str
) -> Grid:
    from moeprune.core.budget import Budget, parse_pattern
    from moeprune.pipeline.arena.run import Grid

    budgets = [Budget(keep=number) for number in _numbers(keep, int, "--keep")]
    if not budgets:
        budgets = [Budget(ratio=number) for number in _numbers(ratios, float, "--ratios")]
    budgets += [Budget(pattern=parse_pattern(text)) for text in _split(patterns)]
    return Grid(
        methods,
        budgets,
        _numbers(seeds, int, "--seeds"),
        _split(domains),
        _numbers(sequences, int, "--sequences"),
    )


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, kind: type, option: str) -> list:  # type: ignore[type-arg]
    try:
        return [kind(part) for part in _split(text)]
    except ValueError:
        raise MoepruneError(
            f"{option}: {text!r} is no list of numbers", f"for example {option} 1,2"
        ) from None
