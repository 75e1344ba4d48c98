"""Alignment of neurons against all permutations, and of copies that are permuted."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.core.ops.matching import (
    best_assignment,
    correlations,
    cosines,
    distances,
    inner_products,
)


def matrices(seed: int, neurons: int, width: int = 5, roles: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(neurons, width, generator=generator) for _ in range(roles)]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(0, 10_000), st.sampled_from([2, 3]))
def test_no_permutation_gains_more(neurons: int, seed: int, roles: int) -> None:
    one, two = matrices(seed, neurons, roles=roles), matrices(seed + 1, neurons, roles=roles)
    order = best_assignment(inner_products(one, two)).tolist()

    def gain(chosen: tuple[int, ...]) -> float:
        return sum(
            float(a[i].double() @ b[j].double())
            for a, b in zip(one, two, strict=True)
            for i, j in enumerate(chosen)
        )

    assert sorted(order) == list(range(neurons))
    best = max(gain(chosen) for chosen in permutations(range(neurons)))
    assert gain(tuple(order)) == pytest.approx(best, rel=1e-5, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(0, 10_000))
def test_a_permuted_copy_is_found(neurons: int, seed: int) -> None:
    one = matrices(seed, neurons)
    shuffle = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
    two = [m[shuffle] for m in one]
    for gain in (inner_products(one, two), -distances(cosines(one, two))):
        order = best_assignment(gain)
        for a, b in zip(one, two, strict=True):
            assert torch.equal(b[order], a)


def test_gains_against_loops() -> None:
    one, two = matrices(1, 4), matrices(2, 4)
    gain, cosine = inner_products(one, two), cosines(one, two)
    for i in range(4):
        for j in range(4):
            a, b = (torch.cat([m[n] for m in ms]).double() for ms, n in ((one, i), (two, j)))
            assert float(gain[i, j]) == pytest.approx(float(a @ b), rel=1e-5, abs=1e-5)
            expected = float(a @ b / a.norm() / b.norm())
            assert float(cosine[i, j]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_correlations_are_pearsons() -> None:
    h_SI, k_SJ = torch.randn(50, 3) + 4, torch.randn(50, 3) * 3
    k_SJ[:, 2] = 7.0  # never changes
    found = correlations(h_SI, k_SJ).numpy()
    expected = np.corrcoef(h_SI.double().numpy().T, k_SJ[:, :2].double().numpy().T)[:3, 3:]
    np.testing.assert_allclose(found[:, :2], expected, atol=1e-5)
    np.testing.assert_allclose(found[:, 2], 0.0, atol=1e-5)


def test_what_is_not_a_number_gains_nothing() -> None:
    gain = torch.tensor([[5.0, 1.0], [torch.nan, 2.0]])
    assert best_assignment(gain).tolist() == [0, 1]
    gain = torch.tensor([[torch.nan, 1.0], [1.0, torch.nan]])
    assert best_assignment(gain).tolist() == [1, 0]
