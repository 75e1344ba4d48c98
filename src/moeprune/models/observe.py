"""Statistics from inside the experts: an experts implementation that also feeds accumulators.

It is registered with transformers' ``ExpertsInterface`` and receives the very indices and weights
that the block hands to its experts, so no router is ever recomputed. It is switched on for one
layer at a time, and each batch collects into its own accumulators: which threads run which batches
makes no difference. Experts that do not follow the interface get a forward of their own here for
that time (``_SPECIAL``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from moeprune.core.accumulating import Origin
from moeprune.core.accumulators import BlockRows, ExpertRows
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.sites import MoESite
from moeprune.models.special import flat_matrices, stacked

IMPLEMENTATION = "moeprune_observe"
_ROW_BLOCK = 64


@dataclass
class Collector:
    """Where one batch of one layer goes.

    Attributes:
        statistics: the sums of this batch.
        key_T: one number per token, padding included.
        real_T: True where a token is no padding; None if none is.
        origin: which tokens of which domains they are, where that is known.
        logits_TR: the router's logits, if an accumulator wants them.
        routing: input and outputs of the router, where the experts are not told its choice.
    """

    statistics: LayerStatistics
    key_T: Tensor
    real_T: Tensor | None
    origin: Origin | None = None
    logits_TR: Tensor | None = None
    routing: tuple[Tensor, ...] | None = None
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
    experts: Any = site.experts
    special = _SPECIAL.get(type(experts).__name__)
    with ExitStack() as stack:
        if special is not None:
            experts.forward = MethodType(special, experts)
            stack.callback(experts.__dict__.pop, "forward")
        else:
            before = experts.config._experts_implementation
            stack.callback(setattr, experts.config, "_experts_implementation", before)
            experts.config._experts_implementation = IMPLEMENTATION
        if router_output:
            stack.callback(site.router.register_forward_hook(_keep_logits).remove)
        if special is _observe_llama4:
            stack.callback(site.router.register_forward_hook(_keep_routing).remove)
        yield


def _keep_routing(module: nn.Module, args: Any, output: Any) -> None:
    if _ACTIVE.collector is not None:
        _ACTIVE.collector.routing = (args[0], *output)


def _keep_logits(module: nn.Module, args: Any, output: Any) -> None:
    collector = _ACTIVE.collector
    if collector is not None:
        position = quirks.LOGITS_POSITION.get(type(module).__name__, 0)
        logits = output[position] if isinstance(output, (tuple, list)) else output
        collector.logits_TR = logits.reshape(-1, logits.shape[-1])


def _collector(tokens: int) -> Collector:
    """The collector of the batch that this thread computes; its experts are called once."""
    collector = _ACTIVE.collector
    if collector is None or tokens != len(collector.key_T) or collector.calls:
        raise UnsupportedModelError("the experts were not called once with all tokens of the batch")
    collector.calls += 1
    return collector


def observe_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts' forward, expert by expert, with every intermediate shown to the collector.

    Same arithmetic as transformers' ``grouped_mm`` implementation: each slot's output times its
    gate, then the sum over a token's K slots.
    """
    collector = _collector(len(hidden_states))
    T, K = top_k_index.shape
    out_SH = hidden_states.new_zeros(T * K, hidden_states.shape[1])
    slots = Slots(hidden_states, top_k_index, top_k_weights, out_SH)
    compute_slots(self, slots, collector, range(collector.statistics.shape.experts))
    collect_block(collector, slots)
    return slots.sum()


@dataclass(frozen=True)
class Slots:
    """A batch at the experts of a layer: S = T * K slots, those of a token side by side.

    Attributes:
        x_TH: the block's input.
        index_TK: which experts; ids from E on are slots without expert.
        gate_TK: how strongly.
        out_SH: each slot's output times its gate, filled expert by expert.
    """

    x_TH: Tensor
    index_TK: Tensor
    gate_TK: Tensor
    out_SH: Tensor

    def sum(self) -> Tensor:
        """The block's output [T, H]."""
        T, K = self.index_TK.shape
        return self.out_SH.view(T, K, -1).sum(dim=1)


def compute_slots(
    experts: Any, slots: Slots, collector: Collector | None, chosen: range, first: int = 0
) -> None:
    """Fill the slots of the experts ``chosen``, in ascending order, and show them to ``collector``.

    Row 0 of the matrices of ``experts`` is expert ``first``'s.
    """
    K = slots.index_TK.shape[1]
    flat_S = slots.index_TK.reshape(-1)
    order_S = torch.argsort(flat_S, stable=True)
    ends = torch.bincount(flat_S, minlength=chosen.stop).cumsum(0).tolist()
    gates_S = slots.gate_TK.reshape(-1)
    for expert in chosen:
        start, end = ends[expert - 1] if expert else 0, ends[expert]
        if start == end:
            continue
        slots_n = order_S[start:end]
        tokens_n = slots_n // K
        gate_n = gates_S[slots_n]
        x_nH, h_nI, f_nH = _expert(experts, expert - first, slots.x_TH, tokens_n)
        slots.out_SH[slots_n] = (f_nH * gate_n[:, None]).to(slots.out_SH.dtype)
        if collector is not None:
            _collect(collector, expert, tokens_n, (x_nH, gate_n.float(), h_nI, f_nH))


def collect_block(collector: Collector, slots: Slots) -> None:
    """Show the collector a batch at the level of the block."""
    _collect_block(collector, slots.x_TH, slots.index_TK, slots.gate_TK.float())


