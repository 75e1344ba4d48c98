"""What two shortcuts save: binning matrices once for MoEITS, and one walk for all methods.

    python benchmarks/methods_speed.py [--layer] [--json]

1. MoEITS: seconds per pair of matrices of Qwen1.5-MoE's size (1408 x 2048, float32), ours against
   the straightforward NumPy way (``histogram`` of both and ``histogram2d``, bins "auto"), on the
   same pairs; the values must agree to 1e-6. NumPy is timed on a few pairs, ours on all pairs of
   some experts, binning included; with ``--layer`` on a whole layer, 60 experts and 3 matrices.
2. Calibration: seconds of one walk that serves every calibrated method that deletes or replaces
   experts, against the sum of one walk for each, on the embedded model.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeprune.core.accumulators import LIGHT
from moeprune.core.budget import Budget
from moeprune.core.method import Method, methods
from moeprune.core.ops.nmi import pairwise_nmi
from moeprune.pipeline import stages

SHAPE = (1408, 2048)
LAYER = {"experts": 60, "matrices": 3}
SUBSET = 16
NAIVE_PAIRS = 4
FIRST_TEN = (
    "frequency", "routing-score", "ean", "weighted-frequency", "reap", "man", "msan", "mone",
    "mone-ls",
)  # fmt: skip

Matrix = NDArray[np.float32]


def matrices(experts: int, seed: int) -> Iterator[Matrix]:
    """Normal matrices with a part in common, as upcycled experts have; one at a time."""
    common = np.random.default_rng(seed).standard_normal(SHAPE, dtype=np.float32)
    for expert in range(experts):
        own = np.random.default_rng((seed, expert)).standard_normal(SHAPE, dtype=np.float32)
        yield (0.02 * (0.6 * common + 0.8 * own)).astype(np.float32)


def naive_nmi(a: Matrix, b: Matrix) -> float:
    """As one writes it down."""
    edges_a, edges_b = (np.histogram_bin_edges(x, "auto") for x in (a, b))
    counts = (
        np.histogram(a, edges_a)[0],
        np.histogram(b, edges_b)[0],
        np.histogram2d(a.ravel(), b.ravel(), (edges_a, edges_b))[0],
    )

    def entropy(count: NDArray[np.float64]) -> float:
        p = count[count > 0] / count.sum()
        return float(-(p * np.log(p)).sum())

    h_a, h_b, h_ab = map(entropy, counts)
    return (h_a + h_b - h_ab) / math.sqrt(h_a * h_b)


def moeits(whole_layer: bool) -> dict[str, float]:
    experts = LAYER["experts"] if whole_layer else SUBSET
    roles = LAYER["matrices"] if whole_layer else 1
    pairwise_nmi(matrices(2, 9))  # compiled, and loaded from its cache, before the clock starts
    ours, made, found = 0.0, 0.0, np.zeros((experts, experts))
    for role in range(roles):
        start = time.perf_counter()
        for _ in matrices(experts, role):
            pass
        made += time.perf_counter() - start  # drawing random numbers is nobody's work
        start = time.perf_counter()
        nmi = pairwise_nmi(matrices(experts, role))
        ours += time.perf_counter() - start
        found = nmi if role == 0 else found
    pairs = roles * experts * (experts - 1) // 2
    first = list(matrices(NAIVE_PAIRS + 1, 0))
    start = time.perf_counter()
    naive = [naive_nmi(first[0], other) for other in first[1:]]
    seconds = (time.perf_counter() - start) / NAIVE_PAIRS
    difference = max(abs(value - found[0, i + 1]) for i, value in enumerate(naive))
    assert difference < 1e-6, f"the values differ by {difference}"
    per_pair = (ours - made) / pairs
    return {
        "pairs": pairs,
        "seconds": ours - made,
        "seconds_per_pair": per_pair,
        "naive_pairs": NAIVE_PAIRS,
        "naive_seconds_per_pair": seconds,
        "ratio": seconds / per_pair,
        "largest_difference": difference,
    }


def droppers() -> dict[str, Method]:
    """Ten calibrated methods that delete or replace experts and need no walk of their own."""
    found: dict[str, Method] = {}
    for name, kind in methods().items():
        try:
            method = kind()
            method.accept(Budget(ratio=0.5))
        except Exception:  # options without a default, or no ratio: not one of these
            continue
        light = bool(method.needs) and set(method.needs) <= set(LIGHT)
        if light and not method.sequential and method.changes in _DROPS:
            found[name] = method
    first = [name for name in FIRST_TEN if name in found]
    rest = [name for name in found if name not in first and name not in ("random", "saliency")]
    return {name: found[name] for name in [*first, *rest][:10]}


_DROPS = (None, "replaces experts by constants")


def calibrating() -> dict[str, object]:
    text = stages.Text(sequences=60, length=512)
    chosen = droppers()

    def seconds(needs: tuple[str, ...]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            stages.calibrate("demo", Path(folder) / "statistics", text, needs)
            return time.perf_counter() - start

    union = tuple(sorted({name for method in chosen.values() for name in method.needs}))
    seconds(union)  # warm up
    each = {name: seconds(method.needs) for name, method in chosen.items()}
    once = seconds(union)
    return {
        "methods": list(chosen),
        "seconds_each": each,
        "seconds_once": once,
        "ratio": sum(each.values()) / once,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layer", action="store_true", help="all 5310 pairs of a layer")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = {"moeits": moeits(args.layer), "calibration": calibrating()}
    if args.json:
        print(json.dumps(result, indent=1))
        return
    speed, once = result["moeits"], result["calibration"]
    print(
        f"MoEITS: {speed['pairs']} pairs of {SHAPE[0]} x {SHAPE[1]} in {speed['seconds']:.1f} s, "
        f"{1000 * speed['seconds_per_pair']:.2f} ms each; NumPy "
        f"{1000 * speed['naive_seconds_per_pair']:.0f} ms each: {speed['ratio']:.0f} times faster; "
        f"values equal to {speed['largest_difference']:.1g}"
    )
    print(
        f"calibration for {len(once['methods'])} methods ({', '.join(once['methods'])}): one walk "
        f"{once['seconds_once']:.1f} s, one for each {sum(once['seconds_each'].values()):.1f} s: "
        f"{once['ratio']:.1f} times faster"
    )


if __name__ == "__main__":
    main()
