"""What a search over subsets of one layer's experts costs once the experts have run.

    python benchmarks/subsets.py

Random routers and outputs: the time depends on the sizes alone.
"""

from __future__ import annotations

import time

import arguments
import torch

from moeprune.core.accumulators import SAMPLE_SIZE
from moeprune.core.ops.reconstruction import OutputGram, Reconstruction
from moeprune.core.ops.routing import RoutingRule, SubsetRouter
from moeprune.core.ops.subsets import Choice, Evolution, beam, evolve, exhaustive
from moeprune.core.shapes import LayerShape


def layer(experts: int, top_k: int) -> Reconstruction:
    generator = torch.Generator().manual_seed(0)
    f_SEH = torch.randn(SAMPLE_SIZE, experts, 32, generator=generator, dtype=torch.float64)
    rule = RoutingRule(LayerShape(0, experts, top_k, 32, 32), "softmax", True)
    z_SE = torch.randn(SAMPLE_SIZE, experts, generator=generator)
    return Reconstruction(SubsetRouter(rule, z_SE), OutputGram(f_SEH @ f_SEH.transpose(1, 2)))


def main() -> None:
    arguments.parser(__doc__).parse_args()
    print(f"{SAMPLE_SIZE} tokens, {torch.get_num_threads()} threads; half of the experts go")
    for experts, top_k in ((8, 2), (16, 2), (64, 8), (128, 8)):
        error, choice = layer(experts, top_k), Choice(experts, experts // 2)
        searches = {
            "greedy": lambda error=error, choice=choice: beam(error.losses, choice),
            "genetic": lambda error=error, choice=choice: evolve(
                error.losses, choice, Evolution(), "0"
            ),
        }
        if choice.subsets() <= 100_000:
            searches["all subsets"] = lambda error=error, choice=choice: exhaustive(
                error.losses, choice
            )
        for name, search in searches.items():
            start = time.perf_counter()
            found = search()
            seconds = time.perf_counter() - start
            print(f"E={experts} K={top_k} {name}: {seconds:.1f} s, error {found_loss(found):.4g}")


def found_loss(found: object) -> float:
    best = found[0] if isinstance(found, list) else found
    return float(best.loss)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
