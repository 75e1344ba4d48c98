"""Paired shares: intervals against their definition, and exactly how often they hold the truth."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from scipy import stats

from moeprune.evaluation.shares import FEW, Pairs

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import interval_coverage

Z = 1.959963984540054


def z_of(pairs: Pairs, difference: float) -> float:
    """The score statistic, its nuisance share found by trying: the likeliest one."""
    b, c, n = pairs.only_second, pairs.only_first, pairs.items

    def likelihood(share: float) -> float:
        cells = ((b, share + difference), (c, share), (n - b - c, 1 - 2 * share - difference))
        return sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    low, high = max(0.0, -difference), (1.0 - difference) / 2.0
    for _ in range(200):  # golden section; the likelihood is concave
        one, two = low + 0.382 * (high - low), low + 0.618 * (high - low)
        low, high = (low, two) if likelihood(one) > likelihood(two) else (one, high)
    variance = (2.0 * low + difference * (1.0 - difference)) / n
    return ((b - c) / n - difference) / math.sqrt(variance)


def test_a_published_example() -> None:
    """21 patients before and after a transplantation, 1 and 7 unlike: -0.517 to -0.026."""
    found = Pairs(7, 1, 21).interval()
    assert (round(found.low, 3), round(found.high, 3)) == (-0.517, -0.026)


@pytest.mark.parametrize("counts", [(5, 0, 50), (3, 4, 30), (60, 20, 90), (0, 9, 12)])
def test_ends_are_where_the_score_says(counts: tuple[int, int, int]) -> None:
    pairs = Pairs(*counts)
    found = pairs.interval()
    assert z_of(pairs, found.low) == pytest.approx(Z, abs=1e-4)
    assert z_of(pairs, found.high) == pytest.approx(-Z, abs=1e-4)


def test_none_and_all_unlike() -> None:
    """Where the score has no variance at the estimate: limits of neighbours that have."""
    edge = Z**2 / (50 + Z**2)
    same = Pairs(0, 0, 50).interval()
    assert (same.value, same.low, same.high) == (0.0, pytest.approx(-edge), pytest.approx(edge))
    every = Pairs(0, 50, 50).interval()
    assert (every.low, every.high) == (pytest.approx((50 - Z**2) / (50 + Z**2)), 1.0)
    assert every.low > Pairs(0, 49, 50).interval().low
    assert Pairs(50, 0, 50).interval().low == -1.0 and Pairs(1, 0, 1).interval().high > 0.5


def test_mirrored_and_counted() -> None:
    one, two = Pairs(30, 5, 200).interval(), Pairs(5, 30, 200).interval()
    assert one.value == -0.125 and one.high < 0.0
    assert (two.low, two.high) == pytest.approx((-one.high, -one.low))
    assert Pairs.of([1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]) == Pairs(1, 1, 4)
    for wrong in ((2, 2, 3), (-1, 2, 3), (0, 0, 0)):
        with pytest.raises(ValueError, match=r"not negative|more disagreements"):
            Pairs(*wrong)


def test_mcnemar_by_counting() -> None:
    """Two-sided exact: twice the tail of a fair coin."""
    tail = sum(math.comb(10, k) for k in range(3)) / 2**10
    assert Pairs(2, 8, 50).p_value() == Pairs(8, 2, 50).p_value() == pytest.approx(2 * tail)
    assert Pairs(0, 0, 50).p_value() == Pairs(3, 3, 50).p_value() == 1.0


def test_intervals_hold_the_truth_as_often_as_promised() -> None:
    """Exactly, from ``FEW`` expected differences on; docs/evaluate.md has a larger table."""
    for differing in (FEW, 14, 25):
        for split in (0.1, 0.3, 0.5):
            least, most = interval_coverage.span(differing, split, (30, 100))
            assert 0.93 <= least <= most <= 0.97, (differing, split)
    assert interval_coverage.span(2, 0.3, (30, 100))[1] > 0.985, "else fewer would do"


def test_exact_coverage_counts_every_outcome() -> None:
    """Written out for eight questions."""
    first, second, size = 0.2, 0.1, 8
    held = 0.0
    for one in range(size + 1):
        for two in range(size + 1 - one):
            found = Pairs(one, two, size).interval()
            rest = size - one - two
            chance = stats.multinomial.pmf([one, two, rest], size, [first, second, 0.7])
            held += chance * (found.low <= second - first <= found.high)
    assert interval_coverage.exact(first, second, size) == pytest.approx(held, abs=1e-6)


def test_words_interval_and_test_agree() -> None:
    """Of all outcomes of 24 questions that are not mirrored."""
    for one in range(25):
        for two in range(min(one + 1, 25 - one)):
            pairs = Pairs(one, two, 24)
            shown, said = pairs.p_value() <= 0.05, pairs.verdict(0.02, worse=-1)
            assert pairs.interval().excludes_zero or not shown
            assert said.startswith(("worse by", "better by")) == shown, said
            if not shown:
                few = one + two < FEW
                uncertain = pairs.interval().excludes_zero and not few
                assert said.startswith("uncertain") == uncertain, said
                assert ("too few to say" in said) == few, said


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((3, 0, 50), "too small a sample: only 3 of 50 items came out differently, too few to say"),
        ((0, 0, 50), "too small a sample: none of 50 items came out differently, too few to say"),
        ((7, 0, 50), "worse by 14 points (5.87 to 26.2); only 7 of 50 items came out differently"),
        ((15, 6, 100), "uncertain: worse by 9 points in the sample (0.0"),
        ((9, 8, 60), "too small a sample: 60 items can only show a difference of"),
        ((0, 0, 670), "no difference seen: the sample would have shown 1.1"),
        ((20, 20, 20000), "no difference seen: the sample would have shown 0."),
        ((2, 1, 5), "too small a sample: 5 items cannot show a difference; more"),
    ],
)
def test_verdicts_of_shares(counts: tuple[int, int, int], says: str) -> None:
    assert Pairs(*counts).verdict(0.02, worse=-1, advice="more").startswith(says)


@pytest.mark.parametrize("counts", [(6, 12, 60), (0, 0, 60)])
def test_smallest_is_shown_four_times_in_five(counts: tuple[int, int, int]) -> None:
    """By all outcomes of a new sample in which the models differ as often."""
    pairs = Pairs(*counts)
    smallest, size = pairs.smallest(), pairs.items
    share = max(pairs.differing / size, smallest)
    more, less = (share + smallest) / 2, (share - smallest) / 2
    shown = sum(
        stats.multinomial.pmf([one, two, size - one - two], size, [less, more, 1 - share])
        for one in range(size + 1)
        for two in range(size + 1 - one)
        if stats.binom.cdf(min(one, two), one + two, 0.5) <= 0.025
    )
    assert shown == pytest.approx(0.8, abs=1e-6)
    assert math.isnan(Pairs(1, 0, 3).smallest()), "three questions show nothing"
