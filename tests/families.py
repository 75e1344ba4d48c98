"""Tiny random models of every Mixture-of-Experts language model that transformers registers.

Nothing here names the architectures under test: :func:`moe_model_types` reads them out of the
installed transformers, so a family that its next release adds is tested without an edit.  What a
person has to say about a family, because its default configuration would be dense, huge or too
uniform to expose a mistake, is data in ``FAMILIES``.

Every tiny model has hidden size 32, a vocabulary of 128, 8 experts, several decoder layers (dense
ones and several kinds of attention where the family has them) and weights large enough for tokens
to be routed differently.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
MAX_PARAMETERS = 3_000_000

EXPERTS_CLASS = re.compile(r"\w*(?:Experts|MoE|Moe)")
"""Class names of expert blocks: needed for families that do not use transformers' decorator."""

_MOE_SOURCE = re.compile(rf"(?m)^@use_experts_implementation|^class {EXPERTS_CLASS.pattern}\(")

_FIELDS_BY_SIZE: dict[int, str] = {
    0: "pad_token_id",
    1: "bos_token_id n_groups first_k_dense_replace num_dense_layers split_ngram_parts "
    "n_shared_experts num_shared_experts moe_num_shared_experts indexer_kv_heads",
    2: "eos_token_id num_experts_per_tok top_k_experts moe_topk moe_k linear_num_key_heads "
    "num_key_value_heads swa_num_key_value_heads o_groups index_n_heads indexer_n_heads "
    "index_topk_blocks heads_per_ngram",
    4: "num_hidden_layers num_attention_heads swa_num_attention_heads mamba_dt_rank rotary_dim "
    "linear_num_heads linear_num_value_heads index_block_size indexer_compress_ratio",
    8: "num_experts num_local_experts n_routed_experts moe_num_experts "
    "head_dim v_head_dim swa_head_dim kv_channels qk_rope_head_dim qk_nope_head_dim "
    "o_lora_rank d_rel hc_lowrank hidden_size_per_layer_input "
    "sliding_window sliding_window_size attention_chunk_size "
    "index_topk index_head_dim indexer_head_dim indexer_budget "
    "mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim mamba_d_state ssm_state_size "
    "linear_head_dim linear_key_head_dim linear_value_head_dim",
    16: "qk_head_dim q_lora_rank kv_lora_rank rel_extent ple_embed_dim",
    24: "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "shared_expert_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size",
    32: "hidden_size router_hidden_size",
    48: "intermediate_size dense_intermediate_size intermediate_size_mlp ffn_hidden_size",
    64: "ngram_vocab_size_base",
    VOCABULARY: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings",
}
SIZES = {name: size for size, names in _FIELDS_BY_SIZE.items() for name in names.split()}
"""Values for every configuration field of that name, in any family."""

_DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]
_SLIDING_FULL = ["sliding_attention", "full_attention"] * 2
_LINEAR_FULL = ["linear_attention", "full_attention"] * 2
_COMPRESSED = ["heavily_compressed_attention", "compressed_sparse_attention"]
_GRANITE = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _LINEAR_FULL},
    "beam": {"mlp_layer_types": _DENSE_FIRST},
    "cohere2_moe": {"first_k_dense_replace": 1, "logit_scale": 0.5},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "layer_types": ["sliding_attention", *_COMPRESSED, _COMPRESSED[0]],
        "compress_rates": dict(zip(_COMPRESSED, (8, 4), strict=True)),
        "partial_rotary_factor": 0.5,
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {"enable_moe_block": True, "layer_types": _SLIDING_FULL, "global_head_dim": 16},
    "glm_moe_dsa": {"indexer_types": ["full", "full", "shared", "full"]},
    "gpt_oss": {"max_position_embeddings": 131_072},  # fits the vendor's YaRN factor
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": _GRANITE | {"layer_types": _LINEAR_FULL, "position_embedding_type": "rope"},
    "granitemoeshared": _GRANITE,
    "inkling2_text": {
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "n_layers_per_attn_res_block": 2,
    },
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "mlp_layer_types": _DENSE_FIRST,
        "logits_mup_width_multiplier": 2.0,
    },
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _LINEAR_FULL, "q_lora_rank": None},
    "kolibri1": {"layer_types": _SLIDING_FULL},
    "laguna": {"layer_types": _SLIDING_FULL, "num_attention_heads_per_layer": [4, 2, 4, 2]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "longcat_flash": {"num_layers": 3, "zero_expert_num": 2},
    "mellum": {"layer_types": _SLIDING_FULL},
    "minimax_m3_vl_text": {
        "mlp_layer_types": _DENSE_FIRST,
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
    },
    "nemotron_h": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp", "moe"],
    },
    "qwen2_moe": {"use_sliding_window": True, "mlp_only_layers": [1]},
    "qwen4_exp_text": {"ple_layer_ids": [2]},
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "router_hidden_size": 20,
    },
}
"""What ``SIZES`` cannot know: fields (or legacy spellings) that one family needs."""

QUIRKS: dict[str, str] = {
    "dbrx": (
        "The model reads rope_theta from attn_config, whose class does not define it: stock "
        "defaults fail in __init__, so the tiny configuration supplies the field."
    ),
    "zaya": (
        "Loading resets the last balancing bias to -1, because _init_weights assigns it without "
        "asking whether a checkpoint supplied it. The tiny model's last bias is -1 and the others "
        "are near it: only their differences choose experts, so the skip class is still used."
    ),
}
"""Defects of transformers that the tiny models work around; no family is excluded."""


