"""Writes safetensors shards piece by piece: bytes are copied, never interpreted, never gathered.

The safetensors library writes a shard from tensors that are all in memory. Here a shard's header
is known before its data, so memory is bounded by one piece and any dtype passes through unchanged.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moeprune.errors import CheckpointError
from moeprune.files import json_bytes
from moeprune.models.checkpoint import INDEX, TensorInfo

MAX_SHARD = 5_000_000_000
_BLOCK = 1 << 24
_ALIGN = 64
_TORCH_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
"""The dtypes whose values are computed with, as safetensors spells them."""


@dataclass(frozen=True)
class Piece:
    """One tensor to write.

    Attributes:
        name: its name.
        dtype: as safetensors spells it.
        shape: its sizes.
        nbytes: bytes of its data.
        blocks: yields the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    blocks: Callable[[], Iterator[bytes | memoryview]]


def copied(name: str, info: TensorInfo) -> Piece:
    """The tensor ``info`` unchanged, under ``name``."""
    ranges = [(info.begin, info.end)]
    return Piece(name, info.dtype, info.shape, info.nbytes, lambda: _read(info.file, ranges))


def sliced(
    name: str,
    info: TensorInfo,
    dim: int,
    ids: Sequence[int | None],
    rows: int = 1,
    fill: float = 0.0,
) -> Piece:
    """``tensor.index_select(dim, ids)``, byte for byte, whatever the dtype.

    With ``rows``, ids count runs of so many entries along ``dim``. Where an id is None the entry's
    values are ``fill``; another than zero needs a floating dtype, and is clipped to its limits.
    """
    outer, length = 1, info.shape[dim] // rows
    for size in info.shape[:dim]:
        outer *= size
    inner = info.nbytes // (outer * length) if outer * length else 0
    shape = (*info.shape[:dim], len(ids) * rows, *info.shape[dim + 1 :])
    pad = b"" if None not in ids else _filled(info.dtype, inner, fill)
    ranges = [
        pad
        if e is None
        else (info.begin + (o * length + e) * inner, info.begin + (o * length + e + 1) * inner)
        for o in range(outer)
        for e in ids
    ]
    size = outer * len(ids) * inner
    return Piece(name, info.dtype, shape, size, lambda: _read(info.file, ranges))


def zeros(piece: Piece) -> Piece:
    """A tensor of the name, dtype and shape of ``piece`` whose bytes are all zero."""
    return replace(piece, blocks=lambda: iter([bytes(piece.nbytes)]))


def _filled(dtype: str, nbytes: int, value: float) -> bytes:
    if value == 0:
        return bytes(nbytes)
    kind = next(kind for kind, name in _TORCH_NAMES.items() if name == dtype)
    limits = torch.finfo(kind)
    one = torch.tensor([min(max(value, limits.min), limits.max)], dtype=kind)
    return bytes(_raw(one)) * (nbytes // one.element_size())


def computed(piece: Piece, make: Callable[[], Tensor]) -> Piece:
    """A tensor of the name, dtype and shape of ``piece`` whose values are made when written."""

    def blocks() -> Iterator[bytes | memoryview]:
        yield _raw(make())

    return replace(piece, blocks=blocks)


def produced(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    parts: Callable[[], Iterator[Tensor]],
) -> Piece:
    """A tensor that is made part by part, in order of its first axis, when it is written."""
    nbytes = math.prod(shape) * dtype.itemsize
    return Piece(name, _TORCH_NAMES[dtype], shape, nbytes, lambda: map(_raw, parts()))


def given(name: str, tensor: Tensor) -> Piece:
    """A tensor that is in memory already."""
    nbytes = tensor.numel() * tensor.element_size()
    dtype = _TORCH_NAMES[tensor.dtype]
    return Piece(name, dtype, tuple(tensor.shape), nbytes, lambda: iter([_raw(tensor)]))


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # arrays are buffers


def _read(file: Path, ranges: Iterable[tuple[int, int] | bytes]) -> Iterator[bytes | memoryview]:
    with file.open("rb") as handle:
        for source in ranges:
            if isinstance(source, bytes):
                yield source
                continue
            begin, end = source
            handle.seek(begin)
            left = end - begin
            while left:
                block = handle.read(min(left, _BLOCK))
                if not block:
                    raise CheckpointError(f"{file} became shorter while it was read")
                left -= len(block)
                yield block


def write_shards(
    directory: Path,
    pieces: Sequence[Piece],
    max_shard: int = MAX_SHARD,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write ``pieces`` in order as one file, or as shards of at most ``max_shard`` bytes.

    A tensor larger than ``max_shard`` gets a shard of its own. ``progress`` is told bytes.
    """
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    total = sum(piece.nbytes for piece in pieces)
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for block in _write_shard(directory / name, shard):
            done += block
            progress(done, total)
        weight_map.update({piece.name: name for piece in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_bytes(json_bytes(index))


def write_file(file: Path, pieces: Sequence[Piece]) -> None:
    """Write ``pieces`` in order as one safetensors file; it is on the disk when this returns."""
    for _ in _write_shard(file, pieces):
        pass


def _write_shard(file: Path, pieces: Sequence[Piece]) -> Iterator[int]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [position, position + piece.nbytes],
        }
        position += piece.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            written = 0
            for block in piece.blocks():
                handle.write(block)
                written += len(block)
                yield len(block)
            if written != piece.nbytes:
                raise AssertionError(f"{piece.name}: {written} bytes instead of {piece.nbytes}")
        handle.flush()
        os.fsync(handle.fileno())
