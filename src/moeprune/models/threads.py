"""How many cores this process may use."""

from __future__ import annotations

import os
import sys

import torch


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores(processes: int) -> None:
    """Compute with this process's share of the cores, for as long as it runs.

    torchrun sets OMP_NUM_THREADS to 1, which would leave the others idle.
    """
    use_cores(max(1, cores() // processes))


def use_cores(threads: int) -> None:
    """Compute with so many cores, in this thread and in what it starts."""
    torch.set_num_threads(threads)
    os.environ["NUMBA_NUM_THREADS"] = str(threads)
    if "numba" in sys.modules:
        sys.modules["numba"].config.NUMBA_NUM_THREADS = threads
