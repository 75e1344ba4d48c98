"""How far the residual stream turns between decoder layers: the statistic behind layer dropping.

Axis letters: S sampled tokens, Q sampled last tokens of sequences, D points at which the stream is
looked at: the input of each decoder layer, dense ones too, and the output of the last; D = L + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moeprune.core.accumulators import SAMPLE_SIZE
from moeprune.errors import MoepruneError

NAME = "residual"
"""As in ``--collect`` and in a method's ``needs``."""


@dataclass
class Residual:
    """Angles between the stream at any two points, of a bounded sample of tokens.

    ``arccos(cos(x^(l), x^(m))) / pi`` (arXiv 2403.17887), 0 for the same direction and 1 for the
    opposite one. Kept per token, so that merging keeps the tokens with the smallest keys of both:
    the same as one run over all text.

    Attributes:
        key_S: keys of the sampled tokens.
        angle_SDD: their angles.
        last_key_Q: keys of the sampled last tokens of sequences.
        last_angle_QDD: their angles.
    """

    key_S: Tensor
    angle_SDD: Tensor
    last_key_Q: Tensor
    last_angle_QDD: Tensor

    @property
    def layers(self) -> int:
        """L, the decoder layers."""
        return self.angle_SDD.shape[1] - 1

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The fields and their tensors."""
        for field in fields(self):
            yield field.name, getattr(self, field.name)

    def merge(self, other: Residual) -> None:
        """Keep the tokens with the smallest keys of both.

        Raises:
            MoepruneError: another number of layers.
        """
        if other.layers != self.layers:
            raise MoepruneError(f"angles of {self.layers} and of {other.layers} layers")
        for key, angle in (("key_S", "angle_SDD"), ("last_key_Q", "last_angle_QDD")):
            keys = torch.cat((getattr(self, key), getattr(other, key)))
            both = torch.cat((getattr(self, angle), getattr(other, angle)))
            smallest = torch.argsort(keys, stable=True)[:SAMPLE_SIZE]
            setattr(self, key, keys[smallest])
            setattr(self, angle, both[smallest])

    def mean_DD(self, last: bool) -> Tensor:
        """Mean angles, float64 [D, D]: of the last tokens of sequences, or of all sampled ones."""
        return (self.last_angle_QDD if last else self.angle_SDD).double().mean(dim=0)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], layers: int) -> Residual:
        """From a file.

        Raises:
            MoepruneError: it does not hold angles of so many layers.
        """
        found = {field.name: tensors.get(field.name) for field in fields(cls)}
        if any(tensor is None for tensor in found.values()):
            raise MoepruneError("angles between layers are missing")
        result = cls(**{name: tensor for name, tensor in found.items() if tensor is not None})
        for keys, angle in (
            (result.key_S, result.angle_SDD),
            (result.last_key_Q, result.last_angle_QDD),
        ):
            size = (keys.numel(), layers + 1, layers + 1)
            if keys.ndim != 1 or not len(keys) or tuple(angle.shape) != size:
                raise MoepruneError(f"angles of shape {list(angle.shape)}, not {list(size)}")
        return result


def angles(x_DSC: Tensor) -> Tensor:
    """Angles between all pairs of points, float32 [S, D, D], in units of pi.

    Zero vectors have no direction: their cosine counts as 0.
    """
    x_SDC = x_DSC.transpose(0, 1).double()
    length_SD = torch.linalg.vector_norm(x_SDC, dim=-1).clamp_min(1e-300)
    unit_SDC = x_SDC / length_SD[..., None]
    cos_SDD = (unit_SDC @ unit_SDC.transpose(1, 2)).clamp(-1.0, 1.0)
    found = torch.arccos(cos_SDD) / math.pi
    found.diagonal(dim1=1, dim2=2).zero_()
    return found.float()
