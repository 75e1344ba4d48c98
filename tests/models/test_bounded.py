"""Walks within a budget of memory: the same numbers, whatever is given up for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from families import moe_model_types, token_ids
from moeprune.core.memory import Decision
from moeprune.models import walk as walking
from moeprune.models.bounds import Load
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.expert_ranges import whole_only
from moeprune.models.hidden import HiddenStates
from moeprune.models.loading import LayeredModel
from moeprune.models.walk import Batch, Walk

Tiny = Callable[[str], Path]

EVERYTHING = ("routing", "inputs", "hidden", "outputs", "router", "sample", "hidden-gram")
WHOLE = {"dbrx", "llama4_text", "longcat_flash", "zaya"}
"""Families whose experts are never loaded some at a time."""


def batches(padded: bool = True) -> list[Batch]:
    mask = (torch.arange(24) >= torch.tensor([5, 0])[:, None]).long() if padded else None
    keys = torch.arange(48).view(2, 24) * 7919 % 100_003
    return [
        Batch(token_ids(2, 24, seed=1), keys),
        Batch(token_ids(2, 24, seed=2), keys + 1, mask),
        Batch(token_ids(1, 9, seed=3), keys[:1, :9] + 2),
    ]


def opened(directory: Path) -> LayeredModel:
    return LayeredModel(Checkpoint.open(directory), torch.float32)


def run(
    model: LayeredModel, needs: Sequence[str], way: Decision | None, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """Logits and statistics of a walk that goes ``way``."""
    found: dict[str, Tensor] = {}

    def decided(model: LayeredModel, load: Load) -> tuple[Decision, HiddenStates | None]:
        assert way is not None
        stays = way.in_memory >= len(load.tokens)
        return way, None if stays else HiddenStates(None, way.in_memory, smallest=1)

    def visit(site: object, statistics: object) -> bool:
        parts = statistics.to_tensors()  # type: ignore[attr-defined]
        found.update({f"{statistics.shape.layer}.{k}": v.clone() for k, v in parts.items()})  # type: ignore[attr-defined]
        return False

    with monkeypatch.context() as patch:
        if way is not None:
            patch.setattr(walking, "bounded", decided)
        with Walk(model, batches(), 2, chunks=True) as walk:
            walk.layers(needs, visit)
            walk.logits(lambda index, value: found.update({f"logits {index}": value.clone()}))
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name, equal_nan=True)


FILED = Decision(in_memory=1, prefetch=False, workers=1, chunk=8)
CHUNKED = Decision(in_memory=0, prefetch=False, workers=2, chunk=3)


@pytest.mark.parametrize("model_type", moe_model_types())
def test_hidden_states_in_a_file(
    model_type: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prefetch, another number of workers, states in a file: logits bit for bit."""
    expected = run(opened(tiny(model_type)), (), None, monkeypatch)
    way = replace(FILED, chunk=10**9)
    assert_same(run(opened(tiny(model_type)), (), way, monkeypatch), expected)


@pytest.mark.parametrize("model_type", moe_model_types())
def test_experts_some_at_a_time(
    model_type: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and every sum, bit for bit those of the observed walk in one piece."""
    model = opened(tiny(model_type))
    why = whole_only(model)
    if why is not None or not model.sites:
        assert why is None or model_type in WHOLE, why
        return
    expected = run(model, EVERYTHING, None, monkeypatch)
    assert_same(run(opened(tiny(model_type)), EVERYTHING, CHUNKED, monkeypatch), expected)
