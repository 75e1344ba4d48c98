"""Regenerates the tables of docs/recover.md: pruned students before and after recovery.

python benchmarks/recovery_figures.py FOLDER [--only STUDENT ...] [--ways WAY ...] [--jobs 2]

FOLDER keeps what is finished: the original, students, and one JSON file for every cell, with all
domains. What is there is not computed again unless its settings changed, so a run that was cut goes
on where it was. Every job is one process with one thread. The tables show the cells that are there;
with --dry nothing is written into docs/.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every job

import arguments
import torch

import moeprune
from moeprune.pipeline.inputs import Compute, Text
from moeprune.recovery.training import Training

PAGE = Path(__file__).parent.parent / "docs" / "recover.md"
BEGIN, END = "<!-- tables: benchmarks/recovery_figures.py -->", "<!-- end -->"
SEEN = ("english", "french", "german", "math", "python", "spanish")
WINDOWS = Text(sequences=8, length=256)
CALIBRATION = Text(sequences=120, length=512)
LEARN = Text(sequences=600, length=256)
COMMON = {"batch": 8, "holdout": 0.02, "save_every": 1000}


@dataclass(frozen=True)
class Student:
    """A method with its budget."""

    method: str
    budget: moeprune.Budget
    options: dict[str, Any] = field(default_factory=dict)


def _experts(method: str) -> dict[str, Student]:
    return {
        f"{method} {ratio} %": Student(method, moeprune.Budget(ratio=ratio / 100))
        for ratio in (50, 75)
    }


DENSE = {"propagate": "dense"}
STUDENTS: dict[str, Student] = {
    "moe-pruner 50 %": Student("moe-pruner", moeprune.Budget(ratio=0.5), DENSE),
    "moe-pruner 2:4": Student("moe-pruner", moeprune.Budget(pattern=(2, 4)), DENSE),
    **_experts("mone"),
    **_experts("moeits"),
    **_experts("frequency"),
}


@dataclass(frozen=True)
class Way:
    """A recovery with its options, and the students that it is tried on."""

    how: str
    options: dict[str, Any]
    students: tuple[str, ...] = tuple(STUDENTS)


LAYERS = {"layerwise": True, "save_every": 0}  # steps are those of each layer
DISTILLED = {"steps": 60, "evaluate_every": 20, **LAYERS}
FEW = ("moe-pruner 50 %", "frequency 50 %")
WAYS: dict[str, Way] = {
    "expert-kd": Way("expert-kd", {"steps": 60, "evaluate_every": 20}),
    "router-kd": Way("router-kd", {"steps": 30, "evaluate_every": 10}),
    "logit-kd": Way("logit-kd", {"steps": 30, "evaluate_every": 15}),
    "lora": Way("lora", {"steps": 30, "evaluate_every": 15}),
    "full": Way("full", {"steps": 30, "evaluate_every": 15}),
    "expert-kd by layers": Way("expert-kd", DISTILLED),
    "by layers, dense-inputs": Way("expert-kd", {**DISTILLED, "target": "dense-inputs"}, FEW),
    "by layers, dense-outputs": Way("expert-kd", {**DISTILLED, "target": "dense-outputs"}, FEW),
    "router-kd by layers": Way("router-kd", {"steps": 40, "evaluate_every": 20, **LAYERS}),
}


def slug(*names: str) -> str:
    return "-".join(names).replace(" ", "").replace("%", "").replace(":", "of")


def settings(*parts: Any) -> Any:
    """What a finished cell must have been computed with, as JSON reads it."""
    return json.loads(json.dumps(parts, default=str))


def same(saved: Any, wanted: Any) -> bool:
    """Whether settings are the same; an option that is younger than the cell has its default."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        return all(key in wanted and same(value, wanted[key]) for key, value in saved.items())
    if isinstance(saved, list) and isinstance(wanted, list) and len(saved) == len(wanted):
        return all(same(a, b) for a, b in zip(saved, wanted, strict=True))
    return bool(saved == wanted)


