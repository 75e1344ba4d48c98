"""Statistics of some experts of a layer: what is too large to collect of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moeprune.core.accumulators import ACCUMULATORS, BlockRows, ExpertRows
from moeprune.core.shapes import LayerShape
from moeprune.core.statistics import LayerStatistics


@dataclass
class PartialStatistics(LayerStatistics):
    """Sums over the tokens of the experts ``chosen``; row i of every sum is ``chosen[i]``'s.

    For accumulators that look at experts one by one (Gram matrices); others see nothing.
    """

    chosen: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        shape: LayerShape,
        needs: Sequence[str],
        chosen: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> PartialStatistics:
        """Statistics over no tokens."""
        smaller = replace(shape, experts=len(chosen), groups=1)
        parts = {n: ACCUMULATORS[n].empty(smaller, torch.device(device)) for n in sorted(needs)}
        return cls(shape, 0, parts, tuple(chosen))

    def add_expert(self, rows: ExpertRows) -> None:
        """Add the tokens of one expert in one batch, if it is one of ``chosen``."""
        if rows.expert in self.chosen:
            super().add_expert(replace(rows, expert=self.chosen.index(rows.expert)))

    def add_block(self, rows: BlockRows) -> None:
        """Count the tokens of one batch."""
        self.tokens += len(rows.x_TH)

    @property
    def nbytes(self) -> int:
        """Of all sums."""
        return sum(t.nbytes for part in self.parts.values() for _, t in part.tensors())
