"""Statistics that are being collected, in a work folder: each layer's stand there once it is done.

They are the very files of the finished directory, so that finishing is a matter of links and of the
manifest. Beside each stands its entry of the manifest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from moeprune.core.residual import Residual
from moeprune.core.statistics import LayerStatistics
from moeprune.files import json_bytes, new_directory, parse_json
from moeprune.models.store import MANIFEST, manifest_bytes, statistics_file
from moeprune.work import WorkFolder


class KeptStatistics:
    """What a calibration keeps besides the state of its walk.

    Args:
        folder: where.
    """

    def __init__(self, folder: WorkFolder) -> None:
        self._folder = folder
        self._entries: dict[str, dict[str, Any]] = {}

    def save(self, statistics: LayerStatistics | Residual) -> None:
        """Keep statistics; they are on the disk, whole, when this returns."""
        name, tensors, told = statistics_file(statistics)
        with self._folder.new_file(name) as part:
            save_file(tensors, part)
        entry = {"file": name, "sha256": self._folder.checksum(name), **told}
        self._folder.write(_entry_of(name), json_bytes(entry))
        self._entries[name] = entry

    def has(self, layer: int) -> bool:
        """Whether a layer's statistics are there, every byte as it was written."""
        name = f"layer-{layer:05d}.safetensors"
        told = self._folder.read(_entry_of(name))
        if told is None or self._folder.find(name) is None:
            return False
        entry = parse_json(told)
        if entry["sha256"] != self._folder.checksum(name):
            return False  # interrupted between the two
        self._entries[name] = entry
        return True

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

    def publish(self, out: Path, header: Mapping[str, Any], force: bool) -> None:
        """Make the directory of what was saved or found. The kept files stay until it is there.

        Args:
            out, header, force: as of ``writing_statistics``.
        """
        with new_directory(out, force) as work:
            for name in self._entries:
                try:
                    os.link(self._folder.path / name, work / name)
                except OSError:  # a file system without links
                    shutil.copyfile(self._folder.path / name, work / name)
            (work / MANIFEST).write_bytes(manifest_bytes(header, [*self._entries.values()]))


def _entry_of(name: str) -> str:
    return f"{name.removesuffix('.safetensors')}.json"


def _point(number: int) -> str:
    return f"stream/point-{number:05d}.safetensors"
