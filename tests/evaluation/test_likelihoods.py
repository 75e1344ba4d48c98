"""Log-likelihoods of continuations: what is asked before the first walk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig

from moeprune.evaluation import likelihood
from moeprune.evaluation.likelihood import Pair, likelihoods


def test_a_budget_is_held_against_the_pass_of_the_largest_batch_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last pass has fewer batches than the first, but one of longer text."""
    asked: list[list[tuple[int, int]]] = []

    def walk(*_: Any, **__: Any) -> Any:
        raise InterruptedError

    monkeypatch.setattr(likelihood, "_BATCHES_PER_WALK", 2)
    monkeypatch.setattr(likelihood, "share", lambda _, load: asked.append(list(load.tokens)))
    monkeypatch.setattr(likelihood, "Walk", walk)
    model: Any = SimpleNamespace(
        config=OlmoeConfig(), dtype=torch.float32, device=torch.device("cpu"), layers=[]
    )
    pairs = [Pair((1,) * length, (2,)) for length in (3, 4, 60)]
    with pytest.raises(InterruptedError):
        likelihoods({"it": model}, [[pair] for pair in pairs], 100, batch_size=1)
    assert asked == [[(1, 3), (1, 4)], [(1, 60)]]
