"""Kills commands at random moments, runs them again until they end, and compares what they made.

python benchmarks/kill_test.py --points 50 --json kills.json

A command runs in a child that is forked from a process which has imported everything already, and
dies by SIGKILL when it has used a random part of the CPU time of an uninterrupted run, and up to
ten milliseconds more, so that waiting for the disk is hit too. Then the same command runs again, to
its end. What it made has to be what the uninterrupted run made, byte for byte; of the following
files, all but what is named, because it says how long something took or how much memory it needed:

- compare.json: seconds, peak_memory_bytes; compare.html, which shows them, is left out
- moeprune.json and README.md of a recovered checkpoint: seconds; moeprune_recovery.jsonl: seconds
- moeprune_run.json of a recipe: seconds; report.html, which shows them, is left out

The apply under test writes shards of 1 MB, so that the embedded model has a dozen.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import arguments
import torch

import moeprune
import moeprune.cli.app
import moeprune.models.surgery as surgery
import moeprune.pipeline.arena.run
import moeprune.pipeline.recipes.run
import moeprune.pipeline.recovery
import moeprune.pipeline.stages
from moeprune.models.data import demo_text
from moeprune.report import arena  # noqa: F401  (imported by every comparison)

TIMES = {
    "compare.json": ("seconds", "peak_memory_bytes"),
    "moeprune.json": ("seconds",),
    "moeprune_recovery.jsonl": ("seconds",),
    "moeprune_run.json": ("seconds",),
}
LEFT_OUT = ("compare.html", "report.html")
_SECONDS = re.compile(r"\d[\d.,]* (s|seconds|minutes)\b")
SHARD = 1_000_000
RECIPE = """format: moeprune.recipe/1
model: demo
calibration: {{data: ["english={0}"], sequences: 8, length: 64}}
compute: {{dtype: float32, workers: 1}}
steps:
  - {{method: frequency, budget: {{ratio: 0.25}}}}
  - {{method: moe-pruner, options: {{propagate: dense}}, budget: {{ratio: 0.5}},
     statistics: project}}
  - recover: router-kd
    options: {{steps: 4, save_every: 1, batch: 2, sequences: 24, length: 64}}
evaluation: {{data: ["english={0}"], sequences: 2, length: 32}}
"""
NAMES = ("calibrate", "apply", "compare", "recover", "run")
_ENOUGH = 900.0


@dataclass
class Command:
    """A command under test.

    Attributes:
        name: of the command.
        args: without ``--out``.
        cpu: seconds of CPU time of an uninterrupted run.
        made: what that run made.
        killed, resumed: how many were killed before they had ended, and found something to go on.
        ended: kills that came too late.
        wrong: what differed, or was left.
        repeated: CPU seconds of the second runs, as fractions of an uninterrupted one.
    """

    name: str
    args: tuple[str, ...]
    cpu: float = 0.0
    made: dict[str, str] = field(default_factory=dict)
    killed: int = 0
    ended: int = 0
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)


def run(args: list[str], place: Path, kill: float | None = None, late: float = 0.0) -> Any:
    """Run a command in a child; returns its exit code, CPU seconds, and what it said.

    Args:
        args: of the command.
        place: its working directory; temporary files stand in ``place/tmp``.
        kill: CPU seconds after which it is killed.
        late: seconds more.
    """
    log = place / "log.txt"
    pid = os.fork()
    if pid == 0:
        _child(args, place, log)
    clock, deadline = (~pid << 3) | 2, time.monotonic() + _ENOUGH
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"{args[0]} does not end: {log.read_text()}")
        if kill is not None and time.clock_gettime(clock) >= kill:
            time.sleep(late)
            os.kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.001 if kill is not None else 0.02)
    said = log.read_text(errors="replace")
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, said


def _child(args: list[str], place: Path, log: Path) -> None:
    """Be the command, in a process of its own; never returns."""
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(place)
        tempfile.tempdir = str(place / "tmp")
        surgery.write_shards = functools.partial(surgery.write_shards, max_shard=SHARD)
        sys.argv = ["moeprune", *args]
        moeprune.cli.app.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def made(out: Path) -> dict[str, str]:
    """A hash of every file below ``out``, without times."""
    found = {}
    for file in sorted(out.rglob("*")):
        if file.is_file() and file.name not in LEFT_OUT:
            content = _timeless(file)
            found[file.relative_to(out).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def _timeless(file: Path) -> bytes:
    content = file.read_bytes()
    keys = TIMES.get(file.name)
    if file.name == "README.md":
        return _SECONDS.sub("", content.decode()).encode()
    if keys is None:
        return content
    values = [json.loads(line) for line in content.splitlines()] if file.suffix == ".jsonl" else []
    value = values or json.loads(content)
    return json.dumps(_without(value, keys), ensure_ascii=False).encode()


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, keys) for k, v in value.items() if k not in keys}
    return [_without(v, keys) for v in value] if isinstance(value, list) else value


def commands(base: Path, only: tuple[str, ...]) -> list[Command]:
    """The commands, after what they begin with was made in ``base``."""
    text = base / "english.jsonl"
    lines = demo_text("calibration")["english"].read_bytes().splitlines(keepends=True)
    text.write_bytes(b"".join(lines[:12]))
    small = ("--data", f"english={text}", "--length", "64", "--workers", "1")
    (base / "tmp").mkdir()
    for args in (
        ("calibrate", "demo", *small, "--sequences", "8", "--dtype", "float32", "--out", "stats"),
        ("plan", "demo", "--method", "mone", "--ratio", "0.25", "--statistics", "stats", "--out",
         "plan.json"),
        ("apply", "demo", "--plan", "plan.json", "--out", "student"),
    ):  # fmt: skip
        code, _, said = run(list(args), base)
        if code:
            raise SystemExit(f"{args}: {said}")
    recipe = base / "recipe.yaml"
    recipe.write_text(RECIPE.format(text), encoding="utf-8")
    training = ("--steps", "8", "--save-every", "2", "--batch", "2", "--resume")
    found = [
        Command("calibrate", ("calibrate", "demo", *small, "--sequences", "24", "--dtype",
                              "float32")),
        Command("apply", ("apply", "demo", "--plan", str(base / "plan.json"))),
        Command("compare", ("compare", "demo", *small, "--methods", "moeits,mone", "--ratios",
                            "0.5", "--heldout", f"english={text}", "--sequences", "4",
                            "--windows", "2", "--window", "32")),
        Command("recover", ("recover", str(base / "student"), "--teacher", "demo", "--data",
                            f"english={text}", "--length", "64", "--sequences", "24", *training)),
        Command("run", ("run", str(recipe))),
    ]  # fmt: skip
    return [command for command in found if command.name in only]


def place_of(folder: Path) -> Path:
    """A fresh working directory."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    return folder


