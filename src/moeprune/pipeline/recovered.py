"""What a recovery tells while it runs, and what it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.recovery.trainer import Status

Listen = Callable[[Status], None]
"""Called after every step."""


@dataclass(frozen=True)
class Recovered:
    """What a recovery did.

    Attributes:
        path: the new checkpoint.
        steps, best_step: done, and of the weights that were written; 0 is the student as it was.
        held: the held-out measure (``measure``) before and after; None without held-out sequences.
        measure: ``kl`` with a teacher, ``ce`` without.
        lam: lambda of ``expert-kd``.
        gradients: norm of the first gradient, by group of parameters that trained.
        changed: by group, tensors on disk that changed, and in all.
        zeros: weights that were kept at zero.
        seconds: of training.
        ended: why it ended.
        layers: layer by layer, what was done in each: ``layer``, ``before`` and ``after`` (errors
            on held-out tokens), ``best_step``, ``steps``, ``ended``, ``seconds``.
    """

    path: Path
    steps: int
    best_step: int
    held: tuple[float, float] | None
    measure: str
    lam: float | None
    gradients: Mapping[str, float]
    changed: Mapping[str, tuple[int, int]]
    zeros: int
    seconds: float
    ended: str
    layers: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As the command prints it."""
        return {
            **vars(self),
            "path": str(self.path),
            "held": None if self.held is None else list(self.held),
            "gradients": dict(self.gradients),
            "changed": {name: list(counts) for name, counts in self.changed.items()},
            "layers": [dict(layer) for layer in self.layers],
        }
