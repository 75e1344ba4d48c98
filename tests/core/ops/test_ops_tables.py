"""Tables of experts by token id: what is kept, what is redirected, and how fast."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeprune.core.ops.tables import redirect_table
from support import redirected


def random_table(rows: int, top_k: int, experts: int, seed: int = 0) -> Tensor:
    """Rows of different ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, experts, generator=generator).argsort(dim=1)[:, :top_k]


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, list[int], int]:
    """A table, the experts that stay, and E."""
    experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, experts))
    table = random_table(draw(st.integers(0, 30)), top_k, experts, draw(st.integers(0, 9)))
    keep = draw(st.sets(st.integers(0, experts - 1), min_size=top_k, max_size=experts))
    return table, sorted(keep), experts


def test_by_hand() -> None:
    """Experts 1 and 2 of five go; 0, 3 and 4 become 0, 1 and 2, and have 3, 1 and 1 entries."""
    table = torch.tensor([[0, 1], [2, 1], [3, 0], [0, 2], [1, 4]])
    expected = torch.tensor(
        [
            [0, 1],  # 1 and 2 are equal, the lower id wins; then 3, 2, 1
            [2, 1],  # 2 has fewest; then all but 0 have two, the lowest that is not in the row
            [1, 0],
            [0, 2],  # 3, 3, 2
            [0, 2],  # all have three
        ]
    )
    assert torch.equal(redirect_table(table, [0, 3, 4], 5), expected)


@settings(deadline=None, max_examples=200)
@given(tables())
def test_properties(case: tuple[Tensor, list[int], int]) -> None:
    table, keep, experts = case
    before = table.clone()
    new = redirect_table(table, keep, experts)
    assert torch.equal(table, before)
    assert new.shape == table.shape and new.dtype == table.dtype
    for old_row, row in zip(table.tolist(), new.tolist(), strict=True):
        assert len(set(row)) == len(row)
        for old, expert in zip(old_row, row, strict=True):
            assert 0 <= expert < len(keep)
            if old in keep:
                assert keep[expert] == old
    assert [[keep[e] for e in row] for row in new.tolist()] == redirected(table.tolist(), keep)


@settings(deadline=None)
@given(tables())
def test_keeping_all_changes_nothing(case: tuple[Tensor, list[int], int]) -> None:
    table, _, experts = case
    assert torch.equal(redirect_table(table, range(experts), experts), table)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    table = random_table(40, 2, 8)
    new = redirect_table(table.to(dtype), [0, 2, 7], 8)
    assert new.dtype == dtype
    assert torch.equal(new.long(), redirect_table(table, [0, 2, 7], 8))


def test_the_load_is_spread() -> None:
    """All entries of half of the experts: what stays differs by a few entries."""
    table = random_table(3000, 6, 64)
    used = torch.bincount(redirect_table(table, range(0, 64, 2), 64).reshape(-1))
    assert len(used) == 32
    assert used.max() - used.min() <= 1


@pytest.mark.parametrize("wrong", [-1, 8])
def test_an_entry_that_is_no_expert(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.7"):
        redirect_table(torch.tensor([[0, wrong]]), [0, 1], 8)


def test_too_few_experts() -> None:
    with pytest.raises(ValueError, match="2 experts remain for rows of 3"):
        redirect_table(random_table(5, 3, 8), [0, 1], 8)


def test_a_real_table_takes_seconds() -> None:
    """DeepSeek-V4's size: 129,280 token ids, 6 of 256 experts, half of them deleted."""
    table = random_table(129_280, 6, 256)
    start = time.process_time()
    redirect_table(table, range(128), 256)
    assert time.process_time() - start < 20
