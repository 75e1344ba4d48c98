"""What a walk gives up, and in which order, to stay within a budget of memory: arithmetic on sizes.

A walk holds resident tensors, one or two layers, the hidden states of all batches, and for every
batch that computes its intermediate tensors and statistics. What is given up first costs least:
hidden states move to a file, then the next layer is not read ahead, then fewer batches compute at
once, or the experts of a layer are loaded some at a time, whichever is faster.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moeprune.core.folding import held as sums_held
from moeprune.errors import BudgetError

_PASSES = 16
"""Parts that a layer is cut into at most while anything else fits: each is a pass over all text."""

_SPEED_WHOLE, _SPEED_PARTS = 3, 2
"""Of a worker, as a ratio: parts took 1.4 times the CPU time (``docs/performance.md``)."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of what a walk holds.

    Attributes:
        base: the process before the walk, whatever it has loaded already, and what libraries take.
        resident: tensors outside the decoder layers that are still to be loaded.
        layer: the largest decoder layer in the dtype computed in.
        rest: the largest decoder layer without its experts.
        source: tensors of a layer that stand beside those which are made of them while it is
            loaded (experts stored one by one or quantised) or edited, at most.
        experts: experts of a layer.
        batches: how many.
        hidden: what the largest batch holds between layers.
        work: what a batch holds while a layer computes, beyond its hidden states.
        logits: of a batch, which come when the layers are done; 0 where there are none.
        statistics: one set of sums of a layer.
        workers: batches that compute at once, at most.
        chunks: whether experts can be loaded some at a time.
        offset: batches that other processes have before these.
        parked: what a batch holds in memory wherever its hidden states are.
    """

    base: int
    resident: int
    layer: int
    rest: int
    source: int
    experts: int
    batches: int
    hidden: int
    work: int
    logits: int
    statistics: int
    workers: int
    chunks: bool = True
    offset: int = 0
    parked: int = 0


@dataclass(frozen=True)
class Decision:
    """How a walk runs.

    Attributes:
        in_memory: batches whose hidden states stay in memory; those of the others are in a file.
        prefetch: whether the next layer is read while one computes.
        workers: batches that compute at once.
        chunk: experts that are in memory at once; all of them where layers are loaded whole.
        peak: bytes that this takes at most, by the sizes.
    """

    in_memory: int
    prefetch: bool
    workers: int
    chunk: int
    peak: int = 0


def peak(sizes: Sizes, decision: Decision) -> int:
    """Largest number of bytes that a walk holds."""
    workers = min(decision.workers, max(1, sizes.batches))
    held = sizes.base + sizes.resident + decision.in_memory * sizes.hidden
    held += sizes.batches * sizes.parked
    # in flight, waiting to be added, and what a sum of so many parts holds; of experts some at a
    # time, the sum over those before as well
    sets = workers + 1 + sums_held(sizes.batches, sizes.offset)
    sets += decision.chunk < sizes.experts
    computing = workers * (sizes.work + sizes.hidden) + sets * sizes.statistics
    layer, source = sizes.layer, sizes.source
    if decision.chunk < sizes.experts:
        share = -(-(sizes.layer - sizes.rest) * decision.chunk // sizes.experts)
        source = -(-sizes.source * decision.chunk // sizes.experts)
        layer = sizes.rest + share
    if decision.prefetch:
        walking = 2 * layer + source + computing
    else:
        walking = layer + max(source, computing)
    return held + max(walking, workers * (sizes.logits + sizes.hidden))


def decide(sizes: Sizes, budget: int, later: int = 0) -> Decision:
    """The first way to walk, in the order of what it costs, that stays within ``budget`` bytes.

    Hidden states in memory leave ``later`` bytes of it free.

    Raises:
        BudgetError: none does; the message names the smallest budget that works.
    """
    whole = Decision(sizes.batches, True, sizes.workers, sizes.experts)
    if (expected := peak(sizes, whole)) <= budget - later:
        return replace(whole, peak=expected)
    for way in _ways(sizes, budget):
        spare = budget - peak(sizes, way)
        kept = min(sizes.batches, max(0, spare - later) // max(1, sizes.hidden))
        chosen = replace(way, in_memory=kept if way.chunk == sizes.experts else 0)
        return replace(chosen, peak=peak(sizes, chosen))
    least = peak(sizes, _smallest(sizes)) - sizes.base - sizes.resident
    raise BudgetError(
        f"--memory {show(budget)} is too small: the process takes {show(sizes.base)}, "
        f"embeddings and head take {show(sizes.resident)}, {_part(sizes)} {show(least)}",
        f"the smallest budget that works is --memory {show(smallest_budget(sizes))}",
    )


def _part(sizes: Sizes) -> str:
    if sizes.chunks and sizes.experts > 1:
        return "a layer with one expert at a time and one batch"
    return "one layer and one batch"


def _ways(sizes: Sizes, budget: int) -> Iterator[Decision]:
    """Those that fit with all hidden states in a file, from the fastest to the smallest."""
    experts, most = sizes.experts, sizes.workers
    if peak(sizes, ahead := Decision(0, True, most, experts)) <= budget:
        yield ahead
    few = -(-experts // _PASSES)
    ways = [(_SPEED_WHOLE * w, w, range(experts, experts + 1)) for w in range(most, 0, -1)]
    if sizes.chunks:
        ways += [(_SPEED_PARTS * w, w, range(few, experts)) for w in range(most, 0, -1)]
        ways += [(0, w, range(1, few)) for w in range(most, 0, -1)]
    for _, workers, chunks in sorted(ways, key=lambda way: -way[0]):
        chunk = _largest(sizes, budget, workers, chunks)
        if chunk is not None:
            yield Decision(0, False, workers, chunk)


def _largest(sizes: Sizes, budget: int, workers: int, chunks: range) -> int | None:
    """The most experts at a time that fit; None if none of these do."""

    def needed(chunk: int) -> int:
        return peak(sizes, Decision(0, False, workers, chunk))

    fitting = bisect_right(chunks, budget, key=needed)
    return chunks[fitting - 1] if fitting else None


def smallest_budget(sizes: Sizes) -> int:
    """The least that a walk can do with, rounded up to what ``show`` can say."""
    step = 1 << 20
    return -(-peak(sizes, _smallest(sizes)) // step) * step


def _smallest(sizes: Sizes) -> Decision:
    found = [Decision(0, False, 1, sizes.experts)]
    if sizes.chunks:
        found.append(Decision(0, False, 1, 1))
    return min(found, key=lambda way: peak(sizes, way))


def show(size: int) -> str:
    """Bytes as ``targets.parse_size`` reads them: MiB, or GiB where that is short."""
    if size >= 10 << 30 and size % ((1 << 30) // 4) == 0:
        return f"{size / 2**30:g}GiB"
    return f"{-(-size // (1 << 20))}MiB"


def describe(decision: Decision, sizes: Sizes, budget: int) -> str:
    """One line for people."""
    parts = [f"memory {show(budget)}, expected {show(decision.peak)}"]
    filed = sizes.batches - decision.in_memory
    if filed:
        size = show(filed * sizes.hidden)
        parts.append(f"hidden states of {filed} of {sizes.batches} batches in a file ({size})")
    else:
        parts.append("hidden states in memory")
    parts.append("next layer read ahead" if decision.prefetch else "one layer at a time")
    parts.append(f"{decision.workers} batch{'es' if decision.workers > 1 else ''} at once")
    if decision.chunk < sizes.experts:
        parts.append(f"{decision.chunk} of {sizes.experts} experts in memory at a time")
    return "; ".join(parts)
