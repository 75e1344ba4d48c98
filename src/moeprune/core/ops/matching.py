"""Which neuron of one expert corresponds to which neuron of another.

An expert computes the same whatever the order of its neurons, so two experts can be averaged only
after the neurons of one are put in the order of the other. Axes: I neurons of the anchor, J neurons
of the member that is aligned to it (J = I), F features of a neuron, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def inner_products(anchor: Sequence[Tensor], member: Sequence[Tensor]) -> Tensor:
    """Sum of the inner products of neurons, over the matrices of an expert (arXiv 2310.01334).

    ``gain_ij = <gate_i, gate'_j> + <up_i, up'_j> + <down_i, down'_j>``, rows of gate and up,
    columns of down.

    Args:
        anchor: the matrices of one expert, each with one row per neuron, [I, F].
        member: those of the other, in the same order.

    Returns:
        float32 [I, J].
    """
    gain_IJ = anchor[0].float() @ member[0].float().T
    for a_IF, b_JF in zip(anchor[1:], member[1:], strict=True):
        gain_IJ.addmm_(a_IF.float(), b_JF.float().T)
    return gain_IJ


def cosines(anchor: Sequence[Tensor], member: Sequence[Tensor]) -> Tensor:
    """Cosines of neurons whose features are the rows of all matrices together, float32 [I, J]."""
    gain_IJ = inner_products(anchor, member)
    norm_I, norm_J = (
        torch.stack([m.float().square().sum(dim=1) for m in matrices]).sum(dim=0).sqrt()
        for matrices in (anchor, member)
    )
    tiny = torch.finfo(torch.float32).tiny
    return gain_IJ / norm_I.clamp(min=tiny)[:, None] / norm_J.clamp(min=tiny)


def correlations(anchor_SI: Tensor, member_SJ: Tensor) -> Tensor:
    """Pearson correlation of neurons' activations on the same tokens, float32 [I, J].

    0 where a neuron never changes.
    """
    centred = [(h - h.mean(dim=0)).T for h in (anchor_SI.float(), member_SJ.float())]
    return cosines(centred[:1], centred[1:])


def distances(cosine_IJ: Tensor) -> Tensor:
    """Euclidean distance of unit vectors with those cosines: sqrt(2 - 2 cos)."""
    return (2 - 2 * cosine_IJ).clamp(min=0).sqrt()


def best_assignment(gain_IJ: Tensor) -> Tensor:
    """The permutation of the member's neurons with the largest total gain.

    Solved exactly (Jonker-Volgenant, O(I^3)). A gain that is not a number counts as 0.

    Args:
        gain_IJ: what is gained by putting the member's neuron j at the anchor's i; square.

    Returns:
        int64 [I]: for each neuron of the anchor, the member's neuron that belongs there.
    """
    gain = torch.nan_to_num(gain_IJ.detach().cpu(), nan=0.0, posinf=1e30, neginf=-1e30).numpy()
    _, column = linear_sum_assignment(gain, maximize=True)
    return torch.from_numpy(column).long()
