"""A lazy, read-only view of a checkpoint directory; nothing here interprets a tensor.

Safetensors headers are read here and not through the library where byte ranges are needed: the
writer copies bytes, whatever their dtype. (Format: 8 bytes little-endian length, a JSON header,
then the data.)
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files as resource_files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from moeprune.errors import CheckpointError
from moeprune.files import is_plain_name, load_json, parse_json

INDEX = "model.safetensors.index.json"
DEMO = "demo"
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_MAX_CONFIG = 1 << 24
_MAX_INDEX = 1 << 26
_MAX_NAME = 1000
_MAX_AXES = 64  # the limit of torch
REPORT_FILES = ("report.html", "moeprune_run.json")
"""The page of the run that made a checkpoint, and its data."""
OF_THIS_ONE = ("evaluation.json", "moeprune_recovery.jsonl")
"""Measurements and logs beside a checkpoint, which are not true of what is made from it."""

_FOREIGN = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".h5", ".msgpack",
    ".onnx", ".npz", ".npy",
}  # fmt: skip
"""Files of weights: those that were not read do not belong to what is written."""
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


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one safetensors file and its metadata.

    What is accepted here, the safetensors library accepts too.

    Raises:
        CheckpointError: not a safetensors file, truncated, or the header lies about the data.
    """
    try:
        if file.exists() and not file.is_file():  # opening a pipe would wait for ever
            raise _bad(file, "not a regular file")
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise _bad(file, "truncated, or not a safetensors file")
            header = parse_json(handle.read(length))
    except FileNotFoundError:
        raise CheckpointError(
            f"missing shard {file}", "download or copy the checkpoint again"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise _bad(file, f"its header is not JSON: {str(error)[:80]}") from error
    if not isinstance(header, dict):
        raise _bad(file, "its header is not an object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not _is_text_map(metadata):
        raise _bad(file, "its metadata is not an object of strings")
    tensors = {name: _entry(file, name, entry) for name, entry in header.items()}
    return _placed(file, tensors, 8 + length, size), metadata


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(file: Path, name: str, entry: Any) -> TensorInfo:
    """One entry of a header; its bytes are counted from the beginning of the data."""
    if len(name) > _MAX_NAME or not name.isprintable():
        raise _bad(file, f"{name[:80]!r} is no name of a tensor")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = _BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise _bad(file, f"bad header entry for {name!r}") from error
    sizes = isinstance(shape, list) and len(shape) <= _MAX_AXES and all(map(_is_size, shape))
    if not sizes or not _is_size(begin) or not _is_size(end):
        raise _bad(file, f"bad header entry for {name!r}")
    if begin > end or bits * math.prod(shape) != 8 * (end - begin):
        raise _bad(file, f"size of {name!r} does not match its shape")
    return TensorInfo(file, dtype, tuple(shape), begin, end)


def _placed(
    file: Path, tensors: dict[str, TensorInfo], start: int, size: int
) -> dict[str, TensorInfo]:
    """The tensors with their bytes counted from the beginning of the file, which they fill."""
    found = {
        name: replace(info, begin=start + info.begin, end=start + info.end)
        for name, info in tensors.items()
    }
    for name, info in found.items():
        if info.end > size:
            raise _bad(file, f"truncated: {name!r} ends at byte {info.end} of {size}")
    position = start
    for name, info in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise _bad(file, f"{name!r} overlaps another tensor, or there is a gap before it")
        position = info.end
    if position != size:
        raise _bad(file, f"{size - position} bytes belong to no tensor")
    return found


def _load_json(file: Path, most: int, finite: bool = True) -> dict[str, Any]:
    try:
        data = load_json(file, most, finite)
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return data


@dataclass(frozen=True)
class Checkpoint:
    """A directory with config.json, safetensors weights and whatever else belongs to a model.

    Attributes:
        path: the directory.
        trust_remote_code: whether Python files that it brings may run.
    """

    path: Path
    trust_remote_code: bool = False

    @classmethod
    def open(cls, source: str | os.PathLike[str], trust_remote_code: bool = False) -> Checkpoint:
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
            path = _from_hub(text, trust_remote_code)
        if path.is_file():
            raise CheckpointError(f"not a model directory: {path} is a file", "give its directory")
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"not a model directory: {path} has no config.json",
                "give a directory with config.json and *.safetensors, a hub id, or demo",
            )
        found = cls(path.resolve(), trust_remote_code)
        _ = found.tensors  # damaged or missing shards show now, not after an hour
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """The raw config.json; some vendors write infinity there."""
        return _load_json(self.path / "config.json", _MAX_CONFIG, finite=False)

    @cached_property
    def _weight_map(self) -> dict[str, str] | None:
        """Tensor -> file, as the index says; None without an index."""
        index = self.path / INDEX
        if not index.is_file():
            return None
        found = _load_json(index, _MAX_INDEX).get("weight_map")
        if not isinstance(found, dict) or not found or not _is_text_map(found):
            raise CheckpointError(f"{index} has no weight_map of file names")
        for name in sorted(set(found.values())):
            if not is_plain_name(name):
                raise CheckpointError(f"{index} points outside its folder: {name[:80]!r}")
            if not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index} names {name[:80]!r}, which is not a safetensors file",
                    "convert it with transformers: save_pretrained writes safetensors",
                )
        return found

    @cached_property
    def shards(self) -> tuple[Path, ...]:
        """The weight files, in order of name."""
        if self._weight_map is not None:
            return tuple(self.path / name for name in sorted(set(self._weight_map.values())))
        shards = tuple(sorted(self.path.glob("*.safetensors")))
        if not shards:
            others = [f for f in sorted(self.path.iterdir()) if f.suffix in _FOREIGN]
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
        if self._weight_map is not None:
            missing = set(self._weight_map) - set(found)
            if missing:
                raise CheckpointError(
                    f"tensor {min(missing)[:200]!r} is in the index of {self.path} but in no shard",
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

    def other_files(self) -> list[Path]:
        """Files that are neither weights nor config: tokenizer, card, code.

        Reports, measurements and logs of the checkpoint are not of what is made from it.

        Raises:
            CheckpointError: one is a link out of the directory: a copy of what it leads to could
                give away what its owner never meant to publish.
        """
        weights = {*self.shards, self.path / INDEX, self.path / "config.json"}
        found = []
        for file in sorted(self.path.iterdir()):
            if not file.is_file() or file in weights or file.suffix in _FOREIGN:
                continue
            if file.name in (*REPORT_FILES, *OF_THIS_ONE):
                continue
            if file.name.endswith(".index.json"):
                continue  # of weights in another format
            if not file.resolve().is_relative_to(self._home):
                raise CheckpointError(
                    f"{file} is a link that leads out of the checkpoint",
                    "put a copy in its place if it belongs there, or remove it",
                )
            found.append(file)
        return found

    @property
    def _home(self) -> Path:
        """Where links may lead: the hub's cache keeps files beside its directories of links."""
        return self.path.parents[1] if self.path.parent.name == "snapshots" else self.path

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


def _from_hub(name: str, with_code: bool) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"not a model directory: {name} does not exist",
            "give a directory with config.json and *.safetensors, a hub id, or demo",
        )
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]
    patterns += ["*.py"] * with_code
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a local directory nor a model that could be fetched",
            f"({type(error).__name__}) check the name, or give the directory of a downloaded model",
        ) from error
