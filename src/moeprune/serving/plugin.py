"""Entry point of the vLLM plugin (group ``vllm.general_plugins``).

vLLM calls ``register`` in each of its processes before it looks at a model. Nothing heavy is
imported here; the models are imported when a checkpoint asks for one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from moeprune.errors import MoepruneError

TESTED = "0.32"
"""The version of vLLM that docs/serving.md was measured with; we build on what is no public API."""

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

_log = logging.getLogger("vllm.moeprune")


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
    try:
        from moeprune.serving.vllm_config import accept_uneven  # noqa: PLC0415

        accept_uneven()
    except (ImportError, AttributeError) as error:
        # every model that is opened passes here, and most are none of ours
        _log.warning(
            "moeprune's plugin is tested with vLLM %s; in this one uneven DeepSeek checkpoints "
            "cannot be opened: %s", TESTED, error,
        )  # fmt: skip


@contextmanager
def building_on_vllm() -> Iterator[None]:
    """Around what takes names out of vLLM; without them the models cannot be made.

    Raises:
        MoepruneError: this vLLM does not have one of them.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise MoepruneError(
            f"this vLLM does not have what the plugin builds on: {error}",
            f"it is tested with {TESTED}",
        ) from error


def warn_of_version(version: str) -> None:
    """Say that a version of vLLM is not the tested one; others may call our code differently."""
    if not version.startswith(f"{TESTED}."):
        _log.warning(
            "moeprune's plugin is tested with vLLM %s, this is %s: compare what it generates with "
            "transformers", TESTED, version,
        )  # fmt: skip
