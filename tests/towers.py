"""Tiny random models with a vision or audio tower around a Mixture-of-Experts language model.

The language model is the one of ``families``; every tower has as many layers as it, so that one
taken for the other is noticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families import randomise, tiny_config

_QWEN_VISION = {
    "depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}  # fmt: skip
_GRID_TOKENS = {"image_token_id": 120, "video_token_id": 121}
_VISION_TOKENS = _GRID_TOKENS | {"vision_start_token_id": 122, "vision_end_token_id": 123}
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}

TOWERS: dict[str, dict[str, Any]] = {
    "gemma4": {
        "text": {},
        "vision_config": {
            "num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 24,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4,
            "pooling_kernel_size": 2, "position_embedding_size": 16,
        },
        "audio_config": None,
        "image_token_id": 120, "video_token_id": 121, "audio_token_id": 122,
    },
    "glm4v_moe": {
        "text": {"rope_parameters": _MROPE | {"partial_rotary_factor": 1.0}},
        "vision_config": {
            "depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
            "image_size": 16, "patch_size": 4, "out_hidden_size": 32,
        },
        "image_start_token_id": 122, "image_end_token_id": 123,
        "video_start_token_id": 124, "video_end_token_id": 125, **_GRID_TOKENS,
    },
    "llama4": {
        "text": {},
        "vision_config": {
            "num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 64,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "vision_output_dim": 32,
            "projector_input_dim": 32, "projector_output_dim": 32,
        },
        "boi_token_index": 122, "eoi_token_index": 123, "image_token_index": 120,
    },
    "qwen3_5_moe": {
        "text": {"layer_types": ["linear_attention", "full_attention"] * 2},
        "vision_config": _QWEN_VISION,
        **_VISION_TOKENS,
    },
    "qwen3_omni_moe_thinker": {
        "text": {"rope_parameters": _MROPE},
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0, 1]},
        "audio_config": {
            "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "d_model": 16,
            "num_mel_bins": 16, "output_dim": 32, "n_window": 8, "downsample_hidden_size": 8,
            "max_source_positions": 64,
        },
        "audio_start_token_id": 124, "user_token_id": 125, "audio_token_id": 126, **_VISION_TOKENS,
    },
    "qwen3_vl_moe": {
        "text": {"rope_parameters": _MROPE},
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0, 1]},
        **_VISION_TOKENS,
    },
}  # fmt: skip
"""Arguments of the configuration; ``text`` are overrides of the tiny language model's."""


def tower_config(model_type: str) -> PreTrainedConfig:
    """Configuration of the tiny model."""
    fields = dict(TOWERS[model_type])
    config_class = CONFIG_MAPPING[model_type]
    text_type = config_class.sub_configs["text_config"].model_type
    text = tiny_config(text_type, **fields.pop("text"))
    return config_class(text_config=text.to_dict(), **fields)


def tower_model(model_type: str) -> PreTrainedModel:
    """Random float32 model in evaluation mode."""
    config = tower_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, 0)
    return model


def save_tower(model_type: str, directory: Path) -> Path:
    """Save the tiny model in several shards with the tensor names its vendor uses."""
    tower_model(model_type).save_pretrained(directory, max_shard_size="100KB")
    return directory