def _expert(
    experts: Any, e: int, hidden_states: Tensor, tokens_n: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One expert's inputs, hidden activations and outputs.

    Half-precision matrix products on the CPU are compiled per shape, so their rows are rounded up
    to a multiple of ``_ROW_BLOCK``: a few shapes are compiled instead of one per expert and batch.
    """
    n = len(tokens_n)
    if hidden_states.device.type == "cpu" and hidden_states.dtype != torch.float32:
        tokens_n = torch.cat((tokens_n, tokens_n[:1].expand(-n % _ROW_BLOCK)))
    x_nH = hidden_states[tokens_n]
    h_nI, f_nH = run_expert(experts, e, x_nH)
    return x_nH[:n], h_nI[:n], f_nH[:n]


def run_expert(experts: Any, e: int, x_nH: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden activations and outputs of one expert, before the gate."""
    run = _flat_expert if flat_matrices(experts) else _interface_expert
    return run(experts, e, x_nH)


def _interface_expert(experts: Any, e: int, x_nH: Tensor) -> tuple[Tensor, Tensor]:
    """h and f of one expert, by transformers' own flags."""

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
    return h_nI, f_nH


def _flat_expert(experts: Any, e: int, x_nH: Tensor) -> tuple[Tensor, Tensor]:
    """The same for DBRX, whose matrices are rows of one."""
    by_role = {
        role: stacked(experts, name, experts.get_parameter(name))[e]
        for name, (role, _) in flat_matrices(experts).items()
    }
    gate_nI = nn.functional.linear(x_nH, by_role["gate"])
    h_nI = experts.mlp.activation_fn(gate_nI) * nn.functional.linear(x_nH, by_role["up"])
    return h_nI, nn.functional.linear(h_nI, by_role["down"])


def _collect(collector: Collector, expert: int, tokens_n: Tensor, rows: tuple[Tensor, ...]) -> None:
    if collector.real_T is not None:
        real_n = collector.real_T[tokens_n]
        rows = tuple(tensor[real_n] for tensor in rows)
    if len(rows[0]):
        collector.statistics.add_expert(ExpertRows(expert, *rows))


def _collect_block(collector: Collector, x_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> None:
    logits_TR, key_T, origin = collector.logits_TR, collector.key_T, collector.origin
    if collector.real_T is not None:
        real = collector.real_T
        x_TH, index_TK, gate_TK, key_T = x_TH[real], index_TK[real], gate_TK[real], key_T[real]
        logits_TR = None if logits_TR is None else logits_TR[real]
        origin = None if origin is None else origin.of(real)
    collector.statistics.add_block(BlockRows(x_TH, index_TK, gate_TK, logits_TR, key_T, origin))


def _observe_dbrx(self: Any, x_BLH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """The block hands its input on as it is, not as a list of tokens."""
    x_TH = x_BLH.reshape(-1, x_BLH.shape[-1])
    return observe_experts(self, x_TH, index_TK, gate_TK).view_as(x_BLH)


def _observe_longcat(self: Any, x_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Ids from E on are identity experts: the token itself, times its gate."""
    out_TH = observe_experts(self, x_TH, index_TK, gate_TK)
    identity_T = gate_TK.masked_fill(index_TK < int(self.num_routed_experts), 0).sum(dim=1)
    return out_TH + (x_TH * identity_T[:, None]).to(out_TH.dtype)


def _observe_zaya(self: Any, x_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """The router hands a token that skips the experts to expert 0, with the gate 0."""
    return observe_experts(
        self, x_TH, index_TK.masked_fill(gate_TK == 0, self.num_experts), gate_TK
    )


def _observe_llama4(self: Any, scaled_SH: Tensor) -> Tensor:
    """Every expert gets every token times its score, which is 0 for those not chosen.

    So an expert's rows are inputs that have their gate in them already, and count with the gate 1;
    the rows of the block have the unscaled inputs and the scores. Zero rows are nobody's tokens:
    without biases their output is zero.
    """
    E = int(self.num_experts)
    collector = _collector(len(scaled_SH) // E)
    assert collector.routing is not None, "its router runs first"
    x_TH, scores_TE, logits_TE = collector.routing
    collector.routing = None
    # the call by which the router has chosen, on the same numbers
    index_TK = logits_TE.topk(collector.statistics.shape.top_k, dim=1).indices
    chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, index_TK, True)
    scaled_ETH = scaled_SH.view(E, len(x_TH), -1)
    out_ETH = torch.zeros_like(scaled_ETH)
    for expert in range(E):
        tokens_n = chosen_TE[:, expert].nonzero().reshape(-1)
        if not len(tokens_n):
            continue
        x_nH, h_nI, f_nH = _expert(self, expert, scaled_ETH[expert], tokens_n)
        out_ETH[expert, tokens_n] = f_nH
        one_n = torch.ones(len(tokens_n), device=x_nH.device)
        _collect(collector, expert, tokens_n, (x_nH, one_n, h_nI, f_nH))
    _collect_block(collector, x_TH, index_TK, scores_TE.gather(1, index_TK).float())
    return out_ETH.view_as(scaled_SH)


def is_special(experts: nn.Module) -> bool:
    """Whether an experts module is not called as transformers' interface says."""
    return type(experts).__name__ in _SPECIAL


_SPECIAL: dict[str, Callable[..., Tensor]] = {
    "DbrxExperts": _observe_dbrx,
    "Llama4TextExperts": _observe_llama4,
    "LongcatFlashExperts": _observe_longcat,
    "ZayaExperts": _observe_zaya,
}
"""Observing forwards of experts classes that are not called as transformers' interface says."""

ExpertsInterface.register(IMPLEMENTATION, observe_experts)
