"""Cosine similarities of experts, by what their router rows and their outputs did on tokens.

Axes: E experts, S sampled tokens, H width of the block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BYTES = 1 << 26  # outputs of all experts for a few tokens at a time


def gram_cosines(gram_EE: Tensor) -> Tensor:
    """Cosines of vectors from their inner products, float64 [E, E]; NaN where a vector is 0."""
    norm_E = gram_EE.double().diagonal().sqrt()
    return gram_EE.double() / norm_E[:, None] / norm_E


def output_cosines(outputs: Callable[[int, Tensor], Tensor], experts: int, x_SH: Tensor) -> Tensor:
    """Mean over tokens of the cosine of two experts' outputs on that token.

    Args:
        outputs: an expert's output [S, H] for inputs [S, H]; called once per expert and a few
            tokens, so that the outputs of all experts are never in memory for all tokens.
        experts: E.
        x_SH: the tokens, at least one.

    Returns:
        float64 [E, E]; an output of 0 has cosine 0 with everything.
    """
    total_EE = torch.zeros(experts, experts, dtype=torch.float64)
    step = max(1, _BYTES // (4 * experts * x_SH.shape[1]))
    for start in range(0, len(x_SH), step):
        some_sH = x_SH[start : start + step]
        f_EsH = torch.stack([outputs(e, some_sH).float().cpu() for e in range(experts)])
        unit_EsH = torch.nn.functional.normalize(f_EsH, dim=2, eps=1e-30)
        flat = unit_EsH.flatten(1)
        total_EE += (flat @ flat.T).double()
    return total_EE / len(x_SH)
