"""moeprune: make Mixture-of-Experts language models smaller, from disk, and prove what was lost.

The stages are functions with the same names as the commands::

    import moeprune

    moeprune.calibrate("demo", "stats", moeprune.Text(sequences=120, length=512))
    plan = moeprune.plan("demo", "mone", moeprune.Budget(ratio=0.5), "stats")
    moeprune.apply("demo", plan, "smaller")
    moeprune.evaluate("smaller", teacher="demo")
    model = moeprune.load("smaller")

Names are imported when they are first used, so that ``import moeprune`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Budget": "moeprune.core.budget",
    "Compute": "moeprune.pipeline.inputs",
    "Constraints": "moeprune.core.constraints",
    "Grid": "moeprune.pipeline.arena.run",
    "LayerPlan": "moeprune.core.plan",
    "MaskEdit": "moeprune.core.plan",
    "Method": "moeprune.core.method",
    "MoepruneError": "moeprune.errors",
    "Plan": "moeprune.core.plan",
    "Target": "moeprune.core.targets",
    "Text": "moeprune.pipeline.inputs",
    "Writing": "moeprune.models.editing",
    "apply": "moeprune.pipeline.stages",
    "audit": "moeprune.pipeline.auditing",
    "calibrate": "moeprune.pipeline.calibration",
    "compare": "moeprune.pipeline.arena.run",
    "evaluate": "moeprune.pipeline.evaluating",
    "inspect": "moeprune.pipeline.inspection",
    "load": "moeprune.models.runtime",
    "merge_statistics": "moeprune.models.store",
    "plan": "moeprune.pipeline.planning",
    "plan_diff": "moeprune.pipeline.comparison",
    "prune": "moeprune.pipeline.stages",
    "read_plan": "moeprune.models.store",
    "recover": "moeprune.pipeline.recovery",
    "register": "moeprune.core.method",
    "run": "moeprune.pipeline.recipes.run",
    "skip_experts": "moeprune.models.skip_experts",
    "training": "moeprune.pipeline.recovery",
    "verify": "moeprune.pipeline.verification",
    "write_plan": "moeprune.models.store",
}

__all__ = [
    "Budget",
    "Compute",
    "Constraints",
    "Grid",
    "LayerPlan",
    "MaskEdit",
    "Method",
    "MoepruneError",
    "Plan",
    "Target",
    "Text",
    "Writing",
    "__version__",
    "apply",
    "audit",
    "calibrate",
    "compare",
    "evaluate",
    "inspect",
    "load",
    "merge_statistics",
    "plan",
    "plan_diff",
    "prune",
    "read_plan",
    "recover",
    "register",
    "run",
    "skip_experts",
    "training",
    "verify",
    "write_plan",
]

if TYPE_CHECKING:
    from moeprune.core.budget import Budget
    from moeprune.core.constraints import Constraints
    from moeprune.core.method import Method, register
    from moeprune.core.plan import LayerPlan, MaskEdit, Plan
    from moeprune.core.targets import Target
    from moeprune.errors import MoepruneError
    from moeprune.models.editing import Writing
    from moeprune.models.runtime import load
    from moeprune.models.skip_experts import skip_experts
    from moeprune.models.store import merge_statistics, read_plan, write_plan
    from moeprune.pipeline.arena.run import Grid, compare
    from moeprune.pipeline.auditing import audit
    from moeprune.pipeline.calibration import calibrate
    from moeprune.pipeline.comparison import plan_diff
    from moeprune.pipeline.evaluating import evaluate
    from moeprune.pipeline.inputs import Compute, Text
    from moeprune.pipeline.inspection import inspect
    from moeprune.pipeline.planning import plan
    from moeprune.pipeline.recipes.run import run
    from moeprune.pipeline.recovery import recover, training
    from moeprune.pipeline.stages import apply, prune
    from moeprune.pipeline.verification import verify


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
