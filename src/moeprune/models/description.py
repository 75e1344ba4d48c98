"""What a model's MoE blocks are, in words: found by running its router, not by reading its name."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.models.native import text_config
from moeprune.models.sites import MoESite

_TOKENS = 64
_LARGEST = 1 << 24  # weights; a router of 512 experts over 16k channels has half as many


def routing_kind(site: MoESite) -> str:
    """How the gates of the chosen experts follow from the router's logits.

    The router runs on random inputs with random weights, and what it gives to its K chosen experts
    is compared with the usual formulas, up to a common factor. No weight of the model is read.
    """
    try:
        logits_TR, gate_TK, index_TK = _run(site)
    except Exception:  # a router may want more than hidden states; then its formula stays unknown
        return f"its own ({type(site.router).__name__})"
    chosen_TK = logits_TR.gather(1, index_TK)
    formulas = {
        "softmax over all experts": logits_TR.softmax(dim=1).gather(1, index_TK),
        "softmax over the chosen experts": chosen_TK.softmax(dim=1),
        "sigmoid": chosen_TK.sigmoid(),
        "sigmoid, divided by its sum": _divided(chosen_TK.sigmoid()),
    }
    for name, expected_TK in formulas.items():
        factor = (gate_TK.sum() / expected_TK.sum()).item()
        if torch.allclose(gate_TK, factor * expected_TK, rtol=1e-3, atol=1e-6):
            return name if abs(factor - 1) < 1e-3 else f"{name}, times {factor:.4g}"
    return f"its own ({type(site.router).__name__})"


def _divided(values_TK: Tensor) -> Tensor:
    return values_TK / values_TK.sum(dim=1, keepdim=True)


@torch.no_grad()
def _run(site: MoESite) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, R], gates [T, K] and ids [T, K] of a copy of the router on random inputs."""
    if sum(tensor.numel() for tensor in site.router.parameters()) > _LARGEST:
        raise ValueError("too large to be run for a description")
    router = copy.deepcopy(site.router).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        if tensor.ndim >= 2:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
        else:
            tensor.fill_(0 if "bias" in name else 1)
    x_TH = torch.randn(_TOKENS, site.shape.hidden, generator=generator)
    output = router(x_TH)
    if not isinstance(output, tuple) or len(output) < 3:
        raise ValueError("not logits, gates and ids")
    logits, gate, index = output[:3]
    if index.is_floating_point():
        gate, index = index, gate
    chosen = (_TOKENS, site.shape.top_k)
    if not gate.shape == index.shape == chosen or logits.shape[-1] < site.shape.experts:
        raise ValueError("not logits, gates and ids")
    return logits.float(), gate.float(), index


def selection(site: MoESite, config: Any) -> str:
    """What limits or shifts the choice of experts: groups, a bias per expert, a table of tokens."""
    text = text_config(config)
    parts = [f"top {site.shape.top_k} of {site.shape.experts}"]
    if site.shape.groups > 1:
        parts.append(f"among the best {site.shape.top_groups} of {site.shape.groups} groups")
    names = {tensor.name.rpartition(".")[2] for tensor in site.router_tensors} - {"weight"}
    if names:
        parts.append(f"with {' and '.join(sorted(names))}")
    kinds = getattr(text, "mlp_layer_types", None) or []
    if any("hash" in str(kind) for kind in kinds):
        parts.append("(by token id in some layers)")
    return " ".join(parts)


def idle_parameters(sites: Iterable[MoESite]) -> int:
    """Weights of routed experts that one token leaves out, at least.

    A token goes through K of the E experts that have weights, or through all of them where fewer
    are left. Through fewer it goes where it chose novices, or several that one expert answers for.
    """
    shapes = [site.shape for site in sites]
    return sum(max(0, s.experts - s.top_k) * s.expert_parameters for s in shapes)


def shared_parameters(model: nn.Module, site: MoESite) -> int:
    """Parameters of the experts that every token goes through, in one layer."""
    block = model.get_submodule(site.experts_name.rpartition(".")[0])
    return sum(
        parameter.numel()
        for name, child in block.named_children()
        if name.startswith("shared_")
        for parameter in child.parameters()
    )
