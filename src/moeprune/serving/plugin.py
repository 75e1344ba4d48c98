"""Entry point of the vLLM plugin (group ``vllm.general_plugins``).

vLLM calls ``register`` in each of its processes before it looks at a model. Nothing heavy is
imported here; the models are imported when a checkpoint asks for one of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from moeprune.errors import MoepruneError

NATIVE: Mapping[str, tuple[str, str]] = {
    "OlmoeForCausalLM": ("olmoe", "num_experts"),
    "MixtralForCausalLM": ("mixtral", "num_local_experts"),
    "Qwen2MoeForCausalLM": ("qwen2_moe", "num_experts"),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "num_experts"),
    "DeepseekV2ForCausalLM": ("deepseek_v2", "n_routed_experts"),
    "DeepseekV3ForCausalLM": ("deepseek_v2", "n_routed_experts"),
}
"""vLLM's classes that can be served pruned: their module, and config.json's number of experts."""

KINDS = ("Novice", "Answering", "Uneven")
"""What the names of our architectures begin with; see ``moeprune.models.generated``."""

MODELS = "moeprune.serving.vllm_models"
BACKEND = "moeprune.serving.vllm_backend:PrunedTransformersForCausalLM"
"""The class for all others, on vLLM's transformers backend."""


def architectures() -> dict[str, str]:
    """Names in ``architectures`` of config.json, and the class that serves each of them."""
    from transformers.models.auto.modeling_auto import (  # noqa: PLC0415
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )

    others = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
    classes = dict.fromkeys(others, BACKEND) | {one: f"{MODELS}:Pruned{one}" for one in NATIVE}
    return {f"{kind}{native}": where for native, where in classes.items() for kind in KINDS}


def register() -> None:
    """Tell vLLM about our architectures; may be called more than once.

    Raises:
        MoepruneError: vLLM is not installed.
    """
    try:
        from vllm import ModelRegistry  # noqa: PLC0415
    except ImportError as error:
        raise MoepruneError(
            f"vLLM cannot be imported: {error}", "this plugin runs in an environment with vLLM"
        ) from None
    for name, where in architectures().items():
        ModelRegistry.register_model(name, where)
    from moeprune.serving.vllm_config import accept_uneven  # noqa: PLC0415

    accept_uneven()
