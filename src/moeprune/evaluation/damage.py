"""What edits of single layers, or of all, do to held-out text: the branches of a walk, measured.

Axes: W windows, V vocabulary, A branches, R ratios, G clusters (documents, or windows).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moeprune.core.ops.prunability import largest_below
from moeprune.evaluation.intervals import LEVEL, Estimate, Interval, estimate
from moeprune.evaluation.perplexity import Reference, Sums, window_sums
from moeprune.models.branches import BranchedWalk
from moeprune.models.walk import default_workers

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Damage:
    """What every branch of a walk did to every window.

    Attributes:
        model: sums of the unedited model.
        branches: sums of every branch, compared with the unedited model.
        cluster_W: the document of each window, or the window itself where that is not known.
        unit: what a cluster is, in the plural.
    """

    model: Sums
    branches: Sequence[Sums]
    cluster_W: NDArray[np.int64]
    unit: str = "windows"

    def kl(self, branch: int) -> Estimate:
        """Mean KL(unedited || branch), nats per token."""
        return self._mean(self.branches[branch].kl_N)

    def kl_interval(self, branch: int) -> Interval:
        """Of ``kl``, which is never negative."""
        return self.kl(branch).interval().within(0.0, math.inf)

    def loss(self, branch: int) -> Estimate:
        """How much higher the mean loss is, nats per token."""
        return self._mean(self.branches[branch].nll_N - self.model.nll_N)

    def kl_difference(self, first: int, second: int) -> Estimate:
        """Mean KL of the first branch less that of the second, window by window."""
        return self._mean(self.branches[first].kl_N - self.branches[second].kl_N)

    def _mean(self, sums_W: Floats) -> Estimate:
        return estimate(sums_W, self.model.tokens_N, self.cluster_W, self.unit)

    def largest_ratio(
        self, branches: Sequence[int], ratios: Sequence[float], limit: float
    ) -> Interval:
        """The largest ratio at which the loss rises by at most ``limit``, nats per token.

        Between the ratios that ``branches`` stand for, and from 0, the loss is taken to rise along
        straight lines. The interval holds the ratios at which the limit lies within the interval of
        the rise: it ends where the upper and the lower ends cross the limit. All that was tried,
        from 0 on, where the sample has no intervals.
        """
        rises = [self.loss(branch) for branch in branches]
        found = [rise.interval() for rise in rises]
        value = largest_below(ratios, [rise.value for rise in rises], limit)
        low = largest_below(ratios, [each.high for each in found], limit)
        ends = [each.low for each in found]
        known = all(math.isfinite(end) for end in ends)
        high = largest_below(ratios, ends, limit) if known else float(ratios[-1])
        how = f"where the ends of the rise's interval cross, {found[0].method}"
        return Interval(value, low, high, LEVEL, found[0].items, how)


def measure(
    walk: BranchedWalk,
    cluster_W: NDArray[np.int64],
    unit: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Damage:
    """Finish a walk: compare the logits of its branches with the model's, batch by batch."""
    device = walk.model.device

    def score(index: int) -> list[Sums]:
        if device.type == "cpu":
            torch.set_num_threads(1)
        return list(_compared(walk, index))

    parts = []
    with ThreadPoolExecutor(walk.workers or default_workers(device)) as pool:
        for index, part in enumerate(pool.map(score, range(len(walk.held)))):
            parts.append(part)
            progress(index + 1, len(walk.held))
    model, *branches = (Sums.joined(sums) for sums in zip(*parts, strict=True))
    return Damage(model, branches, cluster_W, unit)


def _compared(walk: BranchedWalk, index: int) -> Iterator[Sums]:
    """The sums of one batch: of the model, then of every branch."""
    ids_BL = walk.held[index].ids_BL
    reference: Reference | None = None
    for logits_BLV in walk.held_logits(index):
        yield window_sums(logits_BLV[:, :-1], ids_BL, reference)
        reference = reference or Reference.of(logits_BLV[:, :-1])
        del logits_BLV  # the next ones are computed before this name is used again
