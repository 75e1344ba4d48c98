"""Tensors of experts whose values an edit changes, made when they are written.

All matrices come from ``core.edits.EditedExperts``; here they are put into the form in which the
checkpoint stores them: one by one or fused, gate and up together or apart, transposed or not.
Memory is bounded by the matrices of one expert. Axes as in ``core.edits``; R rows of a router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeprune.core.edits import EditedExperts, Neurons
from moeprune.core.plan import LayerPlan
from moeprune.errors import UnsupportedModelError
from moeprune.models.counts import Slots
from moeprune.models.layout import DiskExperts, DiskTensor
from moeprune.models.loading import LayeredModel
from moeprune.models.masking import is_masked, zeros_of
from moeprune.models.quantised import read
from moeprune.models.writer import TORCH_DTYPES, Piece, computed, produced

BIASES = {"gate_up_proj_bias": "gate_up", "up_proj_bias": "up", "down_proj_bias": "down"}
"""Parameters of experts modules with biases, and the matrix that each belongs to."""


@dataclass
class Rebuilder:
    """Makes the pieces of one checkpoint that an edit computes.

    Attributes:
        model: the model before.
        layout: its experts and routers.
        zeroed: weights that are zero in each piece made so far, or that a mask zeroes in it; of a
            rebuilt one they are known when it was written.
    """

    model: LayeredModel
    layout: Mapping[str, DiskTensor]

    def __post_init__(self) -> None:
        self.zeroed: dict[str, int] = {}

    def changes(self, tensor: DiskTensor, layer: LayerPlan) -> bool:
        """Whether ``layer`` gives the experts in ``tensor`` other values.

        Raises:
            PlanError: a mask on one half of a matrix that is stored with the other.
        """
        if layer.mask is not None:
            is_masked(layer.mask, tensor.role)
        if tensor.role == "other":
            return layer.neurons is not None
        return bool(set(tensor.role.split("_")) & set(layer.changed_roles))

    def piece(self, piece: Piece, tensor: DiskTensor, layer: LayerPlan, slots: Slots) -> Piece:
        """``piece``, the experts ``slots`` of ``tensor`` as they are, with the values of ``layer``.

        Raises:
            UnsupportedModelError: it cannot be computed, or nobody knows what it means.
        """
        dtype = TORCH_DTYPES.get(piece.dtype)
        if dtype is None:
            raise UnsupportedModelError(
                f"{tensor.key} is stored as {piece.dtype}; "
                "weights can be changed in floating point only"
            )
        if tensor.role == "other":
            one = self._other(tensor, layer)
        else:
            edited = layer.edited(self._old(layer))
            one = _matrices(edited, tensor)
        shape = self._resized(piece.shape, tensor, layer, len(slots))
        inner = shape  # of one expert
        if tensor.expert is None:
            inner = shape[1:] if tensor.rows == 1 else (shape[0] // len(slots), *shape[1:])
        rebuilt = layer.rebuilds and tensor.role != "other"
        if not layer.rebuilds and layer.mask is not None:
            pads = sum(expert is None for expert in slots)
            zeros = zeros_of(layer.mask, piece.shape, tensor)
            self.zeroed[piece.name] = zeros * (len(slots) - pads) // len(slots)

        def parts() -> Iterator[Tensor]:
            zeros = 0
            for expert in slots:
                if expert is None:
                    yield torch.zeros(inner, dtype=dtype)
                    continue
                part = one(expert).to(dtype).contiguous()
                assert part.shape == inner, f"{piece.name}: {list(part.shape)}, not {list(inner)}"
                zeros += int((part == 0).sum()) if rebuilt else 0
                yield part
            if rebuilt:
                self.zeroed[piece.name] = zeros

        return produced(piece.name, dtype, shape, parts)

    def router(self, piece: Piece, tensor: DiskTensor, layer: LayerPlan, slots: Slots) -> Piece:
        """A router's tensor with the rows that ``layer.router_CE`` mixes, computed in float64.

        ``piece`` has the rows of ``slots`` and behind them those that are no expert's: pads and the
        rows behind keep their values.
        """
        assert layer.router_CE is not None
        router_CE = layer.router_CE
        dtype = TORCH_DTYPES.get(piece.dtype)
        if dtype is None:
            raise UnsupportedModelError(
                f"{tensor.key} is stored as {piece.dtype}: its rows cannot be mixed"
            )

        def make() -> Tensor:
            whole = self._router_values(tensor).transpose(0, tensor.dim)
            mixed_C = mix_rows(router_CE, whole, layer.experts).to(dtype)
            data = b"".join(bytes(block) for block in piece.blocks())
            rows = torch.frombuffer(bytearray(data), dtype=dtype).view(piece.shape)
            rows_R = rows.transpose(0, tensor.dim)
            for number, expert in enumerate(slots):
                if expert is not None:
                    rows_R[number] = mixed_C[layer.keep.index(expert)]
            return rows

        return computed(piece, make)

    def _router_values(self, tensor: DiskTensor) -> Tensor:
        if tensor.quantised is not None:
            return read(self.model.checkpoint, tensor.quantised)
        return self.model.checkpoint.read(tensor.key)

    def _old(self, layer: LayerPlan) -> DiskExperts:
        site = self.model.sites[layer.layer]
        return DiskExperts(self.model.checkpoint, self.layout, site, written=True)

    def _resized(
        self, shape: tuple[int, ...], tensor: DiskTensor, layer: LayerPlan, experts: int
    ) -> tuple[int, ...]:
        """``shape`` with the new width where the old one was."""
        old = self.model.sites[layer.layer].shape.intermediate
        new = layer.width(old)
        if old == new:
            return shape
        if tensor.rows > 1:
            return (experts * new, *shape[1:])
        if tensor.role == "other":
            role = self._bias(tensor)
            if role == "down":
                return shape
            axis = len(shape) - 1
            if role is None:  # an identity expert's: outputs by inputs, or the other way round
                axis = len(shape) + (-2 if tensor.input_dim == -1 else -1)
        else:
            inputs = tensor.role == "down"
            axis = len(shape) + (tensor.input_dim if inputs else -3 - tensor.input_dim)
        return (*shape[:axis], shape[axis] // old * new, *shape[axis + 1 :])

    def _bias(self, tensor: DiskTensor) -> str | None:
        """The matrix whose bias a tensor is; None for a matrix of an identity expert.

        Raises:
            UnsupportedModelError: it is neither.
        """
        shape = self.model.sites[tensor.layer].shape
        if tensor.expert is not None and tensor.expert >= shape.experts:
            return None
        name, _ = self.model.target(tensor.key)
        role = BIASES.get(str(name).rpartition(".")[2])
        if role is None or tensor.expert is not None:
            raise UnsupportedModelError(
                f"{tensor.key} belongs to experts, and what becomes of it when their neurons are "
                "mixed or removed is not known",
                "take a method that deletes experts or zeroes weights",
            )
        return role

    def _other(self, tensor: DiskTensor, layer: LayerPlan) -> Callable[[int], Tensor]:
        """What makes a bias of one kept expert, or of an identity expert whose id is its own."""
        role, checkpoint = self._bias(tensor), self.model.checkpoint
        neurons = layer.neurons
        assert neurons is not None
        if role is None:
            return lambda expert: self._identity(tensor, neurons.width)
        if role != "down":
            biases = Biases(lambda e: checkpoint.read_row(tensor.key, e), tensor.interleaved, role)
            return lambda expert: new_bias(neurons, layer.keep.index(expert), biases)

        def output_bias(expert: int) -> Tensor:
            shares = neurons.shares(layer.keep.index(expert))
            return mixed_bias(shares, lambda e: checkpoint.read_row(tensor.key, e))

        return output_bias

    def _identity(self, tensor: DiskTensor, width: int) -> Tensor:
        """A matrix of an identity expert, which is stored and never used: its first neurons."""
        whole: Tensor = self.model.checkpoint.read(tensor.key)
        return whole[:width] if tensor.input_dim == -1 else whole[:, :width]


def _matrices(edited: EditedExperts, tensor: DiskTensor) -> Callable[[int], Tensor]:
    def one(expert: int) -> Tensor:
        if tensor.role == "gate_up":
            gate, up = edited.matrix(expert, "gate"), edited.matrix(expert, "up")
            matrix = joined(gate, up, tensor.interleaved)
        else:
            matrix = edited.matrix(expert, tensor.role)
        return matrix.T if tensor.input_dim == -2 else matrix

    return one


def mix_rows(router_CE: Tensor, rows_R: Tensor, experts: int) -> Tensor:
    """New router rows as sums of the first E old ones, in float64, as the old ones' dtype."""
    mixed_C: Tensor = torch.tensordot(router_CE.double(), rows_R[:experts].double(), dims=1)
    return mixed_C.to(rows_R.dtype)


