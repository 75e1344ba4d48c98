"""Numbers about a Mixture-of-Experts layer that tell, before anything is cut, what a cut will cost.

Axes: E experts, H width of the block, R ratios.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from moeprune.core.accumulators import Outputs, Routing
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.ops.novices import novice_error


def load_balance(top1_E: Tensor) -> float:
    """Standard deviation over mean of the tokens whose largest gate is each expert's.

    Source: equations 4 and 5 of arXiv 2410.12013, with the population's deviation. 0 is perfect
    balance, sqrt(E - 1) one expert for all tokens; 0 without tokens.
    """
    mean = float(top1_E.double().mean())
    return float(top1_E.double().std(correction=0)) / mean if mean else 0.0


def tokens_wanted(
    counts: Mapping[int, Sequence[int]], tokens: int, wanted: int, share: float
) -> float | None:
    """Tokens of text after which ``share`` of all experts would have seen ``wanted`` tokens each.

    An expert that saw n of T tokens is taken to see n / T of any such text.

    Args:
        counts: by layer, tokens routed to each expert.
        tokens: T.
        wanted: tokens that an expert should see.
        share: of the experts of all layers together, above 0.

    Returns:
        None if so many experts saw no token that no amount of this text is known to do.
    """
    seen = sorted((count for layer in counts.values() for count in layer), reverse=True)
    least = seen[math.ceil(share * len(seen)) - 1]
    return wanted * tokens / least if least else None


def jaccard(first: Collection[int], second: Collection[int]) -> float:
    """Experts in both over experts in either; 1 for two empty sets."""
    a, b = set(first), set(second)
    return len(a & b) / len(a | b) if a | b else 1.0


def jaccard_by_chance(experts: int, kept: int) -> float:
    """About what two random choices of ``kept`` of ``experts`` share: k / (2 E - k)."""
    return kept / (2 * experts - kept)


def cut_error(plan: LayerPlan, routing: Routing, outputs: Outputs) -> float:
    """Squared error of the block's output that a cut makes on the tokens of the statistics.

    The sum over experts that go of sum g^2 |f - v|^2, where v is the constant in the place of the
    expert, or 0 if it is deleted. It leaves out what the router does with the gates that become
    free, and that two experts which go may be chosen by one token: their errors are added as if
    they were at right angles.
    """
    v_EH = torch.zeros_like(outputs.mean_EH)
    if plan.novices_NH is not None and plan.replaced:
        v_EH[list(plan.replaced)] = plan.novices_NH[:, : v_EH.shape[1]].to(v_EH)
    error_E = novice_error(v_EH, outputs.gate_sq_norm_sq_E, outputs.gated_EH, routing.gate_sq_E)
    return float(error_E[[*plan.dropped, *plan.replaced]].sum())


def largest_below(ratios: Sequence[float], rises_R: ArrayLike, limit: float) -> float:
    """The largest ratio at which a curve through (0, 0) and (ratio, rise) is at most ``limit``.

    Straight lines between the points; a curve that falls is held at its highest value so far. Where
    damage grows ever faster, straight lines lie above it, so that the answer errs downwards. The
    last ratio if the curve stays below the limit.
    """
    x = [0.0, *ratios]
    y = np.maximum.accumulate([0.0, *np.asarray(rises_R, dtype=np.float64)])
    for i in range(1, len(x)):
        if not y[i] <= limit:  # a rise that is not a number is above any limit
            if not math.isfinite(y[i]):
                return x[i - 1]
            return float(x[i - 1] + (x[i] - x[i - 1]) * (limit - y[i - 1]) / (y[i] - y[i - 1]))
    return x[-1]
