"""Regenerates the tables of docs/generation.md: pruned models beside the embedded one.

python benchmarks/generation_figures.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import arguments

import moeprune
from moeprune.pipeline.efficiency import efficiency
from moeprune.pipeline.generation import generation
from moeprune.pipeline.inputs import Compute, Text
from moeprune.pipeline.prompts import Generate

PAGE = Path(__file__).parent.parent / "docs" / "generation.md"
BEGIN, END = "<!-- {}: benchmarks/generation_figures.py -->", "<!-- end of {} -->"
STUDENTS = {
    "mone 50 %": ("mone", moeprune.Budget(ratio=0.5)),
    "moeits 75 %": ("moeits", moeprune.Budget(ratio=0.75)),
}
ASKED = Generate(per_domain=10, prompt_tokens=32, new_tokens=64)
COMPUTE = Compute(dtype="float32")


def cell(found: dict[str, Any], form: str) -> str:
    value, low, high = (format(found[key], form) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def health_rows(name: str, found: dict[str, Any]) -> list[str]:
    rows = []
    for decoding in found["decodings"]:
        measures = decoding["measures"]
        loop, again = measures["loop"], measures["repetition"]
        cells = [
            name, decoding["name"],
            f"{loop['teacher']['value']:.0%} → {loop['model']['value']:.0%}",
            cell(loop["against"], "+.1%"), f"{loop['p_value']:.2g}",
            cell(again["against"], "+.1%"), cell(measures["distinct_2"]["against"], "+.1%"),
            f"{decoding['changed']['share']:.0%}, {decoding['changed']['after_tokens_median']:.0f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def speed_row(name: str, found: dict[str, Any]) -> str:
    mine, teacher, ratio = found["models"]["model"], found["models"]["teacher"], found["ratio"]
    cells = [
        name,
        *(f"{teacher[k] / 1e6:.1f} → {mine[k] / 1e6:.1f}" for k in ("disk_bytes", "memory_bytes")),
        *(
            f"{teacher[k] / 1e6:.2f} → {mine[k] / 1e6:.2f}"
            for k in ("parameters", "active_parameters")
        ),
        cell(ratio["prefill"], ".2f"),
        cell(ratio["decode"], ".2f"),
    ]
    return f"| {' | '.join(cells)} |"


def replace(page: str, name: str, table: list[str]) -> str:
    before, rest = page.split(BEGIN.format(name))
    after = rest.split(END.format(name))[1]
    lines = [BEGIN.format(name), *table, END.format(name)]
    return before + "\n".join(lines) + after


def main() -> None:
    arguments.parser(__doc__).parse_args()
    health = [
        "| model | decoding | loops, teacher → model | difference | p (McNemar) "
        "| repeated 4-grams | distinct 2-grams | changed answers, median of tokens before |",
        "|---|---|---|---|---|---|---|---|",
    ]
    speed = [
        "| model | MB on disk | MB of weights in memory | million parameters | active "
        "| prefill, times as fast | decode, times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    said, place = [], ""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (method, budget)) in enumerate(STUDENTS.items()):
            out = Path(folder) / str(number)
            text = Text(sequences=120, length=512)
            moeprune.prune("demo", method, budget, out, text, compute=COMPUTE)
            found = generation(out, "demo", Text(), ASKED, COMPUTE)
            health += health_rows(name, found)
            said += [f"- {name}: {sentence}." for sentence in found["findings"]]
            found = efficiency(out, "demo", compute=COMPUTE)
            speed.append(speed_row(name, found))
            machine = found["machine"]
            place = f"{machine['name']}, {machine['cores']} cores, {machine['threads']} threads"
            print(name, f"{time.process_time() - start:.0f} s of CPU time", flush=True)
    page = PAGE.read_text(encoding="utf-8")
    page = replace(page, "health", [*health, "", *said])
    page = replace(page, "speed", [*speed, "", f"On {place}, in float32."])
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
