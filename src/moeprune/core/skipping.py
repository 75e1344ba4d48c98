"""When a token may skip its weaker experts, as a value that travels with a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moeprune.errors import PlanError


@dataclass(frozen=True)
class Skipping:
    """Dynamic skipping of one layer (arXiv 2402.14800).

    A token's second and later experts are skipped where their gate is below ``beta`` times its
    first gate. Routers that divide gates by their sum divide those of the others again.

    Attributes:
        beta: the threshold, in [0, 1].
        renormalise: whether the gates of the others are divided by their sum again.
    """

    beta: float
    renormalise: bool

    def to_json(self) -> dict[str, Any]:
        """As it stands in plan.json and, by layer, in config.json."""
        return {"beta": self.beta, "renormalise": self.renormalise}

    @classmethod
    def from_json(cls, data: Any, where: str) -> Skipping:
        """The inverse of ``to_json``.

        Raises:
            PlanError: a field is missing or of the wrong kind.
        """
        beta = data.get("beta") if isinstance(data, dict) else None
        divided = data.get("renormalise") if isinstance(data, dict) else None
        if not isinstance(beta, (int, float)) or isinstance(beta, bool):
            beta = math.nan
        if not 0 <= beta <= 1 or not isinstance(divided, bool):
            raise PlanError(f"{where}: 'beta' is not in [0, 1], or 'renormalise' no boolean")
        return cls(float(beta), divided)
