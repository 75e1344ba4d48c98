"""Finds the MoE blocks of a transformers model by the experts interface, not by class names.

Every experts module of transformers 5 is decorated with ``use_experts_implementation``, which sets
``is_transposed``, ``is_concatenated``, ``has_gate`` and ``has_bias`` on the instance.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moeprune.core.shapes import ROLES, LayerShape
from moeprune.errors import UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.native import text_config
from moeprune.models.special import expert_sizes


@dataclass(frozen=True)
class RouterTensor:
    """A tensor of the router or the block that has one entry per expert along ``dim``."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class MoESite:
    """One MoE block.

    Attributes:
        layer: index of the decoder layer.
        experts_name: qualified name of the experts module.
        experts: the module (on the meta device until its layer is loaded).
        router: the module.
        shape: the sizes.
        router_tensors: what has to be sliced when experts go.
    """

    layer: int
    experts_name: str
    experts: nn.Module
    router: nn.Module
    shape: LayerShape
    router_tensors: tuple[RouterTensor, ...]


def is_experts(module: nn.Module) -> bool:
    """Whether a module follows the experts interface of transformers."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def is_swiglu(experts: nn.Module) -> bool:
    """Whether experts compute silu(gate) * up; by trying it, as families differ in more than names.

    Others have another activation, limits, or no gate.
    """
    module: Any = experts
    if not module.has_gate:
        return False
    row_J = torch.linspace(-100.0, 100.0, 128, device="cpu", dtype=torch.float32)
    both_2J = torch.stack([row_J, row_J.flip(0)])
    tried_4J = torch.cat([both_2J, both_2J / 50.0])
    gate_4I, up_4I = tried_4J.chunk(2, dim=-1)
    made_4I: torch.Tensor = module._apply_gate(tried_4J)
    return torch.allclose(made_4I, functional.silu(gate_4I) * up_4I, rtol=1e-5, atol=1e-6)


def find_sites(model: nn.Module, layer_prefix: str) -> dict[int, MoESite]:
    """The MoE blocks inside the decoder layers ``<layer_prefix>.<index>``, by layer.

    Raises:
        UnsupportedModelError: two blocks in one layer, or no router beside the experts.
    """
    config = text_config(model.config)
    pattern = re.compile(re.escape(layer_prefix) + r"\.(\d+)\.")
    sites: dict[int, MoESite] = {}
    for name, module in model.named_modules():
        match = pattern.match(name)
        if match is None or not is_experts(module):
            continue
        layer = int(match[1])
        if layer in sites:
            raise UnsupportedModelError(f"layer {layer} has more than one MoE block")
        sites[layer] = _site(model, layer, name, module, config)
    return sites


def _site(model: nn.Module, layer: int, name: str, experts: nn.Module, config: Any) -> MoESite:
    block_name = name.rpartition(".")[0]
    block = model.get_submodule(block_name)
    router_attr = next((r for r in quirks.ROUTER_NAMES if hasattr(block, r)), None)
    if router_attr is None:
        raise UnsupportedModelError(f"{block_name} has experts but no router beside them")
    router = getattr(block, router_attr)
    shape = _shape(layer, experts, config)
    return MoESite(
        layer,
        name,
        experts,
        router,
        shape,
        _router_tensors(block_name, block, router_attr, router, shape),
    )


def _shape(layer: int, experts: nn.Module, config: Any) -> LayerShape:
    E, hidden, intermediate = expert_sizes(experts)
    groups = getattr(config, "n_group", None) or 1
    if getattr(config, "topk_method", None) == "greedy":
        groups = 1  # DeepSeek-V2: the key exists but the router ignores it
    return LayerShape(
        layer=layer,
        experts=E,
        top_k=top_k(config),
        hidden=hidden,
        intermediate=intermediate,
        groups=int(groups),
        top_groups=int(getattr(config, "topk_group", None) or 1),
        roles=ROLES if experts.has_gate else ROLES[1:],
    )


def top_k(config: Any) -> int:
    """K, from whichever key the family uses."""
    for part in (config, getattr(config, "ffn_config", None)):
        for key in quirks.TOP_K_KEYS:
            value = getattr(part, key, None)
            if isinstance(value, int):
                return value
    raise UnsupportedModelError(f"no top-k in the configuration of {config.model_type}")


def _router_tensors(
    block_name: str, block: nn.Module, router_attr: str, router: nn.Module, shape: LayerShape
) -> tuple[RouterTensor, ...]:
    """Router tensors with one entry per expert; extra rows (shared, zero experts) come last."""
    named = quirks.ROUTER_TENSORS.get(type(router).__name__)
    if named is not None:
        tensors = {n: t for n, t in _tensors(router, recurse=True) if n in named}
        prefix = f"{block_name}.{router_attr}"
        return tuple(RouterTensor(f"{prefix}.{n}", 0, len(t)) for n, t in tensors.items())
    inside = [(f"{block_name}.{router_attr}.{n}", t) for n, t in _tensors(router, recurse=True)]
    beside = [(f"{block_name}.{n}", t) for n, t in _tensors(block, recurse=False)]
    rows = [t.shape[0] for n, t in inside if t.ndim == 2 and n.endswith("weight")]
    sizes = {shape.experts, *(r for r in rows if r >= shape.experts and r != shape.hidden)}
    found = []
    for name, tensor in inside + beside:
        last = name.rpartition(".")[2]
        if last == "weight" and tensor.ndim == 2 and tensor.shape[0] in sizes:
            found.append(RouterTensor(name, 0, int(tensor.shape[0])))
        elif last in quirks.PER_EXPERT_NAMES and tensor.shape[-1:].numel() in sizes and tensor.ndim:
            found.append(RouterTensor(name, tensor.ndim - 1, int(tensor.shape[-1])))
    return tuple(found)


def _tensors(module: nn.Module, recurse: bool) -> list[tuple[str, Any]]:
    return [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]


def count_key(config: Any) -> str:
    """The name under which a transformers configuration holds the number of experts.

    Raises:
        UnsupportedModelError: there is none that we know.
    """
    text = text_config(config)
    for key in quirks.EXPERT_COUNT_KEYS:
        name = text.attribute_map.get(key, key)
        if isinstance(vars(text).get(name), int):
            return str(name)
    raise UnsupportedModelError(f"{text.model_type}: its number of experts was not found")


def is_uneven(config: Any) -> bool:
    """Whether a transformers configuration gives layers different numbers of experts."""
    text = text_config(config)
    if getattr(text, "experts_per_layer", None):
        return True
    return text.is_heterogeneous and count_key(config) in text.per_layer_attributes


def resize_facts(model: nn.Module, layer_prefix: str) -> dict[str, Any]:
    """What ``uneven_runtime.install`` must know of a model, as its keyword arguments.

    Raises:
        UnsupportedModelError: layers hold their experts under different names.
    """
    router: dict[str, int] = {}
    experts = set()
    for index, site in sorted(find_sites(model, layer_prefix).items()):
        layer = f"{layer_prefix}.{index}."
        experts.add(site.experts_name.removeprefix(layer))
        router |= {t.name.removeprefix(layer): t.dim for t in site.router_tensors}
    if len(experts) != 1:
        raise UnsupportedModelError("its layers hold their experts under different names")
    return {
        "layers": layer_prefix,
        "experts": experts.pop(),
        "router": router,
        "count": count_key(model.config),
    }
