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

import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import arguments
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
FIRST = (
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


class Clock:
    """Seconds on the wall, and of all cores: on a busy machine the second is the steadier."""

    def __enter__(self) -> Clock:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc: object) -> None:
        self.wall = time.perf_counter() - self._start[0]
        self.cpu = time.process_time() - self._start[1]


def moeits(whole_layer: bool) -> dict[str, float]:
    experts = LAYER["experts"] if whole_layer else SUBSET
    roles = LAYER["matrices"] if whole_layer else 1
    pairwise_nmi(matrices(2, 9))  # compiled, and loaded from its cache, before the clock starts
    wall = cpu = 0.0
    found = np.zeros((experts, experts))
    for role in range(roles):
        with Clock() as drawing:  # random numbers are no part of the work
            for _ in matrices(experts, role):
                pass
        with Clock() as ours:
            nmi = pairwise_nmi(matrices(experts, role))
        wall += ours.wall - drawing.wall
        cpu += ours.cpu - drawing.cpu
        found = nmi if role == 0 else found
    pairs = roles * experts * (experts - 1) // 2
    first = list(matrices(NAIVE_PAIRS + 1, 0))
    with Clock() as theirs:
        naive = [naive_nmi(first[0], other) for other in first[1:]]
    difference = max(abs(value - found[0, i + 1]) for i, value in enumerate(naive))
    assert difference < 1e-6, f"the values differ by {difference}"
    return {
        "pairs": pairs,
        "seconds": wall,
        "seconds_per_pair": wall / pairs,
        "naive_pairs": NAIVE_PAIRS,
        "naive_seconds_per_pair": theirs.wall / NAIVE_PAIRS,
        "ratio": theirs.wall / NAIVE_PAIRS / (wall / pairs),
        "ratio_of_cpu_seconds": theirs.cpu / NAIVE_PAIRS / (cpu / pairs),
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
    first = [name for name in FIRST if name in found]
    rest = [name for name in found if name not in first and name not in ("random", "saliency")]
    return {name: found[name] for name in [*first, *rest][:10]}


_DROPS = (None, "replaces experts by constants")


def calibrating() -> dict[str, object]:
    text = stages.Text(sequences=40, length=512)
    chosen = droppers()

    def walk(needs: tuple[str, ...]) -> Clock:
        with tempfile.TemporaryDirectory() as folder, Clock() as clock:
            stages.calibrate("demo", Path(folder) / "statistics", text, needs)
        return clock

    union = tuple(sorted({name for method in chosen.values() for name in method.needs}))
    walk(union)  # warm up
    each = {name: walk(method.needs) for name, method in chosen.items()}
    once = walk(union)
    return {
        "methods": list(chosen),
        "seconds_each": {name: clock.wall for name, clock in each.items()},
        "seconds_once": once.wall,
        "ratio": sum(clock.wall for clock in each.values()) / once.wall,
        "ratio_of_cpu_seconds": sum(clock.cpu for clock in each.values()) / once.cpu,
    }


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("--layer", action="store_true", help="all 5310 pairs of a layer")
    parser.add_argument("--part", choices=("moeits", "calibration"), help="only this one")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result: dict[str, dict] = {}
    if args.part != "calibration":
        result["moeits"] = moeits(args.layer)
    if args.part != "moeits":
        result["calibration"] = calibrating()
    if args.json:
        print(json.dumps(result, indent=1))
        return
    if "moeits" in result:
        speed = result["moeits"]
        print(
            f"MoEITS: {speed['pairs']} pairs of {SHAPE[0]} x {SHAPE[1]} in {speed['seconds']:.1f} "
            f"s, {1000 * speed['seconds_per_pair']:.2f} ms each; NumPy "
            f"{1000 * speed['naive_seconds_per_pair']:.0f} ms each: {speed['ratio']:.0f} times "
            f"faster ({speed['ratio_of_cpu_seconds']:.0f} in CPU seconds); values equal to "
            f"{speed['largest_difference']:.1g}"
        )
    if "calibration" in result:
        once = result["calibration"]
        print(
            f"calibration for {len(once['methods'])} methods ({', '.join(once['methods'])}): one "
            f"walk {once['seconds_once']:.1f} s, one for each "
            f"{sum(once['seconds_each'].values()):.1f} s: {once['ratio']:.1f} times faster "
            f"({once['ratio_of_cpu_seconds']:.1f} in CPU seconds)"
        )


if __name__ == "__main__":
    main()
