"""``moeprune evaluate``: what was lost. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from moeprune.cli import output
from moeprune.cli.options import (
    AsJson,
    Data,
    Device,
    Dtype,
    Model,
    Trust,
    Workers,
    parse_compute,
    parse_text,
)

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
    dtype: Dtype = "auto",
    device: Device = "cpu",
    workers: Workers = 0,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure held-out perplexity per domain and, against a teacher, KL and agreement.

    Example: `moeprune evaluate smaller --teacher demo`
    """
    from moeprune.pipeline import evaluating

    sections: dict[str, Section] = {}
    with output.progress_bars() as progress:
        result = evaluating.evaluate(
            model,
            teacher,
            parse_text(data, sequences, length, 0),
            parse_compute(dtype, device, workers, trust_remote_code),
            progress,
            sections,
        )
    if as_json:
        output.print_json(result)
        return
    _print_text(result)


def _print_text(result: dict[str, Any]) -> None:
    names = ("tokens", "perplexity", "bits_per_byte", "kl", "agreement")
    rows = [
        {
            "domain": domain,
            **{name: "–" if score[name] is None else f"{score[name]:.4g}" for name in names},
        }
        for domain, score in result["domains"].items()
    ]
    output.print_rows(f"{result['model']} ({result['dtype']})", rows)
    total = result["groups"]["all"]
    if total["kl"] is not None:
        output.OUT.print(f"all: KL {total['kl']:.4f}, agreement {total['agreement']:.1%}")
