"""Memory for weights, their way to another device, and a walk on a GPU against one on the CPU."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from families import token_ids
from moeprune.core.statistics import LayerStatistics
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.sites import MoESite
from moeprune.models.staging import Spare, Staging, unwritten
from moeprune.models.walk import Batch, Walk

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_staged_arrives(device: str) -> None:
    """Buffers are used again, for more and for fewer bytes, and nothing is overtaken."""
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(3 + 700 * (i % 4), generator=draw).bfloat16() for i in range(20)]
    targets = [torch.zeros(len(value), device=device) for value in values]
    with Staging(torch.device(device)) as staging:
        for target, value in zip(targets, values, strict=True):
            stored = staging.buffer(2 * len(value)).view(torch.bfloat16)
            stored.copy_(value)
            staging.copy(target, stored)
    for target, value in zip(targets, values, strict=True):
        torch.testing.assert_close(target.cpu(), value.float(), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (3, 1024, 701)])
def test_unwritten_tensors_are_as_any_other(shape: tuple[int, ...], device: str) -> None:
    """Small ones, and those in memory of their own: it lives as long as the last view."""
    tensor = unwritten(shape, torch.bfloat16, torch.device(device))
    assert tensor.shape == shape and tensor.is_contiguous() and tensor.device.type == device
    tensor.fill_(2)
    view = tensor[1:]
    del tensor
    assert torch.equal(view.float().cpu(), torch.full((max(0, shape[0] - 1), *shape[1:]), 2.0))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="other systems have none")
def test_spare_memory_is_used_again_when_no_view_is_left() -> None:
    spare, large = Spare(), (2, 1024, 1024)
    args = torch.bfloat16, torch.device("cpu")
    first, second = spare.unwritten(large, *args), spare.unwritten(large, *args)
    where = first.data_ptr(), second.data_ptr()
    view = first[1].view(torch.uint8)
    del first, second
    again = spare.unwritten(large, *args)
    assert again.data_ptr() == where[1]  # the other one is still in use
    other = spare.unwritten(large, *args)
    assert other.data_ptr() not in where
    view.fill_(7)
    other.fill_(1)
    again.fill_(1)
    assert bool((view == 7).all())
    del view, again
    assert spare.unwritten((3, 1024, 1024), *args).data_ptr() not in where  # of no use: given back
    assert len(spare._all) == 2
    spare.give_back()
    assert len(spare._all) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_layers_arrive_while_others_compute(device: str, tiny: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(tiny("olmoe"))
    there = LayeredModel(checkpoint, torch.bfloat16, device)
    here = LayeredModel(checkpoint, torch.bfloat16)
    ids = token_ids(4, 16, seed=1)
    batches = [Batch(ids, torch.arange(ids.numel()).view_as(ids))]
    with Walk(there, batches) as walk:
        for index in walk.standing():
            here.load_layer(index)
            pairs = zip(
                there.layers[index].named_parameters(), here.layers[index].parameters(), strict=True
            )
            for (name, moved), kept in pairs:
                assert torch.equal(moved.cpu(), kept), name
            walk.run()
            here.free_layer(index)


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_of_a_device_are_those_of_the_cpu(
    device: str, tiny: Callable[[str], Path]
) -> None:
    found: dict[str, dict[str, Tensor]] = {"cpu": {}, device: {}}
    ids = token_ids(8, 32, seed=2)
    batches = [Batch(ids, torch.arange(ids.numel()).view_as(ids))]
    for where, tensors in found.items():

        def visit(site: MoESite, sums: LayerStatistics, into: dict[str, Tensor] = tensors) -> bool:
            for name, tensor in sums.to_tensors().items():
                into[f"{site.shape.layer}.{name}"] = tensor.cpu()
            return False

        model = LayeredModel(Checkpoint.open(tiny("olmoe")), torch.float32, where)
        with Walk(model, batches) as walk:
            walk.layers(("outputs", "routing"), visit)
    assert found["cpu"] and found["cpu"].keys() == found[device].keys()
    for name, expected in found["cpu"].items():
        torch.testing.assert_close(found[device][name], expected, rtol=1e-3, atol=1e-4)
