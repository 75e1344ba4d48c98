"""Writes a random checkpoint with the exact shapes of a published model, at the disk's speed.

    python benchmarks/real_size.py OLMoE-1B-7B out [--layers 4] [--dtype fp8] [--force]

Tensors have the names, shapes and dtypes of the published checkpoint, in shards of at most 5 GB.
Values are normal with the configuration's ``initializer_range``; norms are one, biases zero. They
are drawn once, 64 MiB of them, and all tensors are consecutive stretches of that block, over and
over: its length is a prime, so that no two rows and no two experts of a layer are alike. With
``--dtype fp8`` matrices are stored as DeepSeek-V3 stores them: e4m3 and one float32 scale per
128 x 128 (arXiv 2412.19437, section 3.3). The tokenizer is the embedded model's, and ids of special
tokens are its ids. ``--layers`` writes that many layers of the same size.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arguments
import torch
from published import MODELS, WRITABLE, config_of, in_fp8, skeleton, stored

from moeprune.files import json_bytes, new_directory
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.writer import Piece, write_shards

RING = 33_554_393
"""Values that are drawn; a prime."""
BLOCK = (128, 128)
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


class Values:
    """An endless run of normal values in one dtype, in whatever amounts are asked for."""

    def __init__(self, dtype: torch.dtype, std: float, limit: float = 6.0) -> None:
        drawn = torch.randn(RING, generator=torch.Generator().manual_seed(0))
        values = drawn.clamp_(-limit, limit).mul_(std).to(dtype)
        self._bytes = memoryview(values.view(torch.uint8).numpy())
        self._size = dtype.itemsize
        self._next = 0

    def take(self, count: int) -> Iterator[memoryview]:
        """The bytes of the next ``count`` values."""
        while count:
            part = min(count, RING - self._next)
            yield self._bytes[self._next * self._size : (self._next + part) * self._size]
            self._next = (self._next + part) % RING
            count -= part


def _constant(name: str, tensor: torch.Tensor, value: float) -> Piece:
    values = torch.full(tensor.shape, value, dtype=tensor.dtype)
    data = memoryview(values.view(-1).view(torch.uint8).numpy())
    return Piece(name, _NAMES[tensor.dtype], tuple(tensor.shape), data.nbytes, lambda: iter([data]))


def _drawn(name: str, dtype: torch.dtype, shape: torch.Size, values: Values) -> Piece:
    count = shape.numel()
    nbytes = count * dtype.itemsize
    return Piece(name, _NAMES[dtype], tuple(shape), nbytes, lambda: values.take(count))


def pieces(model: torch.nn.Module, std: float, fp8: bool) -> list[Piece]:
    """Every tensor of the checkpoint, in order."""
    wide = {torch.bfloat16: Values(torch.bfloat16, std)}
    spread = 448 / 6  # six standard deviations are the largest number of e4m3
    small = Values(torch.float8_e4m3fn, spread) if fp8 else None
    found = []
    for name, tensor in stored(model).items():
        if tensor.ndim < 2:
            found.append(_constant(name, tensor, float(name.endswith("norm.weight"))))
        elif small is not None and in_fp8(name, tensor):
            found.append(_drawn(name, torch.float8_e4m3fn, tensor.shape, small))
            grid = [-(-n // b) for n, b in zip(tensor.shape, BLOCK, strict=True)]
            scale = torch.empty(grid, dtype=torch.float32, device="meta")
            found.append(_constant(f"{name}_scale_inv", scale, std / spread))
        else:
            if tensor.dtype not in wide:
                wide[tensor.dtype] = Values(tensor.dtype, std)
            found.append(_drawn(name, tensor.dtype, tensor.shape, wide[tensor.dtype]))
    return found


def _special_tokens(config: dict[str, Any], demo: Path) -> dict[str, Any]:
    ids = json.loads((demo / "config.json").read_text())
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: ids.get(key) for key in keys if config.get(key) is not None}


def write(
    name: str, out: Path, layers: int | None = None, fp8: bool = False, force: bool = False
) -> dict[str, float]:
    """Write the checkpoint; returns its bytes and the seconds that its tensors took."""
    demo = Checkpoint.open("demo").path
    config = config_of(name, layers)
    model = skeleton(config)
    config |= _special_tokens(config, demo)
    if fp8:
        config["quantization_config"] = FP8
    todo = pieces(model, float(config["initializer_range"]), fp8)
    with new_directory(out, force) as work:
        for file in demo.glob("tokenizer*"):
            shutil.copy(file, work)
        (work / "config.json").write_bytes(json_bytes(config))
        start = time.perf_counter()
        write_shards(work, todo)
        seconds = time.perf_counter() - start
    return {"bytes": sum(piece.nbytes for piece in todo), "seconds": seconds}


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("model", choices=WRITABLE)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="instead of the published number")
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    found = write(args.model, args.out, args.layers, args.dtype == "fp8", args.force)
    total = MODELS[args.model].total
    print(
        f"{args.out}: {found['bytes'] / 1e9:.2f} GB in {found['seconds']:.1f} s, "
        f"{found['bytes'] / found['seconds'] / 1e6:.0f} MB/s ({args.model}: {total} parameters)"
    )


if __name__ == "__main__":
    main()