def finished(file: Path, wanted: Any) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found if same(found["settings"], wanted) else None


def keep(file: Path, found: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".partial")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def measure(model: Path | str) -> dict[str, Any]:
    """Scores by domain, and their means over seen and unseen domains."""
    scores = moeprune.evaluate(model, "demo", WINDOWS, Compute(workers=1))["domains"]
    names = ("loss", "perplexity", "kl", "agreement")
    found: dict[str, Any] = {
        "domains": {domain: {name: s[name] for name in names} for domain, s in scores.items()}
    }
    for part in ("seen", "unseen"):
        own = [s for domain, s in scores.items() if (domain in SEEN) == (part == "seen")]
        found[part] = {name: sum(s[name] for s in own) / len(own) for name in names}
    return found


def original(folder: Path) -> dict[str, Any]:
    wanted, file = settings(asdict(WINDOWS)), folder / "original.json"
    found = finished(file, wanted)
    if found is None:
        found = {"settings": wanted, "after": measure("demo")}
        keep(file, found)
    return found


def student_settings(name: str) -> Any:
    student = STUDENTS[name]
    return settings(student.method, asdict(student.budget), student.options, asdict(CALIBRATION))


def make_student(folder: Path, name: str) -> None:
    """Prune, unless that is done."""
    torch.set_num_threads(1)
    wanted, file = student_settings(name), folder / "cells" / f"{slug(name)}.json"
    if finished(file, wanted) is not None:
        return
    student, out = STUDENTS[name], folder / "students" / slug(name)
    moeprune.prune(
        "demo", student.method, student.budget, out, CALIBRATION, student.options,
        compute=Compute(workers=1), force=True,
    )  # fmt: skip
    keep(file, {"settings": wanted, "after": measure(out)})


def cell_settings(name: str, way: str, steps: int | None) -> Any:
    chosen = training_of(way, steps)
    return settings(student_settings(name), chosen.to_json(), asdict(LEARN))


def training_of(way: str, steps: int | None) -> Training:
    known = WAYS[way]
    options = {**COMMON, **known.options, **({} if steps is None else {"steps": steps})}
    return moeprune.training(known.how, None, options)


def fill_cell(folder: Path, name: str, way: str, steps: int | None) -> str:
    """Recover one student in one way, unless that is done."""
    torch.set_num_threads(1)
    wanted = cell_settings(name, way, steps)
    file = folder / "cells" / f"{slug(name, way)}.json"
    if finished(file, wanted) is not None:
        return f"{name}, {way}: was there"
    out = folder / "healed" / slug(name, way)
    start = time.perf_counter(), time.process_time()
    made = moeprune.recover(
        folder / "students" / slug(name), "demo", out, training_of(way, steps), LEARN, force=True
    )
    clock = {"wall": time.perf_counter() - start[0], "cpu": time.process_time() - start[1]}
    found = {"settings": wanted, "seconds": clock, "after": measure(out), "made": made.to_json()}
    keep(file, found)
    shutil.rmtree(out)
    return f"{name}, {way}: {clock['wall']:.0f} s"


def fill(folder: Path, names: list[str], ways: list[str], steps: int | None, jobs: int) -> None:
    """All students, then all cells, several at once."""
    cells = [(name, way) for way in ways for name in names if name in WAYS[way].students]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(make_student, folder, name) for name in names]):
            done.result()
        began = time.perf_counter()
        waiting = [pool.submit(fill_cell, folder, name, way, steps) for name, way in cells]
        for count, done in enumerate(as_completed(waiting), start=1):
            spent = time.perf_counter() - began
            print(f"[{count}/{len(cells)}, {spent:.0f} s] {done.result()}", flush=True)


