"""The shapes that benchmarks/ writes and computes with are those of the published models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import published
import scale_model as sim


@pytest.mark.parametrize("name", sorted(published.MODELS))
def test_counts_are_as_printed(name: str) -> None:
    """Totals to the digits that the publisher prints; nothing is allocated.

    Active parameters are printed with the embedding by some and without by others, and cut off or
    rounded: one of the two lies within one of the last digit.
    """
    model, shapes = published.MODELS[name], sim.shapes_of(name)
    assert published.printed(shapes.total, model.total) == model.total
    embedding = shapes.vocabulary * shapes.hidden
    last = 10.0 ** -len(model.active[:-1].partition(".")[2])
    active = [(shapes.active + more) / 1e9 - float(model.active[:-1]) for more in (0, embedding)]
    assert min(map(abs, active)) < last
    if not model.fp8:
        assert shapes.bytes == 2 * shapes.total
    else:
        assert shapes.total < shapes.bytes < 1.02 * shapes.total


def test_pruned_shapes_lose_what_goes() -> None:
    shapes = sim.shapes_of("OLMoE-1B-7B")
    fewer = shapes.pruned(0.25)
    assert fewer.experts == 48
    assert shapes.total - fewer.total == 16 * 16 * 3 * 2048 * 1024
    assert shapes.bytes - fewer.bytes == 2 * (shapes.total - fewer.total)


def test_the_slowest_part_bounds_a_walk() -> None:
    shapes = sim.shapes_of("OLMoE-1B-7B")
    fast = sim.Machine("m", 1, 1e15, None, 1e15, 1e9, None, 1e15, 1e15, 1, 1e9, 1e9, 0.0)
    slow = sim.walk("walk", shapes, fast, 8192, 512, head=False)
    assert slow.bound == "arithmetic"
    assert slow.seconds == pytest.approx(slow.flops / 1e9, rel=1e-3)
    reading = sim.Machine("m", 1, 1e6, None, 1e15, 1e30, None, 1e15, 1e15, 1, 1e9, 1e9, 0.0)
    read = sim.walk("walk", shapes, reading, 8192, 512, head=False)
    assert read.bound == "disk"
    assert read.seconds == pytest.approx(read.read / 1e6 * 17 / 16)
