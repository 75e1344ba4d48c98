"""Buffers that batches in several threads fill at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from moeprune.models.walk import Batch
from moeprune.recovery.layerwise import tap as taps
from moeprune.recovery.layerwise.tap import Tap


def test_threads_that_begin_together_fill_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever came second would have replaced the buffer that the first had filled."""
    allocate, meet = torch.empty, threading.Barrier(2)

    def slow(*shape: int, **options: object) -> Tensor:
        with suppress(threading.BrokenBarrierError):
            meet.wait(0.2)  # both have found no buffer, where nothing keeps them apart
        return allocate(*shape, **options)  # type: ignore[call-overload, no-any-return]

    ids_BL = torch.zeros(2, 8, dtype=torch.int64)
    tap = Tap([Batch(ids_BL, ids_BL)] * 2, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(taps.torch, "empty", slow)

    def keep(batch: int) -> None:
        tap.begin(batch)
        tap._keep_output(torch.nn.Identity(), (), torch.full((16, 4), batch + 1.0))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(keep, range(2)))
    assert [tap.y_TH[rows].unique().tolist() for rows in tap.slices] == [[1.0], [2.0]]
