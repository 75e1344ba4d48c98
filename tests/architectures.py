"""Measures every Mixture-of-Experts architecture of the installed transformers, and tells of it.

    python tests/architectures.py

runs each tiny random model of ``families`` through every kind of edit, compares the result with a
slow independent reference in float32, and writes what came out: ``architectures.json`` inside the
package (read by ``moeprune models``) and ``docs/architectures.md``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from families import experts_modules, load_tiny, moe_model_types, save_tiny, token_ids
from moeprune.core.plan import LayerPlan, MaskEdit
from moeprune.core.shapes import LayerShape
from moeprune.errors import MoepruneError
from moeprune.files import json_bytes
from moeprune.models import quirks, runtime
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Writing
from moeprune.models.loading import LayeredModel
from moeprune.models.surgery import apply_plan
from moeprune.models.walk import Batch, Walk
from support import (
    aligned,
    experts_masked,
    logits,
    open_stock,
    outputs_replaced,
    plan_for,
    some_experts,
    without,
)

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "src/moeprune/assets/architectures.json"
PAGE = ROOT / "docs/architectures.md"

COLUMNS = {
    "discover": "MoE layers, experts and top-k of the tiny model",
    "stream": "logits of the walk, one layer in memory at a time, against the whole model",
    "delete": "the same number of experts deleted in every layer, opened by stock transformers, "
    "against the original with masked routers",
    "uneven": "another number in every layer, opened by moeprune, against the same",
    "padded": "the same filled up to equal numbers with `--pad`, opened by stock transformers",
    "novices": "experts replaced by constants, opened by moeprune, against the original whose "
    "experts answer with them",
    "mask": "half of every row of every expert zeroed, opened by stock transformers, against the "
    "original zeroed in memory",
}
TOLERANCE = 2e-5
"""Largest difference of logits that counts as the same: another order of summation."""


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint, and where results go."""

    source: Path
    out: Path

    @property
    def shapes(self) -> list[LayerShape]:
        sites = LayeredModel(Checkpoint.open(self.source)).sites
        return [site.shape for _, site in sorted(sites.items())]

    def apply(self, name: str, make: Callable[[LayerShape], LayerPlan], pad: bool = False) -> Any:
        """The plan, carried out."""
        checkpoint = Checkpoint.open(self.source)
        plan = plan_for(checkpoint, [make(shape) for shape in self.shapes])
        apply_plan(checkpoint, plan, self.out / name, writing=Writing(pad=pad))
        return plan


def discover(case: Case) -> str:
    shapes = case.shapes
    if not shapes:
        return "no MoE layer found"
    return f"{len(shapes)} x {shapes[0].experts}, top {shapes[0].top_k}"


def stream(case: Case) -> str:
    tokens, found = token_ids(2, 24), {}
    batch = Batch(tokens, torch.arange(tokens.numel()).view_as(tokens))
    with Walk(LayeredModel(Checkpoint.open(case.source)), [batch], workers=1) as walk:
        walk.layers()
        walk.logits(lambda index, value: found.update({index: value}))
    whole = transformers.AutoModelForCausalLM.from_pretrained(case.source, dtype=torch.float32)
    return difference(found[0], logits(whole.eval()))


def delete(case: Case) -> str:
    def make(shape: LayerShape) -> LayerPlan:
        gone = some_experts(shape, 1 if shape.groups > 1 else 2, seed=1)
        return LayerPlan(shape.layer, shape.experts, without(shape, gone))

    plan = case.apply("deleted", make)
    return difference(logits(open_stock(case.out / "deleted")), masked_original(case, plan))


def _some(shape: LayerShape) -> LayerPlan:
    kept = shape.experts // shape.groups - 1 - shape.layer % (2 if shape.groups > 1 else 3)
    return LayerPlan(shape.layer, shape.experts, some_experts(shape, kept, seed=shape.layer))


def uneven(case: Case) -> str:
    plan = case.apply("uneven", _some)
    if len({len(layer.keep) for layer in plan.layers.values()}) == 1:
        return "its tiny model has one MoE layer"
    found = logits(aligned(runtime.load(case.out / "uneven")))
    return difference(found, masked_original(case, plan))


def padded(case: Case) -> str:
    plan = case.apply("padded", _some, pad=True)
    if len({len(layer.keep) for layer in plan.layers.values()}) == 1:
        return "its tiny model has one MoE layer"
    return difference(logits(open_stock(case.out / "padded")), masked_original(case, plan))


def novices(case: Case) -> str:
    generator = torch.Generator().manual_seed(3)

    def make(shape: LayerShape) -> LayerPlan:
        gone = some_experts(shape, 2 if shape.groups == 1 else 1, seed=1)
        vectors = torch.randn(len(gone), shape.hidden, generator=generator)
        keep = without(shape, gone)
        return LayerPlan(shape.layer, shape.experts, keep, gone, novices_NH=vectors)

    plan = case.apply("novices", make)
    original = load_tiny(case.source)
    original.set_experts_implementation("eager")
    constants = {
        index: dict(zip(layer.replaced, layer.novices_NH, strict=True))
        for index, layer in plan.layers.items()
    }
    with outputs_replaced(original, constants):
        expected = logits(original)
    return difference(logits(runtime.load(case.out / "novices")), expected)


