"""Which stored expert computes for which expert of the router, and what is added to the outputs.

One description for the two kinds of layers whose router selects among more experts than are stored:
novices (``approximate_experts``) and experts that answer for others (``experts_served_by``,
``expert_offsets``). Pure torch; docs/formats.md describes the files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moeprune.errors import CheckpointError
from moeprune.models.answer_runtime import has_offsets, served_by
from moeprune.models.novice_runtime import novices_of, rank_of

_ONE = re.compile(r"(\d+)\.(approx_value|output_offset)")
_ALL = ("novice_value", "output_offset")
_STORED = re.compile(r"(\d+)\.(.+)")


@dataclass(frozen=True)
class Slots:
    """One layer.

    Attributes:
        kept: the experts that are stored, ascending; their slots are their places in here.
        slot_of: per expert of the router, the slot that computes for it; 0 where none does.
        computed: per expert of the router, whether a stored expert computes for it.
        added: the experts that a vector of their own is added for, in the order of its rows.
        row_of: per expert of the router, its row among the vectors; -1 where nothing is added.
        rank: r where the vectors are maps v + B A x, packed into (1 + 2 r) H values; 0 for vectors.
    """

    kept: tuple[int, ...]
    slot_of: tuple[int, ...]
    computed: tuple[bool, ...]
    added: tuple[int, ...]
    row_of: tuple[int, ...]
    rank: int = 0

    @classmethod
    def of(cls, config: Any, layer: int, experts: int) -> Slots | None:
        """What ``config`` says of a layer whose router selects among ``experts``; None: nothing.

        Raises:
            CheckpointError: it says both kinds, or names experts that the router does not have.
        """
        novices = novices_of(config, layer)
        answers, offsets = served_by(config, layer), has_offsets(config, layer)
        if not novices and answers is None and not offsets:
            return None
        if novices and (answers is not None or offsets):
            raise CheckpointError(f"layer {layer} has novices and experts that answer for others")
        served = [int(e) for e in answers] if answers is not None else list(range(experts))
        if len(served) != experts or not {*served, *novices} <= set(range(experts)):
            raise CheckpointError(
                f"config.json names experts of layer {layer} that its router does not select among "
                f"(it has {experts})"
            )
        kept = tuple(e for e in sorted(set(served)) if e not in novices)
        added = tuple(novices) if novices else kept if offsets else ()
        if not kept:
            raise CheckpointError(f"layer {layer} stores no expert at all")
        owner = list(range(experts)) if novices else served
        return cls(
            kept=kept,
            slot_of=tuple(kept.index(e) if e in kept else 0 for e in served),
            computed=tuple(e in kept for e in served),
            added=added,
            row_of=tuple(added.index(e) if e in added else -1 for e in owner),
            rank=rank_of(config) if novices else 0,
        )

    def row(self, name: str) -> int | slice | None:
        """The rows of the vectors that a checkpoint's tensor holds; None if it holds none.

        ``name`` is relative to the experts: ``5.approx_value``, ``output_offset``.
        """
        match = _ONE.fullmatch(name)
        if match is None and name not in _ALL:
            return None
        if not self.added or (match is not None and int(match[1]) not in self.added):
            raise CheckpointError(f"{name} is stored, but config.json does not mention it")
        return slice(None) if match is None else self.added.index(int(match[1]))

    def stored_name(self, name: str) -> str:
        """The name of a stored expert's tensor by its slot: ``5.up_proj.weight`` to ``2.…``."""
        match = _STORED.fullmatch(name)
        if match is None:
            return name  # fused: in the order of the slots already
        if int(match[1]) not in self.kept:
            raise CheckpointError(f"{name} is stored, but config.json says that it is not")
        return f"{self.kept.index(int(match[1]))}.{match[2]}"


def added_output(
    x_TH: Tensor, row_TK: Tensor, gate_TK: Tensor, value_RW: Tensor, rank: int
) -> Tensor:
    """What the vectors add to the block's output [T, H], in float32: the sum of gate times vector.

    Args:
        x_TH: the block's input; read only for maps.
        row_TK: rows of ``value_RW`` for each selected expert, -1 where nothing is added.
        gate_TK: the gates.
        value_RW: vectors (W = H), or maps v + B A x: W = (1 + 2 r) H, v, rows of A, columns of B.
        rank: r.
    """
    row_TK, gate_TK = row_TK.clamp(min=0), gate_TK.float().masked_fill(row_TK < 0, 0)
    value_RW = value_RW.float()
    H = value_RW.shape[1] // (1 + 2 * rank)
    out_TH = functional.embedding_bag(
        row_TK, value_RW[:, :H].contiguous(), per_sample_weights=gate_TK, mode="sum"
    )
    if not rank:
        return out_TH
    maps = value_RW[:, H:].view(len(value_RW), 2, rank, H)
    gate_TR = gate_TK.new_zeros(len(gate_TK), len(value_RW)).scatter_add_(1, row_TK, gate_TK)
    inner_TRr = (x_TH.float() @ maps[:, 0].flatten(0, 1).T).view(len(x_TH), -1, rank)
    scaled: Tensor = (inner_TRr * gate_TR[:, :, None]).flatten(1)
    return out_TH + scaled @ maps[:, 1].flatten(0, 1)


def index_tensors(slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
    """``slot_of`` and ``row_of`` as int64, ``computed`` as float32: [E] each."""
    return (
        torch.tensor(slots.slot_of),
        torch.tensor(slots.row_of),
        torch.tensor(slots.computed, dtype=torch.float32),
    )
