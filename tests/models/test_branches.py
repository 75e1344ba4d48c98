"""Edited versions of a model side by side in one walk, against whole models, edited alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import load_tiny, token_ids
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.statistics import LayerStatistics
from moeprune.models.branches import Branch, BranchedWalk
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import token_keys
from moeprune.models.loading import LayeredModel
from moeprune.models.walk import Batch, Walk
from support import experts_masked, logits, outputs_replaced, some_experts

Tiny = Callable[[str], Path]

HELD = [token_ids(2, 16, seed=4), token_ids(1, 16, seed=5)]
SEEN = [token_ids(2, 16, seed=6), token_ids(2, 16, seed=7)]


def batches(ids: list[Tensor]) -> list[Batch]:
    return [Batch(part, token_keys(part)) for part in ids]


@pytest.mark.parametrize("kind", ["zaya", "qwen4_exp_text"])
def test_every_branch_is_the_edited_model(kind: str, tiny: Tiny) -> None:
    """One layer at a time, all of them, and branches that leave the model as it is."""
    model = LayeredModel(Checkpoint.open(tiny(kind)), torch.float32)
    layers = sorted(model.sites)
    keep = {
        index: some_experts(site.shape, site.shape.experts // site.shape.groups // 2)
        for index, site in model.sites.items()
    }
    branches = [Branch({index: "half"}) for index in layers]
    branches += [Branch(dict.fromkeys(layers, "half")), Branch({layers[-1]: "not tried"})]

    def decide(site: Any, statistics: LayerStatistics | None) -> dict[str, LayerPlan]:
        assert statistics is None, "there is nothing to observe"
        index = site.shape.layer
        return {"half": LayerPlan(index, site.shape.experts, keep[index])}

    walk = BranchedWalk(model, [], 1, held=batches(HELD), branches=branches, decide=decide)
    with walk:
        walk.layers(("routing",))
        found = [list(walk.held_logits(index)) for index in range(len(HELD))]
    whole = load_tiny(tiny(kind))
    for ids, (own, *edited) in zip(HELD, found, strict=True):
        plain = logits(whole, ids)
        torch.testing.assert_close(own, plain, rtol=0, atol=1e-5)
        for branch, got in zip(branches[:-1], edited, strict=False):
            with experts_masked(whole, {index: keep[index] for index in branch.edits}):
                want = logits(whole, ids)
            assert (want - plain).abs().max() > 0.01
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert torch.equal(edited[-1], own)
    # and nothing of it is left
    with Walk(model, batches(HELD), 1) as after:
        after.layers()
        assert torch.equal(after.logits_of(0), found[0][0])


def test_observes_beside_constants(tiny: Tiny) -> None:
    """Held-out text leaves no trace in the statistics; parts add up to them."""
    model = LayeredModel(Checkpoint.open(tiny("mixtral")), torch.float32)
    first = min(model.sites)
    total: dict[int, LayerStatistics] = {}
    parts: dict[int, list[int]] = {}
    vectors = {expert: torch.full((32,), 0.1 * expert) for expert in (1, 4)}

    def decide(site: Any, statistics: LayerStatistics | None) -> dict[str, LayerPlan]:
        assert statistics is not None
        total[site.shape.layer] = statistics
        keep = tuple(e for e in range(site.shape.experts) if e not in vectors)
        table_NH = torch.stack([*vectors.values()])
        plan = LayerPlan(site.shape.layer, site.shape.experts, keep, (1, 4), novices_NH=table_NH)
        return {"constants": plan}

    def part(site: Any, index: int, statistics: LayerStatistics) -> None:
        # the sums themselves are taken over when the next batch is added
        parts.setdefault(site.shape.layer, []).append(statistics.tokens)

    with BranchedWalk(
        model,
        batches(SEEN),
        2,
        held=batches(HELD),
        branches=[Branch({first: "constants"})],
        decide=decide,
        part=part,
    ) as walk:
        walk.layers(("routing", "outputs"))
        own, edited = walk.held_logits(0)
    whole = load_tiny(tiny("mixtral"))
    with outputs_replaced(whole, {first: vectors}):
        torch.testing.assert_close(edited, logits(whole, HELD[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(own, logits(whole, HELD[0]), rtol=0, atol=1e-5)
    with torch.no_grad():
        states = whole(torch.cat(HELD), output_hidden_states=True).hidden_states
    squares = [float(x.square().sum(-1).mean()) for x in states[1:-1]]  # the last is normalised
    assert walk.squares[:-1] == pytest.approx(squares, rel=1e-5)
    for layer, statistics in total.items():
        assert statistics.tokens == sum(ids.numel() for ids in SEEN)
        assert parts[layer] == [ids.numel() for ids in SEEN]
