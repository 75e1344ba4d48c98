"""Whether the kernels of plans use every core: seconds on one and on all, and equal results.

    python benchmarks/cores.py [--json]

NMI of 24 matrices of 1024 x 2048 (``moeits``), and searches over subsets of 64 experts on 2048
tokens (``naee``, ``stun``). Results must not depend on the number of threads; it ends with 1 where
they do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import arguments
import numpy as np
import torch
from subsets import layer

from moeprune.core.ops.nmi import pairwise_nmi
from moeprune.core.ops.subsets import Choice, Evolution, beam, evolve

MATRICES, ENTRIES = 24, 1024 * 2048
EXPERTS, TOP_K = 64, 8


def nmi() -> Callable[[int], Any]:
    draw = np.random.default_rng(0)
    matrices = [draw.standard_normal(ENTRIES, dtype=np.float32) for _ in range(MATRICES)]
    pairwise_nmi(matrices[:2])  # compiles
    return lambda threads: pairwise_nmi(matrices, threads=threads).tolist()


def search(genetic: bool) -> Callable[[int], Any]:
    error, choice = layer(EXPERTS, TOP_K), Choice(EXPERTS, EXPERTS // 2)

    def run(threads: int) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            if genetic:
                return evolve(error.losses, choice, Evolution(iterations=10), "0")
            return beam(error.losses, choice)
        finally:
            torch.set_num_threads(before)

    return run


def main() -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    found = {}
    for name, run in {
        f"NMI, {MATRICES * (MATRICES - 1) // 2} pairs": nmi(),
        f"greedy search, {EXPERTS} experts": search(genetic=False),
        f"genetic search, {EXPERTS} experts": search(genetic=True),
    }.items():
        seconds, results = [], []
        for threads in (1, cores):
            start = time.perf_counter()
            results.append(run(threads))
            seconds.append(time.perf_counter() - start)
        found[name] = {
            "one_core": seconds[0],
            "all_cores": seconds[1],
            "cores": cores,
            "equal": results[0] == results[1],
        }
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"| | 1 core | {cores} cores | faster | equal |\n|---|---|---|---|---|")
        for name, row in found.items():
            faster = row["one_core"] / row["all_cores"]
            print(
                f"| {name} | {row['one_core']:.1f} s | {row['all_cores']:.1f} s | {faster:.2f} | "
                f"{'yes' if row['equal'] else 'NO'} |"
            )
    return int(not all(row["equal"] for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
