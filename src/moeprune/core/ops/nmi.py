"""Normalised mutual information between index-aligned expert matrices.

Source: MoEITS (arXiv 2604.10603).  Entry n of expert A is paired with entry n of expert B; both
are binned, and from the counts of the bins, with entropies H in nats,

    I(A, B) = H_A + H_B - H_AB          NMI(A, B) = I(A, B) / sqrt(H_A * H_B)

Every matrix is binned once, to 16-bit codes; a pair then costs one pass over two code arrays.
With counts c of N entries, N * H = N ln N - sum of c ln c.  The terms c ln c are added as 64-bit
fixed-point integers, so a sum depends on the multiset of counts and not on their order: results
are exactly symmetric, exactly 1 for equal codes, and equal for every number of threads.

Axis letters: E experts, N entries of one matrix, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeAlias

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeprune.core.ops.binning import (
    Codes,
    auto_edges,
    bin_counts,
    digitise,
    fixed_edges,
    flat,
    jit,
)

__all__ = ["auto_edges", "digitise", "fixed_edges", "noise_floor", "pairwise_nmi"]

Bins: TypeAlias = int | Literal["auto"]
Progress: TypeAlias = Callable[[int, int], None]

_LUT_SIZE = 1024


def pairwise_nmi(
    matrices_EN: Iterable[ArrayLike],
    bins: Bins = "auto",
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Return the NMI of every pair of experts as a symmetric [E, E] matrix with zero diagonal.

    Source: MoEITS (arXiv 2604.10603); NMI is 0 where an entropy is 0.

    ``matrices_EN`` yields one role's matrix of each expert, of any shape and N entries in all; it
    is consumed once and lazily, ``threads`` matrices at a time, so a generator need never hold
    all of them.  Kept are the codes, 2 * E * N bytes, and for each thread one joint table of 4
    bytes for every pair of occupied bins.  ``threads`` defaults to Numba's number of threads and
    does not affect the result.  ``progress(done, total)`` is called in the caller's thread as
    pairs finish, in order.

    Raises ValueError if matrices differ in size, or as :func:`auto_edges`, :func:`fixed_edges`.
    """
    # not numba.get_num_threads(): that starts Numba's own pool, which changes torch's thread count
    workers = numba.config.NUMBA_NUM_THREADS if threads is None else threads
    pool = ThreadPoolExecutor(workers)
    try:
        coded = list(_encode_lazily(matrices_EN, bins, workers, pool))
        pairs = [(a, b) for a in range(len(coded)) for b in range(a + 1, len(coded))]
        values = pool.map(lambda pair: _nmi(coded[pair[0]], coded[pair[1]]), pairs)
        similarity_EE = np.zeros((len(coded), len(coded)))
        for done, ((a, b), value) in enumerate(zip(pairs, values, strict=True), start=1):
            similarity_EE[a, b] = similarity_EE[b, a] = value
            if progress is not None:
                progress(done, len(pairs))
    finally:
        pool.shutdown(cancel_futures=True)
    return similarity_EE


def noise_floor(a: ArrayLike, b: ArrayLike, seed: int, bins: Bins = "auto") -> float:
    """Return the NMI of ``a`` [N] with a seeded random permutation of ``b`` [N].

    Finite samples make the NMI of unrelated matrices positive; this is that bias for the given
    marginals and N.  Pairs of experts that do not exceed it show no redundancy to NMI as MoEITS
    (arXiv 2604.10603) defines it.

    Raises ValueError as :func:`pairwise_nmi`.
    """
    first, second = _encode(a, bins), _encode(b, bins)
    shuffled_N = np.random.default_rng(seed).permutation(second.codes_N)
    return _nmi(first, _Coded(shuffled_N, second.bins, second.entropy))


@dataclass(frozen=True)
class _Coded:
    """One binned matrix; ``entropy`` is N * H in the fixed-point unit of its N."""

    codes_N: Codes
    bins: int
    entropy: int


def _encode_lazily(
    matrices_EN: Iterable[ArrayLike], bins: Bins, workers: int, pool: ThreadPoolExecutor
) -> Iterator[_Coded]:
    source, size = iter(matrices_EN), None
    while batch := list(islice(source, workers)):
        for coded in pool.map(lambda values: _encode(values, bins), batch):
            size = coded.codes_N.size if size is None else size
            if coded.codes_N.size != size:
                raise ValueError(f"matrices of {size} and of {coded.codes_N.size} entries")
            yield coded


def _encode(values: ArrayLike, bins: Bins) -> _Coded:
    """Bin one matrix; empty bins are dropped, which leaves entropies alone and tables small."""
    values_N = flat(values)
    edges = auto_edges(values_N) if bins == "auto" else fixed_edges(values_N, bins)
    codes_N, counts_B = bin_counts(values_N, edges)
    if not counts_B.all():
        _relabel(codes_N, np.cumsum(counts_B > 0) - 1)
        counts_B = counts_B[counts_B > 0]
    scale = _scale(codes_N.size)
    spent = sum(int(_c_log_c(count, scale)) for count in counts_B.tolist())
    return _Coded(codes_N, counts_B.size, int(_c_log_c(codes_N.size, scale)) - spent)


def _nmi(a: _Coded, b: _Coded) -> float:
    if a.codes_N.size != b.codes_N.size:
        raise ValueError(f"matrices of {a.codes_N.size} and of {b.codes_N.size} entries")
    if a.entropy <= 0 or b.entropy <= 0:
        return 0.0
    scale = _scale(a.codes_N.size)
    table_BB = np.zeros((a.bins, b.bins), np.uint32)
    spent = int(_joint_c_log_c(a.codes_N, b.codes_N, table_BB, scale))
    joint = int(_c_log_c(a.codes_N.size, scale)) - spent
    information = max(0, a.entropy + b.entropy - joint)
    return information / math.sqrt(float(a.entropy) * float(b.entropy))


def _scale(size: int) -> float:
    """The power of two that maps N ln N, the largest sum of c ln c, into 62 bits."""
    return 2.0 ** (62 - math.ceil(math.log2(size * math.log(size) + 2.0)))


@jit
def _relabel(codes_N: Any, labels_B: Any) -> None:
    """Replace every code by its label, in place."""
    for n in range(codes_N.size):
        codes_N[n] = labels_B[codes_N[n]]


@jit
def _c_log_c(count: Any, scale: float) -> Any:
    """The term c ln c of an entropy, in fixed point."""
    return np.int64(np.rint(count * math.log(count) * scale)) if count > 0 else np.int64(0)


@jit
def _joint_c_log_c(a_N: Any, b_N: Any, table_BB: Any, scale: float) -> Any:
    """Count the pairs of codes in the zeroed ``table_BB`` and add up c ln c over its cells."""
    for n in range(a_N.size):
        table_BB[a_N[n], b_N[n]] += np.uint32(1)
    known = np.empty(_LUT_SIZE, np.int64)
    for count in range(_LUT_SIZE):
        known[count] = _c_log_c(count, scale)
    total = np.int64(0)
    for count in table_BB.flat:
        total += known[count] if count < _LUT_SIZE else _c_log_c(np.int64(count), scale)
    return total
