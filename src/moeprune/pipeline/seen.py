"""Which domains a checkpoint was made with, as its own record tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeprune.models.surgery import recoveries_of, steps_of


def seen_domains(directory: Path) -> frozenset[str] | None:
    """Names of the domains that it was calibrated or recovered on; None if there is no record.

    It is somebody's file: what is not of our form is passed over.
    """
    used = [step.get("statistics") for step in steps_of(directory)]
    used += recoveries_of(directory)
    return frozenset(name for one in used for name in _domains(one)) or None


def _domains(made_with: Any) -> list[str]:
    data = made_with.get("data") if isinstance(made_with, dict) else None
    names = data.get("domains") if isinstance(data, dict) else None
    return [str(name) for name in names] if isinstance(names, dict) else []
