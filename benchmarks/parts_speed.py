"""What it costs to have the experts of a layer in memory some at a time, in CPU seconds.

    python benchmarks/parts_speed.py MODEL [--tokens 4096]

MODEL has few layers of true size (``real_size.py --layers 1``). Walks that collect all light
statistics, hidden states in a file: layers whole with one batch at once, then in two and in sixteen
parts with two batches at once. Results are the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from calibration import random_batches, walk_seconds

from moeprune.core.accumulators import LIGHT
from moeprune.core.memory import Decision
from moeprune.models import walk
from moeprune.models.bounds import Load
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.hidden import HiddenStates
from moeprune.models.loading import LayeredModel
from moeprune.models.ranks import Ranks
from moeprune.models.walk import Batch, Walk


def cpu_seconds(model: LayeredModel, batches: list[Batch], workers: int, chunk: int) -> float:
    """Of a walk with so many batches at once and experts at a time."""

    def way(_: LayeredModel, load: Load, ranks: Ranks) -> tuple[Decision, HiddenStates]:
        return Decision(0, False, workers, chunk), HiddenStates()

    decided, walk.bounded = walk.bounded, way
    start = time.process_time()
    try:
        with Walk(model, batches, workers, needs=LIGHT, chunks=True) as running:
            running.layers(LIGHT)
    finally:
        walk.bounded = decided
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    given = parser.parse_args()
    torch.set_num_threads(2)
    model = LayeredModel(Checkpoint.open(given.model))
    batches = random_batches(given.tokens // 512)
    walk_seconds(model, batches[:2], LIGHT)  # compiles kernels
    experts = max(site.shape.experts for site in model.sites.values())
    whole = cpu_seconds(model, batches, 1, experts)
    print(f"whole: {whole:.1f} s")
    for parts in (2, 16):
        seconds = cpu_seconds(model, batches, 2, -(-experts // parts))
        print(f"{parts} parts: {seconds:.1f} s, {seconds / whole:.2f} of it", flush=True)


if __name__ == "__main__":
    main()
