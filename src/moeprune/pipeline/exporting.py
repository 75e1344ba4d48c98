"""Plans written for servers."""

from __future__ import annotations

from pathlib import Path

from moeprune.core.plan import Plan
from moeprune.errors import PlanError, nearest
from moeprune.files import write_together
from moeprune.models.store import read_plan
from moeprune.pipeline.inputs import Source
from moeprune.serving.profiles import PROFILES, export


def plan_export(
    plan: Plan | Source, out: Source, profile: str = "moeprune", force: bool = False
) -> Path:
    """Write a plan for servers that prune while they load; see ``serving.profiles``.

    Raises:
        PlanError: not a plan, or one that such a server cannot follow.
        OutputError: ``out`` exists and not ``force``.
    """
    if profile not in PROFILES:
        raise PlanError(f"unknown format {profile!r}", nearest(profile, PROFILES))
    read = plan if isinstance(plan, Plan) else read_plan(Path(plan))
    write_together({Path(out): export(read, profile)}, force)
    return Path(out)
