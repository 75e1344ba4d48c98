"""Whether the same experts would stay if the calibration text had been other text of its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moeprune.core.ops.prunability import jaccard
from moeprune.core.statistics import LayerStatistics

Choice = Callable[[LayerStatistics], Sequence[int]]
"""The experts that stay, from a layer's statistics."""


@dataclass(frozen=True)
class Stability:
    """How much a choice of experts moves.

    Attributes:
        mean: of the Jaccard overlap of the experts that stay with those that stay by all the text.
        lowest: the smallest overlap seen.
    """

    mean: float
    lowest: float


def resamples(parts: Sequence[LayerStatistics], count: int, seed: int) -> list[LayerStatistics]:
    """Statistics over ``count`` bootstrap samples of the parts into which the text was cut.

    Each sample draws as many parts as there are, with replacement, and adds them up exactly.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        total = LayerStatistics.empty(parts[0].shape, parts[0].parts, _device(parts[0]))
        for index in sorted(rng.integers(0, len(parts), len(parts)).tolist()):
            total.merge(parts[index])
        found.append(total)
    return found


def stability(
    full: LayerStatistics, samples: Sequence[LayerStatistics], choose: Choice
) -> Stability:
    """Overlap of what ``choose`` keeps by each of ``samples`` with what it keeps by ``full``."""
    kept = choose(full)
    overlaps = [jaccard(kept, choose(sample)) for sample in samples]
    return Stability(float(np.mean(overlaps)), min(overlaps))


def _device(statistics: LayerStatistics) -> str:
    part = next(iter(statistics.parts.values()))
    return str(next(tensor for _, tensor in part.tensors()).device)
