"""Plans that were made compared with each other, from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeprune.core.plan import Plan
from moeprune.core.plan_diff import plan_diff as difference
from moeprune.models.store import read_plan
from moeprune.pipeline.inputs import Source


def plan_diff(one: Plan | Source, two: Plan | Source) -> dict[str, Any]:
    """What two plans, or files of plans, decide differently; see ``core.plan_diff``.

    Raises:
        PlanError: not plans, or of models of different shapes.
    """
    first, second = (
        plan if isinstance(plan, Plan) else read_plan(Path(plan)) for plan in (one, two)
    )
    return difference(first, second)
