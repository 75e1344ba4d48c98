"""Experts modules of vLLM that store fewer experts than their router selects among.

The router stays vLLM's own, over all experts. Here its choices are renumbered to what is stored; an
expert that is a constant gets the weight 0 in the kernel (its slot computes, but its memory is
never allocated), and the vectors are added to the experts' output.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, RoutedExperts
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.models.utils import extract_layer_index

from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.models.uneven_runtime import experts_of
from moeprune.serving.slots import Slots, added_output, index_tensors

_OVERRIDDEN = RoutedExperts.forward_modular, RoutedExperts.forward_monolithic
"""Missing in another vLLM, they fail here: a method that nobody calls would be a wrong result."""

_SAME_TWICE = ("TRITON", "CPU")
"""Kernels that compute each choice of a token by itself. Others sort tokens by experts in a way
that takes it for granted that a token never chooses one expert twice, which here it does: all
novices have one slot, and so has who answers for others."""

_QUANTISED = re.compile(r"_(scale|packed|zero_point|blocks|g_idx)")
"""In names of tensors that quantised weights have beside them, or are stored in."""


class SlottedExperts(RoutedExperts):  # type: ignore[misc]
    """vLLM's experts, of which ``slots`` says who computes for whom."""

    def __init__(self, *args: Any, slots: Slots, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slots = slots
        self._refuse()
        for name, tensor in zip(
            ("slot_E", "row_E", "computed_E"), index_tensors(slots), strict=True
        ):
            self.register_buffer(name, tensor.to(self.w2_weight.device), persistent=False)
        width = self.moe_config.hidden_dim_unpadded * (1 + 2 * slots.rank)
        value_RW = torch.zeros(len(slots.added), width, dtype=self.params_dtype)
        self.added_value = nn.Parameter(value_RW, requires_grad=False) if slots.added else None
        self.missing = set(slots.added)

    def _refuse(self) -> None:
        """Say no to what would leave the vectors out, or has not been tried."""
        parallel = self.moe_config.moe_parallel_config
        kernel = getattr(getattr(self.quant_method, "unquantized_backend", None), "name", "unknown")
        found = {
            "quantised experts": not isinstance(self.quant_method, UnquantizedFusedMoEMethod),
            "a kernel that routes by itself (choose --moe-backend triton)": (
                self.quant_method.is_monolithic
            ),
            f"the kernel {kernel} (choose --moe-backend triton)": kernel not in _SAME_TWICE,
            "--enable-expert-parallel": parallel.use_ep,
            "data parallel experts": parallel.dp_size > 1,
            "prefill context parallel experts": parallel.pcp_size > 1,
            "sequence parallel experts": parallel.is_sequence_parallel,
            "--enable-eplb": parallel.enable_eplb,
            "--enable-lora": self.moe_config.is_lora_enabled,
            "router weights on inputs": self.apply_router_weight_on_input,
            "padded hidden states": (
                self.moe_config.hidden_dim != self.moe_config.hidden_dim_unpadded
            ),
        }
        for what, here in found.items():
            if here:
                raise UnsupportedModelError(
                    f"{self.layer_name}: some experts of this checkpoint are not stored, which "
                    f"does not go together with {what}"
                )

    def take(self, name: str, tensor: Tensor) -> str | None:
        """Load a tensor if it is one of the vectors; else the name under which vLLM loads it.

        ``name`` is the checkpoint's, relative to the experts.
        """
        row = self.slots.row(name)
        if row is None:
            if _QUANTISED.search(name):
                raise UnsupportedModelError(
                    f"{self.layer_name}: some experts of this checkpoint are not stored, which "
                    f"does not go together with quantised experts ({name})"
                )
            return self.slots.stored_name(name)
        assert self.added_value is not None
        into = self.added_value.data[row]
        if tensor.shape != into.shape:  # copy_ would repeat a smaller one
            raise CheckpointError(
                f"{self.layer_name}: {name} is {list(tensor.shape)}, not {list(into.shape)}"
            )
        into.copy_(tensor)
        added = self.slots.added
        self.missing -= {added[row]} if isinstance(row, int) else set(added)
        return None

    def complete(self) -> None:
        """Raise ``CheckpointError`` if a vector that config.json names was not in the files."""
        if self.missing:
            raise CheckpointError(
                f"{self.layer_name}: config.json says that expert {min(self.missing)} has a "
                "vector, but the files hold none"
            )

    def forward_modular(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The stored experts' outputs and the vectors, each times its gate."""
        ids_TK = topk_ids.long()
        out_TH: Tensor = super().forward_modular(
            x,
            topk_weights * self.computed_E[ids_TK].to(topk_weights.dtype),
            self.slot_E[ids_TK].to(topk_ids.dtype),
            *args,
            **kwargs,
        )
        # the ranks' outputs are summed later, and each rank holds the whole vectors
        if self.added_value is None or get_tensor_model_parallel_rank():
            return out_TH
        added_TH = added_output(
            x, self.row_E[ids_TK], topk_weights, self.added_value, self.slots.rank
        )
        return out_TH + added_TH.to(out_TH.dtype)

    def forward_monolithic(self, *args: Any, **kwargs: Any) -> Tensor:
        """Never called: ``_refuse`` saw to it."""
        raise AssertionError("the kernel routes by itself")


@cache
def slotted(experts: type[RoutedExperts]) -> type[SlottedExperts]:
    """``SlottedExperts`` for a kind of vLLM's experts that names them in another way."""
    if experts is RoutedExperts:
        return SlottedExperts
    return type(f"Slotted{experts.__name__}", (SlottedExperts, experts), {"__module__": __name__})


def has_own_numbers(config: Any) -> bool:
    """Whether config.json gives layers numbers of experts of their own."""
    return bool(getattr(config, "per_layer_config", None)) or hasattr(config, "experts_per_layer")


def experts_factory(config: Any, count: str | None = None) -> Callable[..., Any]:
    """What takes the place of vLLM's ``FusedMoEFactory`` while a model is built.

    ``count`` is config.json's name of the number of experts, for a caller who does not look up that
    of each layer.
    """
    asked = inspect.signature(create_fused_moe_router).parameters

    def build(**options: Any) -> Any:
        layer = extract_layer_index(options["prefix"])
        if count is not None:
            options["num_experts"] = experts_of(config, layer, count)
        if options.get("enable_eplb") and has_own_numbers(config):
            # it has one table of places for all layers
            raise UnsupportedModelError(
                f"{options['prefix']}: layers of this checkpoint hold different numbers of "
                "experts, which does not go together with --enable-eplb"
            )
        experts = options["num_experts"]
        slots = Slots.of(config, layer, experts)
        if slots is None:
            return FusedMoEFactory(**options)
        if options.get("fuse_shared_experts"):
            raise UnsupportedModelError("shared experts fused into the routed ones (VLLM_ROCM_*)")
        given = {name: value for name, value in options.items() if name in asked}
        if options.get("apply_routed_scale_to_output"):
            given["routed_scaling_factor"] = 1.0  # vLLM's runner applies it
        router = create_fused_moe_router(**given, global_num_experts=experts)
        return FusedMoEFactory(
            **{
                **options,
                "num_experts": len(slots.kept),
                "router": router,
                "routed_experts_cls": slotted(options.get("routed_experts_cls") or RoutedExperts),
                "routed_experts_args": {"slots": slots},
            }
        )

    return build
