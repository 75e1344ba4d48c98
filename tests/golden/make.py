"""Write ``demo_plans.json``: what every founding method decides about the embedded model.

Run ``python tests/golden/make.py`` from the root of the repository after a change that is meant to
change decisions, or after the embedded model has been trained anew, and look at the difference
before committing it. It prints how close the closest decision was: a margin near 0 means that
another machine's rounding could decide otherwise.

Only decisions are kept, no scores, so that rounding does not matter: which experts stay and which
are replaced, and for MoE-Pruner, which keeps all experts, what is masked and the experts whose
statistics were too thin, with the input columns that weigh most in each layer.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from moeprune.core.budget import Budget
from moeprune.core.plan import LayerPlan, Plan
from moeprune.pipeline import stages

FILE = Path(__file__).with_name("demo_plans.json")
TEXT = stages.Text(sequences=24, length=256)
COMPUTE = stages.Compute(dtype="float32", workers=2)
METHODS: dict[str, dict[str, str]] = {
    "mone": {},
    "moeits": {},
    "moe-pruner": {"propagate": "dense"},
}
BUDGET = Budget(ratio=0.5)
COLUMNS = 4


def demo_plans() -> dict[str, Plan]:
    """The plans of all methods for the embedded model, from one calibration."""
    with tempfile.TemporaryDirectory() as folder:
        statistics = Path(folder) / "statistics"
        stages.calibrate("demo", statistics, TEXT, compute=COMPUTE)
        return {
            method: stages.plan(
                "demo", method, BUDGET, statistics, options=options, compute=COMPUTE
            )
            for method, options in METHODS.items()
        }


def decisions(plan: Plan) -> dict[str, Any]:
    """What a plan decides, by layer, without any floating-point number but the ratio."""
    return {str(index): _layer(layer) for index, layer in sorted(plan.layers.items())}


def _layer(layer: LayerPlan) -> dict[str, Any]:
    found: dict[str, Any] = {"keep": list(layer.keep), "replaced": list(layer.replaced)}
    if layer.mask is not None:
        found["mask"] = {"ratio": layer.mask.ratio, "roles": list(layer.mask.roles)}
        found["loudest"] = sorted(_weight_of_columns(layer).topk(COLUMNS).indices.tolist())
        found["notes"] = list(layer.notes)
    return found


def _weight_of_columns(layer: LayerPlan) -> torch.Tensor:
    assert layer.mask is not None and layer.mask.scale_in_EH is not None
    return layer.mask.scale_in_EH.double().square().sum(dim=0)


def margin(layer: LayerPlan) -> float:
    """Relative distance of the two scores between which a layer's decision was made."""
    if layer.mask is not None:
        weight = _weight_of_columns(layer).sort(descending=True).values.tolist()
        return 1 - weight[COLUMNS] / weight[COLUMNS - 1]
    if layer.replaced:
        scores = [score or 0.0 for score in layer.scores["fusion"]]
        return 1 - max(scores[e] for e in layer.replaced) / min(scores[e] for e in layer.keep)
    return 1.0  # MoEITS: entropies are exact, there is no rounding to fear


def as_json(plans: dict[str, Plan]) -> str:
    """The content of ``demo_plans.json``; lists of numbers stand on one line each."""
    lines = ["{"]
    for method, plan in plans.items():
        rows = [f"  {json.dumps(i)}: {json.dumps(row)}" for i, row in decisions(plan).items()]
        lines += [f" {json.dumps(method)}: {{", ",\n".join(rows), " },"]
    lines[-1] = " }"
    return "\n".join([*lines, "}"]) + "\n"


if __name__ == "__main__":
    made = demo_plans()
    FILE.write_text(as_json(made), encoding="utf-8")
    for name, plan in made.items():
        closest = min(margin(layer) for layer in plan.layers.values())
        print(f"{name}: closest decision {closest:.2%}")
    print(f"written: {FILE}")
