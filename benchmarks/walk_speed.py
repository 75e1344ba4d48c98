"""How close the observed walk comes to what bounds it: arithmetic, or the disk.

    python benchmarks/walk_speed.py MODEL [--tokens 8192] [--repeats 3] [--compile] [--json]

MODEL has few layers of true size (``real_size.py --layers 2``). Alternating, medians of the ratios:

1. arithmetic: all layers of MODEL are loaded, and the same batches go through them by their
   own plain forward, as many at once as the walk computes; against a walk over MODEL that collects
   all light statistics, reading included, with a warm cache. Also the plain walk.
2. disk: all shards are read front to back, 16 MiB at a time, with a cold cache; against a walk with
   64 tokens, likewise, which reads the layers and little of the embeddings: bytes per second.
3. with ``--compile``, the plain forward of one layer against ``torch.compile`` of it.

Goal: the walk does 70 % of either.
"""

from __future__ import annotations

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import arguments
import limited
import torch
from apply_speed import prepare
from calibration import random_batches, walk_seconds

from moeprune.core.accumulators import LIGHT
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.walk import Batch, default_workers


class Through:
    """One batch on its way through layers that are called as they are."""

    def __init__(self, model: LayeredModel, batch: Batch) -> None:
        inner: Any = model.model.get_decoder()
        self._state = inner.embed_tokens(batch.ids_BL)
        self._position_BL = torch.arange(batch.ids_BL.shape[1])[None]
        self._rotary = inner.rotary_emb(self._state, self._position_BL)

    def go(self, layer: Any) -> None:
        """The next layer, on what came out of the one before."""
        with torch.no_grad():
            out = layer(
                self._state, position_embeddings=self._rotary, position_ids=self._position_BL
            )
        self._state = out if isinstance(out, torch.Tensor) else out[0]


def plain_seconds(model: LayeredModel, batches: list[Batch]) -> float:
    """The layers in memory, one after another, each on all batches: no reading, no observing."""
    model.load_resident()
    for index in range(len(model.layers)):
        model.load_layer(index)
    threads = torch.get_num_threads()
    workers = default_workers(model.device)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        travellers = [Through(model, batch) for batch in batches]
        start = time.perf_counter()
        for layer in model.layers:
            list(pool.map(lambda one, layer=layer: one.go(layer), travellers))
        seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    for index in range(len(model.layers)):
        model.free_layer(index)
    return seconds


def arithmetic(path: Path, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of the plain layers, of the plain walk and of the observed one."""
    model = LayeredModel(Checkpoint.open(path))
    batches = random_batches(tokens // 512)
    walk_seconds(model, batches[:2], LIGHT)  # compiles kernels
    rows = []
    for _ in range(repeats):
        prepare(path, cold=False)
        rows.append(
            (
                plain_seconds(model, batches),
                walk_seconds(model, batches, ()),
                walk_seconds(model, batches, LIGHT),
            )
        )
    return {
        "plain_layers_seconds": statistics.median(row[0] for row in rows),
        "plain_walk_seconds": statistics.median(row[1] for row in rows),
        "observed_walk_seconds": statistics.median(row[2] for row in rows),
        "observed_of_plain_layers": statistics.median(row[0] / row[2] for row in rows),
        "plain_walk_of_plain_layers": statistics.median(row[0] / row[1] for row in rows),
    }


def disk(path: Path, repeats: int) -> dict[str, float]:
    """Seconds of reading the shards, and of a walk with few tokens, both from the disk."""
    model = LayeredModel(Checkpoint.open(path))
    batches = random_batches(1, 64)
    walk_seconds(model, batches, LIGHT)
    rows = []
    for _ in range(repeats):
        limited.forget_files(path)
        start = time.perf_counter()
        read = 0
        for shard in sorted(path.glob("*.safetensors")):
            with shard.open("rb", buffering=0) as handle:
                block = bytearray(1 << 24)
                while count := handle.readinto(block):
                    read += count
        reading = time.perf_counter() - start
        limited.forget_files(path)
        start = time.perf_counter()
        fresh = LayeredModel(Checkpoint.open(path))  # embeddings are read again as well
        opened = time.perf_counter() - start
        rows.append((reading, walk_seconds(fresh, batches, LIGHT), opened))
    held = {index: model.stored(index) for index in range(len(model.layers))}
    layers = sum(
        model.checkpoint.tensors[key].nbytes for keys in held.values() for key, _, _ in keys
    )
    return {
        "bytes": read,
        "layer_bytes": layers,
        "read_seconds": statistics.median(row[0] for row in rows),
        "walk_seconds": statistics.median(row[1] for row in rows),
        "opening_seconds": statistics.median(row[2] for row in rows),
        "walk_of_read": statistics.median(
            (layers / walking) / (read / reading) for reading, walking, _ in rows
        ),
    }


def compiled(path: Path, tokens: int) -> dict[str, float]:
    """One MoE layer of the model, plain and compiled, one batch after another on all cores."""
    model = LayeredModel(Checkpoint.open(path))
    batches = random_batches(max(1, tokens // 512))
    model.load_resident()
    index = max(model.sites)
    model.load_layer(index)
    layer = model.layers[index]
    found = {}
    for name, run in {"plain": layer, "compiled": torch.compile(layer, dynamic=True)}.items():
        times = []
        for _ in range(3):
            travellers = [Through(model, batch) for batch in batches]
            start = time.perf_counter()
            for one in travellers:
                one.go(run)
            times.append(time.perf_counter() - start)
        found[f"{name}_first_seconds"], found[f"{name}_seconds"] = times[0], min(times[1:])
    return found


def main() -> None:
    parser = arguments.of_model(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    found: dict[str, Any] = {
        "arithmetic": arithmetic(args.model, args.tokens, args.repeats),
        "disk": disk(args.model, args.repeats),
    }
    if args.compile:
        found["compile"] = compiled(args.model, args.tokens)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for part, figures in found.items():
        print(part)
        for name, value in figures.items():
            print(f"  {name:28s} {value:12.2f}")


if __name__ == "__main__":
    main()
