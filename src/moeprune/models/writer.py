"""Writes safetensors shards piece by piece: bytes are copied, never interpreted, never gathered.

The safetensors library writes a shard from tensors that are all in memory. Here a shard's header
is known before its data, so memory is bounded by one piece and any dtype passes through unchanged.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moeprune.errors import CheckpointError
from moeprune.files import json_bytes, leave_cache
from moeprune.models.checkpoint import INDEX, TensorInfo
from moeprune.work import OUTPUT, WorkFolder

MAX_SHARD = 5_000_000_000
_BLOCK = 1 << 18
"""Bytes read at once. For larger blocks the allocator asks the kernel for fresh pages every time,
which costs three times as much as the reading."""
_BATCH = 1 << 22
_FLUSH = 1 << 26
_ALIGN = 64
_AGAIN = "download or copy the checkpoint again"
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
    return bytes(raw(one)) * (nbytes // one.element_size())


def computed(piece: Piece, make: Callable[[], Tensor]) -> Piece:
    """A tensor of the name, dtype and shape of ``piece`` whose values are made when written."""

    def blocks() -> Iterator[bytes | memoryview]:
        yield raw(make())

    return replace(piece, blocks=blocks)


def produced(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    parts: Callable[[], Iterator[Tensor]],
) -> Piece:
    """A tensor that is made part by part, in order of its first axis, when it is written."""
    nbytes = math.prod(shape) * dtype.itemsize
    return Piece(name, _TORCH_NAMES[dtype], shape, nbytes, lambda: map(raw, parts()))


def given(name: str, tensor: Tensor) -> Piece:
    """A tensor that is in memory already."""
    nbytes = tensor.numel() * tensor.element_size()
    dtype = _TORCH_NAMES[tensor.dtype]
    return Piece(name, dtype, tuple(tensor.shape), nbytes, lambda: iter([raw(tensor)]))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # arrays are buffers


def _read(file: Path, ranges: Iterable[tuple[int, int] | bytes]) -> Iterator[bytes | memoryview]:
    try:
        with file.open("rb", buffering=0) as handle:
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
                        raise CheckpointError(f"{file} became shorter while it was read", _AGAIN)
                    left -= len(block)
                    yield block
    except OSError as error:  # a reader's own: a writer's never gets here
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}", _AGAIN) from error


class Shards:
    """Where shards are written: a plain directory.

    Args:
        directory: the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def kept(self, name: str) -> str | None:
        """The SHA-256 of a shard that is there already, whole; None if it is to be written."""
        return None

    def write(self, name: str, pieces: Sequence[Piece], tell: Callable[[int], None]) -> str:
        """Write a shard; returns its SHA-256."""
        return write_file(self.directory / name, pieces, tell)


class KeptShards(Shards):
    """A directory of a work folder, in which shards that are whole stay after an interruption."""

    def __init__(self, folder: WorkFolder) -> None:
        super().__init__(folder.output)
        self._folder = folder

    def kept(self, name: str) -> str | None:
        """As in ``Shards``."""
        key = f"{OUTPUT}/{name}"
        return None if self._folder.find(key) is None else self._folder.checksum(key)

    def write(self, name: str, pieces: Sequence[Piece], tell: Callable[[int], None]) -> str:
        """As in ``Shards``."""
        key = f"{OUTPUT}/{name}"
        part = self._folder.temporary(key)
        try:
            checksum = write_file(part, pieces, tell)
            self._folder.keep(key, part, checksum)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return checksum


def write_shards(
    place: Path | Shards,
    pieces: Sequence[Piece],
    max_shard: int = MAX_SHARD,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Write ``pieces`` in order as one file, or as shards of at most ``max_shard`` bytes.

    A tensor larger than ``max_shard`` gets a shard of its own. ``progress`` is told bytes.

    Returns:
        The SHA-256 of every file of weights, by name.

    Raises:
        CheckpointError: a file that pieces are copied from became shorter, or cannot be read.
    """
    place = Shards(place) if isinstance(place, Path) else place
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
    checksums: dict[str, str] = {}

    def tell(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        kept = place.kept(name)
        if kept is not None:
            tell(sum(piece.nbytes for piece in shard))
        checksums[name] = kept or place.write(name, shard, tell)
        weight_map.update({piece.name: name for piece in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (place.directory / INDEX).write_bytes(json_bytes(index))
    return checksums


class _Summing:
    """SHA-256 in a thread beside the writing; at most two batches of small blocks are held."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool, self._digest = pool, hashlib.sha256()
        self._batch: list[bytes | memoryview] = []
        self._size = 0
        self._running: Future[None] | None = None

    def add(self, block: bytes | memoryview) -> None:
        self._batch.append(block)
        self._size += len(block)
        if self._size >= _BATCH:
            self._send()

    def settle(self, block: bytes | memoryview) -> None:
        """After ``block`` was written: one that is a whole tensor is not held any longer."""
        if len(block) >= _BATCH and self._running is not None:
            self._running.result()

    def result(self) -> str:
        self._send()
        assert self._running is not None
        self._running.result()
        return self._digest.hexdigest()

    def _send(self) -> None:
        if self._running is not None:
            self._running.result()
        self._running = self._pool.submit(self._update, self._batch)
        self._batch, self._size = [], 0

    def _update(self, batch: list[bytes | memoryview]) -> None:
        for block in batch:
            self._digest.update(block)
        batch.clear()


def write_file(
    file: Path, pieces: Sequence[Piece], tell: Callable[[int], None] = lambda nbytes: None
) -> str:
    """Write one safetensors file; on the disk when this returns.

    ``tell`` is told bytes of data. Returns the file's SHA-256.
    """
    with ThreadPoolExecutor(1) as pool, file.open("wb", buffering=0) as handle:
        digest, begun = _Summing(pool), 0
        for block in _content(pieces, tell):
            digest.add(block)
            view = memoryview(block)
            while view:  # a raw write may end early
                view = view[handle.write(view) :]
            digest.settle(block)
            if (position := handle.tell()) - begun >= _FLUSH:
                # the disk begins to write now, not when memory is full of what it has to write
                leave_cache(handle.fileno(), begun, position - begun)
                begun = position
        os.fsync(handle.fileno())
        return digest.result()


def _content(pieces: Sequence[Piece], tell: Callable[[int], None]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: the length of its header, the header, the data."""
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
    yield len(text).to_bytes(8, "little") + text
    for piece in pieces:
        written = 0
        for block in piece.blocks():
            yield block
            written += len(block)
            tell(len(block))
        if written != piece.nbytes:
            raise AssertionError(f"{piece.name}: {written} bytes instead of {piece.nbytes}")
