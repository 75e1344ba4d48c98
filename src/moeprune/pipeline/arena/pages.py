"""A comparison's page: its table and picture, and the atlas of what every plan does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune.errors import MoepruneError
from moeprune.files import is_plain_name
from moeprune.models.store import read_plan
from moeprune.pipeline import facts
from moeprune.pipeline.arena.state import PLANS
from moeprune.report.arena import measured, render, title


def compare_page(folder: Path, result: Mapping[str, Any]) -> tuple[str, str]:
    """The page and the picture of a comparison in ``folder``.

    Plans that cannot be read any more are left out of the atlas.
    """
    rows = []
    for row in measured(result):
        name = Path(str(row.get("plan") or "")).name
        try:
            plan = read_plan(folder / PLANS / name) if is_plain_name(name) else None
        except MoepruneError:
            plan = None
        if plan is not None:
            entry = {"name": title(row, result["texts"]), "method": row["method"]}
            rows.append({**entry, "plan": facts.plan_facts(plan)})
    return render(result, rows)
