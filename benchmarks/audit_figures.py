"""Whether an audit foretells what a cut costs; writes its part of docs/audit.md.

python benchmarks/audit_figures.py DIR [audit|truth]

What is finished stays in DIR, and a second run goes on from it.

Audits the embedded model. Then prunes it for real, one layer at a time at every ratio: a plan from
a calibration of its own (another draw of text), written to disk by ``apply``, and measured by the
evaluator on the embedded held-out text of ten domains, of which the audit has read nothing and four
are in no calibration text at all. The two share the method and the model, and no number.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import arguments
import torch
import transformers

from moeprune import Budget, Compute, Text, apply, calibrate, plan
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.plan_diff import spearman
from moeprune.evaluation.perplexity import evaluate
from moeprune.models.checkpoint import Checkpoint
from moeprune.pipeline.auditing import RATIOS, audit
from moeprune.pipeline.inputs import read_heldout

PAGE = Path(__file__).parent.parent / "docs" / "audit.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
CALIBRATION = Text(sequences=96, length=512, seed=1)
HELD_OUT = Text(sequences=8, length=256)  # per domain; the audit holds 16 384 tokens out
COMPUTE = Compute(dtype="float32")

Cell = tuple[int, float]


def alone(whole: Plan, layer: int) -> Plan:
    """The plan that does to one layer what ``whole`` does, and nothing to the others."""
    layers = {
        index: one if index == layer else LayerPlan(index, one.experts, tuple(range(one.experts)))
        for index, one in whole.layers.items()
    }
    return replace(whole, layers=layers)


def prune_and_measure(work: Path) -> dict[str, float]:
    """KL on held-out text by "layer ratio", layer "all" for all of them."""
    store = work / "statistics"
    calibrate("demo", store, CALIBRATION, compute=COMPUTE)
    made: dict[str, Plan] = {}
    for ratio in RATIOS:
        whole = plan("demo", "mone", Budget(ratio=ratio), store, compute=COMPUTE)
        made[f"all {ratio}"] = whole
        for layer in sorted(whole.layers):
            made[f"{layer} {ratio}"] = alone(whole, layer)
    models = {}
    for number, (key, one) in enumerate(made.items()):
        apply("demo", one, work / str(number))
        models[key] = COMPUTE.open(Checkpoint.open(work / str(number)))
    demo = Checkpoint.open("demo")
    results = evaluate(
        {"teacher": COMPUTE.open(demo), **models}, read_heldout(demo, HELD_OUT), "teacher"
    )
    return {key: float(results[key].total().to_json()["kl"] or 0.0) for key in made}


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(columns)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def order(cells: Iterable[Cell], foretold: Mapping[Cell, float], true: Mapping[Cell, float]) -> str:
    some = list(cells)
    rho = spearman([foretold[cell] for cell in some], [true[cell] for cell in some])
    return "–" if rho is None else f"{rho:.3f}"


def text(result: dict[str, Any], cpu: float, cells: Mapping[Cell, float], every: Any) -> str:
    audited = {
        cell: result["layers"][str(cell[0])]["damage"][f"{cell[1]:g}"] for cell in sorted(cells)
    }
    foretold = {
        "statistics alone": {cell: one["stream_error"] for cell, one in audited.items()},
        "small replacement": {
            cell: one["measured"]["kl"]["value"] for cell, one in audited.items()
        },
    }
    held, seen = result["data"]["held"], result["data"]["calibration"]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    parts = [
        f"Audit: {seen['tokens']} tokens observed and {held['tokens']} held out, "
        f"{cpu:.0f} s of CPU time and {result['seconds']:.0f} s on the wall ({os.cpu_count()} "
        f"cores that had other work too, {platform.machine()}, {versions}). Truth: "
        f"{len(cells) + len(every)} checkpoints pruned from another calibration and evaluated on "
        f"{HELD_OUT.sequences * HELD_OUT.length * 10} tokens of other text; see the head of the "
        "script.\n",
        table(
            ["Spearman's ρ with the true KL", *foretold],
            [
                [
                    f"all {len(cells)} pairs of layer and ratio",
                    *(order(cells, by, cells) for by in foretold.values()),
                ],
                *(
                    [
                        f"the {sum(r == ratio for _, r in cells)} layers at {ratio:.0%}",
                        *(
                            order([c for c in cells if c[1] == ratio], by, cells)
                            for by in foretold.values()
                        ),
                    ]
                    for ratio in RATIOS
                ),
            ],
        ),
        table(
            ["layer", "ratio", "stream error", "KL foretold from it", "KL of the small replacement",
             "true KL"],
            [
                [
                    str(layer),
                    f"{ratio:.0%}",
                    f"{one['stream_error']:.2e}",
                    f"{one['kl_predicted']:.2e}",
                    f"{one['measured']['kl']['value']:.2e}",
                    f"{cells[layer, ratio]:.2e}",
                ]
                for (layer, ratio), one in audited.items()
            ],
        ),
        table(
            ["all layers cut by", "KL in the audit", "interval", "true KL"],
            [
                [f"{ratio:.0%}", f"{kl['value']:.2e}", f"{kl['low']:.2e} to {kl['high']:.2e}",
                 f"{every[ratio]:.2e}"]
                for ratio in RATIOS
                for kl in [result["model_damage"][f"{ratio:g}"]["kl"]]
            ],
        ),
        "What the audit said:\n",
        "\n".join(f"- warning: {line}" for line in result["warnings"]),
        "\n".join(f"- {line}" for line in result["findings"]) + "\n",
    ]  # fmt: skip
    return "\n".join(parts)


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What an earlier run has left in ``file``, or else what is made now."""
    if not file.is_file():
        file.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def audited() -> dict[str, Any]:
    start = time.process_time()
    result = audit("demo", compute=COMPUTE)
    return {"result": result, "cpu": time.process_time() - start}


def pruned() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as work:
        return prune_and_measure(Path(work))


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("part", nargs="?", choices=("audit", "truth"), help="default: both")
    given = parser.parse_args()
    folder, parts = given.folder, (given.part,) if given.part else ("audit", "truth")
    folder.mkdir(parents=True, exist_ok=True)
    if "audit" in parts:
        one = kept(folder / "audit.json", audited)
    if "truth" in parts:
        truth = kept(folder / "truth.json", pruned)
    if len(parts) < 2:
        return
    every = {ratio: truth[f"all {ratio}"] for ratio in RATIOS}
    layers = one["result"]["model"]["moe_layers"]
    cells = {(layer, ratio): truth[f"{layer} {ratio}"] for layer in layers for ratio in RATIOS}
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    figures = text(one["result"], one["cpu"], cells, every)
    PAGE.write_text(before + BEGIN + figures + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
