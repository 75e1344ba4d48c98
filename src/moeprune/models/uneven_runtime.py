# This file travels with checkpoints: it depends on torch and transformers only.
"""Opens MoE checkpoints whose layers hold different numbers of experts.

``config.json`` says the largest number where the architecture says it, and the others in
``per_layer_config``: ``{"3": {"num_experts": 6}}``. transformers reads that key, but its classes
build every layer with the one number; here the layers are resized after they were built. A few
classes refuse a ``per_layer_config`` that differs between layers with the same kind of attention:
their numbers stand in ``experts_per_layer``: ``{"3": 6}``.
"""

import re
from typing import ClassVar

import torch
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import PreTrainedModel

COUNTS = re.compile(r"num_(local_|routed_|router_)?(experts|classes)|n_routed_experts|out_features")
"""Attributes of modules that hold the number of experts, or of the router's rows."""


def experts_of(config, layer, count):
    """The number of experts of one layer; ``count`` is the configuration's name of it."""
    own = getattr(config, "experts_per_layer", None)
    if own is not None:
        return own.get(str(layer), getattr(config, count))
    return getattr(config.per_layer_config[layer], count)


def resize(module, name, dim, size):
    """Give one parameter or buffer of ``module`` another length along ``dim``."""
    old = getattr(module, name)
    shape = [*old.shape[:dim], size, *old.shape[dim + 1 :]]
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        module.register_buffer(name, new, persistent=name not in module._non_persistent_buffers_set)


def recount(module, sizes):
    """Change the module's own attributes that hold a number of experts."""
    for name, value in list(vars(module).items()):
        if COUNTS.fullmatch(name) and isinstance(value, int) and value in sizes:
            setattr(module, name, sizes[value])


def install(model, layers, experts, router, count):
    """Resize the MoE layers of a model that was just built.

    Args:
        model: the model, every layer with the largest number of experts.
        layers: name of the list of decoder layers.
        experts: name of the experts module inside a decoder layer.
        router: tensors with one entry per expert, name inside a decoder layer -> axis.
        count: the configuration's name of the number of experts.
    """
    config = model.config.get_text_config()
    for index, layer in enumerate(model.get_submodule(layers)):
        modules = dict(layer.named_modules())
        if experts not in modules:
            continue
        module = modules[experts]
        before, after = int(module.num_experts), experts_of(config, index, count)
        if before == after:
            continue
        sizes = {before: after}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if "." not in name and tensor.ndim and tensor.shape[0] == before:
                resize(module, name, 0, after)
        for path, dim in router.items():
            parent, _, name = path.rpartition(".")
            if parent not in modules or getattr(modules[parent], name, None) is None:
                continue  # not every layer of every family has a bias
            rows = getattr(modules[parent], name).shape[dim]
            sizes[rows] = rows - before + after  # rows beyond the experts' stay
            resize(modules[parent], name, dim, sizes[rows])
        for path, part in modules.items():
            inside = any(name == path or name.startswith(path + ".") for name in (experts, *router))
            if inside and not isinstance(part, PreTrainedModel):
                recount(part, sizes)


def register(model):
    """Let transformers convert this model's tensor names although its class is not its own."""
    modules = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    for key in {k for m in modules for k in (type(m).__name__, m.config.model_type)}:
        mapping = get_checkpoint_conversion_mapping(key)
        if mapping is not None:
            register_checkpoint_conversion_mapping(key, mapping, overwrite=True)


class UnevenModel:
    """Mixin for a causal language model; put it before the native class and set the attributes."""

    moe: ClassVar = {}
    """Keyword arguments of ``install``."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        install(self, **self.moe)
        register(self)

    @classmethod
    def is_backend_compatible(cls):
        """Asked by servers that would put experts modules of their own in place of ours."""
        raise NotImplementedError(
            "layers of this checkpoint hold different numbers of experts, which this server does "
            "not know: use transformers, or a checkpoint with the same number in every layer"
        )
