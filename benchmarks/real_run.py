"""Calibrate, plan, apply and verify a checkpoint under a hard memory limit, measured per stage.

    python benchmarks/real_run.py MODEL --limit 6GiB [--memory 4GiB] [--method reap] [--json]
    python benchmarks/real_run.py --flat OLMoE-1B-7B --layers 4,8,16 --work scratch

MODEL is a checkpoint, of ``real_size.py`` for example; 16 x 512 tokens of the embedded text go
through it. Files are dropped from the page cache before every stage. ``--flat`` writes checkpoints
of several depths one after another and calibrates each: its peak memory should not depend on them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import arguments
import limited

GIB = 2**30
STAGES = ("calibrate", "plan", "apply", "verify")


def size(text: str) -> int:
    """Bytes of ``6GiB``, ``500MiB`` or ``1000``."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("GB", 10**9), ("", 1)):
        if unit and text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(text)


def commands(model: Path, work: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """What the stages run."""
    memory = ["--memory", args.memory] if args.memory else []
    text = ["--sequences", str(args.sequences), "--length", str(args.length)]
    method = ["--method", args.method, "--ratio", str(args.ratio)]
    stats, plan, out = (str(work / name) for name in ("stats", "plan.json", "smaller"))
    return {
        "calibrate": [str(model), "--out", stats, *text, *memory],
        "plan": [str(model), *method, "--statistics", stats, "--out", plan],
        "apply": [str(model), "--plan", plan, "--out", out],
        # in float32 a layer of Mixtral's size is larger than the limit
        "verify": [out, "--against", str(model), "--dtype", "bfloat16", *memory],
    }


def stage(name: str, model: Path, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one stage, with a cold cache."""
    for folder in (model, work):
        limited.forget_files(folder)
    words = [sys.executable, "-m", "moeprune", name, *commands(model, work, args)[name], "--json"]
    cost = limited.run(words, size(args.limit))
    found = asdict(cost)
    output = found.pop("output")
    if not ended_well(name, cost.code):
        print(f"{name} ended with {cost.code}: {' '.join(words[2:])}", file=sys.stderr)
    elif name == "verify":
        found["findings"] = json.loads(output).get("findings")
        for finding in found["findings"] or ():
            print(f"verify: {json.dumps(finding)}", file=sys.stderr)
    return found


def ended_well(name: str, code: int) -> bool:
    """``verify`` says with 1 that it has found something."""
    return code == 0 or (name == "verify" and code == 1)


def all_stages(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The stages of one model; ends with the first that fails."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for name in args.stages.split(","):
            found[name] = stage(name, model, Path(folder), args)
            print(row(name, found[name]), file=sys.stderr, flush=True)
            if not ended_well(name, found[name]["code"]):
                break
        found["experts_touched"] = touched(Path(folder) / "stats")
        print(f"experts that saw a token: {found['experts_touched']}", file=sys.stderr)
    return found


def touched(stats: Path) -> str | None:
    """The smallest share of experts that saw a token, over layers: random routers may collapse."""
    from safetensors.torch import load_file  # noqa: PLC0415  # the parent needs no torch

    shares = []
    for file in sorted(stats.glob("layer-*.safetensors")):
        counts = load_file(file).get("routing.count_E")
        if counts is not None:
            shares.append(float((counts > 0).double().mean()))
    return f"{min(shares):.2f}" if shares else None


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    gib = {key: f"{found[key] / GIB:.2f} GiB" for key in ("anonymous", "resident")}
    group = found["peak_of_group"]
    return (
        f"| {name} | {found['wall']:.0f} s | {found['cpu']:.0f} s | {gib['anonymous']} | "
        f"{gib['resident']} | {'–' if group is None else f'{group / GIB:.2f} GiB'} | "
        f"{found['read'] / 1e9:.1f} GB | {found['written'] / 1e9:.1f} GB | {found['code']} |"
    )


def flat(args: argparse.Namespace) -> dict[str, Any]:
    """Peak of ``calibrate`` by number of layers; every checkpoint is removed after use."""
    import real_size  # noqa: PLC0415  # not needed otherwise, and slow

    found = {}
    for layers in (int(n) for n in args.layers.split(",")):
        path = Path(args.work or tempfile.gettempdir()) / f"{args.flat}-{layers}"
        try:
            real_size.write(args.flat, path, layers, force=True)
            found[f"{layers} layers"] = all_stages(path, args)["calibrate"]
        finally:
            shutil.rmtree(path, ignore_errors=True)
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--limit", default="6GiB")
    parser.add_argument("--memory", help="handed on to calibrate and verify")
    parser.add_argument("--method", default="reap")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--flat", metavar="NAME", help="a published model, by --layers")
    parser.add_argument("--layers", default="4,8,16")
    parser.add_argument("--work", type=Path, help="where outputs are for that time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(words)
    if (args.model is None) == (args.flat is None):
        parser.error("give MODEL, or --flat NAME")
    head = ("", "wall", "CPU", "anonymous", "resident", "group", "read", "written", "exit")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", file=sys.stderr)
    if args.flat:
        args.stages = "calibrate"
    try:
        found = flat(args) if args.flat else all_stages(args.model, args)
    except limited.NoLimitError as error:
        parser.error(str(error))
    rows = {name: costs for name, costs in found.items() if isinstance(costs, dict)}
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        print("\n".join(row(name, costs) for name, costs in rows.items()))
        print(f"limit {args.limit} held by {next(iter(rows.values()))['how']}")
    return int(not all(ended_well(name, costs["code"]) for name, costs in rows.items()))


if __name__ == "__main__":
    sys.exit(main())
