"""The walk: every batch through every decoder layer, one layer in memory at a time.

While a layer computes, the next one is read from disk, so that two layers are resident and never
more. Statistics are collected per batch and added up in order of batches.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor

from moeprune.core.accumulating import Origin
from moeprune.core.folding import Fold, held
from moeprune.core.partial import PartialStatistics
from moeprune.core.profile import COMPUTING, LOADING, MERGING, WAITING
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import BudgetError
from moeprune.models.bounds import Load, bounded
from moeprune.models.chunks import ChunkedLayer
from moeprune.models.expert_ranges import ExpertRanges, parameters
from moeprune.models.loading import LayeredModel
from moeprune.models.lockstep import Job, Lockstep
from moeprune.models.observe import Collector, observed
from moeprune.models.ranks import ALONE, Ranks
from moeprune.models.sites import MoESite
from moeprune.models.walk_state import Start

# Half-precision matrix products on the CPU are compiled once per shape and kept, half a megabyte
# each, 1024 by default. The number of rows per expert differs with every batch, so most are used
# once; fewer of them keep memory a matter of one layer. Read by torch at its first such product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# Above it torch keeps another cache of them in every thread that multiplies, 1024 by default.
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")

_MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None

S = TypeVar("S", bound=LayerStatistics)

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all); a step is one batch through one layer."""


@dataclass(frozen=True)
class Batch:
    """Token ids that go through the model together.

    Attributes:
        ids_BL: token ids.
        key_BL: one number per token that is the same in every run on the same text.
        mask_BL: 1 for tokens, 0 for padding; None if there is no padding.
        domain_B: a key of the domain of each sequence; None where it is not known.
        watched_M: token ids that are worth counting one by one, ascending; with ``domain_B``.
    """

    ids_BL: Tensor
    key_BL: Tensor
    mask_BL: Tensor | None = None
    domain_B: Tensor | None = None
    watched_M: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Rows, and tokens per row."""
        return len(self.ids_BL), self.ids_BL.shape[1]

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        found = {"input_ids": self.ids_BL.to(device)}
        if self.mask_BL is not None:
            found["attention_mask"] = self.mask_BL.to(device)
        return found

    def collector(self, statistics: LayerStatistics, device: torch.device) -> Collector:
        """Where this batch's sums of one layer go."""
        real_T = None if self.mask_BL is None else self.mask_BL.reshape(-1).bool().to(device)
        origin = None
        if self.domain_B is not None and self.watched_M is not None:
            domain_BL = self.domain_B[:, None].expand_as(self.ids_BL)
            parts = (self.ids_BL.reshape(-1), domain_BL.reshape(-1), self.watched_M)
            origin = Origin(*(tensor.to(device) for tensor in parts))
        return Collector(statistics, self.key_BL.reshape(-1).to(device), real_T, origin)


