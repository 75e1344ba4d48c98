"""A recovered student on disk: the student's files, with the bytes of trained tensors replaced."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from moeprune.errors import UnsupportedModelError
from moeprune.files import json_bytes, load_json, new_directory
from moeprune.models.card import write_card
from moeprune.models.card_metadata import CARD
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.scan import digest
from moeprune.models.surgery import CHECKSUMS, PLAN_COPY, PROVENANCE
from moeprune.models.writer import Piece, computed, copied, write_shards
from moeprune.recovery.lora import Adapters

LOG_COPY = "moeprune_recovery.jsonl"
_MAX_PLAN = 1 << 28
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


class Writable(Protocol):
    """A checkpoint, and the tensors of what is to be written in its place."""

    checkpoint: Checkpoint

    def pieces(self) -> list[Piece]:
        """All tensors."""
        ...


class Places:
    """Where on disk the parameters of a loaded model stand.

    Args:
        checkpoint: what the model was loaded from.
        model: the model.
        names: the parameters that will change.

    Raises:
        UnsupportedModelError: a parameter as it was loaded does not give the bytes on disk, so a
            trained one could not be written either.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, names: Iterable[str]) -> None:
        self.checkpoint, self.model = checkpoint, model
        self._owner: dict[str, str] = {}
        for name in names:
            for key, value in self._reverted(name).items():
                info = checkpoint.tensors.get(key)
                if info is None or info.shape != tuple(value.shape) or info.dtype not in _DTYPES:
                    raise UnsupportedModelError(
                        f"{name} would be written as {key}, and there is no such tensor"
                    )
                self._owner[key] = name
        for key in self._owner:
            if digest(self._piece(key)) != digest(copied(key, checkpoint.tensors[key])):
                raise UnsupportedModelError(
                    f"{key} was not loaded as it is stored: it cannot be trained"
                )
        self._values.cache_clear()

    def pieces(self) -> list[Piece]:
        """All tensors of the new checkpoint, in the order of the old one."""
        return [
            self._piece(key) if key in self._owner else copied(key, info)
            for key, info in self.checkpoint.tensors.items()
        ]

    def own_pieces(self) -> list[Piece]:
        """The tensors of the parameters that will change."""
        return [self._piece(key) for key in self._owner]

    def changed(self, pieces: Iterable[Piece], groups: Mapping[str, str]) -> dict[str, list[int]]:
        """Tensors whose bytes changed, and tensors in all, by group of parameters."""
        found: dict[str, list[int]] = {}
        for piece in pieces:
            group = groups.get(self._owner.get(piece.name, ""), "frozen")
            counts = found.setdefault(group, [0, 0])
            counts[1] += 1
            if piece.name in self._owner:
                counts[0] += digest(piece) != digest(
                    copied(piece.name, self.checkpoint.tensors[piece.name])
                )
        return found

    def _piece(self, key: str) -> Piece:
        info = self.checkpoint.tensors[key]
        kind = _DTYPES[info.dtype]
        return computed(copied(key, info), lambda: self._values(self._owner[key])[key].to(kind))

    @lru_cache(maxsize=4)  # noqa: B019  a few tensors of one layer, written one behind the other
    def _values(self, name: str) -> dict[str, Tensor]:
        return self._reverted(name)

    def _reverted(self, name: str) -> dict[str, Tensor]:
        value = self.model.get_parameter(name).detach()
        return dict(revert_weight_conversion(self.model, {name: value}))


def write_recovered(
    places: Writable,
    out: Path,
    record: Mapping[str, Any],
    log: Path | None,
    force: bool,
    progress: Callable[[int, int], None],
) -> None:
    """Write the recovered checkpoint, whole or not at all; ``record`` becomes moeprune.json.

    Raises:
        OutputError: ``out`` exists, or could not be written.
    """
    with new_directory(out, force) as work:
        checksums = write_shards(work, places.pieces(), progress=progress)
        shutil.copyfile(places.checkpoint.path / "config.json", work / "config.json")
        for file in places.checkpoint.other_files():
            if file.name != CARD:
                shutil.copyfile(file, work / file.name)
        (work / PROVENANCE).write_bytes(json_bytes({**record, CHECKSUMS: checksums}))
        write_card(work, places.checkpoint, record, load_json(work / PLAN_COPY, _MAX_PLAN))
        if log is not None and log.is_file():
            shutil.copyfile(log, work / LOG_COPY)


def write_adapter(
    adapters: Adapters, out: Path, record: Mapping[str, Any], log: Path, force: bool
) -> None:
    """Write LoRA matrices as peft reads them, a directory for each adapter, and no weights.

    Raises:
        OutputError: ``out`` exists, or could not be written.
    """
    with new_directory(out, force) as work:
        adapters.save(work)
        told = {"format": "moeprune.adapter/1", **record}
        (work / PROVENANCE).write_bytes(json_bytes(told))
        if log.is_file():
            shutil.copyfile(log, work / LOG_COPY)
