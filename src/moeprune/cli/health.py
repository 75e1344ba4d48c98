"""Options and tables of ``evaluate --generate`` and ``--efficiency``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from moeprune.cli import output
from moeprune.errors import MoepruneError

if TYPE_CHECKING:
    from moeprune.pipeline.evaluating import Section
    from moeprune.pipeline.inputs import Compute, Progress, Source, Text

Generate = Annotated[
    bool, typer.Option("--generate", help="Also: loops, repetition and endless answers.")
]
Prompts = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="--generate: JSONL of **prompt** or **messages**; default: cut from text."),
]
PerDomain = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="--generate: prompts from each domain; default 12."),
]
NewTokens = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="--generate: where an answer is cut; default 96."),
]
Temperatures = Annotated[
    Optional[list[float]],  # noqa: UP045
    typer.Option("--temperature", help="--generate: 0 is greedy; repeatable; default 0 and 1."),
]
HealthSeed = Annotated[
    int, typer.Option("--seed", min=0, help="--generate: of the draw of prompts and of sampling.")
]
Efficiency = Annotated[
    bool, typer.Option("--efficiency", help="Also: sizes, speed and memory, measured in turns.")
]
Rounds = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="--efficiency: turns of each model; default 10."),
]
Card = Annotated[
    bool, typer.Option("--card", help="Write what was measured into the model's README.md.")
]


def generation_section(
    wanted: bool,
    text: Text,
    prompts: Path | None,
    per_domain: int | None,
    new_tokens: int | None,
    temperatures: list[float] | None,
    seed: int,
) -> dict[str, Section]:
    """The section, if it is wanted.

    Raises:
        MoepruneError: options of a section that is not wanted, or values out of range.
    """
    given: dict[str, Any] = {
        "prompts": prompts,
        "per_domain": per_domain,
        "new_tokens": new_tokens,
        "temperatures": tuple(temperatures) if temperatures else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not wanted:
        names = {"per_domain": "--prompts-per-domain", "temperatures": "--temperature"}
        for name in given:
            option = names.get(name, "--" + name.replace("_", "-"))
            raise MoepruneError(f"{option} is about generated text", "add --generate")
        return {}
    if prompts is not None and per_domain is not None:
        raise MoepruneError("--prompts takes all prompts of its file", "no --prompts-per-domain")
    from moeprune.pipeline.generation import generation
    from moeprune.pipeline.prompts import Generate as Wanted

    asked = Wanted(**given, seed=seed)

    def section(
        source: Source, teacher: Source | None, compute: Compute, progress: Progress
    ) -> dict[str, Any]:
        return generation(source, teacher, text, asked, compute, progress)

    return {"generation": section}


def efficiency_section(wanted: bool, text: Text, rounds: int | None) -> dict[str, Section]:
    """The section, if it is wanted.

    Raises:
        MoepruneError: an option of a section that is not wanted, or out of range.
    """
    if not wanted:
        if rounds is not None:
            raise MoepruneError("--rounds is about speed", "add --efficiency")
        return {}
    from moeprune.pipeline.efficiency import Turns, efficiency

    turns = Turns() if rounds is None else Turns(rounds=rounds)

    def section(
        source: Source, teacher: Source | None, compute: Compute, progress: Progress
    ) -> dict[str, Any]:
        return efficiency(source, teacher, text, turns, compute, progress)

    return {"efficiency": section}


def print_generation(section: Mapping[str, Any]) -> None:
    """A table for each way of decoding, then the findings."""
    for decoding in section["decodings"]:
        rows = [
            {
                decoding["name"]: name.replace("_", "-"),
                **{
                    who: _interval(cell[who])
                    for who in ("model", "teacher", "against")
                    if who in cell
                },
            }
            for name, cell in decoding["measures"].items()
        ]
        output.print_rows(f"generation, {decoding['prompts']} prompts", rows)
    _print_findings(section)


def print_efficiency(section: Mapping[str, Any]) -> None:
    """What was measured of each model, then the findings."""
    models = section["models"]
    keys = next(iter(models.values()))
    rows = [
        {"": key.replace("_", " "), **{name: _value(row[key]) for name, row in models.items()}}
        for key in keys
    ]
    place = section["machine"]
    where = f"{place['device']} ({place['name']}, {place['threads']} threads)"
    output.print_rows(f"efficiency on {where}, {section['dtype']}", rows)
    _print_findings(section)


def _print_findings(section: Mapping[str, Any]) -> None:
    for text in section.get("findings", ()):
        output.OUT.print(text, markup=False, soft_wrap=True)


def _interval(cell: Mapping[str, Any]) -> str:
    ends = (cell["low"], cell["high"])
    if cell["value"] is None or None in ends:
        return _value(cell["value"])
    return f"{cell['value']:.3g} ({ends[0]:.3g} to {ends[1]:.3g})"


def _value(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:.4g}"
