"""Statistics that are being collected, in a work folder: each layer's stand there once it is done.

They are the very files of the finished directory, so that finishing is a matter of its name and of
the manifest. Entries of the manifest are kept with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeprune.core.residual import Residual
from moeprune.core.shapes import LayerShape
from moeprune.core.statistics import LayerStatistics
from moeprune.files import json_bytes, parse_json, write_together
from moeprune.models.store import MANIFEST, manifest_bytes, statistics_file
from moeprune.work import OUTPUT, WorkFolder


class KeptStatistics:
    """What a walk that collects keeps besides its state.

    Args:
        folder: where.
        place: of the files in it; ``publish`` is for those of the output alone.
    """

    def __init__(self, folder: WorkFolder, place: str = OUTPUT) -> None:
        self._folder, self._place = folder, place
        self._entries: dict[str, dict[str, Any]] = {}

    def save(self, statistics: LayerStatistics | Residual) -> None:
        """Keep statistics; they are on the disk, whole, when this returns."""
        name, tensors, told = statistics_file(statistics)
        with self._folder.new_file(f"{self._place}/{name}") as part:
            save_file(tensors, part)
        entry = {"file": name, "sha256": self._folder.checksum(f"{self._place}/{name}"), **told}
        self._folder.write(self._entry_of(name), json_bytes(entry))
        self._entries[name] = entry

    def has(self, layer: int) -> bool:
        """Whether a layer's statistics are there, every byte as it was written."""
        name = f"layer-{layer:05d}.safetensors"
        told = self._folder.read(self._entry_of(name))
        if told is None or self._folder.find(f"{self._place}/{name}") is None:
            return False
        entry = parse_json(told)
        if entry["sha256"] != self._folder.checksum(f"{self._place}/{name}"):
            return False  # interrupted between the two
        self._entries[name] = entry
        return True

    def load(self, shape: LayerShape, device: torch.device) -> LayerStatistics:
        """The statistics of a layer that is there."""
        entry = self._entries[f"layer-{shape.layer:05d}.safetensors"]
        tensors = load_file(self._folder.path / self._place / entry["file"], str(device))
        return LayerStatistics.from_tensors(shape, entry["tokens"], tensors)

    def _entry_of(self, name: str) -> str:
        return f"{self._place}-entries/{name.removesuffix('.safetensors')}.json"

    def save_point(self, number: int, rows: tuple[Tensor, Tensor]) -> None:
        """Keep rows of the residual stream (``ResidualTap.points``)."""
        with self._folder.new_file(_point(number)) as part:
            save_file({str(i): tensor for i, tensor in enumerate(rows)}, part)

    def points(self) -> list[tuple[Tensor, Tensor]]:
        """The rows at the first points, as far as they are there."""
        found: list[tuple[Tensor, Tensor]] = []
        while (file := self._folder.find(_point(len(found)))) is not None:
            tensors = load_file(file)
            found.append((tensors["0"], tensors["1"]))
        return found

    def publish(self, header: Mapping[str, Any], force: bool) -> None:
        """Make what was saved or found the output of the folder.

        Args:
            header, force: as of ``writing_statistics``.
        """
        manifest = manifest_bytes(header, [*self._entries.values()])
        write_together({self._folder.output / MANIFEST: manifest}, force=True)
        self._folder.publish(force)


def _point(number: int) -> str:
    return f"stream/point-{number:05d}.safetensors"
