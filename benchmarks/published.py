"""Published models of real size: their configurations, their printed sizes, their tensors' shapes.

Nothing here has weights: models are built on the meta device. The configurations of the first six
are those of tests/vendor_configs.py; DeepSeek-V3 and Kimi-K2, which no test of the package builds,
stand here, without what says nothing about shapes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.core_model_loading import revert_weight_conversion

from moeprune.models.loading import find_layers
from moeprune.models.native import native_class, quiet_transformers
from moeprune.models.sites import MoESite, find_sites

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from quantise import LINEAR
from vendor_configs import VENDORS

_DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
_KIMI_K2 = _DEEPSEEK_V3 | {  # its model_type is kimi_k2; the classes are DeepSeek-V3's
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}


@dataclass(frozen=True)
class Published:
    """One model.

    Attributes:
        config: its config.json.
        total: its parameters as its publisher prints them.
        active: parameters that one token uses, likewise; some count the embedding, some do not.
        fp8: whether it is published in block-scaled fp8.
    """

    config: dict[str, Any]
    total: str
    active: str
    fp8: bool = False


def _vendor(name: str, total: str, active: str) -> Published:
    return Published(VENDORS[name].config, total, active)


MODELS = {
    "OLMoE-1B-7B": _vendor("OLMoE-1B-7B", "6.9B", "1.3B"),
    "Qwen1.5-MoE-A2.7B": _vendor("Qwen1.5-MoE-A2.7B", "14.3B", "2.7B"),
    "DeepSeek-V2-Lite": _vendor("DeepSeek-V2-Lite", "15.7B", "2.4B"),
    "Qwen3-30B-A3B": _vendor("Qwen3-30B-A3B", "30.5B", "3.3B"),
    "Mixtral-8x7B": _vendor("Mixtral-8x7B", "46.7B", "12.9B"),
    "Mixtral-8x22B": _vendor("Mixtral-8x22B", "141B", "39B"),
    "DeepSeek-V3": Published(_DEEPSEEK_V3, "671B", "37B", fp8=True),
    "Kimi-K2": Published(_KIMI_K2, "1T", "32B", fp8=True),
}
"""By the names that papers use."""

WRITABLE = tuple(MODELS)[:5]
"""Those of which checkpoints are written here; the others are only counted."""


def config_of(name: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a model, without code of its own, with another number of layers."""
    config = {key: value for key, value in MODELS[name].config.items() if key != "auto_map"}
    if layers is not None:
        config["num_hidden_layers"] = layers
    return config


def skeleton(config: dict[str, Any]) -> nn.Module:
    """The model of a config.json on the meta device, in bf16."""
    found = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with quiet_transformers(), init_empty_weights(include_buffers=True):
        model: nn.Module = native_class(found)._from_config(found, dtype=torch.bfloat16)
    return model


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of its checkpoint, on the meta device, by the names on disk, in order."""
    with torch.device("meta"):
        return dict(revert_weight_conversion(model, model.state_dict()))


def in_fp8(name: str, tensor: torch.Tensor) -> bool:
    """Whether a block-scaled checkpoint quantises this tensor, as DeepSeek-V3 does."""
    return tensor.ndim == 2 and LINEAR.fullmatch(name) is not None


def sites(model: nn.Module) -> dict[int, MoESite]:
    """MoE blocks by layer index."""
    return find_sites(model, find_layers(model)[0])


def printed(count: float, like: str) -> str:
    """A number of parameters rounded as ``like`` is: ``printed(6.919e9, "6.9B")`` is "6.9B"."""
    digits = len(like[:-1].partition(".")[2])
    return f"{count / {'B': 1e9, 'T': 1e12}[like[-1]]:.{digits}f}{like[-1]}"
