"""One parked thread per batch: the model's own forward, stopped at every decoder layer.

Each batch runs ``model.forward`` in a thread of its own, which stops when it reaches a decoder
layer, waits until that layer's weights are in memory, runs it, and goes on to the next. Masks,
position inputs, states that pass between layers, final norm and head are therefore the model's own
doing, whatever the family does between its layers.

On the CPU each thread computes with one core and several threads run at once. A batch's numbers
then do not depend on how many run beside it, which makes results the same on any number of cores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from enum import Enum, auto
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.models.observe import Collector, collecting


class _Command(Enum):
    RUN = auto()  # run the layer (again) and stay
    ADVANCE = auto()  # hand the output on and stop at the next layer
    ABORT = auto()


class _Aborted(BaseException):
    """Unwinds a parked thread; not an Exception, so that no model code catches it."""


class Job(threading.Thread):
    """One batch on its way through the model."""

    def __init__(self, index: int, call: Callable[[], Any], done: SimpleQueue[Job]) -> None:
        super().__init__(daemon=True, name=f"moeprune-batch-{index}")
        self.index = index
        self.at = -1
        self.output: Any = None
        self.error: BaseException | None = None
        self.collector: Collector | None = None
        self._call = call
        self._done = done
        self._commands: SimpleQueue[_Command] = SimpleQueue()

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
        self.at = -2
        self._done.put(self)

    def stop_at(self, index: int, layer: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Called in the thread in place of a decoder layer's forward."""
        self.at = index
        self._done.put(self)
        while True:
            command = self._commands.get()
            if command is _Command.ABORT:
                raise _Aborted
            if command is _Command.ADVANCE:
                output, self.output = self.output, None
                return output
            with collecting(self.collector):
                self.output = layer(*args, **kwargs)
            self._done.put(self)

    def command(self, command: _Command) -> None:
        """Tell the parked thread what to do."""
        self._commands.put(command)


class _Current(threading.local):
    job: Job | None = None


_CURRENT = _Current()


class Lockstep:
    """Runs a model's forward on several batches, one decoder layer at a time.

    Args:
        model: the transformers model; its layers need weights only while ``run`` is called.
        layers: its decoder layers.
        inputs: keyword arguments of ``model.forward``, per batch.
        workers: batches that compute at once; each uses one core (CPU).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        inputs: Sequence[dict[str, Tensor]],
        workers: int,
    ) -> None:
        self.workers = workers
        self._layers = layers
        self._done: SimpleQueue[Job] = SimpleQueue()
        self._threads_before = torch.get_num_threads()
        self.jobs = [Job(i, self._caller(model, kw), self._done) for i, kw in enumerate(inputs)]
        self._one_core = all(not t.is_cuda for kw in inputs for t in kw.values())
        for i, layer in enumerate(layers):
            layer.forward = self._gate(i, layer.forward)
        try:
            self._each(lambda job: job.start())  # to the first layer: embeddings, masks
        except BaseException:
            self.close()
            raise

    def _caller(self, model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Any]:
        def call() -> Any:
            if self._one_core:
                torch.set_num_threads(1)
            return model(**inputs, use_cache=False)

        return call

    @staticmethod
    def _gate(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def gated(*args: Any, **kwargs: Any) -> Any:
            job = _CURRENT.job
            if job is None:
                return forward(*args, **kwargs)
            return job.stop_at(index, forward, args, kwargs)

        return gated

    def run(
        self,
        collect: Callable[[int], Collector] | None = None,
        finished: Callable[[Job], None] = lambda job: None,
    ) -> None:
        """Run the layer at which all batches stand.

        Args:
            collect: makes the collector of a batch when it starts; None observes nothing.
            finished: called in order of batches.
        """

        def start(job: Job) -> None:
            job.collector = None if collect is None else collect(job.index)
            job.command(_Command.RUN)

        self._each(start, finished)

    def advance(self, finished: Callable[[Job], None] = lambda job: None) -> None:
        """Hand the outputs on: to the next layer, or through norm and head to the end."""
        self._each(lambda job: job.command(_Command.ADVANCE), finished)

    def finish(self, index: int) -> Any:
        """Let one batch that stands at the last layer run to the end; its output."""
        job = self.jobs[index]
        job.command(_Command.ADVANCE)
        job.join()
        if job.error is not None:
            raise job.error
        output, job.output = job.output, None
        return output

    def _each(
        self, start: Callable[[Job], None], finished: Callable[[Job], None] = lambda job: None
    ) -> None:
        """Start every job, ``workers`` at a time; report those done in order of batches."""
        waiting, ready, next_index = iter(self.jobs), set(), 0
        running = 0
        for job in waiting:
            start(job)
            running += 1
            if running == self.workers:
                break
        while running:
            job = self._done.get()
            running -= 1
            if job.error is not None:
                raise job.error
            ready.add(job.index)
            following = next(waiting, None)
            if following is not None:
                start(following)
                running += 1
            while next_index in ready:
                finished(self.jobs[next_index])
                next_index += 1

    def close(self) -> None:
        """End all threads and give the layers their own forward back."""
        for job in self.jobs:
            job.command(_Command.ABORT)
        for job in self.jobs:
            if job.is_alive():
                job.join()
            job.output = job.collector = None
        for layer in self._layers:
            layer.__dict__.pop("forward", None)
        torch.set_num_threads(self._threads_before)

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
