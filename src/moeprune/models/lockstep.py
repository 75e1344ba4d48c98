"""One parked thread per batch: the model's own forward, stopped at every decoder layer.

Each batch runs ``model.forward`` in a thread of its own, which stops when it reaches a decoder
layer, waits until that layer has been computed, and goes on to the next. Masks, position inputs,
states that pass between layers, final norm and head are therefore the model's own doing, whatever
the family does between its layers.

The layers themselves are computed by a few worker threads: matrix libraries keep buffers for every
thread that ever multiplied. On the CPU each thread computes with one core, so a batch's numbers do
not depend on how many run beside it, and results are the same on any number of cores.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moeprune.models.hidden import HiddenStates
from moeprune.models.observe import Collector, collecting


class _Aborted(BaseException):
    """Unwinds a parked thread; not an Exception, so that no model code catches it."""


class Enough(Exception):
    """Ends a layer's forward: what was wanted of it is known."""


T = TypeVar("T")

_HELD = ("attention_mask", "position_embeddings")
"""What the model's forward makes for a batch and hands to every layer; it holds it to its end."""


class Job(threading.Thread):
    """One batch on its way through the model."""

    def __init__(
        self,
        index: int,
        call: Callable[[], Any],
        done: SimpleQueue[Job],
        hidden: HiddenStates | None = None,
    ) -> None:
        super().__init__(daemon=True, name=f"moeprune-batch-{index}")
        self.index = index
        self.output: Any = None
        self.error: BaseException | None = None
        self.collector: Collector | None = None
        self._call = call
        self._done = done
        self._hidden = hidden
        self.entered: Any = None
        self.passed = 0
        self._layer: Callable[[], Any] | None = None
        self._go_on: SimpleQueue[bool] = SimpleQueue()

    def run(self) -> None:
        """The thread: the model's forward."""
        _CURRENT.job = self
        try:
            with torch.no_grad():
                self.output = self._call()
        except _Aborted:
            pass
        except BaseException as error:
            self.error = error
        self._done.put(self)

    def hold(self, found: Any) -> None:
        """Tensors that this batch holds from now on: to where hidden states are."""
        if self._hidden is not None:
            self._hidden.keep(self.index, found)

    def stop_at(self, layer: Callable[[], Any], entered: Any) -> Any:
        """Called in this thread in place of a decoder layer: wait for its output.

        ``entered`` is what goes into it.
        """
        self.hold(entered)
        self._layer, self.entered = layer, entered
        self._done.put(self)
        if not self._go_on.get():
            raise _Aborted
        output, self.output = self.output, None
        return output

    def compute(self) -> None:
        """Run the layer at which this batch stands, in the caller's thread."""
        assert self._layer is not None, "the batch has passed its last layer"
        with torch.no_grad(), collecting(self.collector):
            try:
                self.output = self._layer()
            except Enough:
                self.output = None
        self.hold(self.output)
        if self._hidden is not None:
            self._hidden.rest(self.index)

    def go_on(self, wanted: bool = True) -> None:
        """Let the thread continue with the layer's output, or end it."""
        self._layer = self.entered = None
        self._go_on.put(wanted)


class _Current(threading.local):
    job: Job | None = None


_CURRENT = _Current()


def _embeddings(model: Any) -> nn.Module:
    found: nn.Module = model.get_input_embeddings()
    return found


def _hold(module: nn.Module, args: Any, output: Any) -> None:
    """The model's forward holds the embeddings to its end, also where nothing needs them."""
    if _CURRENT.job is not None:
        _CURRENT.job.hold(output)


