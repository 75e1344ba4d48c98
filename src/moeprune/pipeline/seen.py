"""Which domains a checkpoint was made with, as its own record tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeprune.files import load_json
from moeprune.models.surgery import PROVENANCE, steps_of

_MOST = 1 << 24


def seen_domains(directory: Path) -> frozenset[str] | None:
    """Names of the domains that it was calibrated or recovered on; None if there is no record.

    It is somebody's file: what is not of our form is passed over.
    """
    used = [step.get("statistics") for step in steps_of(directory)]
    try:
        record = load_json(directory / PROVENANCE, _MOST)
    except (OSError, ValueError):
        record = None
    recovered = record.get("recovered") if isinstance(record, dict) else None
    used += recovered if isinstance(recovered, list) else []
    return frozenset(name for one in used for name in _domains(one)) or None


def _domains(made_with: Any) -> list[str]:
    data = made_with.get("data") if isinstance(made_with, dict) else None
    names = data.get("domains") if isinstance(data, dict) else None
    return [str(name) for name in names] if isinstance(names, dict) else []
