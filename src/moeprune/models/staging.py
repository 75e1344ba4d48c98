"""Host memory that weights are read into, or pass through on their way to the tensors of a model.

Weights that are stored as a model holds them are read straight into it on the CPU. All others pass
through a buffer: those of another dtype, and those of a model on a GPU. For a GPU there are two
buffers of page-locked memory, in turn: one is read from disk while the other is copied, on a stream
of its own, so that neither waits for what the GPU computes.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from contextlib import suppress
from types import TracebackType

import torch
from torch import Tensor

_HUGE = 2 << 20  # bytes of a huge page; the kernel makes them where a whole one fits
_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)


def unwritten(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor to be filled with weights, in huge pages where the system has them (Linux).

    A layer is read into memory that no one has touched yet, and in pages of 4 KiB the processor
    spends more time on making them than on copying what the disk has read.
    """
    memory = _pages(shape, dtype, device)
    if memory is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype).view(shape)  # given back with its last view


class Spare:
    """Memory of layers that were freed, for the next ones, which are of the same size.

    Giving it back and asking for it again costs more than reading a layer where the system clears
    pages, and most in a virtual machine whose host takes back what is free.
    """

    def __init__(self) -> None:
        self._all: list[tuple[mmap.mmap, weakref.ref[memoryview]]] = []
        self._lock = threading.Lock()

    def unwritten(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As the function, in memory that is spare if there is such of this size."""
        with self._lock:
            memory = self._take(math.prod(shape) * dtype.itemsize)
            if memory is None:
                self._give_back()
                memory = _pages(shape, dtype, device)
            if memory is None:
                return torch.empty(shape, dtype=dtype, device=device)
            view = memoryview(memory)  # held by the tensor and its views, and by nothing else
            self._all.append((memory, weakref.ref(view)))
            return torch.frombuffer(view, dtype=dtype).view(shape)

    def give_back(self) -> None:
        """Keep nothing that no tensor is in."""
        with self._lock:
            self._give_back()

    def _take(self, nbytes: int) -> mmap.mmap | None:
        for index, (memory, view) in enumerate(self._all):
            if view() is None and len(memory) == nbytes:
                del self._all[index]
                return memory
        return None

    def _give_back(self) -> None:
        self._all = [(memory, view) for memory, view in self._all if view() is not None]


def _pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> mmap.mmap | None:
    """Memory of its own for a large tensor on the CPU; None for any other."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    memory = mmap.mmap(-1, nbytes, flags=_PRIVATE)
    with suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Staging:
    """Takes bytes to ``device``; ``with`` ends when all of them are there.

    To be opened when the tensors that will be filled have been allocated: their memory may be that
    of a layer just freed, which the work queued so far still reads, and copies wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8)]
        self._turn = 0
        self._copied: list[torch.Event | None] = [None]
        self._stream: torch.Stream | None = None
        if device.type == "cuda":
            self._buffers *= 2
            self._copied *= 2
            self._stream = torch.Stream(device)
            self._stream.wait_stream(torch.accelerator.current_stream(device))

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def buffer(self, nbytes: int) -> Tensor:
        """The next buffer, ``nbytes`` of it, once what it held has been copied."""
        self._turn = (self._turn + 1) % len(self._buffers)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        if len(self._buffers[self._turn]) < nbytes:
            locked = self._stream is not None
            self._buffers[self._turn] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=locked)
        return self._buffers[self._turn][:nbytes]

    def copy(self, target: Tensor, stored: Tensor) -> None:
        """``target`` becomes ``stored``, a view of the last buffer, in its own dtype."""
        if self._stream is None:
            target.copy_(stored)
            return
        with self._stream:  # in the stored dtype first: converting is the GPU's, not this core's
            target.copy_(stored.to(target.device, non_blocking=True))
            self._copied[self._turn] = self._stream.record_event()