def mask(case: Case) -> str:
    def make(shape: LayerShape) -> LayerPlan:
        edit = MaskEdit(0.5, None, shape.roles)
        return LayerPlan(shape.layer, shape.experts, tuple(range(shape.experts)), mask=edit)

    case.apply("masked", make)
    original = load_tiny(case.source)
    masked = experts_modules(open_stock(case.out / "masked"))
    with torch.no_grad():
        for name, experts in experts_modules(original).items():
            for key, parameter in experts.named_parameters():
                _zero_smallest(parameter, masked[name].get_parameter(key), case.shapes[0].experts)
    return difference(logits(open_stock(case.out / "masked")), logits(original))


def _zero_smallest(weight: Tensor, result: Tensor, experts: int) -> None:
    """Zero half of every row of each expert along the axis along which ``result`` is half zero."""
    if weight.ndim == 2:  # all experts as one matrix
        weight, result = (t.view(experts, -1, t.shape[-1]) for t in (weight, result))
    for matrix, other in zip(weight, result, strict=True):
        for dim in (-1, -2):
            half = matrix.shape[dim] // 2 if matrix.ndim > 1 else 0
            if half and ((other == 0).sum(dim=dim) == half).all():
                smallest = matrix.abs().argsort(dim=dim, stable=True).narrow(dim, 0, half)
                matrix.scatter_(dim, smallest, 0.0)
                break


MEASURES: dict[str, Callable[[Case], str]] = {
    "discover": discover, "stream": stream, "delete": delete, "uneven": uneven, "padded": padded,
    "novices": novices, "mask": mask,
}  # fmt: skip


def masked_original(case: Case, plan: Any) -> Tensor:
    original = load_tiny(case.source)
    with experts_masked(original, {index: layer.keep for index, layer in plan.layers.items()}):
        return logits(original)


def difference(found: Tensor, expected: Tensor) -> str:
    """``exact``, ``same`` within ``TOLERANCE``, or by how much logits differ."""
    if torch.equal(found, expected):
        return "exact"
    largest = float((found - expected).abs().max())
    return "same" if largest <= TOLERANCE else f"differs by {largest:.1e}"


def measure(model_type: str) -> dict[str, str]:
    """What comes out for one architecture, by column."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(save_tiny(model_type, Path(folder) / "source"), Path(folder))
            for column, run in MEASURES.items():
                try:
                    found[column] = run(case)
                except MoepruneError as error:
                    found[column] = f"refused: {_reason(column, model_type, error)}"
    finally:
        torch.set_num_threads(threads)
    return found


def _reason(column: str, model_type: str, error: MoepruneError) -> str:
    known: dict[str, dict[str, str]] = {
        "uneven": quirks.UNEVEN_REFUSED,
        "novices": quirks.NOVICES_REFUSED,
    }
    if model_type in quirks.REFUSED:
        return quirks.REFUSED[model_type]
    if column == "padded" and model_type not in quirks.PADDABLE:
        return "its router has no bias on independent scores"
    return known.get(column, {}).get(model_type, error.problem)


def measure_all() -> dict[str, Any]:
    transformers.logging.disable_progress_bar()
    found = {}
    for model_type in moe_model_types():
        found[model_type] = measure(model_type)
        print(model_type, *found[model_type].values(), sep="; ", file=sys.stderr)
    return {
        "transformers": transformers.__version__,
        "columns": COLUMNS,
        "architectures": found,
    }


def page(result: dict[str, Any]) -> str:
    """The documentation's page."""
    rows, reasons = [], []
    for name, found in result["architectures"].items():
        cells = []
        for text in found.values():
            verdict, colon, reason = text.partition(": ")
            if colon and reason not in reasons:
                reasons.append(reason)
            cells.append(f"{verdict} [{reasons.index(reason) + 1}]" if colon else text)
        rows.append(f"| {name} | {' | '.join(cells)} |")
    names = list(result["columns"])
    return "\n".join(
        [
            "# Architectures",
            "",
            "Every Mixture-of-Experts architecture that causal language models of transformers "
            f"{result['transformers']} are",
            "registered with, as a tiny random model in float32 on a CPU. Made by `make figures`; "
            "the",
            "outcome of each cell is measured again by the tests (`pytest -m slow` measures all).",
            "",
            "- **exact**: equal bit for bit; **same**: logits differ by at most "
            f"{TOLERANCE:g}, as another",
            "  order of summation makes them; **refused**: before anything is written, with the "
            "reason below.",
            *(f"- {name}: {text}" for name, text in result["columns"].items()),
            "",
            f"| architecture | {' | '.join(names)} |",
            "|" + "---|" * (len(names) + 1),
            *rows,
            "",
            *(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)),
            "",
        ]
    )


if __name__ == "__main__":
    RESULT.write_bytes(json_bytes(measure_all()))
    PAGE.write_text(page(json.loads(RESULT.read_text())), encoding="utf-8")
