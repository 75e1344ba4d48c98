"""SparseGPT against the textbook: every inverse taken anew, one column after another, float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from moeprune.core.ops.masks import matrix_keep_mask, nm_keep_mask, prune_count
from moeprune.core.ops.sparsegpt import inverse_factor, sparsegpt

Matrix = NDArray[np.float64]


def case(
    outputs: int, inputs: int, tokens: int, seed: int = 0, dead: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """A weight matrix and correlated inputs [tokens, inputs], float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    x_nI = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    x_nI = x_nI @ (torch.eye(inputs, dtype=torch.float64) + mix)
    x_nI[:, list(dead)] = 0.0
    return weight, x_nI


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hessian(x_nI: Matrix) -> Matrix:
    H = x_nI.T @ x_nI
    live = np.diag(H) > 0
    return H + 0.01 * np.diag(H)[live].mean() * np.eye(len(H))


def textbook(
    weight: Matrix,
    x_nI: Matrix,
    ratio: float | None = None,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
) -> Matrix:
    """Optimal brain surgeon in fixed column order, a loop over rows and columns."""
    W, H = weight.copy(), hessian(x_nI)
    outputs, inputs = W.shape
    inverses = [np.linalg.inv(H[j:, j:]) for j in range(inputs)]
    dead = (x_nI == 0).all(axis=0)
    run = 1 if pattern is None else pattern[1]
    block = max(run, block // run * run)
    pruned = np.zeros(W.shape, bool)
    gone = 0

    def score(row: int, j: int) -> float:
        return 0.0 if dead[j] else float(W[row, j] ** 2 / inverses[j][0, 0])

    for j in range(inputs):
        if ratio is not None and j % block == 0:
            end = min(j + block, inputs)
            keys = sorted((score(o, k), o, k) for o in range(outputs) for k in range(j, end))
            count = prune_count(outputs * end, ratio) - gone
            gone += count
            for _, o, k in keys[:count]:
                pruned[o, k] = True
        if pattern is not None and j % pattern[1] == 0:
            for o in range(outputs):
                keys = sorted((score(o, k), o, k) for k in range(j, j + pattern[1]))
                for _, _, k in keys[: pattern[0]]:
                    pruned[o, k] = True
        for o in range(outputs):
            if pruned[o, j]:
                G = inverses[j]
                W[o, j:] -= W[o, j] / G[0, 0] * G[0]
                W[o, j] = 0.0
    return W


def ours(weight: Tensor, x_nI: Tensor, dtype: torch.dtype = torch.float64, **how: object) -> Tensor:
    gram_II = (x_nI.T @ x_nI).to(dtype)
    dead_I = gram_II.diagonal() == 0
    return sparsegpt(weight.to(dtype), inverse_factor(gram_II), dead_I, **how)  # type: ignore[arg-type]


HOW = [
    {"ratio": 0.5, "block": 8},
    {"ratio": 0.3, "block": 128},
    {"ratio": 0.7, "block": 5},
    {"pattern": (2, 4), "block": 8},
    {"pattern": (1, 4), "block": 6},
    {"pattern": (3, 4), "block": 2},
]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("tokens", [200, 7])
@pytest.mark.parametrize("dead", [(), (0, 3, 17)])
def test_equals_the_textbook(how: dict[str, object], tokens: int, dead: tuple[int, ...]) -> None:
    weight, x_nI = case(6, 20, tokens, dead=dead)
    expected = textbook(weight.numpy(), x_nI.numpy(), **how)  # type: ignore[arg-type]
    found = ours(weight, x_nI, **how).numpy()
    assert np.array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("how", HOW)
def test_float32_is_near(how: dict[str, object]) -> None:
    weight, x_nI = case(16, 40, 300, seed=2)
    expected, found = ours(weight, x_nI, **how), ours(weight, x_nI, torch.float32, **how)
    assert found.dtype == torch.float32
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 30), st.floats(0, 1), st.integers(1, 12), st.integers(0, 20)
)
def test_exactly_the_quota_goes(
    outputs: int, inputs: int, ratio: float, block: int, tokens: int
) -> None:
    weight, x_nI = case(outputs, inputs, tokens)
    found = ours(weight, x_nI, ratio=ratio, block=block)
    assert int((found == 0).sum()) == prune_count(outputs * inputs, ratio)
    assert bool(found.isfinite().all())


