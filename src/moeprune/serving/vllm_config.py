"""What vLLM makes of a configuration whose layers differ in nothing but their number of experts."""

from __future__ import annotations

from typing import Any

from vllm.transformers_utils import model_arch_config_convertor as convertors

from moeprune.serving.plugin import architectures

LATENT = ("deepseek_v2", "deepseek_v3")
"""Model types with latent attention: vLLM refuses any per-layer configuration of theirs."""


class OneConfiguration(convertors.ModelArchConfigConvertorBase):  # type: ignore[misc]
    """Reads our checkpoints as if all layers were alike, as to all but experts they are."""

    def get_per_layer_hf_configs(self) -> Any:
        """None for our architectures: the model itself reads the numbers of experts."""
        if architectures().keys() & set(self.get_architectures()):
            return None
        return super().get_per_layer_hf_configs()


def accept_uneven() -> None:
    """Let vLLM read uneven checkpoints of models with latent attention."""
    for model_type in LATENT:
        convertors.MODEL_ARCH_CONFIG_CONVERTORS.setdefault(model_type, OneConfiguration)
