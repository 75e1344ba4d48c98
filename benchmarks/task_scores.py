"""Writes docs/tasks.md: the papers' protocols on the embedded model and three results from it.

python benchmarks/task_scores.py DIR [--limit 24] [--subject-limit 1] [--shots-limit 3]

DIR holds the tasks' data as NAME.jsonl with the columns of the harness's own data sets. All models
see the same questions in the same pass through the streamed door.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import torch

import moeprune
from moeprune import Budget, Compute, Text
from moeprune.cli.task_tables import between, number, signed
from moeprune.evaluation import blimp
from moeprune.evaluation.harness import doors, running
from moeprune.evaluation.harness.catalogue import Catalogue, harness_version
from moeprune.evaluation.harness.protocols import PROTOCOLS, Protocol
from moeprune.evaluation.harness.running import Asked, Outcome
from moeprune.evaluation.harness.scores import mean_score, score
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import load_tokenizer
from moeprune.pipeline.sample import measure_sample, sample_entry

PAGE = Path(__file__).parent.parent / "docs" / "tasks.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
ORIGINAL = "original"
STUDENTS = {
    "mone-50": ("mone", {}),
    "moeits-50": ("moeits", {}),
    "moe-pruner-50": ("moe-pruner", {"propagate": "dense"}),
}
Results = Mapping[Asked, Mapping[str, Outcome]]


def students(work: Path, compute: Compute) -> dict[str, Path]:
    """Three results at half the size or half the weights, from one calibration."""
    moeprune.calibrate("demo", work / "stats", Text(sequences=60, length=256), compute=compute)
    made = {}
    for name, (method, options) in STUDENTS.items():
        statistics = work / "stats"
        plan = moeprune.plan("demo", method, Budget(ratio=0.5), statistics, options=options)
        moeprune.apply("demo", plan, work / name)
        made[name] = work / name
    return made


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(columns), "|".join("---" for _ in columns), *map(" | ".join, rows)]
    return "".join(f"| {line} |\n" for line in lines)


def cell(entry: Mapping[str, Any]) -> str:
    gap = entry["difference"]
    own = number(entry["value"]) + between(entry["low"], entry["high"])
    return own if gap is None else f"{number(entry['value'])}; {signed(gap)}"


def of_protocol(
    protocol: Protocol, results: Results, left_out: Mapping[Asked, Any], names: list[str]
) -> Iterator[str]:
    yield f"\n### {protocol.name}: {protocol.source}, {protocol.shots}-shot\n\n"
    yield f"{protocol.remark}.\n\n"
    rows, cut = [], []
    for task, metric in protocol.metrics.items():
        found = results.get(Asked(task, protocol.shots))
        if found is None:
            continue
        first = found[ORIGINAL]
        entries = [
            score(found[n].items[metric], None if n == ORIGINAL else first.items[metric])
            for n in names
        ]
        rows.append([task, metric, str(len(first.questions)), *map(cell, entries)])
        if first.cut:
            cut.append(f"{task} {first.cut}")
    if len(rows) == len(protocol.metrics):
        items = {
            n: [results[Asked(t, protocol.shots)][n].items[m] for t, m in protocol.metrics.items()]
            for n in names
        }
        means = [mean_score(items[n], None if n == ORIGINAL else items[ORIGINAL]) for n in names]
        rows.append(["**mean**", "", "", *map(cell, means)])
    yield table(["task", "metric", "questions", *names], rows)
    for one, error in left_out.items():
        if one.shots == protocol.shots and one.task in protocol.metrics:
            yield f"\nLeft out: {one.task}, {error.problem}; no mean.\n"
    if cut:
        yield f"\nPrompts longer than the model's 512 tokens, cut at the left: {', '.join(cut)}.\n"


def of_sample(right: Mapping[str, list[bool]], names: list[str]) -> str:
    entries = [sample_entry(right[n], None if n == ORIGINAL else right[ORIGINAL]) for n in names]
    row = [blimp.NAME, "acc", str(entries[0]["items"]), *map(cell, entries)]
    return "\n### blimp_sample: in the package\n\n" + table(
        ["task", "metric", "questions", *names], [row]
    )


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--subject-limit", type=int, default=1)
    parser.add_argument("--shots-limit", type=int, default=3)
    given = parser.parse_args()
    begin, compute = time.process_time(), Compute(dtype="float32", workers=2)
    asked = list(dict.fromkeys(Asked(t, p.shots) for p in PROTOCOLS.values() for t in p.metrics))
    catalogue = Catalogue([one.task for one in asked])
    ready, left_out = running.prepare(asked, catalogue, running.data_folder(given.data), False)
    results: dict[Asked, dict[str, Outcome]] = {}
    with tempfile.TemporaryDirectory() as work:
        sources = {ORIGINAL: "demo", **students(Path(work), compute)}
        models = {n: compute.open(Checkpoint.open(source)) for n, source in sources.items()}
        tokenizer = load_tokenizer(Checkpoint.open("demo"))
        shared = doors.Shared(models, workers=compute.workers)
        opened = {n: partial(doors.streamed, shared, n, tokenizer) for n in models}
        for one in ready:
            limit = given.shots_limit if one.shots else given.limit
            if catalogue.is_group(one.asked.task):
                limit = given.subject_limit
            results |= running.measure([one], opened, limit)
            print(one.asked, f"{time.process_time() - begin:.0f} s", flush=True)
        right = measure_sample(models, tokenizer, None, compute, lambda *_: None)
    names = list(sources)
    command = (
        f"python benchmarks/task_scores.py DIR --limit {given.limit} "
        f"--subject-limit {given.subject_limit} --shots-limit {given.shots_limit}"
    )
    text = [
        f"```sh\n{command}\n```\n\n",
        f"lm_eval {harness_version()}, torch {torch.__version__}, float32, ",
        f"{time.process_time() - begin:.0f} seconds of CPU. The original has its 95 % interval; ",
        "the others have the score and the difference to the original on the same questions with ",
        "its 95 % interval.\n",
        of_sample(right, names),
    ]
    for protocol in PROTOCOLS.values():
        text += of_protocol(protocol, results, left_out, names)
    page = PAGE.read_text(encoding="utf-8")
    head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(head + BEGIN + "".join(text) + END + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
