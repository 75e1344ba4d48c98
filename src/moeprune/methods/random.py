"""Random dropping: the choice that every other method has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from moeprune.core.dropping import Dropper
from moeprune.core.method import Context, LayerView
from moeprune.core.ranking import Rating


@dataclass(frozen=True)
class Random(Dropper):
    """Deletes experts that a seed chooses; needs no data.

    The score of an expert is the first 8 bytes of SHA-256 over ``seed:layer:expert`` as a fraction
    of 2^64: uniform, the same on every machine and with every version of every library, and for
    one seed a larger ratio deletes what a smaller one deletes, and more.

    Options:
        scope, normalise, floor: as for every dropper.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "drop experts at random, by seed; needs no data"
    source: ClassVar[str] = "baseline"

    def rate(self, view: LayerView, context: Context) -> Rating:
        """One uniform number per expert."""
        experts = range(view.shape.experts)
        scores = [_uniform(f"{context.seed}:{view.shape.layer}:{expert}") for expert in experts]
        return Rating("random", scores, [0] * len(scores))


def _uniform(text: str) -> float:
    """A number in [0, 1) that ``text`` decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
