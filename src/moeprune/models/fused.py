"""Experts that are stored one by one, read straight into the tensors that a model holds them in.

transformers first reads every expert's matrices and then stacks and concatenates copies of them:
for that time a layer is in memory two or three times, the mapped file not counted. Where its
conversion is that and nothing else, the result is known before a byte is read, and each matrix has
its place in it. The values are the same, bit for bit.

Axis letters: E experts, O outputs of one matrix.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, dot_natural_key

from moeprune.errors import CheckpointError
from moeprune.models.checkpoint import Checkpoint, TensorInfo
from moeprune.models.quantised import Quantisation, read
from moeprune.models.staging import Staging, unwritten
from moeprune.models.writer import TORCH_DTYPES


@dataclass(frozen=True)
class Place:
    """Where one stored matrix goes: ``whole[expert, first : first + rows]``."""

    key: str
    expert: int
    first: int
    rows: int


@dataclass(frozen=True)
class Fused:
    """A parameter that is made of many stored matrices.

    Attributes:
        name: of the parameter.
        shape: [E, O of all its matrices, ...].
        places: one per matrix.
    """

    name: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]


def find_fused(
    names: Mapping[str, tuple[str | None, str | None]],
    converter: Callable[[str], Any],
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Tensor],
) -> list[Fused]:
    """The parameters that can be filled in place.

    Args:
        names: disk name -> (parameter, pattern of its conversion).
        converter: the conversion that a pattern belongs to.
        shapes: of all weights on disk.
        state: the model's parameters.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for key, (name, pattern) in names.items():
        if name is not None and pattern is not None:
            groups.setdefault((name, pattern), []).append(key)
    patterns: dict[str, list[str]] = {}
    for name, pattern in groups:
        patterns.setdefault(name, []).append(pattern)
    found = []
    for name, its in patterns.items():
        conversion = converter(its[0])
        if not _stacks(conversion) or {*its} != {*conversion.source_patterns}:
            continue
        keys = [sorted(groups[name, p], key=dot_natural_key) for p in conversion.source_patterns]
        fused = _fused(name, keys, shapes, tuple(state[name].shape))
        if fused is not None:
            found.append(fused)
    return found


def _stacks(conversion: Any) -> bool:
    """Whether a conversion stacks experts, and puts the stacks one after another along O."""
    kinds = [(_kind(op), op.dim) for op in conversion.operations if hasattr(op, "dim")]
    if len(kinds) != len(conversion.operations) or len(conversion.target_patterns) != 1:
        return False
    whole = [(MergeModulelist, 0), (Concatenate, 1)]
    return kinds == whole or (kinds == whole[:1] and len(conversion.source_patterns) == 1)


def _kind(op: Any) -> type:
    """Its class; of one that only saves in another way (``novice_runtime``), the one it is of."""
    return MergeModulelist if type(op).convert is MergeModulelist.convert else type(op)


def _fused(
    name: str,
    keys: list[list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    shape: tuple[int, ...],
) -> Fused | None:
    """None if the matrices are not those of ``shape``: transformers says what is wrong."""
    places, first = [], 0
    for of_role in keys:
        sizes = {shapes[key] for key in of_role}
        if len(sizes) > 1 or len(of_role) != shape[0]:
            return None
        [size] = sizes
        if not size or size[1:] != shape[2:]:
            return None
        places += [Place(key, e, first, size[0]) for e, key in enumerate(of_role)]
        first += size[0]
    return Fused(name, shape, tuple(places)) if first == shape[1] else None


def kept_wider(name: str, plan: Mapping[str, Any]) -> bool:
    """Whether transformers loads a parameter in a dtype of its own."""
    return any(re.search(re.escape(key).replace(r"\*", ".*"), name) for key in plan)


def fill(
    fused: Iterable[Fused],
    checkpoint: Checkpoint,
    quantisation: Quantisation,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    blank: Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor] = unwritten,
) -> dict[str, Tensor]:
    """The parameters' values, read in the order of the disk into tensors that ``blank`` makes.

    Raises:
        CheckpointError: a file is shorter than it was.
    """
    weights, infos = quantisation.weights, checkpoint.tensors
    whole = {f.name: blank(f.shape, dtypes[f.name], device) for f in fused}

    def position(todo: tuple[Fused, Place]) -> tuple[str, int]:
        key = todo[1].key
        info = infos[weights[key].stored if key in weights else key]
        return str(info.file), info.begin

    todo = sorted(((f, place) for f in fused for place in f.places), key=position)
    with ExitStack() as stack:
        reader = _Reader(stack, device)
        for f, place in todo:
            target = whole[f.name][place.expert, place.first : place.first + place.rows]
            if place.key in weights:
                target.copy_(read(checkpoint, weights[place.key], dtype=target.dtype))
            else:
                reader.into(target, infos[place.key])
    return whole


class _Reader:
    """Reads tensors into memory that is there already; files stay open till the stack ends."""

    def __init__(self, stack: ExitStack, device: torch.device) -> None:
        self._stack = stack
        self._files: dict[Path, int] = {}
        self._staging = stack.enter_context(Staging(device))

    def into(self, target: Tensor, info: TensorInfo) -> None:
        """``target`` becomes the stored tensor, in its own dtype and on its device."""
        dtype = TORCH_DTYPES[info.dtype]
        if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
            self._bytes(target.view(-1).view(torch.uint8), info)
            return
        stored = self._staging.buffer(info.nbytes)
        self._bytes(stored, info)
        self._staging.copy(target, stored.view(dtype).view(target.shape))

    def _bytes(self, target: Tensor, info: TensorInfo) -> None:
        view, done = memoryview(target.numpy()), 0  # type: ignore[arg-type]  # arrays are buffers
        while done < len(view):
            count = os.preadv(self._open(info.file), [view[done:]], info.begin + done)
            if not count:
                raise CheckpointError(f"{info.file} became shorter while it was read")
            done += count

    def _open(self, file: Path) -> int:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
            self._stack.callback(os.close, self._files[file])
        return self._files[file]


def readable(fused: Fused, checkpoint: Checkpoint, quantisation: Quantisation) -> bool:
    """Whether all its matrices are stored in a dtype that can be read in place, or decoded."""
    weights = quantisation.weights
    return math.prod(fused.shape) > 0 and all(
        place.key in weights or checkpoint.tensors[place.key].dtype in TORCH_DTYPES
        for place in fused.places
    )
