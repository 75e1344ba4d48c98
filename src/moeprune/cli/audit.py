"""The command ``audit``. Nothing heavy is imported before the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from moeprune.cli import output
from moeprune.cli.options import (
    AsJson,
    Data,
    Device,
    Dtype,
    Force,
    Length,
    Memory,
    MemoryDir,
    Model,
    Seed,
    Sequences,
    Statistics,
    Trust,
    Workers,
    parse_compute,
    parse_text,
)
from moeprune.errors import BudgetError


def audit(
    model: Model,
    data: Data = None,
    sequences: Sequences = 96,
    length: Length = 512,
    statistics: Statistics = None,
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Chooses experts. [default: mone, or reap where it must]"),
    ] = None,
    ratios: Annotated[str, typer.Option(help="Shares of the experts to try.")] = "0.25,0.5,0.75",
    max_loss: Annotated[
        float, typer.Option(help="Rise of the held-out loss to accept, nats per token.")
    ] = 0.05,
    held: Annotated[int, typer.Option(help="Sequences to measure damage on.")] = 32,
    layers: Annotated[int, typer.Option(help="Layers to cut one at a time, at most.")] = 12,
    seed: Seed = 0,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Directory for audit.json."),
    ] = None,
    force: Force = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    workers: Workers = 0,
    memory: Memory = None,
    memory_dir: MemoryDir = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Tell how prunable a model is, before anything is cut.

    Computes in float32 unless told otherwise: rounding hides the damage of small cuts.

    Example: `moeprune audit demo --max-loss 0.05`
    """
    from moeprune.files import json_bytes, new_directory, refuse_existing
    from moeprune.pipeline import auditing

    trial = auditing.Trial(method, _ratios(ratios), max_loss, held, layers)
    if out is not None:
        refuse_existing(out, force)
    with output.progress_bars() as progress:
        result = auditing.audit(
            model,
            parse_text(data, sequences, length, seed),
            statistics,
            trial,
            parse_compute(dtype, device, workers, trust_remote_code, memory, memory_dir),
            progress,
        )
    if out is not None:
        with new_directory(out, force) as work:
            (work / "audit.json").write_bytes(json_bytes(result))
    if as_json:
        output.print_json(result)
        return
    _print(result)
    output.tell_default_text(model, data)


def _ratios(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise BudgetError(f"bad --ratios {text!r}", "for example 0.25,0.5,0.75") from error


def _print(result: dict[str, Any]) -> None:
    for text in result["warnings"]:
        _line(f"warning: {text}")
    ratios = list(next(iter(result["layers"].values()))["damage"])
    name = result["method"]["name"]
    rows = [_row(layer, one, ratios, name) for layer, one in result["layers"].items()]
    whole = dict.fromkeys(rows[0], "") | {"layer": "all"}
    for ratio, cell in result["model_damage"].items():
        whole[f"KL {ratio}"] = _value(cell["kl"]["value"])
    output.print_rows(
        f"{result['model']['name']} ({result['dtype']}), cut by {name}", [*rows, whole]
    )
    for text in result["findings"]:
        _line(f"- {text}")


def _row(layer: str, one: dict[str, Any], ratios: list[str], name: str) -> dict[str, str]:
    weights, outputs = one["weights"], one["outputs"]
    middle = ratios[len(ratios) // 2]
    steady = (one["stability"] or {}).get(middle)
    found = {
        "layer": layer,
        "experts": str(one["experts"]),
        "balance": f"{one['load_balance']:.2f}",
        "dead": str(len(one["dead"])),
        "super": str(len(one["super"])),
        "< 256 tokens": str(one["uncovered"]),
        "NMI over floor": "–" if weights is None else f"{weights['above']:.0%}",
        "cosine": "–" if outputs is None else _value(outputs["token_median"]),
        f"steady {middle}": "–" if steady is None else f"{steady[name]['mean']:.0%}",
    }
    for ratio in ratios:
        cell = one["damage"][ratio]
        measured = cell.get("measured")
        predicted = cell.get("kl_predicted")
        found[f"KL {ratio}"] = (
            _value(measured["kl"]["value"])
            if measured
            else "–"
            if predicted is None
            else f"~{_value(predicted)}"
        )
    return found


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _line(text: str) -> None:
    output.OUT.print(text, markup=False, soft_wrap=True)
