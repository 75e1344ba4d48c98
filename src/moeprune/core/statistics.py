"""The statistics of one MoE layer: a set of accumulators with the number of tokens behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from moeprune.core.accumulators import ACCUMULATORS, Accumulator, BlockRows, ExpertRows
from moeprune.core.shapes import LayerShape
from moeprune.errors import MoepruneError, nearest

A = TypeVar("A", bound=Accumulator)


@dataclass
class LayerStatistics:
    """Sums over the tokens that one MoE layer has seen.

    Attributes:
        shape: the layer's sizes.
        tokens: tokens seen, padding not counted.
        parts: accumulators by name.
    """

    shape: LayerShape
    tokens: int = 0
    parts: dict[str, Accumulator] = field(default_factory=dict)

    @classmethod
    def empty(
        cls, shape: LayerShape, needs: Iterable[str], device: torch.device | str = "cpu"
    ) -> LayerStatistics:
        """Statistics over no tokens that collect the accumulators ``needs``.

        Raises:
            MoepruneError: a name is not an accumulator's.
        """
        parts = {}
        for name in sorted(needs):
            if name not in ACCUMULATORS:
                raise MoepruneError(f"unknown accumulator {name!r}", nearest(name, ACCUMULATORS))
            parts[name] = ACCUMULATORS[name].empty(shape, torch.device(device))
        return cls(shape, 0, parts)

    @property
    def needs_router(self) -> bool:
        """Whether an accumulator wants the router's own output."""
        return any(part.needs_router for part in self.parts.values())

    def add_expert(self, rows: ExpertRows) -> None:
        """Add the tokens of one expert in one batch."""
        for part in self.parts.values():
            part.add_expert(rows)

    def add_block(self, rows: BlockRows) -> None:
        """Add one batch at the level of the block."""
        self.tokens += len(rows.x_TH)
        for part in self.parts.values():
            part.add_block(rows)

    def merge(self, other: LayerStatistics) -> None:
        """Add what ``other`` saw. Both must be of the same layer and collect the same sums.

        Raises:
            MoepruneError: shapes or accumulators differ.
        """
        if self.shape != other.shape or set(self.parts) != set(other.parts):
            raise MoepruneError(
                f"statistics of layer {self.shape.layer} cannot be merged: "
                f"{self.shape} {sorted(self.parts)} against {other.shape} {sorted(other.parts)}",
                "calibrate both runs on the same model with the same --collect",
            )
        self.tokens += other.tokens
        for name, part in self.parts.items():
            part.merge(other.parts[name])

    def part(self, kind: type[A]) -> A:
        """The accumulator of class ``kind``.

        Raises:
            MoepruneError: these statistics were collected without it.
        """
        found = self.parts.get(kind.name)
        if not isinstance(found, kind):
            raise MoepruneError(
                f"the statistics of layer {self.shape.layer} do not hold {kind.name!r}",
                f"calibrate again with --collect {','.join(sorted({*self.parts, kind.name}))}",
            )
        return found

    def to_tensors(self) -> dict[str, Tensor]:
        """All sums under ``<accumulator>.<field>``, on the CPU."""
        return {
            f"{name}.{field_name}": tensor.cpu().contiguous()
            for name, part in self.parts.items()
            for field_name, tensor in part.tensors()
        }

    @classmethod
    def from_tensors(
        cls, shape: LayerShape, tokens: int, tensors: Mapping[str, Tensor]
    ) -> LayerStatistics:
        """The inverse of ``to_tensors``.

        Raises:
            MoepruneError: a tensor is missing or has another shape than the layer asks for.
        """
        # nothing is allocated for the sizes that a file claims, only for what it holds
        result = cls.empty(shape, {key.split(".", 1)[0] for key in tensors}, "meta")
        result.tokens = tokens
        for name, part in result.parts.items():
            for field_name, blank in part.tensors():
                tensor = tensors.get(f"{name}.{field_name}")
                if tensor is None or not _fits(tensor, blank, part.sampled):
                    raise MoepruneError(f"statistics of layer {shape.layer}: bad {name} sums")
                setattr(part, field_name, tensor.to(blank.dtype))
        return result


def _fits(tensor: Tensor, blank: Tensor, sampled: bool) -> bool:
    """Whether shapes are equal; an axis of 0 stands for any length in what is ``sampled``."""
    return tensor.ndim == blank.ndim and all(
        b == a or (sampled and b == 0) for a, b in zip(tensor.shape, blank.shape, strict=True)
    )
