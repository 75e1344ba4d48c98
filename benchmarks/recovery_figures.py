"""Regenerates the table of docs/recover.md: pruned students before and after recovery.

python benchmarks/recovery_figures.py [--only STUDENT ...]

With --only, the rows of the other students stay as they are.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import moeprune
from moeprune.pipeline.inputs import Text

PAGE = Path(__file__).parent.parent / "docs" / "recover.md"
BEGIN, END = "<!-- table: benchmarks/recovery_figures.py -->", "<!-- end -->"
SEEN = ("english", "french", "german", "math", "python", "spanish")
WINDOWS = Text(sequences=8, length=256)
LEARN = Text(sequences=600, length=256)
SHORT = {"batch": 8, "evaluate_every": 10, "holdout": 0.02}

STUDENTS: dict[str, tuple[str, moeprune.Budget, dict[str, Any]]] = {
    "moe-pruner 50 %": ("moe-pruner", moeprune.Budget(ratio=0.5), {"propagate": "dense"}),
    "moe-pruner 2:4": ("moe-pruner", moeprune.Budget(pattern=(2, 4)), {"propagate": "dense"}),
    "mone 50 %": ("mone", moeprune.Budget(ratio=0.5), {}),
    "mone 75 %": ("mone", moeprune.Budget(ratio=0.75), {}),
    "moeits 50 %": ("moeits", moeprune.Budget(ratio=0.5), {}),
}
STEPS = {"expert-kd": 60, "router-kd": 20}


def ways(method: str) -> tuple[str, ...]:
    return ("expert-kd",) if method == "moe-pruner" else ("router-kd", "expert-kd")


def measure(model: Path | str) -> dict[str, Any]:
    found = moeprune.evaluate(model, "demo", WINDOWS)
    seen = [s["loss"] for name, s in found["domains"].items() if name in SEEN]
    unseen = [s["loss"] for name, s in found["domains"].items() if name not in SEEN]
    return {
        "kl": found["kl"],
        "agreement": found["agreement"],
        "seen": sum(seen) / len(seen),
        "unseen": sum(unseen) / len(unseen),
    }


def row(name: str, how: str, steps: int | None, clock: tuple[float, float] | None,
        now: dict[str, Any], before: dict[str, Any], whole: dict[str, Any]) -> str:  # fmt: skip
    def won(part: str) -> str:
        lost = before[part] - whole[part]
        return "–" if how == "–" else f"{(before[part] - now[part]) / lost:.0%}"

    cells = [
        name, how, "–" if steps is None else str(steps),
        "–" if clock is None else f"{clock[0]:.0f} s / {clock[1]:.0f} s",
        f"{now['kl']:.4f}", f"{now['agreement']:.1%}",
        f"{now['seen']:.4f}", won("seen"), f"{now['unseen']:.4f}", won("unseen"),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def rows_of(name: str, work: Path, whole: dict[str, Any]) -> list[str]:
    method, budget, options = STUDENTS[name]
    student = work / f"student{len(list(work.iterdir()))}"
    moeprune.prune("demo", method, budget, student, Text(sequences=120, length=512), options)
    before = measure(student)
    found = [row(name, "–", None, None, before, before, whole)]
    for how in ways(method):
        chosen = moeprune.training(how, None, {**SHORT, "steps": STEPS[how]})
        out = work / f"{student.name}-{how}"
        start = time.perf_counter(), time.process_time()
        made = moeprune.recover(student, "demo", out, chosen, LEARN)
        clock = time.perf_counter() - start[0], time.process_time() - start[1]
        found.append(row(name, how, made.steps, clock, measure(out), before, whole))
        print(json.dumps({"student": name, **made.to_json()}), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=list(STUDENTS), choices=list(STUDENTS))
    only = parser.parse_args().only
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    old, tail = rest.split(END)
    rows: dict[str, list[str]] = {}
    for line in old.splitlines():
        name = line.strip("| ").split(" | ")[0]
        if name in STUDENTS:
            rows.setdefault(name, []).append(line)
    whole = measure("demo")
    for name in only:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = rows_of(name, Path(folder), whole)
        columns = (
            "student", "recovery", "steps", "wall / CPU time", "KL", "agreement",
            "loss, seen domains", "won back", "loss, unseen domains", "won back",
        )  # fmt: skip
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += [line for known in STUDENTS for line in rows.get(known, [])]
        note = f"On {platform.machine()}; the original has loss {whole['seen']:.4f} on seen and "
        note += f"{whole['unseen']:.4f} on unseen domains."
        text = "\n".join([*lines, "", note])
        PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
