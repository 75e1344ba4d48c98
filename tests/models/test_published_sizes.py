"""The shapes that benchmarks/ writes and computes with are those of the published models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import published
import scale_model as sim

SLOW = {"Kimi-K2", "Qwen3-30B-A3B"}
"""Of many experts; DeepSeek-V3 and OLMoE are of their kinds."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in sorted(published.MODELS)],
)
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


def machine(**given: Any) -> sim.Machine:
    """One on which nothing takes time but what is given."""
    free = dict.fromkeys(("read", "write", "flops", "load", "decode", "digest", "nmi"), 1e30)
    rest = {"nodes": 1, "devices": 1, "cores": 1, "shared": None, "link": None, "start": 0.0}
    return sim.Machine(**{"name": "m", "memory": 1e9, "device_memory": None} | rest | free | given)


def test_the_slowest_part_bounds_a_walk() -> None:
    shapes = sim.shapes_of("OLMoE-1B-7B")
    slow = sim.walk("walk", shapes, machine(flops=1e9), 8192, 512, head=False)
    assert slow.bound == "arithmetic"
    assert slow.seconds == pytest.approx(slow.flops / 1e9, rel=1e-3)
    read = sim.walk("walk", shapes, machine(read=1e6), 8192, 512, head=False)
    assert read.bound == "disk"
    assert read.seconds == pytest.approx(read.read / 1e6 * 17 / 16)
    both = sim.walk("walk", shapes, machine(read=1e6, load=1e6), 8192, 512, head=False)
    assert both.seconds == pytest.approx(2 * read.seconds)  # one thread reads, then converts


def test_every_process_loads_all_layers() -> None:
    shapes = sim.shapes_of("OLMoE-1B-7B")
    gpu = {"link": 1e9, "device_memory": 8e10, "flops": 1e12, "load": 1e9}
    one, eight = (
        sim.walk("walk", shapes, machine(devices=n, **gpu), 8 * 4096, 512, head=False)
        for n in (1, 8)
    )
    assert one.parts["conversion"] == eight.parts["conversion"]
    assert one.parts["link"] == eight.parts["link"]
    assert one.parts["arithmetic"] == pytest.approx(8 * eight.parts["arithmetic"])
    assert 8 * one.memory == eight.memory
    weights = 2 * (2 * shapes.largest + shapes.resident)
    assert one.on_device - weights == pytest.approx(8 * (eight.on_device - weights))
    nobody = sim.walk("walk", shapes, machine(devices=16, **gpu), 8 * 4096, 512, head=False)
    assert nobody.parts == eight.parts, "a process without a batch does nothing"


def test_the_start_of_a_command_may_take_longest() -> None:
    shapes, work = sim.shapes_of("OLMoE-1B-7B"), sim.Work()
    assert sim.plan_scores(shapes, machine(read=1e9, start=5.0), work).bound == "start"
    assert sim.plan_scores(shapes, machine(read=1e9, start=0.1), work).bound == "disk"


def test_attention_by_hand() -> None:
    """Mixtral-8x22B: 48 heads of 128; DeepSeek-V3: 128 of 192 for keys and 128 for values."""
    for name, layers, widths in (("Mixtral-8x22B", 56, 48 * 256), ("DeepSeek-V3", 61, 128 * 320)):
        shapes = sim.shapes_of(name)
        pairs = 2048 / 2
        flops = sim.walk_flops(shapes, 1, 2048, head=True) - 2 * shapes.active
        assert flops == pytest.approx(layers * 2 * widths * pairs)


def test_layers_of_a_plan_and_checksums_bound_what_they_do() -> None:
    shapes, work = sim.shapes_of("OLMoE-1B-7B"), sim.Work()
    times = [sim.plan_nmi(shapes, machine(nodes=n, nmi=1e9), work).seconds for n in (1, 9, 16, 64)]
    assert times == pytest.approx([16 * times[-1], 2 * times[-1], times[-1], times[-1]])
    applied = sim.apply(shapes, machine(digest=1e9), work)
    assert applied.bound == "checksum"
    assert applied.seconds == pytest.approx(applied.written / 1e9)
