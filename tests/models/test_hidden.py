"""Tensors in a file: the values stay, the memory goes, places are used again."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeprune.errors import OutputError
from moeprune.models import hidden
from moeprune.models.hidden import HiddenStates, refuse_memory
from moeprune.models.walk_state import _pieces
from moeprune.models.writer import write_file

PAGE = os.sysconf("SC_PAGE_SIZE")
ROWS = 16 * PAGE // 4


@pytest.fixture
def store(tmp_path: Path) -> HiddenStates:
    return HiddenStates(tmp_path, in_memory=1)


def moved(tensor: Tensor, store: HiddenStates, owner: int = 1) -> bool:
    before = tensor.data_ptr()
    store.keep(owner, tensor)
    return tensor.data_ptr() != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool])
def test_values_and_shapes_stay(dtype: torch.dtype, store: HiddenStates) -> None:
    tensor = (torch.arange(2 * ROWS).view(2, 4, -1) % 7).to(dtype)
    copy, same = tensor.clone(), tensor
    assert moved(tensor, store)
    store.rest(1)
    assert same is tensor
    assert torch.equal(tensor, copy)
    assert tensor.stride() == copy.stride()
    tensor[0] = 1  # the model may change its own tensors
    store.rest_all()
    assert bool((tensor[0] == 1).all())
    assert torch.equal(tensor[1], copy[1])


def test_what_is_moved_and_what_not(store: HiddenStates) -> None:
    large, small = torch.zeros(ROWS), torch.zeros(4)
    store.keep(1, [(large, None), {"mask": small}])
    assert store.nbytes == large.nbytes
    assert not moved(large, store)  # it is there
    assert not moved(large.view(2, -1), store)
    assert not moved(torch.zeros(ROWS), store, owner=0)  # stays in memory
    assert not moved(torch.zeros(1).expand(ROWS), store)  # no memory to save
    assert not moved(torch.nn.Parameter(torch.zeros(ROWS)), store)


def test_places_are_used_again_when_nobody_holds_them(store: HiddenStates) -> None:
    first = torch.ones(ROWS)
    store.keep(1, first)
    part = first[:8]
    del first
    gc.collect()
    second = torch.zeros(ROWS)
    store.keep(1, second)
    assert float(part.sum()) == 8  # a view holds the place
    del part, second
    gc.collect()
    for turn in range(6):
        store.keep(2, torch.full((ROWS,), float(turn)))
    assert store.nbytes == 2 * ROWS * 4


def test_a_batch_may_rest_when_it_is_written(tmp_path: Path) -> None:
    """Not when all are: their pages together may be more than memory."""
    told: list[tuple[int, int]] = []
    file = tmp_path / "state"
    outputs = [torch.ones(PAGE), (torch.zeros(PAGE), None), torch.ones(PAGE)]
    pieces = list(_pieces(outputs, lambda index: told.append((index, file.stat().st_size))))
    assert not told
    write_file(file, pieces)
    assert [index for index, _ in told] == [0, 1, 2]
    assert all(4 * PAGE * (n + 1) <= size < 4 * PAGE * (n + 2) for n, size in told)


def test_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    store = HiddenStates(tmp_path, reserve=1 << 20)
    tensor = torch.ones(ROWS)
    store.keep(0, tensor)
    assert not any(tmp_path.iterdir())
    store.close()
    assert float(tensor.sum()) == ROWS


def test_a_full_disk_shows_before_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden.os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="hidden states take 64 MiB") as raised:
        HiddenStates(tmp_path, reserve=64 << 20)
    assert "--memory-dir" in raised.value.hint


def test_folders_in_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    inside = tmp_path / "in memory"
    inside.mkdir()
    place = str(inside).replace(" ", "\\040")
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\ntmpfs {place} tmpfs rw 0 0\n")
    monkeypatch.setattr(hidden, "_MOUNTS", mounts)
    with pytest.raises(OutputError, match="is in memory"):
        refuse_memory(inside)
    refuse_memory(tmp_path)
    with pytest.raises(OutputError, match="is no directory"):
        refuse_memory(tmp_path / "nowhere")
