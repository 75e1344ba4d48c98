"""Keep-masks against loops over sorted (score, column) pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeprune.core.ops import masks
from moeprune.core.ops.masks import nm_keep_mask, prune_count, row_keep_mask, scores

LEVELS = [0.0, -0.0, 1.0, -1.0, 2.0, -3.0, 0.5, math.inf, math.nan]


def naive_keep(row: list[float], count: int) -> list[bool]:
    keys = [(-math.inf if math.isnan(score) else score, column) for column, score in enumerate(row)]
    pruned = {column for _, column in sorted(keys)[:count]}
    return [column not in pruned for column in range(len(row))]


def naive_mask(weight_EOI: Tensor, scale_EI: Tensor | None, count: int, run: int) -> Tensor:
    result = []
    for e, matrix in enumerate(weight_EOI.tolist()):
        factors = [1.0] * len(matrix[0]) if scale_EI is None else scale_EI[e].tolist()
        for row in matrix:
            saliency = [abs(w) * a for w, a in zip(row, factors, strict=True)]
            for start in range(0, len(row), run):
                result += naive_keep(saliency[start : start + run], count)
    return torch.tensor(result).reshape(weight_EOI.shape)


@st.composite
def layers(draw: st.DrawFn, run: int = 1) -> tuple[Tensor, Tensor | None]:
    """Few distinct values, so that ties, NaN and infinities abound; products are exact."""
    runs = draw(st.integers(1, 9 if run == 1 else 2))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), run * runs)
    size = math.prod(shape)
    values = draw(st.lists(st.sampled_from(LEVELS), min_size=size, max_size=size))
    weight = torch.tensor(values).reshape(shape)
    if draw(st.booleans()):
        return weight, None
    size = shape[0] * shape[2]
    factors = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=size, max_size=size))
    return weight, torch.tensor(factors).reshape(shape[0], shape[2])


@settings(max_examples=120, deadline=None)
@given(layers(), st.floats(0, 1))
def test_row_mask_equals_the_naive_one(layer: tuple[Tensor, Tensor | None], ratio: float) -> None:
    weight, scale = layer
    count = prune_count(weight.shape[-1], ratio)
    mask = row_keep_mask(weight, scale, ratio)
    assert torch.equal(mask, naive_mask(weight, scale, count, weight.shape[-1]))
    assert torch.all((~mask).sum(dim=-1) == count)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_nm_mask_equals_the_naive_one(data: st.DataObject) -> None:
    m = data.draw(st.sampled_from([1, 2, 3, 4, 8, 17]))
    n = data.draw(st.integers(0, m))
    weight, scale = data.draw(layers(run=m))
    mask = nm_keep_mask(weight, scale, n, m)
    assert torch.equal(mask, naive_mask(weight, scale, n, m))
    assert torch.all((~mask).unflatten(-1, (-1, m)).sum(dim=-1) == n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_random_weights_with_real_ties(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 5, 96, generator=generator).to(dtype)
    assert torch.equal(row_keep_mask(weight, None, 0.5), naive_mask(weight, None, 48, 96))
    assert torch.equal(nm_keep_mask(weight, None, 2, 4), naive_mask(weight, None, 2, 4))


@pytest.mark.parametrize(
    ("inputs", "ratio", "count"),
    [
        (10, 0.3, 3),
        (100, 0.29, 29),
        (100, 0.57, 57),
        (3, 1 / 3, 1),
        (7, 0.5, 3),
        (5, 0.0, 0),
        (5, 1.0, 5),
        (9, 0.999, 8),
        (0, 0.5, 0),
        (1408, 0.25, 352),
    ],
)
def test_prune_count_is_the_floor_meant(inputs: int, ratio: float, count: int) -> None:
    assert prune_count(inputs, ratio) == count


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_equal_scores_prune_the_first_columns(value: float) -> None:
    mask = row_keep_mask(torch.full((3, 8), value), torch.ones(8), 0.5)
    assert mask.tolist() == [[False] * 4 + [True] * 4] * 3
    mask = nm_keep_mask(torch.full((3, 8), value), None, 1, 4)
    assert mask.tolist() == [[False, True, True, True] * 2] * 3


def test_nan_is_pruned_before_zero() -> None:
    weight = torch.tensor([[0.0, 5.0, math.nan, 0.0]])
    assert row_keep_mask(weight, None, 0.25).tolist() == [[True, True, False, True]]
    assert nm_keep_mask(weight, None, 1, 4).tolist() == [[True, True, False, True]]


def test_scores_are_at_least_float32_products() -> None:
    weight = torch.tensor([[-1.0, 2.0]], dtype=torch.bfloat16)
    scale = torch.tensor([1 + 2**-20, 3.0], dtype=torch.float64)
    assert scores(weight, scale).dtype == torch.float32
    assert scores(weight, scale).tolist() == [[1 + 2**-20, 6.0]]
    assert scores(weight.double(), scale.float()).dtype == torch.float64
    assert scores(weight, None).tolist() == [[1.0, 2.0]]


def test_a_common_factor_of_an_expert_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 6, 32, generator=generator)
    scale = torch.rand(4, 32, generator=generator)
    factor = torch.tensor([1.0, 2.0, 0.25, 1024.0])[:, None]
    assert torch.equal(
        row_keep_mask(weight, scale, 0.4), row_keep_mask(weight, scale * factor, 0.4)
    )


def test_independent_of_batching_chunks_threads_layout_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(3, 7, 40, generator=generator).bfloat16()
    scale = torch.rand(3, 40, generator=generator)
    row, nm = row_keep_mask(weight, scale, 0.5), nm_keep_mask(weight, scale, 2, 4)
    threads = torch.get_num_threads()
    for chunk, count in ((1, 1), (100, 2), (1 << 20, 1)):
        monkeypatch.setattr(masks, "CHUNK_ENTRIES", chunk)
        torch.set_num_threads(count)
        assert torch.equal(row_keep_mask(weight, scale, 0.5), row)
        assert torch.equal(nm_keep_mask(weight, scale, 2, 4), nm)
    torch.set_num_threads(threads)
    for e in range(3):
        assert torch.equal(row_keep_mask(weight[e], scale[e], 0.5), row[e])
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(row_keep_mask(transposed, scale, 0.5), row)
    assert torch.equal(row_keep_mask(weight.requires_grad_(), scale, 0.5), row)


def test_one_scale_serves_all_experts() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, scale = torch.randn(3, 4, 8, generator=generator), torch.rand(8, generator=generator)
    assert torch.equal(
        row_keep_mask(weight, scale, 0.5), row_keep_mask(weight, scale.expand(3, 8), 0.5)
    )


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty_weights_have_empty_masks(shape: tuple[int, ...]) -> None:
    assert row_keep_mask(torch.empty(shape), None, 0.5).shape == shape
    assert nm_keep_mask(torch.empty(shape), None, 2, 4).shape == shape


@pytest.mark.parametrize(("n", "m"), [(2, 3), (-1, 4), (5, 4), (0, 0)])
def test_impossible_patterns_are_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=r"runs of|need m"):
        nm_keep_mask(torch.ones(2, 8), None, n, m)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_impossible_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        row_keep_mask(torch.ones(2, 8), None, ratio)


@pytest.mark.parametrize("shape", [(), (7,), (1,), (2, 8), (4, 8), (3, 1, 8)])
def test_scales_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        row_keep_mask(torch.ones(3, 5, 8), torch.ones(shape), 0.5)


def test_a_vector_is_not_a_weight() -> None:
    with pytest.raises(ValueError, match="O, I"):
        row_keep_mask(torch.ones(8), None, 0.5)
