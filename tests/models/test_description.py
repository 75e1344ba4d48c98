"""Routing in words, found by running routers on random inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from families import moe_model_types
from moeprune.models import quirks
from moeprune.models.abilities import abilities
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.description import routing_kind, selection, shared_parameters
from moeprune.models.loading import LayeredModel

Tiny = Callable[[str], Path]


@pytest.mark.parametrize(
    ("model_type", "gates", "chosen"),
    [
        ("mixtral", "softmax over the chosen experts", "top 2 of 8"),
        ("olmoe", "softmax over all experts", "top 2 of 8"),
        ("gpt_oss", "softmax over the chosen experts", "top 2 of 8 with bias"),
        (
            "deepseek_v3",
            "sigmoid, divided by its sum, times 2.5",
            "top 2 of 8 among the best 1 of 2 groups with e_score_correction_bias",
        ),
        ("dots1", "sigmoid", "top 2 of 8 with e_score_correction_bias"),
        ("phimoe", "its own (PhimoeTopKRouter)", "top 2 of 8"),
    ],
)
def test_routing(model_type: str, gates: str, chosen: str, tiny: Tiny) -> None:
    model = LayeredModel(Checkpoint.open(tiny(model_type)))
    site = max(model.sites.items())[1]
    assert routing_kind(site) == gates
    assert selection(site, model.config) == chosen
    assert all(p.is_meta for p in site.router.parameters()), "the model itself is left alone"


@pytest.mark.parametrize("model_type", moe_model_types())
def test_every_router_is_described(model_type: str, tiny: Tiny) -> None:
    for site in LayeredModel(Checkpoint.open(tiny(model_type))).sites.values():
        gates = routing_kind(site)
        assert gates.startswith(("softmax", "sigmoid")) or gates == (
            f"its own ({type(site.router).__name__})"
        )


def test_the_random_numbers_of_others_are_left_alone(tiny: Tiny) -> None:
    site = max(LayeredModel(Checkpoint.open(tiny("mixtral"))).sites.items())[1]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    routing_kind(site)
    assert torch.equal(torch.get_rng_state(), before)


def test_shared_experts(tiny: Tiny) -> None:
    model = LayeredModel(Checkpoint.open(tiny("qwen2_moe")))
    site = max(model.sites.items())[1]
    shared = [
        p.numel() for name, p in model.layers[-1].named_parameters() if "mlp.shared_expert" in name
    ]
    assert shared_parameters(model.model, site) == sum(shared) > 0
    other = LayeredModel(Checkpoint.open(tiny("mixtral")))
    assert shared_parameters(other.model, max(other.sites.items())[1]) == 0


@pytest.mark.parametrize("model_type", moe_model_types())
def test_abilities_are_those_of_the_quirks(model_type: str, tiny: Tiny) -> None:
    """Each kind of edit is either possible or comes with a reason."""
    found = abilities(LayeredModel(Checkpoint.open(tiny(model_type))))
    if model_type in quirks.REFUSED:
        assert found.reason is not None and quirks.REFUSED[model_type] in found.reason
        assert all(text.startswith("no: ") for text in found.can.values())
        return
    assert found.reason is None
    for kind, refused in (
        ("replace by constants", quirks.NOVICES_REFUSED),
        ("other counts per layer", quirks.UNEVEN_REFUSED),
    ):
        if model_type in refused:
            assert found.can[kind] == f"no: {refused[model_type]}"
        else:
            assert found.can[kind].startswith("yes")
    assert ("--pad" in found.can["other counts per layer"]) == (model_type in quirks.PADDABLE)