def joined(gate_I: Tensor, up_I: Tensor, interleaved: bool) -> Tensor:
    """Rows of gate and up together: all of one before the other, or in turn."""
    if interleaved:
        return torch.stack((gate_I, up_I), dim=1).flatten(0, 1)
    return torch.cat((gate_I, up_I))


@dataclass(frozen=True)
class Biases:
    """Biases of gate and up as matrices with one column, so that neurons carry them along."""

    read: Callable[[int], Tensor]
    interleaved: bool
    stored: str

    def matrix(self, expert: int, role: str) -> Tensor:
        """The bias of one of an expert's matrices, [I, 1]."""
        bias = self.read(expert).float()[:, None]
        if self.stored != "gate_up":
            return bias
        if self.interleaved:
            return bias[("gate", "up").index(role) :: 2]
        return bias.chunk(2)[("gate", "up").index(role)]


def new_bias(neurons: Neurons, position: int, biases: Biases) -> Tensor:
    """The bias of gate, up or both of one new expert, as it is stored."""
    up = neurons.matrix(position, "up", biases)[:, 0]
    if biases.stored == "up":
        return up
    return joined(neurons.matrix(position, "gate", biases)[:, 0], up, biases.interleaved)


def mixed_bias(shares: Mapping[int, float], read_row: Callable[[int], Tensor]) -> Tensor:
    """The output bias of a new expert: the old ones', weighted by their shares."""
    mixed: Tensor | None = None
    for expert, share in shares.items():
        part = read_row(expert).float() * share
        mixed = part if mixed is None else mixed + part
    assert mixed is not None, "a new expert has neurons"
    return mixed