@dataclass
class Walk:
    """A model and batches on their way through it.

    Args:
        model: where the layers come from.
        batches: what goes through.
        workers: batches that compute at once; 0 takes one per core on the CPU, one on a GPU.
        progress: told after every batch of every layer.
        start: goes on behind a layer whose outputs were kept; None starts before the first.
        ranks: who has the other batches; statistics are of all of them.
        offset: how many batches the ranks before this one have.
        needs: what ``layers`` will collect, for plans of memory; nothing is collected by it.
        chunks: whether the model's memory limit may load the experts of a layer some at a time,
            and layers the memory of others; not if ``visit`` looks at weights, or edits them.

    Use it as ``with Walk(...) as walk:``, call ``layers`` to the end and then, if logits are
    wanted, ``logits``.
    """

    model: LayeredModel
    batches: Sequence[Batch]
    workers: int = 0
    progress: Progress = lambda done, total: None
    start: Start | None = None
    ranks: Ranks = ALONE
    offset: int = 0
    needs: Sequence[str] = ()
    chunks: bool = False
    shared: ClassVar[bool] = False
    """Whether batches hand their states to each other."""
    _stack: ExitStack = field(default_factory=ExitStack)
    _steps: int = 0

    def __enter__(self) -> Walk:
        self._time = self.model.limits.profile
        workers = self.workers or default_workers(self.model.device)
        tokens = [batch.size for batch in self.batches]
        logits = self.shared or not self.needs
        load = Load(tokens, workers, self.needs, self.chunks, self.shared, logits, self.offset)
        self.way, self._hidden = bounded(self.model, load, self.ranks)
        if self._hidden is not None:
            self._stack.callback(self._hidden.close)
        self.model.load_resident()
        if self.chunks and not self.model.changes:  # nobody edits a layer
            self._stack.enter_context(self.model.reusing())
        inputs = [batch.inputs(self.model.device) for batch in self.batches]
        self._stack.callback(self._free_all)
        self._loader = self._stack.enter_context(ThreadPoolExecutor(1, "moeprune-loader"))
        start = self.start
        passing = () if start is None else (start.layer, start.pass_on)
        by = (self.way.workers, self._hidden)
        self._lockstep = self._stack.enter_context(
            Lockstep(self.model.model, self.model.layers, inputs, *by, *passing)
        )
        if start is not None:
            for job in self._lockstep.jobs:  # all stand at the layer that is done
                job.output = start.output(job.index, self.model.device)
                job.hold(job.output)
            self._steps = (start.layer + 1) * len(self.batches)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _free_all(self) -> None:
        for index in range(len(self.model.layers)):
            self.model.free_layer(index)

    def layers(
        self,
        needs: Sequence[str] = (),
        visit: Callable[[MoESite, LayerStatistics], bool] | None = None,
        stream: Callable[[Sequence[object]], None] | None = None,
        done: Callable[[int, Sequence[object]], None] = lambda index, outputs: None,
    ) -> None:
        """Run all decoder layers, or those that are left behind ``start``.

        Args:
            needs: accumulators to collect in the MoE layers; none runs the model's own experts.
            visit: called for each MoE layer with its statistics, its weights in memory. If it
                returns True it has changed them, and the layer runs again before the next one.
            stream: gets the residual stream of all batches before every layer, and after the last.
            done: told that a layer is done, and what it made of all batches.
        """
        for index in self.standing():
            if stream is not None:
                stream([job.entered for job in self._lockstep.jobs])
            self._run(index, needs, visit)
            if index + 1 == len(self.model.layers) and stream is not None:
                stream([job.output for job in self._lockstep.jobs])
            done(index, [job.output for job in self._lockstep.jobs])
            if self._hidden is not None:
                self._hidden.rest_all()

    def rest(self, batch: int) -> None:
        """Let pages of a batch's states that are in a file leave the process."""
        if self._hidden is not None:
            self._hidden.rest(batch)

    def standing(self) -> Generator[int, None, None]:
        """Every decoder layer in turn: its weights are in memory and all batches stand before it.

        Whoever iterates computes the layer, with ``run`` for example, before going on.
        """
        first = 0 if self.start is None else self.start.layer + 1
        if first == len(self.model.layers):
            return
        following: Future[None] = self._loader.submit(self._load, first)
        if first:
            self._lockstep.advance()
        for index in range(first, len(self.model.layers)):
            with self._time.spend(WAITING):
                following.result()
            if index + 1 < len(self.model.layers) and self.way.prefetch:
                following = self._loader.submit(self._load, index + 1)
            yield index
            if index + 1 < len(self.model.layers):
                with self._time.spend(COMPUTING):
                    self._lockstep.advance()  # past the last layer only when logits are asked for
            self.model.free_layer(index)
            if index + 1 + self.way.prefetch >= len(self.model.layers):
                self.model.give_back()  # all others are there
            _return_memory()
            if index + 1 < len(self.model.layers) and not self.way.prefetch:
                following = self._loader.submit(self._load, index + 1)

    def _run(
        self,
        index: int,
        needs: Sequence[str],
        visit: Callable[[MoESite, LayerStatistics], bool] | None,
    ) -> None:
        """One layer, which is in memory."""
        site = self.model.sites.get(index)
        if site is not None and self._is_chunked(index):
            statistics = self._run_chunked(site, needs)
            if statistics is not None and visit is not None and visit(site, statistics):
                raise BudgetError(
                    "weights cannot be changed where the experts of a layer do not fit in memory",
                    "give more --memory",
                )
        elif site is None or not needs:
            with self._time.spend(COMPUTING):
                self._lockstep.run(finished=lambda job: self._step())
        else:
            statistics = self._observe(site, needs)
            if visit is not None and visit(site, statistics):
                self._lockstep.run()

    def run(self, begin: Callable[[int], None] = lambda index: None) -> None:
        """Compute the layer at which all batches stand, again if it was computed before.

        Args:
            begin: told a batch's index, in the thread that computes it, before it does.
        """
        self._lockstep.run(begin)

    def rerun(self, index: int) -> Tensor:
        """Compute the layer for one batch, [B, L, H]."""
        self._lockstep.compute(index)
        return self.output(index)

    def output(self, index: int) -> Tensor:
        """What the layer made of a batch when it was computed last, [B, L, H]."""
        found = self._lockstep.jobs[index].output
        tensor: Tensor = found if isinstance(found, Tensor) else found[0]
        return tensor

    def _load(self, index: int) -> None:
        torch.set_num_threads(1)  # this thread's copies; the batches' threads have the other cores
        with self._time.spend(LOADING):
            if self._is_chunked(index):
                self.model.load_without(index, parameters(self.model.sites[index]))
            else:
                self.model.load_layer(index)
        self._time.read(p.nbytes for p in self.model.layers[index].parameters() if not p.is_meta)
        _return_memory()  # the pieces that fused tensors were made of

    def _is_chunked(self, index: int) -> bool:
        site = self.model.sites.get(index)
        return self.chunks and site is not None and self.way.chunk < site.shape.experts

    def _run_chunked(self, site: MoESite, needs: Sequence[str]) -> LayerStatistics | None:
        """A layer whose experts are loaded some at a time; its statistics, if it is observed."""

        def collector(index: int, statistics: LayerStatistics) -> Collector:
            return self.batches[index].collector(statistics, self.model.device)

        def empty() -> LayerStatistics:
            return LayerStatistics.empty(site.shape, needs, self.model.device)

        def loading(load: Callable[[], int]) -> None:
            with self._time.spend(WAITING):
                self._time.read([load()])
            _return_memory()

        layer = ChunkedLayer(
            site,
            ExpertRanges(self.model, site),
            self._lockstep,
            self.way.chunk,
            self._hidden,
            collector if needs else None,
            empty if needs else None,
            lambda job: self._step(),
            loading,
            self.offset,
            self.ranks,
        )
        with self._time.spend(COMPUTING):
            return layer.run()

    def _step(self) -> None:
        self._steps += 1
        self.progress(self._steps, len(self.batches) * len(self.model.layers))

    def _observe(self, site: MoESite, needs: Sequence[str]) -> LayerStatistics:
        empty = partial(LayerStatistics.empty, site.shape, needs, self.model.device)
        return self._collect(site, empty, self._step)

    def observe_parts(
        self, site: MoESite, needs: Sequence[str], limit: int
    ) -> Iterator[PartialStatistics]:
        """Run the layer at which all batches stand again, for some experts at a time.

        For sums that are too large for all experts: every batch in flight holds its own, and so
        many experts are taken at a time that all of them together stay below ``limit`` bytes (one
        expert at least). To be called from ``visit``, before weights are changed.
        """
        device, E = self.model.device, site.shape.experts
        # in flight, waiting to be added, and the sums; every rank takes as many experts at a time
        window = self._lockstep.workers + 1
        sets = max(self.ranks.gather(window + held(len(self.batches), self.offset)))
        of_one = PartialStatistics.of(site.shape, needs, (0,), "meta").nbytes
        size = max(1, min(E, limit // max(1, of_one * sets)))
        for start in range(0, E, size):
            chosen = tuple(range(start, min(start + size, E)))
            yield self._collect(
                site,
                partial(PartialStatistics.of, site.shape, needs, chosen, device),
                window=window,
            )

    def _collect(
        self,
        site: MoESite,
        empty: Callable[[], S],
        step: Callable[[], None] = lambda: None,
        window: int = 0,
    ) -> S:
        fold: Fold[S] = Fold(self.offset)

        def collect(index: int) -> Collector:
            return self.batches[index].collector(empty(), self.model.device)

        def merge(job: Job) -> None:
            assert job.collector is not None
            self._collected(site, job.index, job.collector.statistics)
            with self._time.spend(MERGING):
                fold.add(cast(S, job.collector.statistics))
            job.collector = None
            step()

        if not window and self.model.limits.memory is not None:
            window = self._lockstep.workers + 1  # sums of batches that wait to be added are memory
        with self._time.spend(COMPUTING), observed(site, empty().needs_router):
            self._lockstep.run(collect, merge, window, self._observed_jobs())
        return self.ranks.total(fold, empty)

    def _collected(self, site: MoESite, index: int, statistics: LayerStatistics) -> None:
        """Called with the sums of every batch before they are added up."""

    def _observed_jobs(self) -> Sequence[Job] | None:
        """The batches that are observed; None observes all."""
        return None

    def logits(self, finished: Callable[[int, Tensor], None]) -> None:
        """Final norm and head; ``finished`` gets each batch's index and logits [B, L, V]."""

        def hand_over(job: Job) -> None:
            output, job.output = job.output, None
            finished(job.index, output.logits)

        self._lockstep.advance(hand_over)

    def logits_of(self, index: int) -> Tensor:
        """Final norm and head of one batch, logits [B, L, V]; each batch can be asked for once."""
        logits: Tensor = self._lockstep.finish(index).logits
        return logits


def _return_memory() -> None:
    """Give the freed layer back to the system.

    The C library keeps freed blocks in one arena per thread, and layers are loaded by ever new
    threads; without this a walk would grow with the number of layers (Linux; elsewhere a no-op).
    """
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


def default_workers(device: torch.device) -> int:
    """Batches that compute at once: one per core on the CPU, one on a GPU."""
    if device.type != "cpu":
        return 1
    return max(1, min(torch.get_num_threads(), os.cpu_count() or 1))
