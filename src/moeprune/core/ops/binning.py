"""Equal-width binning of a matrix into 16-bit codes, as the mutual information of experts needs it.

The edges follow NumPy's "auto" rule, which MoEITS (arXiv 2604.10603) bins with, or a fixed number
of bins; the assignment of values to bins is that of ``numpy.histogram``.

Axis letters: N entries of one matrix, B bins (B + 1 edges).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float32]
Codes: TypeAlias = NDArray[np.uint16]
Ints: TypeAlias = NDArray[np.int64]
_Function = TypeVar("_Function", bound=Callable[..., Any])

MAX_BINS = 1 << 16
MAX_FIXED_BINS = 4096
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_SAMPLE_SIZE = 1 << 13


def jit(function: _Function) -> _Function:
    """Compile with Numba, to run without the interpreter lock; typed as the function itself."""
    return cast(_Function, numba.njit(cache=True, nogil=True)(function))


def auto_edges(values: ArrayLike) -> Floats:
    """Return the bin edges of NumPy's "auto" rule (2.x form) for the float32 ``values`` [N].

    With r = max - min and the quartiles q25, q75:

        width = min(max(2 * (q75 - q25) * N^(-1/3), r / sqrt(N) / 2), r / (log2 N + 1))
        bins = ceil(r / width), edges = linspace(min, max, bins + 1) in float32

    Source: the binning used by MoEITS (arXiv 2604.10603).  Values are cast to float32 first:
    float16 edges collide for large matrices.  A constant input gets one bin.  Where float32
    cannot hold that many distinct edges, the number of bins is halved until it can.

    Raises ValueError for empty or non-finite input, or if max - min overflows float32.
    """
    values_N, low, high = _checked(values)
    count, span = values_N.size, float(high - low)
    if span == 0.0:
        return _spaced_edges(low, high, 1)
    lower, upper = _quartiles(values_N)
    freedman = 2.0 * (upper - lower) * count ** (-1.0 / 3.0)
    square_root = span / math.sqrt(count)
    sturges = span / float(np.log2(count) + 1.0)
    width = min(max(freedman, square_root / 2), sturges)
    return _spaced_edges(low, high, math.ceil(span / width))


def fixed_edges(values: ArrayLike, bins: int) -> Floats:
    """Return the edges of ``bins`` equal bins over mean +- 4 standard deviations of ``values`` [N].

    An alternative to :func:`auto_edges` whose resolution does not depend on single outliers;
    :func:`digitise` puts what lies outside into the first and the last bin.

    Raises ValueError as :func:`auto_edges`, and unless 1 <= bins <= 4096.
    """
    if not 1 <= bins <= MAX_FIXED_BINS:
        raise ValueError(f"bins must lie in 1..{MAX_FIXED_BINS}, got {bins}")
    values_N, low, high = _checked(values)
    if low == high:
        return _spaced_edges(low, high, 1)
    mean = float(values_N.mean(dtype=np.float64))
    reach = 4.0 * float(values_N.std(dtype=np.float64))
    if abs(mean) + 2.0 * reach > _FLOAT32_MAX:
        raise ValueError(f"bins over {mean} +- {reach} overflow float32")
    return _spaced_edges(np.float32(mean - reach), np.float32(mean + reach), bins)


def digitise(values: ArrayLike, edges: Floats) -> Codes:
    """Return the bin number of every one of the ``values`` [N] between the ``edges`` [B + 1].

    Bin b holds edges[b] <= x < edges[b + 1]; the last bin also holds its right edge.  This is the
    assignment of ``numpy.histogram``: a bin guessed by equal width is corrected against the
    edges.  Values outside the edges go to the nearest bin.

    Raises ValueError for NaN values or for edges that do not form 1..65536 bins.
    """
    return bin_counts(flat(values), np.ascontiguousarray(edges, dtype=np.float32))[0]


def bin_counts(values_N: Floats, edges_B: Floats) -> tuple[Codes, Ints]:
    """Return the codes [N] of the values (see :func:`digitise`) and the counts [B] of the bins."""
    if not 2 <= edges_B.size <= MAX_BINS + 1 or not _increasing(edges_B):
        raise ValueError(f"edges must be strictly increasing and form 1..{MAX_BINS} bins")
    if values_N.size and np.isnan(values_N.max()):
        raise ValueError("cannot bin NaN values")
    codes_N, counts_B = np.empty(values_N.size, np.uint16), np.zeros(edges_B.size - 1, np.int64)
    _digitise(values_N, edges_B, codes_N, counts_B)
    return codes_N, counts_B


def flat(values: ArrayLike) -> Floats:
    """Return the values as one float32 run, in row-major order; a view where possible."""
    return np.ascontiguousarray(values, dtype=np.float32).ravel()


def _checked(values: ArrayLike) -> tuple[Floats, np.float32, np.float32]:
    values_N = flat(values)
    if not values_N.size:
        raise ValueError("cannot bin an empty matrix")
    low, high = values_N.min(), values_N.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("cannot bin a matrix with NaN or infinite entries")
    if float(high) - float(low) > _FLOAT32_MAX:
        raise ValueError(f"the range of the values, {low} to {high}, overflows float32")
    return values_N, low, high


def _increasing(edges_B: Floats) -> bool:
    return bool(np.all(edges_B[:-1] < edges_B[1:]))


def _spaced_edges(low: np.float32, high: np.float32, bins: int) -> Floats:
    """Equally spaced float32 edges; fewer than asked where they would collide."""
    if low == high:
        low, high = low - np.float32(0.5), high + np.float32(0.5)
    bins = min(bins, MAX_BINS)
    while low < high:
        edges_B = np.linspace(low, high, bins + 1, dtype=np.float32)
        if _increasing(edges_B):
            return edges_B
        bins = bins // 2
    return np.sort(np.array([np.nextafter(low, np.float32(0)), low], np.float32))


def _quartiles(values_N: Floats) -> tuple[float, float]:
    """The 25 % and 75 % points by linear interpolation, exactly as ``numpy.percentile``."""
    stride = values_N.size // _SAMPLE_SIZE | 1  # odd: does not keep hitting the same columns
    sample = np.sort(values_N[::stride])
    return _quantile(values_N, sample, 0.25), _quantile(values_N, sample, 0.75)


def _quantile(values_N: Floats, sample: Floats, part: float) -> float:
    """Order statistics, from the values between two sample quantiles if these bracket them."""
    rank, fraction = divmod((values_N.size - 1) * part, 1.0)
    centre, slack = int(part * sample.size), 2 * math.isqrt(sample.size)
    low = sample[max(0, centre - slack)]
    high = sample[min(sample.size - 1, centre + slack)]
    below, inside = _between(values_N, low, high)
    first = int(rank) - below
    second = first + int(rank + 1 < values_N.size)
    if first < 0 or second >= inside.size:
        first, second, inside = first + below, second + below, values_N
    inside = np.partition(inside, (first, second))
    step = float(inside[second] - inside[first])
    if fraction >= 0.5:
        return float(inside[second]) - step * (1 - fraction)
    return float(inside[first]) + step * fraction


@jit
def _between(values_N: Any, low: Any, high: Any) -> tuple[int, Floats]:
    """Return how many values lie below ``low``, and the values in [low, high]."""
    inside, found, below = np.empty_like(values_N), 0, 0
    for n in range(values_N.size):
        value = values_N[n]
        inside[found] = value
        below += value < low
        found += low <= value <= high
    return below, inside[:found]


@jit
def _digitise(values_N: Any, edges_B: Any, codes_N: Any, counts_B: Any) -> None:
    """Fill in codes and counts: guess by equal width (vectorised), then settle by the edges."""
    last, low = edges_B.size - 2, edges_B[0]
    factor = np.float32(last + 1) / (edges_B[last + 1] - low)
    for n in range(values_N.size):
        guess = (values_N[n] - low) * factor
        codes_N[n] = np.int32(min(max(guess, np.float32(0)), np.float32(last)))
    for n in range(values_N.size):
        value, code = values_N[n], min(np.int64(codes_N[n]), last)
        while code > 0 and value < edges_B[code]:
            code -= 1
        while code < last and value >= edges_B[code + 1]:
            code += 1
        codes_N[n] = code
        counts_B[code] += 1
