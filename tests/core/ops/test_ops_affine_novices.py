"""Affine novices against least squares over the tokens, and SVD of the fitted outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.core.ops.affine_novices import AffineNovice, fit_affine

H = 6


def tokens(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gates [n], inputs [n, H] and outputs that depend on them in part."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, H)) + 2.0
    f = np.tanh(x @ random.normal(size=(H, H))) + 0.1 * random.normal(size=(n, H)) - 1.0
    return random.uniform(0.05, 1.0, n), x, f


def fitted(
    g: np.ndarray, x: np.ndarray, f: np.ndarray, rank: int, damping: float = 0.0
) -> AffineNovice:
    x1 = np.concatenate([np.ones((len(x), 1)), x], axis=1)
    moments = torch.tensor((g[:, None] * x1).T @ (g[:, None] * x1))
    cross = torch.tensor((g[:, None] * f).T @ (g[:, None] * x1))
    return fit_affine(moments, cross, float(((g[:, None] * f) ** 2).sum()), rank, damping)


def measured(novice: AffineNovice, g: np.ndarray, x: np.ndarray, f: np.ndarray) -> float:
    v, a, b = (t.double().numpy() for t in (novice.v_H, novice.a_rH, novice.b_Hr))
    return float(((g[:, None] * (f - v - x @ a.T @ b.T)) ** 2).sum())


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_no_map_of_that_rank_errs_less(rank: int) -> None:
    """Rows times g: a full least-squares fit, then the best part of rank r of what it predicts."""
    g, x, f = tokens(80, seed=rank)
    novice = fitted(g, x, f, rank)
    mean_x, mean_f = (np.average(t, axis=0, weights=g**2) for t in (x, f))
    wx, wf = g[:, None] * (x - mean_x), g[:, None] * (f - mean_f)
    full, *_ = np.linalg.lstsq(wx, wf, rcond=None)
    left, sizes, right = np.linalg.svd(wx @ full, full_matrices=False)
    best = (left[:, :rank] * sizes[:rank]) @ right[:rank]
    expected = float(((wf - best) ** 2).sum())
    assert novice.error == pytest.approx(expected, rel=1e-4)
    assert measured(novice, g, x, f) == pytest.approx(novice.error, rel=1e-6)
    torch.testing.assert_close(novice.b_Hr.T @ novice.b_Hr, torch.eye(rank).double())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
def test_the_error_is_what_it_says_and_below_the_constant(
    n: int, rank: int, damping: float, seed: int
) -> None:
    g, x, f = tokens(n, seed)
    novice = fitted(g, x, f, rank, damping)
    scale = float(((g[:, None] * f) ** 2).sum())
    assert measured(novice, g, x, f) == pytest.approx(novice.error, abs=1e-6 * scale)
    mean = np.average(f, axis=0, weights=g**2)
    constant = float(((g[:, None] * (f - mean)) ** 2).sum())
    assert novice.error <= constant + 1e-6 * scale


def test_a_larger_rank_errs_less() -> None:
    g, x, f = tokens(60, seed=3)
    errors = [fitted(g, x, f, rank, 0.01).error for rank in range(1, H + 1)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_an_affine_expert_is_met_exactly() -> None:
    g, x, _ = tokens(50, seed=4)
    random = np.random.default_rng(1)
    f = 3.0 + x @ random.normal(size=(H, 2)) @ random.normal(size=(2, H))
    scale = float(((g[:, None] * f) ** 2).sum())
    assert fitted(g, x, f, 2).error < 1e-6 * scale < 1e-3 * fitted(g, x, f, 1).error


def test_one_token_no_token_and_no_number() -> None:
    g, x, f = tokens(1, seed=5)
    one = fitted(g, x, f, 2)
    np.testing.assert_allclose(one.v_H, f[0])
    assert one.error == pytest.approx(0.0, abs=1e-9)
    none = fit_affine(torch.zeros(H + 1, H + 1), torch.zeros(H, H + 1), 0.0, 2, 0.01)
    assert none.error == 0.0 and not none.packed().any() and none.packed().shape == (5 * H,)
    broken = fit_affine(torch.full((H + 1, H + 1), math.nan), torch.zeros(H, H + 1), 1.0, 2, 0.01)
    assert math.isnan(broken.error) and not broken.packed().any()


def test_packing() -> None:
    novice = AffineNovice(
        torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0], [6.0]]), 0.0
    )
    assert novice.packed().tolist() == [1, 2, 3, 4, 5, 6]
