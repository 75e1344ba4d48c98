"""vLLM's own models, built for checkpoints of ours that its classes cannot express.

``Pruned<class>`` is vLLM's class with another way to build its layers: the experts are
``SlottedExperts`` where config.json says so, and every layer sees its own number of experts.
vLLM reads both from one configuration and one factory function; they are replaced while the model
is built, and only then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn

from moeprune.models.uneven_runtime import experts_of
from moeprune.serving.plugin import NATIVE, building_on_vllm, warn_of_version

with building_on_vllm():
    import vllm
    from vllm.model_executor.models.utils import make_layers

    from moeprune.serving.vllm_experts import SlottedExperts, experts_factory, has_own_numbers

warn_of_version(vllm.__version__)


class Pruned:
    """Mixin for a model of vLLM; put it before vLLM's class."""

    count: ClassVar[str]
    """config.json's name of the number of experts."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_text_config
        with building(type(self).__mro__[2].__module__, config, self.count):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        tie(self, config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint; raises ``CheckpointError`` if a vector is missing."""
        return load_vectors(self, super().load_weights, weights)  # type: ignore[misc]


def load_vectors(
    model: Any,
    load: Callable[[Iterable[tuple[str, Tensor]]], set[str]],
    weights: Iterable[tuple[str, Tensor]],
    module_name: Callable[[str], str | None] = str,
) -> set[str]:
    """Load a checkpoint with ``load``, which is vLLM's own.

    Raises ``CheckpointError`` if a vector is missing. The experts' tensors are renamed before vLLM
    sees them: its classes differ in how they load them, but each of them knows experts by their
    slots. ``module_name`` makes a name inside the model of one in the files.
    """
    experts = {
        name.removesuffix("routed_experts"): module
        for name, module in model.named_modules()
        if isinstance(module, SlottedExperts)
    }
    loaded = load(renamed(weights, experts, module_name))
    for prefix, module in experts.items():
        module.complete()
        if module.added_value is not None:
            loaded.add(f"{prefix}routed_experts.added_value")
    return loaded


def renamed(
    weights: Iterable[tuple[str, Tensor]],
    experts: Mapping[str, Any],
    module_name: Callable[[str], str | None],
) -> Iterator[tuple[str, Tensor]]:
    """Take out the vectors of ``experts`` (by prefix), and name their stored experts by slots."""
    for name, tensor in weights:
        prefix, found, rest = name.partition(".experts.")
        module = experts.get((module_name(name) or "").partition(".experts.")[0] + found)
        if module is None:
            yield name, tensor
            continue
        inner = module.take(rest, tensor)
        if inner is not None:
            yield f"{prefix}{found}{inner}", tensor


@contextmanager
def building(module: str, config: Any, count: str) -> Iterator[None]:
    """Let the classes of one of vLLM's modules build layers as ``config`` describes them."""
    with replaced(
        sys.modules[module],
        FusedMoEFactory=experts_factory(config),
        make_layers=layers_factory(config, count),
    ):
        yield


@contextmanager
def replaced(where: ModuleType, **names: Any) -> Iterator[None]:
    """Put other values in place of names of a module, while the block runs."""
    before = {name: getattr(where, name) for name in names}
    for name, value in names.items():
        setattr(where, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(where, name, value)


def layers_factory(config: Any, count: str) -> Callable[..., Any]:
    """What takes the place of ``make_layers``: shows every layer its own number of experts."""
    if not has_own_numbers(config):
        return make_layers  # type: ignore[no-any-return]

    def build(layers: int, layer: Callable[..., nn.Module], prefix: str) -> Any:
        largest = getattr(config, count)

        def one(prefix: str) -> nn.Module:
            setattr(config, count, experts_of(config, int(prefix.rpartition(".")[2]), count))
            try:
                return layer(prefix=prefix)
            finally:
                setattr(config, count, largest)

        return make_layers(layers, one, prefix=prefix)

    return build


def tie(model: Any, config: Any) -> None:
    """Share embeddings and head where config.json says so; vLLM's OLMoE does not do it."""
    if config.tie_word_embeddings and hasattr(model.lm_head, "tie_weights"):
        model.lm_head = model.lm_head.tie_weights(model.model.embed_tokens)


def _pruned(native: str) -> type[Any]:
    module, count = NATIVE[native]
    with building_on_vllm():
        base = getattr(import_module(f"{vllm.__name__}.model_executor.models.{module}"), native)
    name = f"Pruned{native}"
    return type(name, (Pruned, base), {"__module__": __name__, "count": count})


PrunedOlmoeForCausalLM = _pruned("OlmoeForCausalLM")
PrunedMixtralForCausalLM = _pruned("MixtralForCausalLM")
PrunedQwen2MoeForCausalLM = _pruned("Qwen2MoeForCausalLM")
PrunedQwen3MoeForCausalLM = _pruned("Qwen3MoeForCausalLM")
PrunedDeepseekV2ForCausalLM = _pruned("DeepseekV2ForCausalLM")
PrunedDeepseekV3ForCausalLM = _pruned("DeepseekV3ForCausalLM")
