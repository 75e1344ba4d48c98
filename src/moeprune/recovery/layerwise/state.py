"""Layers that are done, on disk, and a student that is read with them in place of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from moeprune.errors import CheckpointError
from moeprune.files import new_directory, sha256_file
from moeprune.models.checkpoint import Checkpoint, TensorInfo, read_header
from moeprune.models.writer import Piece, copied, write_shards
from moeprune.recovery.layerwise.fitting import Fit
from moeprune.recovery.state import FORMAT, SUMS, DamagedState, StateFolder, sealed

_MANIFEST = "manifest.json"


class LayerFolder(StateFolder):
    """The directory of a run layer by layer: what it is about, and every layer that is done."""

    def begin(self, header: dict[str, Any]) -> None:
        """Note what the run is about."""
        if not self.exists() or self.numbers() is None:
            self._write("state", header, {})

    def reached(self) -> str:
        """How far the run came, in words."""
        done = len(self.done())
        return f"{done} layer{'s' * (done != 1)}"

    def clear(self) -> None:
        """Forget all layers, and then what run they are of; a layer without manifest is none."""
        for place in self.path.glob("layer-*"):
            (place / _MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(place, ignore_errors=True)
        super().clear()

    def done(self) -> list[int]:
        """Layers that are there, ascending."""
        names = self.path.glob(f"layer-*/{_MANIFEST}")
        return sorted(int(file.parent.name.removeprefix("layer-")) for file in names)

    def save_layer(
        self, fit: Fit, pieces: Sequence[Piece], changed: dict[str, list[int]], zeros: int
    ) -> None:
        """Keep a layer: its record, and the tensors on disk that changed, if any did.

        Raises:
            OutputError: the disk is full, or cannot be written.
        """
        record = {"format": FORMAT, **asdict(fit), "changed": changed, "zeros": zeros}
        with self.writing(), new_directory(self._place(fit.layer), force=True) as work:
            record[SUMS] = write_shards(work, pieces) if pieces else {}
            (work / _MANIFEST).write_bytes(sealed(record))
        self.write_log()

    def record(self, layer: int) -> dict[str, Any]:
        """What ``save_layer`` kept beside the tensors.

        Raises:
            MoepruneError: it is damaged.
        """
        file = self._place(layer) / _MANIFEST
        found = self._unsealed(file)
        if found.get("layer") != layer:
            raise self._damaged(file)
        return found

    def tensors(self, layer: int) -> dict[str, TensorInfo]:
        """The tensors of a layer that is done.

        Raises:
            MoepruneError: they are damaged.
        """
        found: dict[str, TensorInfo] = {}
        record = self.record(layer)
        sums = record.get(SUMS, {})
        for file in sorted(self._place(layer).glob("*.safetensors")):
            if sums.get(file.name) not in (None, sha256_file(file)):
                raise self._damaged(file)
            try:
                found |= read_header(file)[0]
            except CheckpointError as error:
                raise self._damaged(file) from error
        trained = sum(total for _, total in record["changed"].values())
        if len(found) != (trained if record["best_step"] else 0):
            raise self._damaged(self._place(layer))
        return found

    def write_log(self) -> None:
        """Write the log anew from the layers that are done, in their order."""
        lines = []
        for layer in self.done():
            record = self.record(layer)
            lines += record["entries"]
            told = ("layer", "before", "after", "best_step", "steps", "ended")
            lines.append({"done": True, **{key: record[key] for key in told}})
        part = self.log.with_suffix(f".{os.getpid()}.partial")
        with self.writing():
            part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            os.replace(part, self.log)

    def _place(self, layer: int) -> Path:
        return self.path / f"layer-{layer:05d}"


class Overlaid(Checkpoint):
    """A checkpoint of which some tensors are read from elsewhere."""

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, in the order of the checkpoint."""
        return dict(super().tensors)

    def put(self, tensors: dict[str, TensorInfo]) -> None:
        """Read these from where they are from now on.

        Raises:
            MoepruneError: one is no tensor of the checkpoint, or of another shape or type.
        """
        for name, info in tensors.items():
            own = self.tensors.get(name)
            if own is None or (own.shape, own.dtype) != (info.shape, info.dtype):
                raise DamagedState(
                    f"{info.file} is damaged, or of another run", "begin again with --force"
                )
            self.tensors[name] = info


class Result:
    """The student with its healed layers, as ``write_recovered`` takes it."""

    def __init__(self, overlay: Overlaid) -> None:
        self.checkpoint: Checkpoint = overlay

    def pieces(self) -> list[Piece]:
        """All tensors of the new checkpoint, in the order of the old one."""
        return [copied(name, info) for name, info in self.checkpoint.tensors.items()]
