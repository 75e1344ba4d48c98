"""Statistics from inside the experts: an experts implementation that also feeds accumulators.

It is registered with transformers' ``ExpertsInterface`` and receives the very indices and weights
that the block hands to its experts, so no router is ever recomputed. It is switched on for one
layer at a time, and each batch collects into its own accumulators: which threads run which batches
makes no difference.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from moeprune.core.accumulators import BlockRows, ExpertRows
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import UnsupportedModelError
from moeprune.models.sites import MoESite

IMPLEMENTATION = "moeprune_observe"
_ROW_BLOCK = 64


@dataclass
class Collector:
    """Where one batch of one layer goes.

    Attributes:
        statistics: the sums of this batch.
        key_T: one number per token, padding included.
        real_T: True where a token is no padding; None if none is.
    """

    statistics: LayerStatistics
    key_T: Tensor
    real_T: Tensor | None
    logits_TR: Tensor | None = None
    calls: int = 0


class _Active(threading.local):
    collector: Collector | None = None


_ACTIVE = _Active()


@contextmanager
def collecting(collector: Collector | None) -> Iterator[None]:
    """Send what the experts see in this thread to ``collector``."""
    _ACTIVE.collector = collector
    try:
        yield
    finally:
        _ACTIVE.collector = None


@contextmanager
def observed(site: MoESite, router_output: bool) -> Iterator[None]:
    """Switch one block to the observing implementation, and back."""
    config: Any = site.experts.config
    before = config._experts_implementation
    handle = site.router.register_forward_hook(_keep_logits) if router_output else None
    config._experts_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._experts_implementation = before
        if handle is not None:
            handle.remove()


def _keep_logits(module: nn.Module, args: Any, output: Any) -> None:
    collector = _ACTIVE.collector
    if collector is not None:
        first = output[0] if isinstance(output, (tuple, list)) else output
        collector.logits_TR = first.reshape(-1, first.shape[-1])


def observe_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts' forward, expert by expert, with every intermediate shown to the collector.

    Same arithmetic as transformers' ``grouped_mm`` implementation: each slot's output times its
    gate, then the sum over a token's K slots.
    """
    collector = _ACTIVE.collector
    if collector is None or len(hidden_states) != len(collector.key_T) or collector.calls:
        raise UnsupportedModelError("the experts were not called once with all tokens of the batch")
    collector.calls += 1
    T, K = top_k_index.shape
    E = int(self.num_experts)
    flat_S = top_k_index.reshape(-1)
    order_S = torch.argsort(flat_S, stable=True)
    counts = torch.bincount(flat_S, minlength=E)[:E].tolist()  # ids >= E are slots without expert
    gates_S = top_k_weights.reshape(-1)
    out_SH = hidden_states.new_zeros(T * K, hidden_states.shape[1])
    start = 0
    for expert, n in enumerate(counts):
        if not n:
            continue
        slots_n = order_S[start : start + n]
        start += n
        tokens_n = slots_n // K
        gate_n = gates_S[slots_n]
        x_nH, h_nI, f_nH = _expert(self, expert, hidden_states, tokens_n)
        out_SH[slots_n] = (f_nH * gate_n[:, None]).to(out_SH.dtype)
        _collect(collector, expert, tokens_n, (x_nH, gate_n.float(), h_nI, f_nH))
    _collect_block(collector, hidden_states, top_k_index, top_k_weights.float())
    return out_SH.view(T, K, -1).sum(dim=1)


def _expert(
    experts: Any, e: int, hidden_states: Tensor, tokens_n: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One expert's inputs, hidden activations and outputs, by transformers' own flags.

    Half-precision matrix products on the CPU are compiled per shape, so their rows are rounded up
    to a multiple of ``_ROW_BLOCK``: a few shapes are compiled instead of one per expert and batch.
    """
    n = len(tokens_n)
    if hidden_states.device.type == "cpu" and hidden_states.dtype != torch.float32:
        tokens_n = torch.cat((tokens_n, tokens_n[:1].expand(-n % _ROW_BLOCK)))
    x_nH = hidden_states[tokens_n]

    def linear(x: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)[e]
        y = x @ weight if experts.is_transposed else nn.functional.linear(x, weight)
        return y + getattr(experts, f"{name}_bias")[e] if experts.has_bias else y

    if experts.has_gate:
        h_nI = experts._apply_gate(linear(x_nH, "gate_up_proj"))
    else:
        h_nI = experts.act_fn(linear(x_nH, "up_proj"))
    f_nH = linear(h_nI, "down_proj")
    f_nH = experts.post_expert_norm(f_nH) if experts.has_post_expert_norm else f_nH
    return x_nH[:n], h_nI[:n], f_nH[:n]


def _collect(collector: Collector, expert: int, tokens_n: Tensor, rows: tuple[Tensor, ...]) -> None:
    if collector.real_T is not None:
        real_n = collector.real_T[tokens_n]
        rows = tuple(tensor[real_n] for tensor in rows)
    if len(rows[0]):
        collector.statistics.add_expert(ExpertRows(expert, *rows))


def _collect_block(collector: Collector, x_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> None:
    logits_TR, key_T = collector.logits_TR, collector.key_T
    if collector.real_T is not None:
        real = collector.real_T
        x_TH, index_TK, gate_TK, key_T = x_TH[real], index_TK[real], gate_TK[real], key_T[real]
        logits_TR = None if logits_TR is None else logits_TR[real]
    collector.statistics.add_block(BlockRows(x_TH, index_TK, gate_TK, logits_TR, key_T))


ExpertsInterface.register(IMPLEMENTATION, observe_experts)
