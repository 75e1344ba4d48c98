"""``moeprune evaluate``: what was lost. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from moeprune.cli import health, output, together
from moeprune.cli.options import (
    AsJson,
    Data,
    Device,
    Dtype,
    Memory,
    MemoryDir,
    Model,
    Profiled,
    Trust,
    Workers,
    parse_compute,
    parse_text,
)
from moeprune.cli.task_options import (
    BatchSize,
    Door,
    IncludePath,
    Limit,
    NumFewshot,
    TaskData,
    Tasks,
    task_sections,
)
from moeprune.cli.task_tables import print_tasks

if TYPE_CHECKING:
    from moeprune.pipeline.evaluating import Section


def evaluate(
    model: Model,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The model that it was made from, for KL and agreement."),
    ] = None,
    data: Data = None,
    sequences: Annotated[int, typer.Option(help="Windows per domain; 0 takes all.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    smallest: Annotated[
        float, typer.Option(help="The difference of loss that matters, nats per token.")
    ] = 0.02,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    workers: Workers = 0,
    memory: Memory = None,
    memory_dir: MemoryDir = None,
    profile: Profiled = False,
    generate: health.Generate = False,
    prompts: health.Prompts = None,
    prompts_per_domain: health.PerDomain = None,
    new_tokens: health.NewTokens = None,
    temperature: health.Temperatures = None,
    seed: health.HealthSeed = 0,
    efficiency: health.Efficiency = False,
    rounds: health.Rounds = None,
    card: health.Card = False,
    trust_remote_code: Trust = False,
    tasks: Tasks = None,
    limit: Limit = None,
    task_data: TaskData = None,
    include_path: IncludePath = None,
    num_fewshot: NumFewshot = None,
    door: Door = "streamed",
    batch_size: BatchSize = 16,
    resume: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Keep what is done in a folder of this name + .evaluation until the end, and "
            "go on from there after an interruption."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure held-out perplexity per domain and, against a teacher, what was lost.

    Example: `moeprune evaluate smaller --teacher demo`
    """
    from moeprune.pipeline import evaluating
    from moeprune.pipeline.cards import find_card, write_measured

    text = parse_text(data, sequences, length, 0)
    sections: dict[str, Section] = {
        **task_sections(tasks, limit, task_data, include_path, num_fewshot, door, batch_size),
        **health.generation_section(
            generate, text, prompts, prompts_per_domain, new_tokens, temperature, seed
        ),
        **health.efficiency_section(efficiency, text, rounds),
    }
    if card:
        find_card(model)  # before the work
    compute = parse_compute(dtype, device, workers, trust_remote_code, memory, memory_dir, profile)
    with output.progress_bars() as progress:
        result = evaluating.evaluate(
            model,
            teacher,
            text,
            compute,
            progress,
            sections,
            smallest,
            resume,
            output.note,
        )
    if not together.ranks().first:
        return
    if card:
        output.note(f"wrote {write_measured(model, result)}")
    output.tell_profile(compute)
    if as_json:
        output.print_json({**result, **output.profile_json(compute)})
        return
    _print_text(result)
    if "tasks" in result:
        print_tasks(result["tasks"], result["protocols"])
    if generate:
        health.print_generation(result["generation"])
    if efficiency:
        health.print_efficiency(result["efficiency"])


def _print_text(result: dict[str, Any]) -> None:
    """A table of domains and groups, then what the differences mean."""
    parts = {**result["domains"], **{f"= {name}": x for name, x in result["groups"].items()}}
    rows = [{"domain": name, **_cells(score)} for name, score in parts.items()]
    output.print_rows(f"{result['model']} ({result['dtype']})", rows)
    if result["teacher"] is None:
        return
    output.OUT.print(f"Against {result['teacher']}, loss in nats per token:", markup=False)
    for name, score in parts.items():
        output.OUT.print(f"  {name}: {score['against']['verdict']}", markup=False, soft_wrap=True)
    for sentence in result["findings"]:
        output.OUT.print(f"Found: {sentence}.", markup=False, soft_wrap=True)


def _cells(score: dict[str, Any]) -> dict[str, str]:
    seen = {True: "yes", False: "no", None: "–"}[score["seen"]]
    cells = {
        "seen": seen,
        "tokens": str(score["tokens"]),
        "perplexity": _text(score["perplexity"]),
        "bits/byte": _text(score["bits_per_byte"], ".3f"),
    }
    against = score.get("against")
    if against is None:
        return cells
    return {
        **cells,
        "loss +": _with_ends(against["loss"], "+.3f"),
        "KL": _with_ends(against["kl"], ".3f"),
        "agree": _with_ends(against["agreement"], ".1%"),
        "top 5": _text(score["agreement_top5"], ".1%"),
    }


def _with_ends(interval: dict[str, Any], form: str) -> str:
    value, low, high = (_text(interval[key], form) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _text(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)
