"""From what is known of a layer to the error of its output for any subset of its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.core.accumulators import Routing, TokenSample
from moeprune.core.budget import least_kept, removal_range
from moeprune.core.method import Block, Context, LayerView
from moeprune.core.ops.reconstruction import Norm, Reconstruction, finite_rows, output_gram
from moeprune.core.ops.routing import SubsetRouter, fit_rule
from moeprune.core.ops.subsets import Choice
from moeprune.errors import BudgetError, MoepruneError, UnsupportedModelError

NEEDS = ("routing", "sample")
"""The accumulators that this module reads."""


def followed_router(view: LayerView) -> SubsetRouter:
    """The layer's routing on the sampled tokens, for any subset of its experts.

    Raises:
        UnsupportedModelError: no known rule gives the choices and gates that were observed.
        MoepruneError: there are no sampled tokens.
    """
    sample = view.need().part(TokenSample)
    shape = view.shape
    if not len(sample.key_S):
        raise MoepruneError(f"layer {shape.layer}: no token was sampled", "give more text")
    tables = {} if view.router is None else view.router()
    rule = fit_rule(shape, sample.z_SR, sample.index_SK, sample.gate_SK, tables)
    if rule is None:
        raise UnsupportedModelError(
            f"layer {shape.layer}: its router could not be followed (no known rule gives the "
            "gates that were observed)",
            "use a method that runs no subsets of experts, for example reap or mone",
        )
    if bool(((sample.index_SK >= shape.experts) & (sample.gate_SK > 0)).any()):
        raise UnsupportedModelError(
            f"layer {shape.layer}: tokens choose what is no expert, whose share is not followed",
            "use a method that runs no subsets of experts, for example reap or mone",
        )
    return SubsetRouter(rule, sample.z_SR)


def reconstruction(view: LayerView, context: Context, norm: Norm = "frobenius") -> Reconstruction:
    """The error of the layer's output on the sampled tokens as a function of the experts left.

    The target is the layer's own output with all experts; where the layers before it are edited
    already and ``view.dense`` is given, its output in the unedited model.

    Cost: every expert runs on every sampled token (E / K times the work of routing them), and
    S * E^2 inner products of width H; S * E^2 numbers of 8 bytes are kept.

    Raises:
        UnsupportedModelError: the layer's router could not be followed.
    """
    router = followed_router(view)
    block, E = _block(view), view.shape.experts
    sample = view.need().part(TokenSample)
    full_SE = router.gates(torch.ones(1, E, dtype=torch.bool))[0]
    target_SH = None if view.dense is None else _dense_output(view, block, sample)
    gram = output_gram(block.outputs, sample.x_SH, full_SE, target_SH)
    if gram.broken:
        context.warn(
            f"layer {view.shape.layer}: experts {list(gram.broken)} gave outputs that are not "
            "finite; they count as zeros"
        )
    return Reconstruction(router, gram, norm)


def _block(view: LayerView) -> Block:
    block = view.need_block()
    if block.gated_inputs:
        raise UnsupportedModelError(
            f"layer {view.shape.layer}: its router scales what goes into an expert, so outputs "
            "cannot be weighed afterwards",
            "use a method that runs no subsets of experts, for example reap or mone",
        )
    return block


def _dense_output(view: LayerView, block: Block, sample: TokenSample) -> Tensor:
    """What the layer gives for the same tokens in the unedited model, [S, H]."""
    assert view.dense is not None
    dense = view.dense.part(TokenSample)
    if not torch.equal(dense.key_S, sample.key_S):
        raise MoepruneError(f"layer {view.shape.layer}: the two samples are not of the same tokens")
    target_SH = torch.zeros_like(dense.x_SH, dtype=torch.float64)
    for expert in range(view.shape.experts):
        tokens_n, slots_n = torch.nonzero(dense.index_SK == expert, as_tuple=True)
        if len(tokens_n):
            f_nH = finite_rows(block.outputs(expert, dense.x_SH[tokens_n]).double())
            gate_n = dense.gate_SK[tokens_n, slots_n].double()
            target_SH.index_add_(0, tokens_n, f_nH * gate_n[:, None])
    return target_SH


def choice_of(view: LayerView, context: Context, remove: int) -> Choice:
    """Which ``remove`` of the layer's experts may go.

    Raises:
        BudgetError: too many experts are pinned or forbidden for that number.
    """
    shape, multiple = view.shape, context.budget.multiple_of
    pinned, forbidden = context.pinned_in(shape.layer), context.forbidden_in(shape.layer)
    least = least_kept(shape, 0, multiple)
    if pinned or forbidden:
        low, high = removal_range(shape, least, multiple, pinned, forbidden)
        if not low <= remove <= high:
            raise BudgetError(
                f"layer {shape.layer}: the budget removes {remove} experts, but with those that "
                f"are pinned and forbidden it can be {low} to {high}",
                "pin or forbid fewer experts",
            )
    counts = tuple(view.need().part(Routing).count_E.tolist())
    return Choice(shape.experts, remove, shape.groups, pinned, forbidden, counts)


def alone(error: Reconstruction) -> tuple[float, ...]:
    """The error if one expert goes and all others stay, for each expert; 0 if none can go."""
    E = error.experts
    if error.router.rule.shape.top_k >= E:
        return (0.0,) * E
    return tuple(error.losses(Choice(E, 1).mask([(e,) for e in range(E)])).tolist())


def skip_threshold(router: SubsetRouter, kept: tuple[int, ...]) -> float | None:
    """Median over tokens of the second gate divided by the first, with the experts that stay.

    The threshold of dynamic skipping (arXiv 2402.14800): a ratio of gates is the ratio of the
    probabilities before they are divided by their sum. None if no token chooses two experts.
    """
    shape = router.rule.shape
    if shape.top_k < 2:
        return None
    left_1E = torch.zeros(1, shape.experts, dtype=torch.bool)
    left_1E[0, list(kept)] = True
    two_S2 = router.gates(left_1E)[0].topk(2, dim=1).values
    return float((two_S2[:, 1] / two_S2[:, 0]).quantile(0.5))
