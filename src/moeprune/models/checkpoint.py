"""A lazy, read-only view of a checkpoint directory; nothing here interprets a tensor.

Safetensors headers are read here and not through the library where byte ranges are needed: the
writer copies bytes, whatever their dtype. (Format: 8 bytes little-endian length, a JSON header,
then the data.)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files as resource_files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from moeprune.errors import CheckpointError

INDEX = "model.safetensors.index.json"
DEMO = "demo"
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        file: the shard.
        dtype: as safetensors spells it, for example ``BF16``.
        shape: its sizes.
        begin, end: the bytes of its data in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def _bad(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"damaged file {file}: {why}", "download or copy the checkpoint again")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one safetensors file and its metadata.

    Raises:
        CheckpointError: not a safetensors file, truncated, or the header lies about the data.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise _bad(file, "truncated, or not a safetensors file")
            header = json.loads(handle.read(length), object_pairs_hook=_without_repetition)
    except FileNotFoundError:
        raise CheckpointError(
            f"missing shard {file}", "download or copy the checkpoint again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"its header is not JSON: {str(error)[:80]}") from error
    if not isinstance(header, dict):
        raise _bad(file, "its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _bad(file, "its metadata is not an object")
    start, tensors = 8 + length, {}
    for name, entry in header.items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
            right = (
                _BITS[dtype] * math.prod(shape) == 8 * (end - begin) and min(shape, default=0) >= 0
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _bad(file, f"bad header entry for {name!r}") from error
        if not right or not 0 <= begin <= end:
            raise _bad(file, f"size of {name!r} does not match its shape")
        if start + end > size:
            raise _bad(file, f"truncated: {name!r} ends at byte {start + end} of {size}")
        tensors[name] = TensorInfo(file, dtype, shape, start + begin, start + end)
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise _bad(file, f"{name!r} overlaps another tensor, or there is a gap before it")
        position = info.end
    if position != size:
        raise _bad(file, f"{size - position} bytes belong to no tensor")
    return tensors, {str(k): str(v) for k, v in metadata.items()}


def _load_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return data


@dataclass(frozen=True)
class Checkpoint:
    """A directory with config.json, safetensors weights and whatever else belongs to a model."""

    path: Path

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> Checkpoint:
        """Open a local directory, ``demo`` (the embedded model), or a hub id.

        A local directory of that name wins over a hub id.

        Raises:
            CheckpointError: not a checkpoint, or one whose weights are not safetensors.
        """
        text = os.fspath(source)
        path = Path(text)
        if text == DEMO and not path.is_dir():
            path = demo_path()
        elif not path.exists():
            path = _from_hub(text)
        if path.is_file():
            raise CheckpointError(f"not a model directory: {path} is a file", "give its directory")
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"not a model directory: {path} has no config.json",
                "give a directory with config.json and *.safetensors, a hub id, or demo",
            )
        found = cls(path.resolve())
        _ = found.tensors  # damaged or missing shards show now, not after an hour
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """The raw config.json."""
        return _load_json(self.path / "config.json")

    @cached_property
    def shards(self) -> tuple[Path, ...]:
        """The weight files, in order of name."""
        if (self.path / INDEX).is_file():
            weight_map = _load_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{self.path / INDEX} has no weight_map")
            names = {str(name) for name in weight_map.values()}
            for name in names:
                if Path(name).name != name or name in ("", ".", ".."):
                    raise CheckpointError(
                        f"{self.path / INDEX} points outside its folder: {name!r}"
                    )
            return tuple(self.path / name for name in sorted(names))
        shards = tuple(sorted(self.path.glob("*.safetensors")))
        if not shards:
            others = [*self.path.glob("*.bin"), *self.path.glob("*.pt"), *self.path.glob("*.gguf")]
            hint = "convert it with transformers: save_pretrained writes safetensors"
            if others:
                raise CheckpointError(
                    f"no safetensors weights in {self.path}, only {others[0].name}", hint
                )
            raise CheckpointError(
                f"no weights in {self.path}", "expected *.safetensors beside config.json"
            )
        return shards

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, in order of shard and position."""
        found: dict[str, TensorInfo] = {}
        for shard in self.shards:
            tensors, _ = read_header(shard)
            for name, info in sorted(tensors.items(), key=lambda item: item[1].begin):
                if name in found:
                    raise CheckpointError(
                        f"tensor {name!r} stands in {found[name].file.name} and {shard.name}"
                    )
                found[name] = info
        if (self.path / INDEX).is_file():
            missing = set(_load_json(self.path / INDEX)["weight_map"]) - set(found)
            if missing:
                raise CheckpointError(
                    f"tensor {min(missing)!r} is in the index of {self.path} but in no shard",
                    "download or copy the checkpoint again",
                )
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def numel(self) -> int:
        """Values in all tensors, as stored."""
        return sum(info.numel for info in self.tensors.values())

    def other_files(self) -> Iterator[Path]:
        """Files that are neither weights nor config: tokenizer, card, code."""
        weights = {*self.shards, self.path / INDEX, self.path / "config.json"}
        for file in sorted(self.path.iterdir()):
            if (
                file.is_file()
                and file not in weights
                and file.suffix not in (".safetensors", ".bin")
            ):
                yield file

    def read(self, name: str) -> torch.Tensor:
        """One tensor, copied into memory."""
        info = self.tensors[name]
        try:
            with safe_open(info.file, "pt") as handle:
                tensor: torch.Tensor = handle.get_tensor(name)
                return tensor.clone()
        except SafetensorError as error:
            raise _bad(info.file, str(error)) from error

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """``tensor[row]`` without reading the rest."""
        return self.read_rows(name, row, 1)[0]

    def read_rows(self, name: str, first: int, number: int) -> torch.Tensor:
        """``tensor[first : first + number]`` without reading the rest."""
        info = self.tensors[name]
        try:
            with safe_open(info.file, "pt") as handle:
                tensor: torch.Tensor = handle.get_slice(name)[first : first + number].clone()
                return tensor
        except SafetensorError as error:
            raise _bad(info.file, str(error)) from error

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config.json, every header, and 64 blocks of 4 KiB spread over each shard.

        It tells models apart in milliseconds; it is no checksum of every byte.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for shard in self.shards:
            size = shard.stat().st_size
            with shard.open("rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                digest.update(size.to_bytes(8, "little") + handle.read(length))
                for block in range(64):
                    handle.seek(max(8 + length, (size - 4096) * block // 63))
                    digest.update(handle.read(4096))
        return digest.hexdigest()


def is_weights(file: Path) -> bool:
    """Whether a file holds weights, by its name."""
    return file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or file.name == INDEX


class ConfigOnly(Checkpoint):
    """A model of which only config.json is there: no tensor has a name yet."""

    @cached_property
    def shards(self) -> tuple[Path, ...]:
        """None."""
        return ()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """None."""
        return {}


def demo_path() -> Path:
    """The directory of the embedded model."""
    return Path(str(resource_files("moeprune.assets"))) / "demo" / "model"


def _from_hub(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"not a model directory: {name} does not exist",
            "give a directory with config.json and *.safetensors, a hub id, or demo",
        )
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a local directory nor a model that could be fetched",
            f"({type(error).__name__}) check the name, or give the directory of a downloaded model",
        ) from error
