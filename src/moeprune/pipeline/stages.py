"""The stages, one public function each: inspect, calibrate, plan, apply, prune, evaluate."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeprune.core.budget import Budget
from moeprune.core.constraints import Constraints
from moeprune.core.method import Method, make_method
from moeprune.core.plan import Plan
from moeprune.core.targets import Target
from moeprune.errors import OutputError
from moeprune.evaluation.perplexity import evaluate as evaluate_models
from moeprune.files import refuse_existing
from moeprune.models import data
from moeprune.models.byte_exact import refuse_method
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Sizes, Writing
from moeprune.models.store import read_plan
from moeprune.models.store import write_plan as save_plan
from moeprune.models.surgery import apply_plan
from moeprune.pipeline.asking import PROTECTION_NEEDS, accept
from moeprune.pipeline.calibration import calibrate
from moeprune.pipeline.inputs import (
    Compute,
    Progress,
    Source,
    Text,
    model_name,
    read_heldout,
    silent,
)
from moeprune.pipeline.inspection import inspect
from moeprune.pipeline.measure import peak_memory, reset_peak_memory
from moeprune.pipeline.planning import plan

__all__ = [
    "Compute",
    "Constraints",
    "Pruned",
    "Target",
    "Text",
    "Writing",
    "apply",
    "calibrate",
    "evaluate",
    "inspect",
    "plan",
    "prune",
    "save_plan",
]


def apply(
    source: Source,
    plan_or_path: Plan | Source,
    out: Source,
    force: bool = False,
    progress: Progress = silent,
    writing: Writing = Writing(),
    trust_remote_code: bool = False,
) -> Sizes:
    """Write the checkpoint that a plan describes.

    Of a quantised model every kept weight and scale keeps its bytes, unless ``writing`` says
    otherwise.

    Raises:
        MoepruneError: the plan does not fit the model, or the output cannot be written.
    """
    out = Path(out)
    refuse_existing(out, force)
    checkpoint = Checkpoint.open(source, trust_remote_code)
    _refuse_source(checkpoint, out)
    chosen = plan_or_path if isinstance(plan_or_path, Plan) else read_plan(Path(plan_or_path))
    return apply_plan(
        checkpoint,
        chosen,
        out,
        force,
        lambda done, total: progress("writing", done, total),
        writing,
    )


def _refuse_source(checkpoint: Checkpoint, out: Path) -> None:
    """Replacing an output must not delete the model that is read."""
    if checkpoint.path.is_relative_to(out.resolve()):
        raise OutputError(
            f"the output {out} is the model itself, or holds it", "choose another --out"
        )


@dataclass(frozen=True)
class Pruned:
    """What ``prune`` did.

    Attributes:
        plan: the decision.
        sizes: before and after.
        seconds: per stage.
        peak_memory_bytes: of all stages; None where it cannot be known.
    """

    plan: Plan
    sizes: Sizes
    seconds: dict[str, float]
    peak_memory_bytes: int | None


def prune(  # noqa: PLR0913  (what calibrate, plan and apply take, together)
    source: Source,
    method: str | Method,
    budget: Budget | Target,
    out: Source,
    text: Text = Text(),
    options: Mapping[str, Any] | None = None,
    statistics: Source | None = None,
    compute: Compute = Compute(),
    seed: int = 0,
    force: bool = False,
    progress: Progress = silent,
    uniform: bool = False,
    writing: Writing = Writing(),
    constraints: Constraints = Constraints(),
) -> Pruned:
    """calibrate + plan + apply. The plan is kept in the new checkpoint as well.

    ``dequantize`` is as for ``apply``.

    Raises:
        MoepruneError: anything the user can mend; nothing is left behind.
    """
    refuse_existing(Path(out), force)
    chosen = method if isinstance(method, Method) else make_method(method, options)
    accept(chosen, budget, constraints)
    checkpoint = Checkpoint.open(source)
    _refuse_source(checkpoint, Path(out))
    refuse_method(checkpoint, chosen.changes, writing.dequantize)
    reset_peak_memory()
    seconds: dict[str, float] = {}
    work = Path(tempfile.mkdtemp(prefix="moeprune-"))
    try:
        start = time.perf_counter()
        needs = {*chosen.needs, *([PROTECTION_NEEDS] if constraints.protect_super else [])}
        if needs and not chosen.sequential and statistics is None:
            statistics = work / "statistics"
            seeded = replace(text, seed=seed)
            calibrate(source, statistics, seeded, sorted(needs), compute, progress=progress)
            seconds["calibrate"] = time.perf_counter() - start
        start = time.perf_counter()
        made = plan(
            source,
            chosen,
            budget,
            statistics,
            replace(text, seed=seed),
            None,
            compute,
            seed,
            progress,
            uniform,
            constraints,
            writing,
        )
        seconds["plan"] = time.perf_counter() - start
        start = time.perf_counter()
        trust = compute.trust_remote_code
        sizes = apply(source, made, out, force, progress, writing, trust)
        seconds["apply"] = time.perf_counter() - start
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Pruned(made, sizes, seconds, peak_memory())


def evaluate(
    source: Source,
    teacher: Source | None = None,
    text: Text = Text(sequences=64, length=256),
    compute: Compute = Compute(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Held-out perplexity per domain and, against a teacher, mean KL and top-1 agreement.

    ``text.sequences`` is per domain here; 0 takes all.

    Raises:
        MoepruneError: anything the user can mend.
    """
    checkpoint = Checkpoint.open(source, compute.trust_remote_code)
    models = {"model": compute.open(checkpoint)}
    if teacher is not None:
        models["teacher"] = compute.open(Checkpoint.open(teacher, compute.trust_remote_code))
    domains = read_heldout(checkpoint, text)
    results = evaluate_models(
        models,
        domains,
        "teacher" if teacher is not None else None,
        compute.workers,
        lambda done, total: progress("evaluating", done, total),
    )
    return {
        "format": "moeprune.evaluation/1",
        "model": model_name(source),
        "teacher": None if teacher is None else model_name(teacher),
        "data": data.describe(domains),
        "dtype": str(models["model"].dtype).removeprefix("torch."),
        **results["model"].to_json(),
    }
