"""The options that commands share, and what they are parsed into."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from moeprune.cli import together
from moeprune.errors import MoepruneError

if TYPE_CHECKING:
    from moeprune.core.budget import Budget
    from moeprune.core.constraints import Constraints
    from moeprune.core.targets import Target
    from moeprune.pipeline.inputs import Compute, Text

_Text = Optional[str]  # noqa: UP045  (typer reads it at run time on Python 3.10)
_Texts = Optional[list[str]]  # noqa: UP045
_Number = Optional[float]  # noqa: UP045
_Count = Optional[int]  # noqa: UP045
_Path = Optional[Path]  # noqa: UP045

Model = Annotated[str, typer.Argument(help="Directory, hub id, or **demo** (the embedded model).")]
AsJson = Annotated[bool, typer.Option("--json", help="Result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Dequantize = Annotated[
    bool, typer.Option("--dequantize", help="Write the weights of a quantised model as bf16.")
]
Data = Annotated[
    _Texts,
    typer.Option(
        help="Text: **[name=]file** (.jsonl, .jsonl.gz, .txt) or "
        "**[name=]dataset:NAME[:CONFIG][:SPLIT][#FIELD]**; repeat for more domains."
    ),
]
Mix = Annotated[
    _Text,
    typer.Option(help="Weights of domains, **english=2,python=1**; 1 where none is given."),
]
Method = Annotated[str, typer.Option(help="See **moeprune methods**.")]
Options = Annotated[
    _Texts,
    typer.Option("--option", "-o", help="Option of the method, **name=value**; repeatable."),
]
Ratio = Annotated[_Number, typer.Option(help="Fraction to remove, 0 <= R < 1.")]
Keep = Annotated[_Count, typer.Option(help="Experts to keep per layer.")]
Tau = Annotated[_Number, typer.Option(help="Threshold of MoEITS.")]
Pattern = Annotated[_Text, typer.Option(help="N:M, N of every M weights zeroed.")]
TargetBytes = Annotated[
    _Text,
    typer.Option(help="Remove as little as fits this size: **24GiB**, **900MB**, plain bytes."),
]
TargetParams = Annotated[
    _Text,
    typer.Option(help="Remove as little as leaves at most so many parameters: **8e9**."),
]
Pin = Annotated[
    _Texts,
    typer.Option(help="Experts that stay, **LAYER:IDS** (**3:5,7**, **'*:0'**); repeatable."),
]
Forbid = Annotated[
    _Texts,
    typer.Option(help="Experts that do not stay, **LAYER:IDS**; repeatable."),
]
ProtectSuper = Annotated[
    bool,
    typer.Option("--protect-super", help="Pin experts with extreme activations (needs outputs)."),
]
MultipleOf = Annotated[
    int,
    typer.Option(help="Experts kept are a multiple of this (tensor or expert parallel).", min=1),
]
Uniform = Annotated[bool, typer.Option("--uniform", help="The same number in every layer.")]
Pad = Annotated[
    bool,
    typer.Option(
        "--pad",
        help="Layers of different sizes: fill up with experts that are never chosen, so that stock "
        "classes open the result. Saves no memory.",
    ),
]
Statistics = Annotated[
    _Path,
    typer.Option(help="Output of **moeprune calibrate**."),
]
Mtp = Annotated[
    str,
    typer.Option(
        help="Attached prediction layers: **keep-pruned** (as the nearest layer) or **drop**."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draw of text, and of the method.")]
Sequences = Annotated[int, typer.Option(help="Calibration sequences in all.")]
Length = Annotated[int, typer.Option(help="Tokens per sequence, clipped to the model's limit.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Torch device.")]
Workers = Annotated[int, typer.Option(min=0, help="Batches computed at once; 0: one per core.")]
Memory = Annotated[
    _Text,
    typer.Option(help="Stay below this: **8GiB**. Slower where it is little; same results."),
]
MemoryDir = Annotated[
    _Path,
    typer.Option(help="Folder on a disk for what has no room; default: TMPDIR."),
]
Profiled = Annotated[
    bool, typer.Option("--profile", help="Tell where time went, and what bounds it.")
]

Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python files that the model brings.")
]


def parse_budget(
    ratio: float | None,
    keep: int | None,
    tau: float | None,
    pattern: str | None,
    multiple_of: int,
    target_bytes: str | None = None,
    target_params: str | None = None,
) -> Budget | Target:
    """The one budget that was given."""
    from moeprune.core.budget import Budget, parse_pattern
    from moeprune.core.targets import Target, parse_size
    from moeprune.errors import BudgetError

    sizes = {"target-bytes": target_bytes, "target-params": target_params}
    given = [name for name, text in sizes.items() if text is not None]
    if not given:
        parsed = None if pattern is None else parse_pattern(pattern)
        return Budget(ratio, keep, tau, parsed, multiple_of)
    others = {"ratio": ratio, "keep": keep, "tau": tau, "pattern": pattern}
    given += [name for name, value in others.items() if value is not None]
    if len(given) > 1:
        got = " and ".join(f"--{name}" for name in given)
        raise BudgetError(f"give exactly one budget (got {got})")
    size, option = parse_size(sizes[given[0]] or "", given[0]), given[0]
    return Target(
        bytes=size if option == "target-bytes" else None,
        parameters=size if option == "target-params" else None,
        multiple_of=multiple_of,
    )


def parse_constraints(
    pin: list[str] | None, forbid: list[str] | None, protect_super: bool
) -> Constraints:
    """What is to happen to certain experts."""
    from moeprune.core.constraints import Constraints

    return Constraints(tuple(pin or ()), tuple(forbid or ()), protect_super)


def parse_options(pairs: list[str] | None) -> dict[str, str]:
    """``name=value`` pairs."""
    found = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator:
            raise MoepruneError(f"bad option {pair!r}", "write -o name=value")
        found[name.replace("-", "_")] = value
    return found


def parse_text(
    data: list[str] | None, sequences: int, length: int, seed: int, mix: str | None = None
) -> Text:
    """What to read."""
    from moeprune.pipeline.stages import Text

    return Text(tuple(data or ()), sequences, length, seed, parse_mix(mix))


def parse_mix(mix: str | None) -> tuple[tuple[str, float], ...]:
    """Weights by domain, none negative."""
    found: dict[str, float] = {}
    for part in mix.split(",") if mix else ():
        name, _, number = part.strip().rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or name in found or not 0 <= weight < math.inf:
            raise MoepruneError(
                f"bad weight {part.strip()!r}", "write --mix english=2,python=1, each name once"
            )
        found[name] = weight
    return tuple(found.items())


def parse_compute(
    dtype: str,
    device: str,
    workers: int,
    trust: bool = False,
    memory: str | None = None,
    memory_dir: Path | None = None,
    profile: bool = False,
) -> Compute:
    """Where to compute, and with how much memory."""
    from moeprune.cli.output import note
    from moeprune.core.profile import Profile
    from moeprune.core.targets import parse_size
    from moeprune.pipeline.inputs import Compute

    size = None if memory is None else parse_size(memory, "memory")
    if memory_dir is not None and memory is None:
        raise MoepruneError("--memory-dir is for what has no room", "add --memory 8GiB")
    counted = Profile() if profile else None
    ranks = together.ranks()
    return Compute(device, dtype, workers, trust, ranks, size, memory_dir, note, counted)