class Lockstep:
    """Runs a model's forward on several batches, one decoder layer at a time.

    Args:
        model: the transformers model; its layers need weights only while ``run`` is called.
        layers: its decoder layers.
        inputs: keyword arguments of ``model.forward``, per batch.
        workers: batches that compute at once; each uses one core (CPU).
        hidden: what batches hold between layers goes there; None leaves it in memory.
        passing: layers at the beginning that are not computed; batches stop at the next one.
        pass_on: what such a layer hands on, given a batch's index and what goes into the layer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        inputs: Sequence[dict[str, Tensor]],
        workers: int,
        hidden: HiddenStates | None = None,
        passing: int = 0,
        pass_on: Callable[[int, Any], Any] = lambda index, entered: entered,
    ) -> None:
        self.workers = workers
        self._passing, self._pass_on = passing, pass_on
        self._layers = layers
        self._done: SimpleQueue[Job] = SimpleQueue()
        self._threads_before = torch.get_num_threads()
        self.jobs = [
            Job(i, self._caller(model, kw), self._done, hidden) for i, kw in enumerate(inputs)
        ]
        self._one_core = all(not t.is_cuda for kw in inputs for t in kw.values())
        self._pool = ThreadPoolExecutor(workers, "moeprune-worker", self._prepare_thread)
        for layer in layers:
            layer.forward = self._gate(layer.forward)
        self._hook = None if hidden is None else _embeddings(model).register_forward_hook(_hold)
        try:
            self._each(Job.start)  # to the first layer: embeddings, masks
        except BaseException:
            self.close()
            raise

    def _caller(self, model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Any]:
        def call() -> Any:
            self._prepare_thread()
            return model(**inputs, use_cache=False)

        return call

    def _prepare_thread(self) -> None:
        if self._one_core:
            torch.set_num_threads(1)

    def _gate(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def gated(*args: Any, **kwargs: Any) -> Any:
            job = _CURRENT.job
            if job is None:
                return forward(*args, **kwargs)
            entered = args[0] if args else kwargs.get("hidden_states")
            if job.passed < self._passing:
                job.passed += 1
                return self._pass_on(job.index, entered)
            job.hold([kwargs.get(name) for name in _HELD])
            return job.stop_at(lambda: forward(*args, **kwargs), entered)

        return gated

    def run(
        self,
        collect: Callable[[int], Collector | None] | None = None,
        finished: Callable[[Job], None] = lambda job: None,
        window: int = 0,
        jobs: Sequence[Job] | None = None,
    ) -> None:
        """Run the layer at which all batches stand.

        Args:
            collect: makes the collector of a batch when it starts; None observes nothing.
            finished: called in order of batches.
            window: batches that have started and are not yet ``finished``, at most; 0 is no limit.
            jobs: the batches that run; None runs all.
        """

        def compute(job: Job) -> Job:
            job.collector = None if collect is None else collect(job.index)
            job.compute()
            return job

        for job in self.in_order(compute, window, jobs):
            finished(job)

    def in_order(
        self, call: Callable[[Job], T], window: int = 0, jobs: Sequence[Job] | None = None
    ) -> Iterator[T]:
        """What ``call`` makes of every batch in the worker threads, in order of batches."""
        started: deque[Future[T]] = deque()
        for job in self.jobs if jobs is None else jobs:
            started.append(self._pool.submit(call, job))
            if len(started) == window:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()

    def compute(self, index: int) -> None:
        """Run the layer for one batch alone, in a thread like all others."""
        self._pool.submit(self.jobs[index].compute).result()

    def advance(self, finished: Callable[[Job], None] = lambda job: None) -> None:
        """Hand the outputs on: to the next layer, or through norm and head to the end."""
        self._each(Job.go_on, finished)

    def finish(self, index: int) -> Any:
        """Let one batch that stands at the last layer run to the end; its output."""
        job = self.jobs[index]
        job.go_on()
        job.join()
        if job.error is not None:
            raise job.error
        output, job.output = job.output, None
        return output

    def _each(
        self, start: Callable[[Job], None], finished: Callable[[Job], None] = lambda job: None
    ) -> None:
        """Start every job and report those done in order of batches.

        At most ``workers`` have started and are not yet reported: an output may be large.
        """
        ready: set[int] = set()
        begun = told = 0
        while told < len(self.jobs):
            for job in self.jobs[begun : told + self.workers]:
                start(job)
            begun = told + self.workers
            job = self._done.get()
            if job.error is not None:
                raise job.error
            ready.add(job.index)
            while told in ready:
                finished(self.jobs[told])
                told += 1

    def close(self) -> None:
        """End all threads and give the layers their own forward back."""
        self._pool.shutdown(cancel_futures=True)
        for job in self.jobs:
            job.go_on(False)
        for job in self.jobs:
            if job.is_alive():
                job.join()
            job.output = job.collector = None
        if self._hook is not None:
            self._hook.remove()
        for layer in self._layers:
            layer.__dict__.pop("forward", None)
        torch.set_num_threads(self._threads_before)

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
