"""Binning against NumPy's histograms, mutual information against a float64 twin on top of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from moeprune.core.ops.nmi import auto_edges, digitise, fixed_edges, noise_floor, pairwise_nmi

Floats = NDArray[np.float32]
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
COARSE = st.integers(-3, 3).map(float)


def vectors(elements: st.SearchStrategy[float], least: int = 1) -> st.SearchStrategy[Floats]:
    return hnp.arrays(np.float32, st.integers(least, 200), elements=elements)


def naive_entropy(counts: NDArray[np.float64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return -math.fsum(p * math.log(p) for p in share.tolist())


def naive_nmi(a: Floats, b: Floats) -> float:
    counts_a, edges_a = np.histogram(a, bins="auto")
    counts_b, edges_b = np.histogram(b, bins="auto")
    joint, _, _ = np.histogram2d(a, b, bins=(edges_a, edges_b))
    h_a, h_b, h_ab = (naive_entropy(c.ravel()) for c in (counts_a, counts_b, joint))
    return (h_a + h_b - h_ab) / math.sqrt(h_a * h_b) if h_a > 0 and h_b > 0 else 0.0


def gaussians(experts: int, entries: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((experts, entries), dtype=np.float32)


SHAPES: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "normal": lambda rng, n: rng.normal(0.0, 0.02, n),
    "uniform": lambda rng, n: rng.uniform(-1, 3, n),
    "exponential": lambda rng, n: rng.exponential(2.0, n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "student": lambda rng, n: rng.standard_t(4, n),
    "integers": lambda rng, n: rng.integers(-5, 6, n).astype(float),
    "bfloat16 grid": lambda rng, n: np.round(rng.normal(0, 1, n) * 128) / 128,
    "mostly zero": lambda rng, n: rng.normal(0, 1, n) * (rng.random(n) < 0.1),
    "two values": lambda rng, n: (rng.random(n) < 0.3).astype(float),
    "sorted": lambda rng, n: np.sort(rng.normal(0, 1, n)),
    "offset": lambda rng, n: 1e3 + rng.normal(0, 1, n),
    "subnormal": lambda rng, n: rng.normal(0, 1e-40, n),
    "periodic": lambda rng, n: np.sin(np.arange(n) * 2 * np.pi / 64) + rng.normal(0, 1e-3, n),
}


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1001, 40_000, 300_001])
@pytest.mark.parametrize("shape", SHAPES)
def test_edges_and_counts_equal_numpys(shape: str, size: int) -> None:
    values = SHAPES[shape](np.random.default_rng(size), size).astype(np.float32)
    try:
        counts, edges = np.histogram(values, bins="auto")
    except ValueError as error:
        assert "Too many bins" in str(error)
        edges = auto_edges(values)
        counts = np.histogram(values, bins=edges)[0]
    assert auto_edges(values).dtype == np.float32
    assert np.array_equal(auto_edges(values), edges)
    codes = digitise(values, edges)
    assert codes.dtype == np.uint16
    assert np.array_equal(np.bincount(codes, minlength=len(counts)), counts)


@settings(max_examples=200, deadline=None)
@given(vectors(COARSE) | vectors(FINITE) | vectors(st.floats(-1, 1, width=32)))
def test_every_finite_input_is_binned_exactly(values: Floats) -> None:
    edges = auto_edges(values)
    assert np.all(np.diff(edges.astype(np.float64)) > 0)
    assert edges[0] <= values.min()
    assert edges[-1] >= values.max()
    expected = np.searchsorted(edges, values, side="right") - 1
    expected[values == edges[-1]] = edges.size - 2
    assert np.array_equal(digitise(values, edges), expected)
    try:
        assert np.array_equal(edges, np.histogram_bin_edges(values, bins="auto"))
    except ValueError as error:
        assert "Too many bins" in str(error)


def test_digitise_at_the_edges_and_outside() -> None:
    edges = np.array([0, 1, 2, 10], np.float32)
    values = [-np.inf, -1, 0, np.nextafter(np.float32(1), np.float32(0)), 1, 2, 9, 10, 11, np.inf]
    assert digitise(values, edges).tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2]
    fine = np.linspace(-1, 1, 1001, dtype=np.float32)
    assert np.array_equal(digitise(fine[:-1], fine), np.arange(1000))
    below = np.nextafter(fine[1:], np.float32(-2))
    assert np.array_equal(digitise(below, fine), np.arange(1000))


@pytest.mark.parametrize("value", [0.0, -0.0, 3.5, -1e9, 1e9, 3.4e38, -3.4e38, 1e-45])
@pytest.mark.parametrize("size", [1, 5])
def test_a_constant_has_one_bin_and_no_information(value: float, size: int) -> None:
    constant = np.full(size, value, np.float32)
    for edges in (auto_edges(constant), fixed_edges(constant, 64)):
        assert edges.size == 2
        assert edges[0] <= constant[0] <= edges[1]
        assert not digitise(constant, edges).any()
    other = np.arange(size, dtype=np.float32)
    assert not pairwise_nmi([constant, constant, other]).any()


def test_values_too_close_for_float32_get_fewer_bins() -> None:
    values = (1e6 + np.random.default_rng(0).random(100_000)).astype(np.float32)
    with pytest.raises(ValueError, match="Too many bins"):
        np.histogram(values, bins="auto")
    edges = auto_edges(values)
    assert np.all(edges[:-1] < edges[1:])
    assert 4 <= edges.size - 1 <= 16


def test_f4_half_precision_with_an_outlier_does_not_collapse() -> None:
    values = np.random.default_rng(4).normal(0, 0.02, 1 << 22).astype(np.float16)
    values[12345] = 0.5
    with pytest.raises(ValueError, match="Too many bins"):
        np.histogram(values, bins="auto")
    edges = auto_edges(values)
    assert np.array_equal(edges, np.histogram_bin_edges(values.astype(np.float32), bins="auto"))
    assert edges.size > 1500


def test_fixed_bins_ignore_outliers() -> None:
    values = gaussians(1, 10_000)[0]
    edges = fixed_edges(values, 64)
    assert edges.size == 65
    assert edges[0] == pytest.approx(values.mean() - 4 * values.std(), rel=1e-5)
    assert edges[-1] == pytest.approx(values.mean() + 4 * values.std(), rel=1e-5)
    values[0] = 30.0
    assert fixed_edges(values, 64)[-1] < 5
    assert digitise(values, fixed_edges(values, 64))[0] == 63


def test_nmi_equals_the_naive_one() -> None:
    base = gaussians(5, 20_011)
    base[1] += 2 * base[0]
    base[2] = np.abs(base[0]) ** 3
    base[3] = np.round(base[0])
    result = pairwise_nmi(base)
    for a in range(5):
        for b in range(5):
            expected = 0.0 if a == b else naive_nmi(base[a], base[b])
            assert result[a, b] == pytest.approx(expected, rel=1e-11, abs=1e-14)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_nmi_of_arbitrary_vectors_equals_the_naive_one(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 60))
    pair = data.draw(hnp.arrays(np.float32, (2, size), elements=COARSE))
    value = pairwise_nmi(pair)[0, 1]
    assert value == pytest.approx(naive_nmi(pair[0], pair[1]), rel=1e-9, abs=1e-12)
    assert 0 <= value <= 1 + 1e-12


def test_symmetric_equivariant_and_independent_of_threads_to_the_bit() -> None:
    matrices = gaussians(7, 30_000, seed=1)
    matrices[4] = matrices[1] + matrices[2]
    result = pairwise_nmi(matrices, threads=1)
    assert np.array_equal(result, result.T)
    assert not np.diag(result).any()
    for threads in (2, 3):
        assert pairwise_nmi(matrices, threads=threads).tobytes() == result.tobytes()
    order = np.random.default_rng(2).permutation(7)
    assert np.array_equal(pairwise_nmi(matrices[order]), result[np.ix_(order, order)])
    entries = np.random.default_rng(3).permutation(30_000)
    assert np.array_equal(pairwise_nmi(matrices[:, entries]), result)


def test_equal_and_affine_images_share_everything() -> None:
    a, b = gaussians(2, 50_000, seed=5)
    result = pairwise_nmi([a, a.copy(), b, b * np.float32(8)])
    assert result[0, 1] == result[2, 3] == 1.0
    assert result[0, 2] == result[1, 3]
    affine = pairwise_nmi([a, b * np.float32(-0.37) + np.float32(0.05)])[0, 1]
    assert affine == pytest.approx(pairwise_nmi([a, b])[0, 1], rel=0.02)


def test_outliers_leave_no_empty_bins_in_the_table_but_the_same_value() -> None:
    pair = gaussians(2, 40_000, seed=6)
    pair[0, 7], pair[1, 9] = 60.0, -45.0
    assert pairwise_nmi(pair)[0, 1] == pytest.approx(naive_nmi(pair[0], pair[1]), rel=1e-11)


def test_large_counts_leave_the_lookup_table() -> None:
    rng = np.random.default_rng(7)
    a = (rng.random(100_000) < 0.4).astype(np.float32)
    b = np.where(rng.random(100_000) < 0.9, a, 1 - a).astype(np.float32)
    assert pairwise_nmi([a, b])[0, 1] == pytest.approx(naive_nmi(a, b), rel=1e-11)


def test_fixed_bins_equal_a_clipped_histogram() -> None:
    a, b = gaussians(2, 20_000, seed=8)
    b = b + a
    edges = [fixed_edges(x, 32) for x in (a, b)]
    clipped = [np.clip(x, e[0], e[-1]) for x, e in zip((a, b), edges, strict=True)]
    joint, _, _ = np.histogram2d(*clipped, bins=edges)
    h_a, h_b = naive_entropy(joint.sum(axis=1)), naive_entropy(joint.sum(axis=0))
    expected = (h_a + h_b - naive_entropy(joint.ravel())) / math.sqrt(h_a * h_b)
    assert pairwise_nmi([a, b], bins=32)[0, 1] == pytest.approx(expected, rel=1e-11)


def test_f3_finite_sample_bias_and_correlation() -> None:
    a, b = gaussians(2, 1 << 20, seed=9)
    related = np.float32(0.9) * a + np.float32(math.sqrt(1 - 0.81)) * b
    result = pairwise_nmi([a, b, related, a])
    assert result[0, 1] == pytest.approx(0.0063, rel=0.08)
    assert result[0, 2] == pytest.approx(0.167, rel=0.03)
    assert result[0, 3] == 1.0
    floor = noise_floor(a, related, seed=1)
    assert floor == pytest.approx(0.0063, rel=0.08)
    assert floor == noise_floor(a, related, seed=1) != noise_floor(a, related, seed=2)


def test_matrices_are_taken_lazily_and_progress_is_told() -> None:
    taken: list[int] = []
    alive = gaussians(5, 64)

    def source() -> Iterator[Floats]:
        for index, matrix in enumerate(alive):
            taken.append(index)
            yield matrix.reshape(8, 8)

    told: list[tuple[int, int]] = []
    result = pairwise_nmi(source(), progress=lambda done, total: told.append((done, total)))
    assert taken == [0, 1, 2, 3, 4]
    assert told == [(done, 10) for done in range(1, 11)]
    assert np.array_equal(result, pairwise_nmi(alive))


def test_a_failing_progress_callback_ends_the_computation() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pairwise_nmi(gaussians(6, 1000), progress=stop)


@pytest.mark.parametrize("experts", [0, 1])
def test_without_pairs_there_is_nothing_to_compare(experts: int) -> None:
    assert pairwise_nmi(gaussians(experts, 10)).tolist() == [[0.0]] * experts


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_input_is_refused(bad: float) -> None:
    values = np.array([0.0, bad, 1.0], np.float32)
    for function in (auto_edges, lambda v: fixed_edges(v, 8), lambda v: pairwise_nmi([v, v])):
        with pytest.raises(ValueError, match="NaN or infinite"):
            function(values)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="empty"):
        auto_edges(np.empty(0))
    with pytest.raises(ValueError, match="overflows"):
        auto_edges([-3e38, 3e38])
    with pytest.raises(ValueError, match="overflow"):
        fixed_edges([1e38, 3e38], 8)
    with pytest.raises(ValueError, match="NaN"):
        digitise([np.nan], np.array([0, 1], np.float32))
    with pytest.raises(ValueError, match="increasing"):
        digitise([0.0], np.array([0, 0], np.float32))
    with pytest.raises(ValueError, match="entries"):
        pairwise_nmi([np.zeros(3), np.zeros(4)])
    with pytest.raises(ValueError, match="entries"):
        noise_floor(np.zeros(3), np.zeros(4), seed=0)
    for bins in (0, 5000):
        with pytest.raises(ValueError, match="bins must"):
            pairwise_nmi(gaussians(2, 8), bins=bins)