@functools.cache
def moe_model_types() -> list[str]:
    """Model types of all causal language models with experts in the installed transformers.

    Found by reading source files, not by importing them.  A composite (vision or audio) model is
    left out where its language model is registered as a type of its own.
    """
    found = sorted(filter(_source_has_experts, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    return [name for name in found if not _is_composite(name, found)]


@functools.cache
def _source_has_experts(model_type: str) -> bool:
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
    return any(
        _MOE_SOURCE.search(path.read_text(encoding="utf-8"))
        for path in folder.glob("modeling_*.py")
    )


def _is_composite(model_type: str, registered: list[str]) -> bool:
    module = model_type_to_module_name(model_type)
    if not any(model_type_to_module_name(x) == module for x in registered if x != model_type):
        return False  # a twin lives in the same module; most types are spared an import
    parts = CONFIG_MAPPING[model_type].sub_configs.values()
    return any(getattr(part, "model_type", None) in registered for part in parts)


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Configuration of the tiny model; ``overrides`` are passed to the configuration class.

    Overriding ``num_hidden_layers`` repeats or cuts the per-layer lists of ``FAMILIES``.
    """
    config_class = CONFIG_MAPPING[model_type]
    fields: dict[str, Any] = {x.name: x.default for x in dataclasses.fields(config_class)}
    sizes = {_field(config_class, name): size for name, size in SIZES.items()} | SIZES
    values: dict[str, Any] = {name: size for name, size in sizes.items() if name in fields}
    if "kv_lora_rank" in fields:  # multi-head latent attention has one key per query head
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "n_group" in fields:  # grouped where the vendor groups
        values |= {"n_group": min(fields["n_group"] or 1, 2), "topk_group": 1}
    values |= copy.deepcopy(FAMILIES.get(model_type, {}))  # configurations edit their lists
    planned: int = values.get("num_hidden_layers", 0)
    values |= {_field(config_class, name): value for name, value in overrides.items()}
    layers: int = values.get("num_hidden_layers", 0)
    for name in values.keys() - overrides.keys():
        if isinstance(values[name], list) and len(values[name]) == planned != layers:
            values[name] = (values[name] * layers)[:layers]
    return config_class(**values)


def _field(config_class: type[PreTrainedConfig], name: str) -> str:
    """The spelling of ``name`` that is a field of this class, whichever way it is aliased."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    aliases = config_class.attribute_map
    spellings = [name, aliases.get(name), *(old for old, new in aliases.items() if new == name)]
    return next((spelling for spelling in spellings if spelling in fields), name)


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Random float32 model in evaluation mode, the same for the same arguments.

    Raises:
        ValueError: the family needs an entry in ``FAMILIES`` to become small.
    """
    config = tiny_config(model_type, **overrides)
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(config).num_parameters()
    if count > MAX_PARAMETERS:
        raise ValueError(f"{model_type} has {count:,} parameters: shrink it in FAMILIES")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Replace transformers' small initial values; each tensor's depend on its name only."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("balancing_biases"):  # see QUIRKS["zaya"]
            tensor.copy_(-1 + 0.03 * noise)
            tensor[-1] = -1
        elif name.endswith("tid2eid"):  # expert ids per token id: distinct within a row
            scores = torch.rand(len(tensor), model.config.n_routed_experts, generator=generator)
            tensor.copy_(scores.argsort(dim=1)[:, : tensor.shape[1]])
        elif name.endswith("bias"):  # small, because it is the same for every token
            tensor.copy_(0.03 * noise)
        elif not isinstance(tensor, nn.Parameter):
            continue
        elif "router_mlp" in name and tensor.ndim == 2:  # zaya: GELU's mean would decide alone
            tensor.copy_(0.4 * (noise - noise.mean(dim=1, keepdim=True)))
        elif tensor.ndim >= 2:
            tensor.copy_(0.15 * noise)
        else:  # norms, scales, decay rates: stay near what they were
            tensor.add_(0.1 * noise)


def save_tiny(model_type: str, directory: Path | str, seed: int = 0, **overrides: Any) -> Path:
    """Save the tiny model in several shards with the tensor names its vendor uses."""
    model = tiny_model(model_type, seed, **overrides)
    model.save_pretrained(directory, max_shard_size="100KB")
    return Path(directory)


def load_tiny(directory: Path | str) -> PreTrainedModel:
    """Reload a saved model so that it computes exactly what it did before it was saved.

    Weights loaded from safetensors live inside the mapped file, at any multiple of four bytes,
    and some matrix kernels round differently there.  Copies start on aligned addresses, like the
    weights of a model that was never saved.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def experts_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Modules that hold routed experts, by name: judged by class, independently of the package.

    One per block; jetmoe has one per matrix of its blocks, and others inside its attention.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_transposed") or EXPERTS_CLASS.fullmatch(type(module).__name__)
    }
    found = {name: module for name, module in found.items() if "shared" not in name}
    return {  # the innermost ones, without the blocks around them
        name: module
        for name, module in found.items()
        if not any(other.startswith(f"{name}.") for other in found)
    }


def moe_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the decoder layers that hold routed experts."""
    found = (re.search(r"\.(\d+)\.", name + ".") for name in experts_modules(model))
    return sorted({int(match.group(1)) for match in found if match})


def token_ids(batch: int, length: int, vocab: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length], without the special tokens 0, 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (batch, length), generator=generator)
