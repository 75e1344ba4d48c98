"""Tensors that batches hold between two decoder layers, in a file instead of memory.

A tensor is moved by giving it the same values in mapped pages of an unlinked file: the model goes
on with the very tensor objects that it has, and whoever holds them keeps nothing else alive. Pages
leave the process when a batch has been computed and come back when it is read. A place in the file
is used again once no tensor stands on it any more, whoever held it.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moeprune.errors import OutputError
from moeprune.files import leave_cache

_IN_MEMORY = ("tmpfs", "ramfs")
_MOUNTS = Path("/proc/self/mounts")
_SMALLEST = 1 << 14  # bytes; what is smaller is not worth a place in a file


class _Place:
    """Bytes of the file, mapped."""

    def __init__(self, file: int, start: int, size: int) -> None:
        self.start, self.size, self.owner = start, size, 0
        self.map = mmap.mmap(file, size, offset=start)
        self.address = torch.from_numpy(np.frombuffer(self.map, np.uint8)).data_ptr()

    def leave(self, file: int) -> None:
        """Take the pages out of the process, and let the system begin to write them."""
        self.map.madvise(mmap.MADV_DONTNEED)
        leave_cache(file, self.start, self.size)


class HiddenStates:
    """Where the tensors of batches are between layers.

    Args:
        folder: on whose disk the file is; None takes the directory for temporary files.
        in_memory: so many batches, the first ones, stay in memory.
        reserve: bytes that the file has from the start, so that a full disk shows before the walk.
        smallest: tensors of fewer bytes stay where they are.
        spent: told how many seconds copying took.

    Raises:
        OutputError: the disk is full, or the folder is memory itself.
    """

    def __init__(
        self,
        folder: Path | None = None,
        in_memory: int = 0,
        reserve: int = 0,
        smallest: int = _SMALLEST,
        spent: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._in_memory, self._smallest, self._spent = in_memory, smallest, spent
        refuse_memory(self._folder)
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  (see close)
        except OSError as error:
            raise OutputError(
                f"no file for hidden states in {self._folder}: {error.strerror}",
                "name a folder on a disk with --memory-dir",
            ) from error
        self._reserved = self._used = 0
        self._lock = threading.Lock()
        self._free: dict[int, list[_Place]] = defaultdict(list)
        self._left: deque[_Place] = deque()
        self._live: dict[int, _Place] = {}  # by address
        self._owned: dict[int, set[_Place]] = defaultdict(set)
        try:
            self._grow(reserve)
        except OutputError:
            self._file.close()
            raise

    def keep(self, owner: int, found: Any) -> None:
        """Move the tensors in ``found``, however nested, of batch ``owner``."""
        if owner < self._in_memory:
            return
        for tensor in tensors_in(found):
            if self._movable(tensor):
                self._move(owner, tensor)

    def rest(self, owner: int) -> None:
        """Pages of a batch leave the process; they come back when it is read again."""
        with self._lock:
            self._collect()
            for place in self._owned[owner]:
                place.leave(self._file.fileno())

    def rest_all(self) -> None:
        """The same for all batches."""
        with self._lock:
            self._collect()
            for place in self._live.values():
                place.leave(self._file.fileno())

    def close(self) -> None:
        """Give the file up; its bytes are gone when the last tensor on it is."""
        self._free.clear()
        self._file.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the file that have been used."""
        return self._used

    def _movable(self, tensor: Tensor) -> bool:
        return (
            tensor.device.type == "cpu"
            and tensor.layout == torch.strided
            and not isinstance(tensor, nn.Parameter)
            and tensor.nbytes >= self._smallest
            and tensor.is_contiguous()
            and tensor.untyped_storage().data_ptr() not in self._live
        )

    def _move(self, owner: int, tensor: Tensor) -> None:
        started = time.perf_counter()
        with self._lock:
            self._collect()
            place = self._place(tensor.nbytes)
            place.owner = owner
            self._owned[owner].add(place)
            array = np.frombuffer(place.map, np.uint8, tensor.nbytes)
            moved = torch.from_numpy(array).view(tensor.dtype).view(tensor.shape)
            self._live[place.address] = place
            # the storage holds the array: when the last tensor on it goes, so does the array.
            # Nothing is locked there, since it can happen anywhere
            weakref.finalize(array, self._left.append, place)
            del array
        moved.copy_(tensor.detach())
        tensor.data = moved
        place.leave(self._file.fileno())
        self._spent(time.perf_counter() - started)

    def _collect(self) -> None:
        """Places that no tensor stands on can be used again."""
        while self._left:
            place = self._left.popleft()
            del self._live[place.address]
            self._owned[place.owner].discard(place)
            place.map.madvise(mmap.MADV_DONTNEED)
            self._free[place.size].append(place)

    def _place(self, nbytes: int) -> _Place:
        size = -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if self._free[size]:
            return self._free[size].pop()
        self._grow(self._used + size)
        place = _Place(self._file.fileno(), self._used, size)
        self._used += size
        return place

    def _grow(self, size: int) -> None:
        """Allocated, not only promised: writing to mapped pages that the disk lacks would kill."""
        if size <= self._reserved:
            return
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), self._reserved, size - self._reserved)
            else:  # macOS: promised
                os.ftruncate(self._file.fileno(), size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OutputError(
                f"disk full: hidden states take {size / 2**20:.0f} MiB in {self._folder}",
                "free some space, name another folder with --memory-dir, or give more --memory",
            ) from error
        self._reserved = size


def tensors_in(found: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and mappings."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        for value in found.values():
            yield from tensors_in(value)
    elif isinstance(found, (tuple, list)):
        for value in found:
            yield from tensors_in(value)


def refuse_memory(folder: Path) -> None:
    """Raise ``OutputError`` if ``folder`` is no directory, or one of a file system in memory."""
    if not folder.is_dir():
        raise OutputError(f"{folder} is no directory", "name one on a disk with --memory-dir")
    if _file_system(folder.resolve()) in _IN_MEMORY:
        raise OutputError(
            f"{folder} is in memory: a file there would save none",
            "name a folder on a disk with --memory-dir, or set TMPDIR",
        )


def _file_system(folder: Path) -> str:
    """The type of the file system of ``folder``; empty where the system does not say."""
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    for line in lines:
        _, place, found, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if folder.is_relative_to(place) and len(place) >= len(best):
            best, kind = place, found
    return kind
