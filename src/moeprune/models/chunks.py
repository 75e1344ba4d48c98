"""One layer whose experts are in memory some at a time.

The layer's own forward runs twice for every batch: first up to its experts, where what they are
given is kept and the forward ends, and last with the experts' outputs, which were computed in
between, chunk by chunk, for all batches. Outputs and sums are those of the layer in one piece, bit
for bit where that is observed: each slot is computed by the same products and added in the same
order. (The model's own experts differ from observed ones in the last bits, here as everywhere.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from moeprune.core.folding import Fold
from moeprune.core.statistics import LayerStatistics
from moeprune.models.expert_ranges import ExpertRanges
from moeprune.models.hidden import HiddenStates
from moeprune.models.lockstep import Enough, Job, Lockstep
from moeprune.models.observe import Collector, Slots, collect_block, compute_slots, observed
from moeprune.models.ranks import ALONE, Ranks
from moeprune.models.sites import MoESite


class _Here(threading.local):
    batch: int = -1


@dataclass
class ChunkedLayer:
    """The layer at which all batches of ``lockstep`` stand.

    Args:
        site: its MoE block.
        ranges: its experts, none of which are loaded.
        lockstep: the batches.
        chunk: experts in memory at once.
        hidden: where the batches' tensors go; None leaves them in memory.
        collector: where a batch's sums go; None observes nothing.
        empty: statistics over no tokens.
        finished: told of every batch, in order, when the layer is done with it.
        loading: wraps the loading of a chunk.
        offset, ranks: as of the walk.
    """

    site: MoESite
    ranges: ExpertRanges
    lockstep: Lockstep
    chunk: int
    hidden: HiddenStates | None = None
    collector: Callable[[int, LayerStatistics], Collector] | None = None
    empty: Callable[[], LayerStatistics] | None = None
    finished: Callable[[Job], None] = lambda job: None
    loading: Callable[[Callable[[], int]], None] = lambda load: None
    offset: int = 0
    ranks: Ranks = ALONE
    _slots: dict[int, Slots] = field(default_factory=dict)
    _collectors: dict[int, Collector] = field(default_factory=dict)
    _here: _Here = field(default_factory=_Here)

    def run(self) -> LayerStatistics | None:
        """Compute the layer; its statistics, if it is observed."""
        total = None if self.empty is None else self.empty()
        self._up_to_experts(total)
        experts = self.site.shape.experts
        for start in range(0, experts, self.chunk):
            chosen = range(start, min(start + self.chunk, experts))
            self.loading(lambda chosen=chosen: self.ranges.load(chosen))  # type: ignore[misc]
            self._merge(total, lambda job, chosen=chosen: self._compute(job, chosen))  # type: ignore[misc]
        self.ranges.free()
        self._merge(total, self._block)
        self._from_experts()
        return total

    def _up_to_experts(self, total: LayerStatistics | None) -> None:
        def capture(experts: Any, x_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
            batch = self._here.batch
            if batch in self._slots:
                raise AssertionError("the experts of a batch are called once")
            slots = Slots(x_TH, index_TK, gate_TK, x_TH.new_zeros(index_TK.numel(), x_TH.shape[1]))
            self._slots[batch] = slots
            self._keep(batch)
            raise Enough

        def begin(index: int) -> Collector | None:
            self._here.batch = index
            if self.collector is None:
                return None
            # sums come later, chunk by chunk; now only the router is listened to
            none = LayerStatistics(self.site.shape)
            self._collectors[index] = self.collector(index, none)
            return self._collectors[index]

        needs_router = total is not None and total.needs_router
        with observed(self.site, needs_router), self._experts(capture):
            self.lockstep.run(begin, self._end)

    def _from_experts(self) -> None:
        def give(experts: Any, x_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
            return self._slots.pop(self._here.batch).sum()

        def begin(index: int) -> None:
            self._here.batch = index

        with self._experts(give):
            self.lockstep.run(begin, self.finished)

    def _end(self, job: Job) -> None:
        job.collector = None

    def _compute(self, job: Job, chosen: range) -> LayerStatistics | None:
        collector = self._collectors.get(job.index)
        if collector is not None and self.empty is not None:
            collector = replace(collector, statistics=self.empty())
        slots = self._slots[job.index]
        compute_slots(self.site.experts, slots, collector, chosen, chosen.start)
        if self.hidden is not None:
            self.hidden.rest(job.index)
        return None if collector is None else collector.statistics

    def _block(self, job: Job) -> LayerStatistics | None:
        collector = self._collectors.pop(job.index, None)
        if collector is None or self.empty is None:
            return None
        collector = replace(collector, statistics=self.empty())
        collect_block(collector, self._slots[job.index])
        if self.hidden is not None:
            self.hidden.rest(job.index)
        return collector.statistics

    def _merge(
        self, total: LayerStatistics | None, compute: Callable[[Job], LayerStatistics | None]
    ) -> None:
        """Let the worker threads compute all batches; add what they saw, in order."""

        def without_grad(job: Job) -> LayerStatistics | None:
            with torch.no_grad():
                return compute(job)

        fold: Fold[LayerStatistics] = Fold(self.offset)
        for statistics in self.lockstep.in_order(without_grad, self.lockstep.workers + 1):
            if statistics is not None:
                fold.add(statistics)
        if total is not None and self.empty is not None:
            total.merge(self.ranks.total(fold, self.empty))  # of other experts than those before

    def _keep(self, batch: int) -> None:
        if self.hidden is not None:
            slots, collector = self._slots[batch], self._collectors.get(batch)
            logits = None if collector is None else collector.logits_TR
            self.hidden.keep(
                batch, (slots.x_TH, slots.index_TK, slots.gate_TK, slots.out_SH, logits)
            )

    @contextmanager
    def _experts(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        experts: Any = self.site.experts
        experts.forward = MethodType(forward, experts)
        try:
            yield
        finally:
            del experts.forward
