"""How a walk over a model stays within a budget: what its parts measure, and what is given up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.core.accumulators import SAMPLE_SIZE
from moeprune.core.memory import Decision, Sizes, decide, describe
from moeprune.core.profile import HIDDEN, Profile
from moeprune.core.shapes import LayerShape
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import MoepruneError
from moeprune.models.expert_ranges import whole_only
from moeprune.models.hidden import HiddenStates, refuse_memory
from moeprune.models.native import text_config
from moeprune.models.process import resident_memory
from moeprune.models.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from moeprune.models.loading import LayeredModel
    from moeprune.models.sites import MoESite

RESIDENT = -1
"""Key of the tensors outside the decoder layers: embeddings, final norm, head."""

_STATES = 3  # a batch holds its embeddings, what went into a layer, and what came out
_THREAD = 128 << 10  # of a parked batch: what its thread and the model's forward hold
_IDS = 16  # bytes per token: its id, its key
_SLACK = 128 << 20  # scratch memory and compiled kernels of matrix libraries
_FIRST: list[int] = []  # the size of the process when it was looked at first


def _no_word(text: str) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class Limits:
    """What walks over a model are held to.

    Attributes:
        memory: bytes of the whole process; None is no limit.
        folder: where hidden states go that have no room; None takes the system's.
        beside: bytes that whoever walks takes for himself while he does.
        later: bytes that hidden states leave free, for models that are walked beside this one.
        compared: bytes per logit that whoever asks for them takes beside them.
        tell: gets a line on what was decided.
        profile: counts where time goes.
    """

    memory: int | None = None
    folder: Path | None = None
    beside: int = 0
    later: int = 0
    compared: int = 0
    tell: Callable[[str], None] = _no_word
    profile: Profile = field(default_factory=Profile)


@dataclass(frozen=True)
class Load:
    """What goes through a model.

    Attributes:
        tokens: of each batch, as (rows, tokens per row).
        workers: batches that may compute at once.
        needs: accumulators that are collected.
        chunks: whether the experts of a layer may be loaded some at a time.
        shared: whether batches hand their states to each other, as branches do.
        logits: whether they go on through the head.
        offset: batches that other processes have before these.
    """

    tokens: Sequence[tuple[int, int]]
    workers: int
    needs: Sequence[str] = ()
    chunks: bool = False
    shared: bool = False
    logits: bool = True
    offset: int = 0

    @property
    def edits(self) -> bool:
        """Whether new experts of a layer may stand beside the old ones."""
        return self.shared or bool(self.needs and not self.chunks)


def bounded(
    model: LayeredModel, load: Load, ranks: Ranks = ALONE
) -> tuple[Decision, HiddenStates | None]:
    """How to walk; without a budget everything in memory, the next layer read ahead.

    All of ``ranks`` call it: if one of them loads experts some at a time, all do.

    Raises:
        BudgetError: the budget is too small.
        OutputError: there is no room for the file of hidden states.
    """
    limits = model.limits
    experts = max((site.shape.experts for site in model.sites.values()), default=1)
    everything = Decision(len(load.tokens), True, load.workers, experts)
    if limits.memory is None:
        return everything, None
    if model.device.type != "cpu":
        raise MoepruneError(
            "--memory bounds what a walk holds on the CPU", f"leave it out with {model.device}"
        )
    sizes = sizes_of(model, load)
    decision = decide(sizes, limits.memory, limits.later)
    chunk = min(ranks.gather(decision.chunk))
    if chunk < experts or (load.shared and decision.in_memory < len(load.tokens)):
        decision = replace(decision, in_memory=0, chunk=chunk)
    limits.profile.starved |= not decision.prefetch
    limits.tell(describe(decision, sizes, limits.memory))
    if decision.in_memory == len(load.tokens):
        return decision, None
    filed = list(load.tokens)[decision.in_memory :]
    slots = (decision.chunk < experts) * (1 + _top_k(model)) * _width(model)
    reserve = sum(_between(model, *size) + size[0] * size[1] * slots for size in filed)

    def spent(seconds: float) -> None:  # copied while the other workers compute
        limits.profile.move(HIDDEN, "computing", seconds / decision.workers)

    return decision, HiddenStates(limits.folder, decision.in_memory, reserve, spent=spent)


def share(models: Sequence[LayeredModel], load: Load, compared: int = 0) -> None:
    """Prepare models that are walked one after another and stay open to share one budget.

    Hidden states of the first leave room for what the next ones keep, and a budget that is too
    small for one of them shows before the first walk. ``compared`` is as in ``Limits``.

    Raises:
        BudgetError: it is too small.
    """
    if all(model.limits.memory is None for model in models):
        return
    parked = len(load.tokens) * _parked(load)
    outside = [outside_bytes(model) + parked for model in models]
    for number, model in enumerate(models):
        memory = model.limits.memory
        if memory is not None:
            later = sum(outside[number + 1 :])
            model.limits = replace(model.limits, later=later, compared=compared)
            sizes = sizes_of(model, load)
            # by then the file has all hidden states of those before it
            decide(replace(sizes, base=sizes.base + sum(outside[:number])), memory)


def outside_bytes(model: LayeredModel) -> int:
    """Embeddings, head, final norm, and whatever else is not in the decoder layers."""
    return _stored(model)[RESIDENT][0]


def check(limits: Limits) -> None:
    """Raise if the folder cannot take hidden states, before anything is read."""
    if limits.folder is not None:
        refuse_memory(limits.folder)


def sizes_of(model: LayeredModel, load: Load) -> Sizes:
    """What a walk would hold, from shapes alone; the process is measured."""
    layers, stored = range(len(model.layers)), _stored(model)
    whole = [_nbytes(model.layers[index].parameters()) for index in layers]
    inside = [
        _nbytes(model.sites[index].experts.parameters()) if index in model.sites else 0
        for index in layers
    ]
    largest = max(load.tokens, key=math.prod, default=(0, 0))
    edited = max(inside, default=0) if load.edits else 0
    return Sizes(
        # branches compute while the layer is there as it was and as it is edited
        base=_process() + model.limits.beside + load.shared * edited,
        resident=0 if model.is_resident else stored[RESIDENT][0],
        layer=max(whole, default=0),
        rest=max((a - b for a, b in zip(whole, inside, strict=True)), default=0),
        source=max((edited, *(stored[index][1] + model.beside(index) for index in layers))),
        experts=max((site.shape.experts for site in model.sites.values()), default=1),
        batches=len(load.tokens),
        hidden=max((_between(model, *size) for size in load.tokens), default=0),
        work=_work(model, load, *largest),
        logits=_logits(model, math.prod(largest)) if load.logits else 0,
        statistics=statistics_bytes(model, load.needs),
        workers=load.workers,
        chunks=load.chunks and whole_only(model) is None,
        offset=load.offset,
        parked=_parked(load),
    )


def _parked(load: Load) -> int:
    return _THREAD + _IDS * max(map(math.prod, load.tokens), default=0)


def _between(model: LayeredModel, rows: int, length: int) -> int:
    """What a batch holds between layers: states, cosines and sines of positions, masks."""
    config, size = text_config(model.config), model.dtype.itemsize
    kinds = len({*(getattr(config, "layer_types", None) or ("",))})
    turned = max(_head(config), int(getattr(config, "qk_rope_head_dim", 0) or 0))
    found = rows * length * (_STATES * _width(model) + 2 * kinds * turned * size)
    if getattr(config, "_attn_implementation", "") == "eager":
        return found + kinds * rows * length * length * size
    windows = (getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size"))
    masked = any(isinstance(window, int) and window < length for window in windows)
    return found + masked * rows * length * length


def _stored(model: LayeredModel) -> dict[int, tuple[int, int]]:
    """By layer: bytes of its weights in memory, and of what they are made of while it is loaded."""
    found: dict[int, tuple[int, int]] = {}
    weights, tensors = model.quantisation.weights, model.checkpoint.tensors
    for index in (RESIDENT, *range(len(model.layers))):
        made = source = one = 0
        in_place = {f.name for f in model.in_place([key for key, _, _ in model.stored(index)])}
        for key, name, pattern in model.stored(index):
            part = weights.get(key)
            shape = tensors[key].shape if part is None else part.shape
            size = math.prod(shape) * model.dtype.itemsize
            disk = sum(tensors[k].nbytes for k in ({key} if part is None else {part.stored}))
            made += size
            if name in in_place:  # one matrix at a time, decoded by way of two in float32
                decoded = math.prod(shape) * 10
                one = max(one, disk + decoded if part is not None else disk)
            elif part is not None or disk != size:
                source += disk + (size if pattern is not None else 0)
            elif pattern is not None:
                source += disk
        found[index] = (made, source + one)
    return found


def _process() -> int:
    """What the process takes, with what libraries will take in its first walk."""
    now = resident_memory() or 0
    if not _FIRST:
        _FIRST.append(now)
    return max(now, _FIRST[0] + _SLACK)


def _nbytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def stream_width(model: LayeredModel) -> int:
    """Channels of one token's hidden state; some models carry several streams side by side."""
    config = text_config(model.config)
    return int(config.hidden_size) * int(getattr(config, "hc_mult", None) or 1)


