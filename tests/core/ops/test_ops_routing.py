"""Routing over subsets: every family's own router, with experts masked, is the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from families import moe_model_types, tiny_model, token_ids
from methods.conftest import watch
from moeprune.core.ops.routing import RoutingRule, SubsetRouter, fit_rule
from moeprune.core.shapes import LayerShape
from moeprune.models import quirks
from moeprune.models.loading import find_layers
from moeprune.models.sites import MoESite, find_sites
from moeprune.models.special import describe
from support import experts_masked, per_expert_tensors, some_experts

REFUSED = {"inkling_text", "phimoe", "zaya"}
"""Families whose routers follow a rule of their own."""

UNSEEN = {"doge", "jetmoe", "llama4_text"}
"""Families whose experts are not told what the router has chosen, or that are not pruned at all."""


def logits_of(site: MoESite, kept: list[Tensor]) -> None:
    """Append a router's logits whenever it runs."""

    def keep(module: torch.nn.Module, args: object, output: object) -> None:
        position = quirks.LOGITS_POSITION.get(type(module).__name__, 0)
        logits = output[position] if isinstance(output, (tuple, list)) else output
        assert isinstance(logits, Tensor)
        kept.append(logits.reshape(-1, logits.shape[-1]).float())

    site.router.register_forward_hook(keep)


@pytest.mark.parametrize("family", sorted(set(moe_model_types()) - UNSEEN))
def test_masked_routers_give_the_gates_that_the_rule_says(family: str) -> None:
    model = tiny_model(family)
    describe(model)
    sites = find_sites(model, find_layers(model)[0])
    site = sites[max(sites)]
    shape, ids = site.shape, token_ids(4, 40)
    model.requires_grad_(False)
    z: list[Tensor] = []
    logits_of(site, z)
    seen = watch(model, ids)[shape.layer]
    beside = per_expert_tensors(model, site.experts_name)
    tables = {name: tensor for name, tensor in beside if tensor.numel() == z[0].shape[1]}
    if hasattr(site.router, "per_expert_scale"):
        tables["per_expert_scale"] = site.router.per_expert_scale
    rule = fit_rule(shape, z[0], seen.index_TK, seen.gate_TK, tables)
    if family in REFUSED:
        assert rule is None
        return
    assert rule is not None
    router = SubsetRouter(rule, z[0])
    for seed in range(2):
        per_group = max(shape.experts // shape.groups // 2, 1 + (shape.groups > 1))
        kept = some_experts(shape, max(per_group, shape.top_k // shape.groups), seed)
        with experts_masked(model, {shape.layer: kept}):
            masked = watch(model, ids)[shape.layer]
        left_1E = torch.zeros(1, shape.experts, dtype=torch.bool)
        left_1E[0, list(kept)] = True
        gates_SE = router.gates(left_1E)[0]
        expected_SR = torch.zeros(len(z[0]), z[0].shape[1]).scatter_(
            1, masked.index_TK, masked.gate_TK
        )
        torch.testing.assert_close(
            gates_SE.float(), expected_SR[:, : shape.experts], rtol=2e-4, atol=2e-6
        )


SHAPE = LayerShape(layer=0, experts=6, top_k=2, hidden=8, intermediate=12)


def sample(tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, choices and gates of a plain softmax router."""
    z_SR = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(4))
    gate_SK, index_SK = z_SR.softmax(dim=1).topk(2, dim=1)
    return z_SR, index_SK, gate_SK


def test_what_no_rule_gives_is_not_followed() -> None:
    z_SR, index_SK, gate_SK = sample()
    assert fit_rule(SHAPE, z_SR, index_SK, gate_SK) is not None
    assert fit_rule(SHAPE, z_SR, index_SK, gate_SK.square()) is None
    one_off = gate_SK.clone()
    one_off[7, 1] *= 1.001
    assert fit_rule(SHAPE, z_SR, index_SK, one_off) is None
    other_choice = index_SK.clone()
    other_choice[3] = z_SR[3].argsort()[:2]
    other_gate = gate_SK.clone()
    other_gate[3] = z_SR.softmax(dim=1)[3, other_choice[3]]
    assert fit_rule(SHAPE, z_SR, other_choice, other_gate) is None


def test_nothing_is_followed_without_logits_or_tokens() -> None:
    z_SR, index_SK, gate_SK = sample()
    assert fit_rule(SHAPE, z_SR[:, :0], index_SK, gate_SK) is None
    assert fit_rule(SHAPE, z_SR[:0], index_SK[:0], gate_SK[:0]) is None
    assert fit_rule(SHAPE, z_SR.log(), index_SK, gate_SK) is None  # not finite


def test_gates_of_half_precision_are_reproduced_within_their_rounding() -> None:
    z_SR, index_SK, gate_SK = sample()
    assert fit_rule(SHAPE, z_SR, index_SK, gate_SK.bfloat16().float()) is not None
    assert fit_rule(SHAPE, z_SR, index_SK, gate_SK.half().float()) is not None
    assert fit_rule(SHAPE, z_SR, index_SK, (gate_SK * (1 + z_SR[:, :2] / 99)).half()) is None
    assert fit_rule(SHAPE, z_SR, index_SK, (gate_SK * 1.05).bfloat16().float()) is not None
    assert fit_rule(SHAPE, z_SR, index_SK, gate_SK.sqrt().bfloat16().float()) is None


def test_equal_logits_are_decided_by_the_lower_id() -> None:
    router = SubsetRouter(RoutingRule(SHAPE, "softmax", True), torch.zeros(3, 6))
    left_2E = torch.tensor([[True] * 6, [False, True, False, True, True, True]])
    gates_2SE = router.gates(left_2E)
    assert gates_2SE[0, :, :2].eq(0.5).all() and not gates_2SE[0, :, 2:].any()
    assert gates_2SE[1, :, [1, 3]].eq(0.5).all() and gates_2SE[1].sum() == 3