@dataclass(frozen=True)
class Row:
    """A student as it was (``way`` is empty), or after a recovery."""

    name: str
    way: str
    found: dict[str, Any]
    before: dict[str, Any]

    def won(self, part: str, whole: dict[str, Any]) -> float:
        """The part of the lost log-perplexity that is there again."""
        lost = self.before[part]["loss"] - whole[part]["loss"]
        return float((self.before[part]["loss"] - self.found["after"][part]["loss"]) / lost)


def rows(folder: Path, steps: int | None) -> list[Row]:
    """What is finished with these settings, in order of students and ways."""
    found = []
    for name in STUDENTS:
        before = finished(folder / "cells" / f"{slug(name)}.json", student_settings(name))
        if before is None:
            continue
        found.append(Row(name, "", before, before["after"]))
        for way in WAYS:
            file = folder / "cells" / f"{slug(name, way)}.json"
            cell = finished(file, cell_settings(name, way, steps))
            if cell is not None:
                found.append(Row(name, way, cell, before["after"]))
    return found


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main_table(found: list[Row], whole: dict[str, Any]) -> list[str]:
    columns = (
        "student", "recovery", "steps", "wall / CPU s", "KL", "agreement",
        "log-perplexity, seen", "won back", "unseen", "won back",
    )  # fmt: skip
    lines = [line(columns), "|---" * len(columns) + "|"]
    for row in found:
        now, seen, unseen = row.found["after"], *(row.found["after"][p] for p in ("seen", "unseen"))
        count = len(SEEN), len(now["domains"]) - len(SEEN)
        kl, agreement = (
            (count[0] * seen[what] + count[1] * unseen[what]) / sum(count)
            for what in ("kl", "agreement")
        )
        if row.way:
            clock, made = row.found["seconds"], row.found["made"]
            told = [row.way, str(made["steps"]), f"{clock['wall']:.0f} / {clock['cpu']:.0f}"]
        else:
            told = ["none", "", ""]
        won = [f"{row.won(part, whole):.0%}" if row.way else "" for part in ("seen", "unseen")]
        lines.append(line([
            row.name, *told, f"{kl:.4f}", f"{agreement:.1%}",
            f"{seen['loss']:.4f}", won[0], f"{unseen['loss']:.4f}", won[1],
        ]))  # fmt: skip
    return lines


def domain_table(found: list[Row], whole: dict[str, Any]) -> list[str]:
    order = sorted(whole["domains"], key=lambda domain: (domain not in SEEN, domain))
    heads = [domain if domain in SEEN else f"*{domain}*" for domain in order]
    lines = [line(["student", "recovery", *heads]), "|---" * (len(order) + 2) + "|"]
    rest = [(row.name, row.way or "none", row.found["after"]) for row in found]
    for name, way, now in [("original", "", whole), *rest]:
        values = [f"{now['domains'][domain]['perplexity']:.1f}" for domain in order]
        lines.append(line([name, way, *values]))
    return lines


def tables(folder: Path, steps: int | None) -> str:
    whole, found = original(folder)["after"], rows(folder, steps)
    note = (
        f"On {platform.machine()}; the original has log-perplexity {whole['seen']['loss']:.4f} on "
        f"seen and {whole['unseen']['loss']:.4f} on unseen domains. Every cell ran on one core."
    )
    second = "Perplexity by domain, *unseen* in italics:"
    parts = [*main_table(found, whole), "", note, "", second, "", *domain_table(found, whole)]
    return "\n".join(parts)


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("folder", type=Path, help="what is finished, and will be")
    parser.add_argument("--only", nargs="*", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--steps", type=int, help="instead of each way's own, to try")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print the tables, leave docs/ alone")
    chosen = parser.parse_args()
    original(chosen.folder)
    fill(chosen.folder, chosen.only, chosen.ways, chosen.steps, chosen.jobs)
    text = tables(chosen.folder, chosen.steps)
    if chosen.dry or chosen.steps:
        print(text)
        return
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