def _width(model: LayeredModel) -> int:
    """Bytes of one token's hidden state."""
    return stream_width(model) * model.dtype.itemsize


def _top_k(model: LayeredModel) -> int:
    return max((site.shape.top_k for site in model.sites.values()), default=0)


def _work(model: LayeredModel, load: Load, rows: int, length: int) -> int:
    """Intermediate tensors of a batch in a layer: an estimate from above, checked by tests.

    The widest of attention, with norms in float32, and experts. Whoever observes and loads experts
    some at a time never changes weights, so the model's own experts do not run.
    """
    config, size = text_config(model.config), model.dtype.itemsize
    T, hidden = rows * length, int(config.hidden_size)
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    attention = T * (6 * heads * _head(config) * size + 4 * hidden * 4)
    if getattr(config, "_attn_implementation", "") == "eager":
        attention += rows * heads * length * length * (4 + size)
    dense = T * 3 * size * int(getattr(config, "intermediate_size", 0) or 0)
    experts = 0
    for site in model.sites.values():
        experts = max(experts, _observed_bytes(site, size))
        if not (load.needs and load.chunks):
            experts = max(experts, _own_bytes(site, size))
    return max(attention, dense, T * experts) + T * 2 * hidden * size


def _head(config: Any) -> int:
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    return int(getattr(config, "head_dim", 0) or int(config.hidden_size) // heads)


def _observed_bytes(site: MoESite, size: int) -> int:
    """Of a token in ``observe_experts``, where every expert gets every token.

    All slots' outputs; input, inside and output of the expert before, which are let go when those
    of the next one are there; and either the gate of this one, or its rows without padding and the
    sums' temporary tensors in float32 (two of I, or three of H).
    """
    H, I = site.shape.hidden, site.shape.intermediate  # noqa: E741
    rows = (2 * H + I) * size
    slots = (1 if _takes_all(site) else site.shape.top_k) * H * size
    if _takes_all(site):
        slots += 2 * site.shape.experts * H * size  # what is given to the experts, and their output
    return slots + rows + max((H + _gate(site) * I) * size, rows + 4 * max(2 * I, 3 * H))


def _own_bytes(site: MoESite, size: int) -> int:
    """Of a token in the model's own experts (``grouped_mm``): all slots at once."""
    slots = site.shape.experts if _takes_all(site) else site.shape.top_k
    biases = 2 if getattr(site.experts, "has_bias", False) else 0  # a row of them per slot
    return slots * (site.shape.hidden + (_gate(site) + biases) * site.shape.intermediate) * size


def _takes_all(site: MoESite) -> bool:
    """Whether every expert is given every token, times a score that may be 0 (Llama 4)."""
    return type(site.experts).__name__ == "Llama4TextExperts"


def _gate(site: MoESite) -> int:
    """Tensors of width I at once: two of gate and up, those of the activation, the product."""
    apply = getattr(type(site.experts), "_apply_gate", None)
    return 4 if getattr(apply, "__module__", "") == "transformers.integrations.moe" else 7


def _logits(model: LayeredModel, tokens: int) -> int:
    """Logits of a batch, and what is made of them."""
    each = 2 * model.dtype.itemsize + model.limits.compared
    return tokens * int(text_config(model.config).vocab_size) * each


def statistics_bytes(model: LayeredModel, needs: Iterable[str]) -> int:
    """One set of sums of the largest layer."""
    return max((sums_bytes(site.shape, needs) for site in model.sites.values()), default=0)


def sums_bytes(shape: LayerShape, needs: Iterable[str]) -> int:
    """One set of sums of a layer."""
    parts = LayerStatistics.empty(shape, needs, "meta").parts.values()
    own = sum(t.nbytes for part in parts for _, t in part.tensors())
    row = shape.hidden + shape.experts + 3 * shape.top_k
    sample = any(part.sampled for part in parts)
    return own + sample * SAMPLE_SIZE * row * 4
