# This file travels with checkpoints: it depends on torch and transformers only.
"""Opens MoE checkpoints in which experts answer for others, or have a constant in their output.

Where ``config.experts_served_by = {"<layer>": [id, ...]}`` names a layer, its router is unchanged
and selects among all E experts; entry e of the list is the expert that answers for e. Only those
that answer are stored and computed. A token routed to two experts for which the same one answers
receives its output times the sum of both gates.

``config.expert_offsets = [layer, ...]`` lists the layers whose experts add a constant vector to
their output, before the gate.

Layout on disk: where experts are stored one by one, those that answer keep their ids, and
``<experts>.<id>.output_offset`` [H] is a constant. Where they are stored fused, the tensors hold
those that answer in ascending order, and ``<experts>.output_offset`` [C, H] the constants.
"""

import re

import torch
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import MergeModulelist, SplitModulelist, WeightConverter
from transformers.modeling_utils import PreTrainedModel


def served_by(config, layer):
    """For each expert of a layer the one that answers for it; None if each does for itself."""
    table = getattr(config.get_text_config(), "experts_served_by", None) or {}
    return table.get(str(layer))


def has_offsets(config, layer):
    """Whether the experts of a layer add constants to their outputs."""
    return int(layer) in (getattr(config.get_text_config(), "expert_offsets", None) or ())


class MergeAnswering(MergeModulelist):
    """Stacks the experts that are there; the reverse gives them their own ids back."""

    @property
    def reverse_op(self):
        """What saving does."""
        return SplitAnswering(self.dim)


class SplitAnswering(SplitModulelist):
    """Names the slices of a fused tensor by the ids that they have among all E experts."""

    @property
    def reverse_op(self):
        """What loading does."""
        return MergeAnswering(self.dim)

    @torch.no_grad()
    def convert(
        self,
        input_dict,
        source_patterns,
        target_patterns,
        model=None,
        full_layer_name=None,
        **kwargs,
    ):
        """Called by transformers when it saves a model."""
        answers = served_by(model.config, re.search(r"\.(\d+)\.", full_layer_name)[1])
        # the caller looks for expert 0 to find the prefix, and 0 may be gone: give whole names
        prefix = full_layer_name.partition(target_patterns[0])[0]
        result = {}
        for source, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            single = len(input_dict) == 1 and len(target_patterns) == 1
            pattern = target_patterns[0] if single else source
            ids = range(tensor.size(self.dim)) if answers is None else sorted(set(answers))
            for expert, piece in zip(ids, tensor.unbind(self.dim), strict=True):
                result[prefix + pattern.replace("*", str(expert))] = piece.contiguous()
        return result


def register(model):
    """Teach transformers how checkpoints of this model's classes are laid out on disk.

    The conversions are looked up by class name and by model type; both are adapted in place, since
    a mapping of our own class would be applied beside the native one and not instead.
    """
    modules = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    for key in {k for m in modules for k in (type(m).__name__, m.config.model_type)}:
        mapping = get_checkpoint_conversion_mapping(key)
        if mapping is not None:
            register_checkpoint_conversion_mapping(key, adapted(mapping), overwrite=True)
    # some native classes have conversions of their own, beside those of their model type
    own, *bases = type(model).__mro__
    for base in bases:
        mapping = get_checkpoint_conversion_mapping(base.__name__)
        if mapping is not None:
            register_checkpoint_conversion_mapping(own.__name__, adapted(mapping), overwrite=True)
            break


def adapted(mapping):
    """A checkpoint conversion mapping that reads and writes offsets and the ids that are left."""
    found, offsets = [], None
    for entry in mapping:
        sources = getattr(entry, "_original_source_patterns", [])
        if any("output_offset" in source for source in sources):
            continue  # adapted before
        if isinstance(entry, WeightConverter) and any("experts.*" in s for s in sources):
            operations = [
                MergeAnswering(op.dim) if isinstance(op, MergeModulelist) else op
                for op in entry.operations
            ]
            targets = list(entry._original_target_patterns)
            found.append(WeightConverter(list(sources), targets, operations))
            source = sources[0].partition("experts.*")[0] + "experts.*.output_offset"
            target = targets[0].rpartition(".")[0] + ".output_offset"
            offsets = WeightConverter(source, target, operations=[MergeAnswering(0)])
        else:
            found.append(entry)
    return found if offsets is None else [*found, offsets]


class AnsweringExperts:
    """Mixin for an experts module some of whose experts answer for others, or have constants."""

    def forward(self, hidden_states, top_k_index, top_k_weights, *args, **kwargs):
        """The outputs of those that answer, and their constants, each times its gate."""
        # slot_of_expert: where the expert that answers stands among those that are stored
        slots = self.__dict__.get("_slots")
        if slots is None or slots.device != top_k_index.device:
            slots = torch.tensor(self.slot_of_expert, device=top_k_index.device)
            self.__dict__["_slots"] = slots
        slot = slots[top_k_index]
        out = super().forward(hidden_states, slot, top_k_weights, *args, **kwargs)
        if self.output_offset is None:
            return out
        constant = nn.functional.embedding_bag(
            slot,
            self.output_offset.float(),
            per_sample_weights=top_k_weights.float(),
            mode="sum",
        )
        return out + constant.to(out.dtype)


def install(model):
    """Adapt the experts modules of a model that was just built."""
    for name, experts in list(model.named_modules()):
        if not (hasattr(experts, "is_transposed") and hasattr(experts, "has_gate")):
            continue
        layer = re.search(r"\.(\d+)\.", name)[1]
        answers, total = served_by(model.config, layer), experts.num_experts
        if answers is None and not has_offsets(model.config, layer):
            continue
        answers = list(range(total)) if answers is None else [int(e) for e in answers]
        kept = sorted(set(answers))
        for key, p in list(experts.named_parameters(recurse=False)):
            if p.shape[0] == total:
                data = torch.empty(len(kept), *p.shape[1:], dtype=p.dtype, device=p.device)
                setattr(experts, key, nn.Parameter(data, requires_grad=p.requires_grad))
        down = experts.down_proj
        experts.output_offset = None
        if has_offsets(model.config, layer):
            hidden = down.shape[2] if experts.is_transposed else down.shape[1]
            value = torch.zeros(len(kept), hidden, dtype=down.dtype, device=down.device)
            experts.output_offset = nn.Parameter(value)
        experts.num_experts = len(kept)
        experts.slot_of_expert = [kept.index(e) for e in answers]
        cls = type(experts)
        experts.__class__ = type(
            "Answering" + cls.__name__, (AnsweringExperts, cls), {"__module__": cls.__module__}
        )


class AnsweringModel:
    """Mixin for a causal language model; put it before the native class."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        install(self)
        register(self)

    @classmethod
    def is_backend_compatible(cls):
        """Asked by servers that would put experts modules of their own in place of ours."""
        raise NotImplementedError(
            "experts of this checkpoint answer for others or have constants in their outputs "
            "(experts_served_by, expert_offsets), which this server would leave out: use "
            "transformers, or a checkpoint whose experts were deleted"
        )
