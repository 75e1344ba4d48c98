"""Routing over subsets of experts: a router's rule, found from what it did, and replayed.

A pruned router scores the experts that are left. To know its gates without running the model, the
rule by which logits become gates must be known. Nothing here reads a configuration: usual rules
are tried on the sampled tokens until one reproduces every choice and every gate that the block was
seen to make. If none does, the caller is told and nothing is guessed.

Axes: S sampled tokens, R router outputs (R >= E: rows beyond E are not experts'), E experts,
K selected per token, N subsets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from moeprune.core.shapes import LayerShape

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]

EXACT = 1e-4
"""Relative error up to which a gate counts as reproduced (float32 against float64)."""

ROUNDED = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""The same where all gates are numbers of a smaller type: a few roundings on their way."""

_TINY = 1e-6
_DROPPED = -torch.inf


@dataclass(frozen=True)
class RoutingRule:
    """How logits become a choice of experts and their gates.

    Attributes:
        shape: E, K and routing groups.
        score: what is made of the logits; a softmax is over all experts that are left.
        divided: whether the gates of the chosen are divided by their sum.
        factor: what all gates are multiplied by.
        bias_R: added to the scores for the choice alone; None if nothing is.
        scale_R: what the gate of each expert is multiplied by; None if it is not.
        best: how many of its best scores rank a routing group; 0 where groups do not matter.
        logarithm: whether the router's output was probabilities, whose logarithms are logits.
        early: whether the bias is added to the logits and not to their scores.
    """

    shape: LayerShape
    score: Score
    divided: bool
    factor: float = 1.0
    bias_R: Tensor | None = None
    scale_R: Tensor | None = None
    best: int = 0
    logarithm: bool = False
    early: bool = False

    @property
    def ordered(self) -> bool:
        """Whether the order of two experts for a token never depends on the others."""
        return not self.best and (self.bias_R is None or self.early or self.score != "softmax")


class SubsetRouter:
    """The gates that a router with this rule gives when only some experts are left.

    Args:
        rule: see ``fit_rule``.
        z_SR: the router's first output for the sampled tokens.

    Computed in float64. Equal scores are decided by the lower id.
    """

    def __init__(self, rule: RoutingRule, z_SR: Tensor) -> None:
        self.rule = rule
        self._z_SR = _logits(rule, z_SR)
        self._rank_SR: Tensor | None = None
        if rule.ordered:
            order_SR = torch.argsort(self._choice(self._z_SR), dim=1, descending=True, stable=True)
            R = order_SR.shape[1]
            # -rank as a score: what is left is chosen without computing any score again
            ranks_SR = torch.arange(0, -R, -1, dtype=torch.float32).expand_as(order_SR)
            self._rank_SR = torch.empty(order_SR.shape).scatter_(1, order_SR, ranks_SR)

    @property
    def tokens(self) -> int:
        """S."""
        return len(self._z_SR)

    def gates(self, kept_NE: Tensor) -> Tensor:
        """Gates [N, S, E], 0 where an expert is not chosen, for N subsets (True: left).

        The bias and the softmax see the experts that are left, and the outputs beyond E always.
        """
        N, E = kept_NE.shape
        R = self._z_SR.shape[1]
        left_NR = torch.cat((kept_NE, kept_NE.new_ones(N, R - E)), dim=1)
        index_NSK = self.chosen(left_NR)
        gate_NSK = self._gate(index_NSK, left_NR)
        gate_NSR = gate_NSK.new_zeros(N, self.tokens, R).scatter_(2, index_NSK, gate_NSK)
        return gate_NSR[..., :E]

    def chosen(self, left_NR: Tensor) -> Tensor:
        """The K outputs chosen by each token, [N, S, K], of those that are left."""
        if self._rank_SR is not None:
            choice_NSR = self._rank_SR.masked_fill(~left_NR[:, None], _DROPPED)
        else:
            z_NSR = self._z_SR.masked_fill(~left_NR[:, None], _DROPPED)
            choice_NSR = self._choice(z_NSR).masked_fill_(~left_NR[:, None], _DROPPED)
            choice_NSR = self._limited(choice_NSR)
        return choice_NSR.topk(self.rule.shape.top_k, dim=2).indices

    def _choice(self, z_XR: Tensor) -> Tensor:
        """What the top-k is taken of."""
        rule = self.rule
        if rule.bias_R is None:
            return z_XR.clone()  # every score grows with the logit
        base_XR = z_XR if rule.early else _scores(z_XR, rule.score)
        return base_XR + rule.bias_R.double()

    def _limited(self, choice_NSR: Tensor) -> Tensor:
        """The same without the groups that a token may not choose from."""
        shape, best = self.rule.shape, self.rule.best
        if not best:
            return choice_NSR
        grouped = choice_NSR[..., : shape.experts].reshape(*choice_NSR.shape[:2], shape.groups, -1)
        rank_NSG = grouped.topk(best, dim=3).values.sum(dim=3)
        allowed = torch.zeros_like(rank_NSG, dtype=torch.bool).scatter_(
            2, rank_NSG.topk(shape.top_groups, dim=2).indices, True
        )
        limited = grouped.masked_fill(~allowed[..., None], _DROPPED).flatten(2)
        return torch.cat((limited, choice_NSR[..., shape.experts :]), dim=2)

    def _gate(self, index_NSK: Tensor, left_NR: Tensor) -> Tensor:
        rule = self.rule
        z_NSK = self._z_SR.expand(len(left_NR), -1, -1).gather(2, index_NSK)
        if rule.score == "softmax" and rule.divided:
            gate_NSK = z_NSK.softmax(dim=2)  # the common denominator cancels
        elif rule.score == "softmax":
            z_NSR = self._z_SR.masked_fill(~left_NR[:, None], _DROPPED)
            gate_NSK = (z_NSK - z_NSR.logsumexp(dim=2, keepdim=True)).exp()
        else:
            gate_NSK = _scores(z_NSK, rule.score)
            if rule.divided:
                gate_NSK = gate_NSK / gate_NSK.sum(dim=2, keepdim=True)
        if rule.scale_R is not None:
            gate_NSK = gate_NSK * rule.scale_R.double()[index_NSK]
        return gate_NSK * rule.factor