def one(command: Command, folder: Path, part: float, late: float) -> None:
    """Kill a command when it has done ``part`` of its work, run it again, and compare."""
    place = place_of(folder)
    args = [*command.args, "--out", "out"]
    code, _, said = run(args, place, part * command.cpu, late)
    if code == 0:
        command.ended += 1
    elif code != -signal.SIGKILL:
        command.killed += 1
        command.wrong.append(f"{part:.3f}: ended with {code} by itself: {said[-300:]}")
        return
    else:
        command.killed += 1
        left = [p.name for p in place.iterdir() if p.name.startswith("out.")]
        command.resumed += bool(left) or (place / "out").exists()
        there = (place / "out").exists() and command.name != "compare"
        code, spent, said = run(args, place)
        if there and (not left or command.name == "recover"):
            code = 0 if code == 2 and "output exists" in said else code  # but for last words
        command.repeated.append(spent / command.cpu)
    if code:
        command.wrong.append(f"{part:.3f}: then ended with {code}: {said[-300:]}")
        return
    now = made(place / "out")
    if now != command.made:
        names = sorted(n for n in {*now, *command.made} if now.get(n) != command.made.get(n))
        command.wrong.append(f"{part:.3f}: other bytes in {', '.join(names)}")
    left = sorted(p.name for p in place.iterdir() if p.name not in ("out", "log.txt", "tmp"))
    hidden = sorted(p.name for p in (place / "out").rglob(".*"))
    if left or hidden:
        command.wrong.append(f"{part:.3f}: left behind: {', '.join(left + hidden)}")


def test(
    points: int,
    seed: int,
    only: tuple[str, ...],
    tell: Callable[[str], None] = lambda text: None,
) -> list[Command]:
    """Kill each of the commands its share of ``points``."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="moeprune-kill-") as name:
        base = Path(name) / "base"
        base.mkdir()
        found = commands(base, only)
        for command in found:
            for number in (1, 2):
                place = place_of(Path(name) / "whole")
                code, command.cpu, said = run([*command.args, "--out", "out"], place)
                if code:
                    raise SystemExit(f"{command.name}: {said}")
                again = made(place / "out")
                if number == 2 and again != command.made:
                    names = [n for n in again if again[n] != command.made.get(n)]
                    raise SystemExit(f"{command.name} twice gives other bytes: {names}")
                command.made = again
            tell(f"{command.name}: {command.cpu:.1f} CPU s, {len(command.made)} files")
        while (number := sum(command.killed for command in found)) < points:
            command = found[number % len(found)]  # one that had ended is killed another time
            part, late = draw.random(), draw.random() / 100
            one(command, Path(name) / "run", part, late)
            tell(f"{number + 1}/{points} {command.name} at {part:.3f}: {len(command.wrong)} wrong")
    return found


def rows(found: list[Command]) -> Iterator[dict[str, Any]]:
    """The result of each command."""
    for c in found:
        mean = sum(c.repeated) / len(c.repeated) if c.repeated else None
        yield {
            "command": c.name,
            "cpu_seconds": round(c.cpu, 2),
            "files": len(c.made),
            "killed": c.killed,
            "ended_before": c.ended,
            "went_on": c.resumed,
            "second_run": None if mean is None else round(mean, 2),
            "wrong": c.wrong,
        }


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    only = tuple(given.only.split(","))
    if not {*only} <= {*NAMES}:
        parser.error(f"--only takes {', '.join(NAMES)}")
    found = test(given.points, given.seed, only, lambda text: print(text, file=sys.stderr))
    table = list(rows(found))
    heads = "command, CPU s, files compared, killed, had ended, something kept, second run, wrong"
    print("|", heads.replace(", ", " | "), "|")
    print("|---|---|---|---|---|---|---|---|")
    for row in table:
        print("|", " | ".join(str(len(v) if isinstance(v, list) else v) for v in row.values()), "|")
    for row in table:
        for text in row["wrong"]:
            print(f"{row['command']}: {text}")
    if given.json is not None:
        record = {"seed": given.seed, "points": given.points, "commands": table}
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["wrong"] for row in table))


if __name__ == "__main__":
    main()
