"""Reads the values of tensors in blocks: what is not finite, what is zero, what is equal.

Nothing here depends on the size of a tensor: at most one block is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeprune.models.checkpoint import TensorInfo
from moeprune.models.writer import Piece

FLOAT_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Floating-point types of safetensors of which torch can read values one by one."""

_BLOCK = 1 << 23  # divisible by the size of every type


@dataclass(frozen=True)
class Scan:
    """What the values of a tensor are like.

    Attributes:
        nonfinite: how many are NaN or infinite.
        zero_rows: the rows, of those that were asked for, in which every value is zero.
    """

    nonfinite: int
    zero_rows: tuple[int, ...]


def values(info: TensorInfo, begin: int, end: int) -> Iterator[Tensor]:
    """The values between two bytes of a tensor's file, in blocks, in their own type."""
    dtype = FLOAT_DTYPES[info.dtype]
    with info.file.open("rb") as handle:
        handle.seek(begin)
        while begin < end:
            data = bytearray(handle.read(min(_BLOCK, end - begin)))
            if not data:
                return  # the file shrank: reading its header again says so
            begin += len(data)
            yield torch.frombuffer(data, dtype=torch.uint8).view(dtype)


def scan(
    info: TensorInfo, rows: int = 1, progress: Callable[[int], None] = lambda nbytes: None
) -> Scan:
    """Read all values of a tensor of ``FLOAT_DTYPES``.

    Args:
        info: where it is.
        rows: equal parts of it, along its first axis, that are told apart.
        progress: told bytes.
    """
    nonfinite, zero_rows, size = 0, [], info.nbytes // rows if info.nbytes else 0
    for row in range(rows if size else 0):
        zero = True
        for block in values(info, info.begin + row * size, info.begin + (row + 1) * size):
            wide = block if block.dtype.itemsize > 1 else block.to(torch.float32)
            nonfinite += wide.numel() - int(torch.isfinite(wide).sum())
            zero = zero and not bool(wide.any())
            progress(block.numel() * block.element_size())
        if zero:
            zero_rows.append(row)
    return Scan(nonfinite, tuple(zero_rows))


def digest(piece: Piece) -> str:
    """SHA-256 of the bytes of a tensor, or of the part of it that ``piece`` is."""
    found = hashlib.sha256()
    for block in piece.blocks():
        found.update(block)
    return found.hexdigest()
