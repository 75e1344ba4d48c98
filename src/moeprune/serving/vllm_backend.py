"""Families that vLLM has no class of its own for, or none that we build on.

vLLM's transformers backend builds transformers' model and puts vLLM's attention, linear layers and
experts in place of its modules. By itself it knows one number of experts and stores them all; here
it gets the same experts modules, and sees the same numbers, as vLLM's own classes in
``vllm_models``. The checkpoint's own Python files are not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from moeprune.errors import UnsupportedModelError
from moeprune.models.sites import count_key, find_sites, is_swiglu, is_uneven, resize_facts
from moeprune.models.uneven_runtime import install
from moeprune.serving.plugin import building_on_vllm
from moeprune.serving.vllm_models import load_vectors, replaced

with building_on_vllm():
    from vllm.logger import init_logger
    from vllm.model_executor.models.transformers import TransformersMoEForCausalLM
    from vllm.model_executor.models.transformers import moe as backend
    from vllm.model_executor.models.utils import extract_layer_index

    from moeprune.serving.vllm_experts import experts_factory

TRIED = frozenset({"dots1", "ernie4_5_moe", "glm4_moe", "granitemoe", "hunyuan_v1_moe"})
"""Model types that were compared with transformers, token by token: docs/serving.md."""

_log = init_logger("vllm.moeprune")


class PrunedTransformersForCausalLM(TransformersMoEForCausalLM):  # type: ignore[misc]
    """Any model of transformers whose experts vLLM's backend replaces."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        divisor = getattr(self.text_config, "logits_scaling", None)
        if divisor is None:
            return
        # the backend does not know this key: greedy tokens are the same without, probabilities not
        if not self.text_config.model_type.startswith("granite"):
            raise UnsupportedModelError(
                f"vLLM's transformers backend leaves out logits_scaling of {self.config.model_type}"
            )
        if hasattr(self, "logits_processor"):  # on the last rank of a pipeline
            self.logits_processor.scale /= divisor

    def recursive_replace(self) -> None:
        """Build vLLM's modules for layers as config.json describes them.

        Raises:
            UnsupportedModelError: the experts are no SwiGLU, or the backend left them to
                transformers, or builds them wider or narrower than they are.
        """
        if self.text_config.model_type not in TRIED:
            _log.warning(
                "%s has not been tried with moeprune's plugin: compare what it generates with "
                "transformers", self.text_config.model_type,
            )  # fmt: skip
        layers = layers_of(self.model)
        if is_uneven(self.text_config):
            install(self.model, **resize_facts(self.model, layers))
        sites = find_sites(self.model, layers)
        if not all(is_swiglu(site.experts) for site in sites.values()):
            # the backend computes SwiGLU whatever the model says, without an error
            raise UnsupportedModelError(
                f"vLLM's transformers backend does not compute the experts of "
                f"{self.config.model_type} as they are: their activation is not silu(gate) * up"
            )
        width = {layer: site.shape.intermediate for layer, site in sites.items()}
        factory = experts_factory(self.text_config, count_key(self.text_config))
        with replaced(backend, FusedMoEFactory=factory):
            super().recursive_replace()
        # it looks for the width in config.json, and loads into a wrong one without an error
        made = {
            extract_layer_index(experts.layer_name): experts.moe_config.intermediate_size
            for experts in self.moe_layers
        }
        if made != width:
            raise UnsupportedModelError(
                f"vLLM's transformers backend does not build the experts of "
                f"{self.config.model_type} as they are: layer and width {made}, not {width}"
            )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint; raises ``CheckpointError`` if a vector is missing."""
        return load_vectors(self, super().load_weights, weights, self.hf_to_vllm_mapper.map_name)


def layers_of(model: nn.Module) -> str:
    """The name of the list of decoder layers.

    Raises:
        UnsupportedModelError: there is none, or more than one that fits.
    """
    config: Any = model.config
    number = config.get_text_config().num_hidden_layers
    found: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number and "." not in name
    ]
    if len(found) != 1:
        raise UnsupportedModelError(f"the decoder layers of {config.model_type} cannot be told")
    return found[0]
