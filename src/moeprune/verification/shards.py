"""The files that hold weights, and JSON, read as far as they can be."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from moeprune.errors import CheckpointError
from moeprune.models.checkpoint import INDEX, Checkpoint, TensorInfo, read_header

SINGLE = "model.safetensors"


class AsFound(Checkpoint):
    """The tensors that can be found, where a damaged checkpoint would be refused."""

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of the shards that can be read."""
        return Shards(self.path).tensors


class Shards:
    """The weight files that transformers would open, and what is wrong with them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: dict[str, dict[str, TensorInfo]] = {}
        self.damaged: dict[str, str] = {}
        self.absent: list[str] = []
        self.twice: list[tuple[str, str, str]] = []
        self.tensors: dict[str, TensorInfo] = {}
        self.names = self._names()
        for name in self.names:
            try:
                self.headers[name], _ = read_header(path / name)
            except (CheckpointError, OSError) as error:
                if (path / name).is_file():
                    self.damaged[name] = getattr(error, "problem", str(error))
                else:
                    self.absent.append(name)
                continue
            for key, info in sorted(self.headers[name].items(), key=lambda item: item[1].begin):
                if key in self.tensors:
                    self.twice.append((key, self.tensors[key].file.name, name))
                else:
                    self.tensors[key] = info

    def _names(self) -> list[str]:
        index = read_json(self.path / INDEX)
        if isinstance(index, dict):
            files = index.get("weight_map")
            listed = set(map(str, files.values())) if isinstance(files, dict) else set()
            return sorted(name for name in listed if Path(name).name == name)
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        return sorted(file.name for file in self.path.glob("*.safetensors"))


def read_json(file: Path) -> Any:
    """The content of a JSON file; None if it is not there or is not JSON."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
