"""Experts that are read into their places: the values of transformers' conversion, no copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeprune.errors import CheckpointError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.fused import find_fused
from moeprune.models.loading import LayeredModel

Tiny = Callable[..., Any]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v2"])
def test_values_are_those_of_the_conversion(
    family: str, dtype: torch.dtype, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = (LayeredModel(Checkpoint.open(tiny(family)), dtype) for _ in range(2))
    index = max(ours.sites)
    names = {f.name for f in ours.in_place([key for key, _, _ in ours.stored(index)])}
    assert len(names) == 2  # gate and up together, and down
    ours.load_layer(index)
    monkeypatch.setattr(plain, "in_place", lambda keys: [])
    plain.load_layer(index)
    expected = dict(plain.layers[index].named_parameters())
    for name, value in ours.layers[index].named_parameters():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


def test_incomplete_experts_are_left_to_the_conversion(tiny: Tiny) -> None:
    """Which then says what is wrong."""
    model = LayeredModel(Checkpoint.open(tiny("olmoe")))
    keys = [key for key, _, _ in model.stored(0)]
    shapes = {key: model.checkpoint.tensors[key].shape for key in keys}
    names = {key: model.target(key) for key in keys if "experts.1.up_proj" not in key}
    found = find_fused(names, model.converter, shapes, model.model.state_dict())
    assert [f.name.rpartition(".")[2] for f in found] == ["down_proj"]


def test_a_file_that_became_shorter(tiny: Tiny, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny("olmoe"), copy)
    model = LayeredModel(Checkpoint.open(copy))
    shard = model.checkpoint.tensors[model.stored(0)[0][0]].file
    with shard.open("r+b") as handle:
        handle.truncate(1024)
    with pytest.raises(CheckpointError):
        model.load_layer(0)
