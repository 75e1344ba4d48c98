# This file travels with checkpoints: it depends on torch and transformers only.
"""Opens MoE checkpoints in which some experts are constant vectors ("novices", arXiv 2507.00390).

The routers are unchanged and select among all E experts. A token routed to a novice receives its
vector times the gate, as it would receive an expert's output times the gate; only the experts that
remain are stored and computed.

Layout on disk: ``config.approximate_experts = {"<layer>": [ids of novices]}``. Where experts are
stored one by one, the remaining ones keep their ids and ``<experts>.<id>.approx_value`` [H] is a
novice. Where they are stored fused, the fused tensors hold the remaining experts in ascending order
and ``<experts>.novice_value`` [R, H] the novices.

With ``config.approximate_rank = r`` a novice is a map v + B (A x) of its input x instead, and its
row holds (1 + 2 r) H values: v, the r rows of A, the r columns of B.
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


def novices_of(config, layer):
    """The ids that are novices in a layer, ascending."""
    table = getattr(config.get_text_config(), "approximate_experts", None) or {}
    return sorted(int(e) for e in table.get(str(layer), ()))


def rank_of(config):
    """The rank of the novices' maps; 0 where they are constants."""
    rank = getattr(config.get_text_config(), "approximate_rank", 0)
    return rank if isinstance(rank, int) and rank > 0 else 0


class MergeKept(MergeModulelist):
    """Stacks the experts that are there; the reverse gives them their own ids back."""

    @property
    def reverse_op(self):
        """What saving does."""
        return SplitKept(self.dim)


class SplitKept(SplitModulelist):
    """Names the slices of a fused tensor by the ids that they have among all E experts."""

    @property
    def reverse_op(self):
        """What loading does."""
        return MergeKept(self.dim)

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
        layer = re.search(r"\.(\d+)\.", full_layer_name)[1]
        novices = novices_of(model.config, layer)
        # the caller looks for expert 0 to find the prefix, and 0 may be a novice: give whole names
        prefix = full_layer_name.partition(target_patterns[0])[0]
        result = {}
        for source, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            single = len(input_dict) == 1 and len(target_patterns) == 1
            pattern = target_patterns[0] if single else source
            if "approx_value" in pattern:
                ids = novices
            else:
                total = tensor.size(self.dim) + len(novices)
                ids = [e for e in range(total) if e not in novices]
            for expert, piece in zip(ids, tensor.unbind(self.dim), strict=True):
                result[prefix + pattern.replace("*", str(expert))] = piece.contiguous()
        return result


def register(model):
    """Teach transformers how novice checkpoints of this model's classes are laid out on disk.

    The conversions are looked up by class name and by model type; both are adapted in place, since
    a mapping of the novice class itself would be applied beside the native one and not instead.
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
    """A checkpoint conversion mapping that reads and writes novices as well."""
    found, novices = [], None
    for entry in mapping:
        sources = getattr(entry, "_original_source_patterns", [])
        if any("approx_value" in source for source in sources):
            continue  # adapted before
        if isinstance(entry, WeightConverter) and any("experts.*" in s for s in sources):
            operations = [
                MergeKept(op.dim) if isinstance(op, MergeModulelist) else op
                for op in entry.operations
            ]
            targets = list(entry._original_target_patterns)
            found.append(WeightConverter(list(sources), targets, operations))
            source = sources[0].partition("experts.*")[0] + "experts.*.approx_value"
            target = targets[0].rpartition(".")[0] + ".novice_value"
            novices = WeightConverter(source, target, operations=[MergeKept(0)])
        else:
            found.append(entry)
    return found if novices is None else [*found, novices]


class NoviceExperts:
    """Mixin for an experts module that holds fewer experts than its router selects among."""

    def forward(self, hidden_states, top_k_index, top_k_weights, *args, **kwargs):
        """The remaining experts' outputs and the constants, each times its gate."""
        # slot_of_expert: the position among the remaining experts, or len(remaining) + novice row
        slots = self.__dict__.get("_slots")
        if slots is None or slots.device != top_k_index.device:
            slots = torch.tensor(self.slot_of_expert, device=top_k_index.device)
            self.__dict__["_slots"] = slots
        slot = slots[top_k_index]
        novice = slot >= self.num_experts
        # The fast kernels skip ids from num_experts on, so novices cost no product. Some families'
        # own loops do not know such ids: there a novice's slot runs any expert, times zero.
        eager = self.config._experts_implementation == "eager"
        out = super().forward(
            hidden_states,
            slot.masked_fill(novice, 0 if eager else self.num_experts),
            top_k_weights.masked_fill(novice, 0),
            *args,
            **kwargs,
        )
        row = (slot - self.num_experts).clamp(min=0)
        gate = top_k_weights.float().masked_fill(~novice, 0)
        value = self.novice_value.float()
        width = value.shape[1] // (1 + 2 * self.novice_rank)
        added = nn.functional.embedding_bag(
            row, value[:, :width].contiguous(), per_sample_weights=gate, mode="sum"
        )
        if self.novice_rank:
            # each token through all maps, times its gate for each: 0 for most
            maps = value[:, width:].view(len(value), 2, -1, width)
            gates = gate.new_zeros(len(gate), len(value)).scatter_add_(1, row, gate)
            inner = hidden_states.float() @ maps[:, 0].flatten(0, 1).T
            inner = inner.unflatten(1, (-1, self.novice_rank))
            added = added + (inner * gates[:, :, None]).flatten(1) @ maps[:, 1].flatten(0, 1)
        return out + added.to(out.dtype)


def install(model):
    """Shrink the experts modules of a model that was just built, and add the novices' vectors."""
    for name, experts in list(model.named_modules()):
        if not (hasattr(experts, "is_transposed") and hasattr(experts, "has_gate")):
            continue
        novices = novices_of(model.config, re.search(r"\.(\d+)\.", name)[1])
        if not novices:
            continue
        total = experts.num_experts
        kept = [e for e in range(total) if e not in novices]
        for key, p in list(experts.named_parameters(recurse=False)):
            if p.shape[0] == total:
                data = torch.empty(len(kept), *p.shape[1:], dtype=p.dtype, device=p.device)
                setattr(experts, key, nn.Parameter(data, requires_grad=p.requires_grad))
        down = experts.down_proj
        hidden = down.shape[2] if experts.is_transposed else down.shape[1]
        experts.novice_rank = rank_of(model.config)
        width = hidden * (1 + 2 * experts.novice_rank)
        value = torch.zeros(len(novices), width, dtype=down.dtype, device=down.device)
        experts.novice_value = nn.Parameter(value)
        experts.num_experts = len(kept)
        experts._is_expert_parallel = True  # makes ids >= num_experts legal in the fast kernels
        order = kept + novices
        experts.slot_of_expert = [order.index(e) for e in range(total)]
        cls = type(experts)
        experts.__class__ = type(
            "Novice" + cls.__name__, (NoviceExperts, cls), {"__module__": cls.__module__}
        )


class NoviceModel:
    """Mixin for a causal language model; put it before the native class."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        install(self)
        register(self)

    @classmethod
    def is_backend_compatible(cls):
        """Asked by servers that would put experts modules of their own in place of ours."""
        raise NotImplementedError(
            "some experts of this checkpoint are constants (approximate_experts), which this "
            "server would leave out: use transformers, or a checkpoint whose experts were deleted"
        )