def test_patterns_are_exact() -> None:
    weight, x_nI = case(5, 24, 50, dead=(1, 2, 3))
    zeros = (ours(weight, x_nI, pattern=(2, 4), block=10) == 0).reshape(-1, 4).sum(dim=1)
    assert set(zeros.tolist()) == {2}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("how", [{"ratio": 0.5}, {"ratio": 0.75}, {"pattern": (2, 4)}])
def test_outputs_are_nearer_than_with_magnitude(seed: int, how: dict[str, object]) -> None:
    """On inputs some of which are larger than others, as in models."""
    weight, x_nI = case(16, 32, 100, seed)
    x_nI = x_nI * torch.linspace(0.2, 3.0, 32)[torch.randperm(32, generator=seeded(seed))]
    if "ratio" in how:
        keep = matrix_keep_mask(weight, None, float(str(how["ratio"])))
    else:
        keep = nm_keep_mask(weight, None, 2, 4)
    found = ours(weight, x_nI, **how)

    def error(pruned: Tensor) -> float:
        return float(((pruned - weight) @ x_nI.T).square().sum())

    assert error(found) < error(weight * keep)
    assert error(found) <= error(weight * (found != 0)), "the update should help"


def test_permuting_the_outputs_permutes_the_result() -> None:
    weight, x_nI = case(8, 16, 60)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    one, two = ours(weight, x_nI, ratio=0.5), ours(weight[order], x_nI, ratio=0.5)
    torch.testing.assert_close(one[order], two)


def test_a_factor_of_the_gram_matrix_changes_nothing() -> None:
    weight, x_nI = case(8, 16, 60, dead=(4,))
    torch.testing.assert_close(ours(weight, x_nI, ratio=0.5), ours(weight, x_nI * 100.0, ratio=0.5))


def test_the_factor_is_that_of_the_inverse() -> None:
    _, x_nI = case(1, 24, 100)
    upper = inverse_factor(x_nI.T @ x_nI)
    assert torch.equal(upper, upper.triu())
    H = torch.from_numpy(hessian(x_nI.numpy()))
    scale = float((x_nI.T @ x_nI).diagonal().mean())
    torch.testing.assert_close(upper.T @ upper / scale, torch.linalg.inv(H))


def test_float64_where_float32_fails() -> None:
    """Rounding makes eigenvalues of 0 a little negative, more than a tiny damping mends."""
    x_nI = torch.randint(-9, 10, (6, 40), generator=seeded(0)).float()
    gram_II = x_nI.T @ x_nI  # integers: exact, and of rank 6
    assert inverse_factor(gram_II).dtype == torch.float32
    assert inverse_factor(gram_II, damping=1e-9).dtype == torch.float64
    with pytest.raises(ValueError, match="not positive semidefinite"):
        inverse_factor(-torch.eye(4) + 3 * torch.ones(4, 4))
    with pytest.raises(ValueError, match="not finite"):
        inverse_factor(torch.full((2, 2), torch.nan))


def test_a_matrix_without_text_is_pruned_by_magnitude() -> None:
    weight, _ = case(4, 8, 1)
    upper = inverse_factor(torch.zeros(8, 8, dtype=torch.float64))
    found = sparsegpt(weight, upper, torch.zeros(8, dtype=torch.bool), ratio=0.5)
    assert torch.equal(found, weight * matrix_keep_mask(weight, None, 0.5))


def test_either_a_ratio_or_a_pattern() -> None:
    weight, x_nI = case(4, 8, 20)
    for how in ({}, {"ratio": 0.5, "pattern": (2, 4)}):
        with pytest.raises(ValueError, match="either"):
            ours(weight, x_nI, **how)
