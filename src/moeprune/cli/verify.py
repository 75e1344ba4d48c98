"""The command ``verify``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from moeprune.cli import output
from moeprune.cli.options import AsJson, Device, Memory, MemoryDir, parse_compute

if TYPE_CHECKING:
    from moeprune.verification.finding import Verification

_MOST_PER_RULE = 5


def verify(
    directory: Annotated[str, typer.Argument(help="A checkpoint, of moeprune or not.")],
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The model that it was made from: compare tensors and logits."),
    ] = None,
    plan: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="What was done to it; default: its own copy, or what its experts show."),
    ] = None,
    values: Annotated[
        bool, typer.Option("--values/--no-values", help="Read all values, or headers only.")
    ] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail as well.")] = False,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16, for logits.")
    ] = "float32",
    device: Device = "cpu",
    memory: Memory = None,
    memory_dir: MemoryDir = None,
    as_json: AsJson = False,
) -> None:
    """Find what is wrong with a checkpoint; exit code 0 clean, 1 findings, 2 no checkpoint.

    Example: `moeprune verify smaller --against demo`
    """
    from moeprune.pipeline.verification import verify as run

    with output.progress_bars() as progress:
        compute = parse_compute(dtype, device, 0, False, memory, memory_dir)
        result = run(directory, against, plan, values, compute, progress)
    if as_json:
        output.print_json(result.to_json())
    else:
        _print(result)
    if not result.passed(strict):
        raise typer.Exit(1)


def _print(result: Verification) -> None:
    shown: Counter[str] = Counter()
    for finding in result.findings:
        shown[finding.rule] += 1
        if shown[finding.rule] <= _MOST_PER_RULE:
            where = finding.file if finding.tensor is None else f"{finding.file}: {finding.tensor}"
            _line(f"{finding.severity}: [{finding.rule}] {where}: {finding.problem}")
            _line(f"    -> {finding.remedy}")
    for rule, count in shown.items():
        if count > _MOST_PER_RULE:
            _line(f"... and {count - _MOST_PER_RULE} more of [{rule}]; all of them: --json")
    logits = result.comparison.get("logits")
    if logits is not None and logits["difference"] is not None:
        how = "equal bit for bit" if logits["equal"] else f"differ by {logits['difference']:.3g}"
        _line(
            f"logits of {logits['tokens']} tokens ({logits['text']}, {logits['dtype']}): {how}, "
            f"tolerance {logits['tolerance']:.3g}"
        )
    reasons: dict[str, list[str]] = {}
    for rule, reason in result.skipped.items():
        reasons.setdefault(reason, []).append(rule)
    for reason, rules in reasons.items():
        _line(f"not checked: {', '.join(rules)}: {reason}")
    counts = ", ".join(f"{len(result.of(kind))} {kind}s" for kind in ("error", "warning", "note"))
    _line(f"{result.path}: {len(result.rules) - len(result.skipped)} rules checked: {counts}")


def _line(text: str) -> None:
    output.OUT.print(text, markup=False, soft_wrap=True)
