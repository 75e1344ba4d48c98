"""The command ``recover``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from moeprune.cli import output
from moeprune.cli.options import (
    AsJson,
    Data,
    Device,
    Force,
    Length,
    Memory,
    MemoryDir,
    Mix,
    Model,
    Seed,
    Trust,
    parse_compute,
    parse_text,
)

if TYPE_CHECKING:
    from moeprune.pipeline.recovery import Recovered, Status

_Number = Optional[float]  # noqa: UP045  (typer reads it at run time on Python 3.10)
_Count = Optional[int]  # noqa: UP045
_Text = Optional[str]  # noqa: UP045


def recover(
    student: Model,
    out: Annotated[Path, typer.Option(help="Directory for the recovered checkpoint.")],
    teacher: Annotated[
        _Text, typer.Option(help="The model that the student was made from.")
    ] = None,
    how: Annotated[
        str, typer.Option(help="expert-kd, router-kd, logit-kd, lora or full.")
    ] = "expert-kd",
    preset: Annotated[
        _Text, typer.Option(help="Published settings: **moe-pruner**, **moeits**.")
    ] = None,
    train: Annotated[
        _Text,
        typer.Option(help="Groups that train: experts, novices, routers, embeddings, rest."),
    ] = None,
    target: Annotated[
        _Text,
        typer.Option(
            help="expert-kd: local or stream; layer by layer: student-inputs, dense-inputs or "
            "dense-outputs."
        ),
    ] = None,
    layerwise: Annotated[
        bool, typer.Option("--layerwise", help="One layer after another; never holds the model.")
    ] = False,
    objective: Annotated[_Text, typer.Option(help="layer by layer: block or router.")] = None,
    processes: Annotated[
        int, typer.Option(help="layer by layer with dense-inputs: share the layers.")
    ] = 1,
    rescale: Annotated[
        bool, typer.Option("--rescale", help="expert-kd: lambda anew at every step.")
    ] = False,
    ce_weight: Annotated[_Number, typer.Option(help="Weight of the cross-entropy.")] = None,
    kl_weight: Annotated[_Number, typer.Option(help="Weight of KL to the teacher.")] = None,
    steps: Annotated[_Count, typer.Option(help="Steps of the optimiser.")] = None,
    batch: Annotated[_Count, typer.Option(help="Sequences per step, in all.")] = None,
    accumulate: Annotated[_Count, typer.Option(help="Parts a batch is cut into.")] = None,
    learning_rate: Annotated[_Number, typer.Option(help="The highest.")] = None,
    warmup: Annotated[_Number, typer.Option(help="Fraction of the steps.")] = None,
    weight_decay: Annotated[_Number, typer.Option()] = None,
    clip: Annotated[_Number, typer.Option(help="Norm of the gradient; 0: none.")] = None,
    rank: Annotated[_Count, typer.Option(help="lora: rank.")] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="lora: save the adapter, merge nothing.")
    ] = False,
    evaluate_every: Annotated[_Count, typer.Option(help="Steps; 0: ten times.")] = None,
    save_every: Annotated[_Count, typer.Option(help="Steps; 0: ten times.")] = None,
    patience: Annotated[_Count, typer.Option(help="Evaluations without gain; 0: for ever.")] = None,
    holdout: Annotated[_Number, typer.Option(help="Fraction that only measures.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    data: Data = None,
    mix: Mix = None,
    sequences: Annotated[int, typer.Option(help="Sequences in all.")] = 600,
    length: Length = 512,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, to compute in.")] = "float32",
    device: Device = "cpu",
    memory: Memory = None,
    memory_dir: MemoryDir = None,
    trust_remote_code: Trust = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was cut.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a pruned model to win back what it lost; zeros stay zeros.

    Example: `moeprune recover smaller --teacher demo --how expert-kd --out healed`
    """
    from moeprune.pipeline.recovery import recover as run
    from moeprune.pipeline.recovery import training

    options: dict[str, Any] = {
        "train": None if train is None else tuple(part.strip() for part in train.split(",")),
        "target": target, "layerwise": layerwise, "objective": objective,
        "rescale": rescale, "ce_weight": ce_weight, "kl_weight": kl_weight,
        "steps": steps, "batch": batch, "accumulate": accumulate, "learning_rate": learning_rate,
        "warmup": warmup, "weight_decay": weight_decay, "clip": clip, "rank": rank,
        "adapter": adapter, "evaluate_every": evaluate_every, "save_every": save_every,
        "patience": patience, "holdout": holdout, "dtype": dtype, "seed": seed,
        "gradient_checkpointing": gradient_checkpointing,
    }  # fmt: skip
    chosen = training(how, preset, options)
    with output.progress_bars() as progress:
        result = run(
            student,
            teacher,
            out,
            chosen,
            parse_text(data, sequences, length, seed, mix),
            parse_compute("float32", device, 0, trust_remote_code, memory, memory_dir),
            resume,
            force,
            _listener(progress),
            progress,
            processes,
        )
    output.tell_default_text(student, data)
    if as_json:
        output.print_json(result.to_json())
    else:
        _print(result)


def _listener(progress: output.Reporter) -> Callable[[Status], None]:
    def listen(status: Status) -> None:
        held = "" if status.held is None else f", held out {status.held:.4f}"
        loss = "" if status.loss is None else f"loss {status.loss:.4f}"
        progress("training", status.step, status.steps)
        progress.describe("training", f"training: {loss}{held}")

    return listen


def _print(result: Recovered) -> None:
    facts: dict[str, Any] = {"steps": f"{result.steps} ({result.ended})", "seconds": result.seconds}
    if result.held is not None:
        before, after = result.held
        facts[f"held-out {result.measure}"] = f"{before:.4f} -> {after:.4f}"
        if not result.layers:
            facts["weights of step"] = result.best_step
    for group, (changed, total) in result.changed.items():
        norm = result.gradients.get(group)
        gradient = "" if norm is None else f", first gradient {norm:.3g}"
        facts[group] = f"{changed} of {total} tensors changed{gradient}"
    facts["kept at zero"] = result.zeros
    output.print_facts(f"recovered: {result.path}", facts)
    if result.held is not None and result.best_step == 0:
        output.note("warning: no step was better than the student as it was, which is written")
    elif result.held is not None and result.held[1] >= result.held[0]:
        output.note("warning: merging lost what training won: the result is worse than the student")
