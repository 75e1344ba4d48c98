"""The stages, one public function each: inspect, calibrate, plan, apply, prune, evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeprune.core.budget import Budget
from moeprune.core.constraints import Constraints
from moeprune.core.method import Method, make_method
from moeprune.core.plan import Plan
from moeprune.core.targets import Target
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Sizes, Writing
from moeprune.models.store import read_plan
from moeprune.models.store import write_plan as save_plan
from moeprune.models.surgery import WRITING, apply_plan
from moeprune.pipeline.calibration import calibrate
from moeprune.pipeline.evaluating import evaluate
from moeprune.pipeline.inputs import (
    Compute,
    Progress,
    Source,
    Text,
    refuse_source,
    silent,
)
from moeprune.pipeline.inspection import inspect
from moeprune.pipeline.kept_report import KeptReport
from moeprune.pipeline.planning import plan
from moeprune.pipeline.reporting import Witness
from moeprune.pipeline.steps import Step, Steps
from moeprune.work import refuse_finished

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

    If the writing is cut, ``<out>.writing`` keeps what is done, and the same call goes on from it.
    Of a quantised model every kept weight and scale keeps its bytes, unless ``writing`` says
    otherwise.

    Raises:
        MoepruneError: the plan does not fit the model, or the output cannot be written.
    """
    out = Path(out)
    refuse_finished(out, WRITING, force=force)
    checkpoint = Checkpoint.open(source, trust_remote_code)
    refuse_source(checkpoint, out)
    chosen = plan_or_path if isinstance(plan_or_path, Plan) else read_plan(Path(plan_or_path))
    return apply_plan(
        checkpoint,
        chosen,
        out,
        force,
        lambda done, total: progress("writing", done, total),
        writing,
        resumable=True,
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
    command: str = "",
    routing: bool | None = None,
) -> Pruned:
    """calibrate + plan + apply, a recipe of one step. The plan is kept in the checkpoint as well.

    ``dequantize`` is as for ``apply``. With ``command``, what was run, the checkpoint also gets
    ``report.html`` and ``moeprune_run.json``, its data; ``routing`` says whether a short walk of
    both models tells for it how evenly experts are used before and after, by default if the text is
    read for the method.

    If it is cut while it measures that, the same call only measures it again; the plan that it
    returns is then without its layers, which stand in the checkpoint.

    Raises:
        MoepruneError: anything the user can mend. ``out`` is not there then; what took long stays
            beside it, for the same command.
    """
    chosen = method if isinstance(method, Method) else make_method(method, options)
    text = replace(text, seed=seed)
    routed = bool(chosen.needs) and statistics is None if routing is None else routing
    shown = text if routed else None
    witness = Witness(source, compute, command, shown, progress) if command else None
    steps = Steps(
        source,
        [Step(chosen, budget, uniform, seed=seed, constraints=constraints)],
        Path(out),
        text,
        None if statistics is None else Path(statistics),
        compute,
        writing,
        progress,
        force,
        observed=None if witness is None else witness.observe,
    )
    report = None if witness is None else KeptReport(witness, steps)
    if report is not None and (cut := report.go_on()) is not None:
        return Pruned(cut.plan, cut.sizes, cut.seconds, None)
    (done,) = steps.run()
    if report is not None:
        report.write(done)
    return Pruned(done.plan, done.sizes, done.seconds, steps.peak)