def fit_rule(
    shape: LayerShape,
    z_SR: Tensor,
    index_SK: Tensor,
    gate_SK: Tensor,
    tables: Mapping[str, Tensor] | None = None,
) -> RoutingRule | None:
    """The simplest rule that reproduces all choices and gates of the sample; None if none does.

    A choice is reproduced if the chosen experts have the K best scores (in whichever order, equal
    scores in whichever way); a gate within ``EXACT``, or ``ROUNDED`` if all gates are numbers of
    a smaller type, relative, or 1e-6 absolute.

    Args:
        shape: the layer's sizes.
        z_SR: the router's first output.
        index_SK: what the block chose; ids from R on chose nothing.
        gate_SK: their gates.
        tables: other tensors of the router with one entry per output [R], by name: candidates for
            a bias of the choice or a scale of the gates.
    """
    S, R = z_SR.shape
    if not S or shape.experts > R or index_SK.shape != (S, shape.top_k):
        return None
    if int(index_SK.max()) >= R or not bool(torch.isfinite(z_SR).all()):
        return None
    for rule in _candidates(shape, z_SR, tables or {}):
        found = _fitted(rule, z_SR, index_SK, gate_SK.double())
        if found is not None:
            return found
    return None


def _candidates(
    shape: LayerShape, z_SR: Tensor, tables: Mapping[str, Tensor]
) -> Iterator[RoutingRule]:
    """Rules from simple to special."""
    R = z_SR.shape[1]
    known = [table.reshape(-1) for _, table in sorted(tables.items()) if table.numel() == R]
    sums_SR = z_SR.double().sum(dim=1)
    probabilities = bool((z_SR >= 0).all()) and bool(((sums_SR - 1).abs() < 1e-2).all())
    size = shape.experts // shape.groups
    groups = [best for best in (0, 2, 1) if best <= size and (shape.groups > 1 or not best)]
    for bias, scale, best in product((None, *known), (None, *known), groups):
        if bias is not None and bias is scale:
            continue
        scores: tuple[Score, ...] = ("softmax", "sigmoid", "sqrtsoftplus")
        for score, divided in product(scores, (True, False)):
            if probabilities and score == "softmax":
                yield RoutingRule(shape, score, divided, 1.0, bias, scale, best, True)
            yield RoutingRule(shape, score, divided, 1.0, bias, scale, best)
            if bias is not None:
                yield RoutingRule(shape, score, divided, 1.0, bias, scale, best, early=True)


def _fitted(
    rule: RoutingRule, z_SR: Tensor, index_SK: Tensor, gate_SK: Tensor
) -> RoutingRule | None:
    """``rule`` with its factor if it reproduces the sample."""
    tolerance = EXACT
    for dtype, error in ROUNDED.items():
        if bool((gate_SK.to(dtype).double() == gate_SK).all()):
            tolerance = error
    router = SubsetRouter(rule, z_SR)
    all_NR = torch.ones(1, z_SR.shape[1], dtype=torch.bool)
    gate = router._gate(index_SK[None], all_NR)[0]
    factor = float(gate_SK.sum() / gate.sum())
    if abs(factor - 1) < tolerance:
        factor = 1.0
    if not torch.allclose(gate * factor, gate_SK, rtol=tolerance, atol=_TINY):
        return None
    choice_SR = router._choice(router._z_SR)
    limited_SR = router._limited(choice_SR[None])[0]
    best_SK = limited_SR.topk(rule.shape.top_k, dim=1).values
    seen_SK = choice_SR.gather(1, index_SK).sort(dim=1, descending=True).values
    same = torch.allclose(seen_SK, best_SK, rtol=tolerance, atol=_TINY)
    return replace(rule, factor=factor) if same else None


def _logits(rule: RoutingRule, z_SR: Tensor) -> Tensor:
    z_SR = z_SR.double()
    return z_SR.clamp(min=1e-38).log() if rule.logarithm else z_SR


def _scores(z: Tensor, score: Score) -> Tensor:
    if score == "softmax":
        return z.softmax(dim=-1)
    if score == "sigmoid":
        return z.sigmoid()
    return torch.nn.functional.softplus(z).sqrt()
