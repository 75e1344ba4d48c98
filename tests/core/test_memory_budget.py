"""What a walk gives up for a budget of memory, and in which order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.core.folding import held
from moeprune.core.memory import Decision, Sizes, decide, describe, peak, show, smallest_budget
from moeprune.core.targets import parse_size
from moeprune.errors import BudgetError

MIB = 1 << 20
SIZES = Sizes(
    base=500 * MIB, resident=100 * MIB, layer=400 * MIB, rest=80 * MIB, source=320 * MIB,
    experts=8, batches=20, hidden=30 * MIB, work=60 * MIB, logits=0, statistics=5 * MIB, workers=4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (4000, (20, True, 4, 8)),  # all there is room for
        (2320, (6, True, 4, 8)),  # hidden states of some batches in a file
        (2115, (0, True, 4, 8)),  # of all
        (1500, (3, False, 4, 8)),  # the next layer is not read ahead; room again for some
        (1389, (2, False, 3, 8)),  # fewer batches at once
        (1321, (0, False, 3, 8)),
        (1300, (0, False, 4, 5)),  # experts some at a time
        (1000, (0, False, 2, 2)),
        (860, (0, False, 1, 1)),
    ],
)
def test_what_is_given_up_first(budget: int, expected: tuple[int, bool, int, int]) -> None:
    found = decide(SIZES, budget * MIB)
    assert (found.in_memory, found.prefetch, found.workers, found.chunk) == expected
    assert found.peak == peak(SIZES, found) <= budget * MIB


def test_a_model_that_is_walked_later_keeps_its_room() -> None:
    assert decide(SIZES, 2320 * MIB, later=100 * MIB).in_memory == 3


def test_sums_that_wait_for_other_processes_take_memory() -> None:
    """Of the batches 37 to 56 a process holds more sums than of the first twenty."""
    first, way = replace(SIZES, source=0), Decision(0, False, 1, 8)
    later = replace(first, offset=37)
    assert peak(later, way) - peak(first, way) == (held(20, 37) - held(20)) * SIZES.statistics > 0


def test_experts_some_at_a_time_are_computed_by_all_workers() -> None:
    """Rather smaller parts of a layer than fewer batches at once, but no more than 16 parts."""
    many = replace(SIZES, experts=64)
    assert [decide(many, budget * MIB).workers for budget in (1240, 1180, 1100)] == [4, 4, 4]
    assert decide(many, 1240 * MIB).chunk > decide(many, 1180 * MIB).chunk >= 4
    assert decide(many, smallest_budget(many)).chunk == 1


def test_what_batches_hold_in_any_case_counts() -> None:
    parked = replace(SIZES, parked=3 * MIB)
    assert smallest_budget(parked) == smallest_budget(SIZES) + 20 * 3 * MIB


def test_large_sums_keep_experts_together() -> None:
    """One more set of sums, as chunks need it, would be more than the layer."""
    heavy = replace(SIZES, statistics=1000 * MIB)
    assert decide(heavy, smallest_budget(heavy)).chunk == heavy.experts


def test_too_little_names_what_works() -> None:
    with pytest.raises(BudgetError) as raised:
        decide(SIZES, 600 * MIB)
    assert "--memory 600MiB is too small" in raised.value.problem
    assert "embeddings and head take 100MiB" in raised.value.problem
    wanted = raised.value.hint.rpartition(" ")[2]
    least = parse_size(wanted, "memory")
    assert decide(SIZES, least).chunk == 1
    with pytest.raises(BudgetError):
        decide(SIZES, least - MIB)


def test_without_chunks_one_layer_is_the_least() -> None:
    whole = replace(SIZES, chunks=False)
    assert smallest_budget(whole) > smallest_budget(SIZES)
    assert decide(whole, smallest_budget(whole)).chunk == whole.experts
    with pytest.raises(BudgetError, match="one layer and one batch"):
        decide(whole, smallest_budget(SIZES))


def test_one_line_says_it() -> None:
    budget = 860 * MIB
    text = describe(decide(SIZES, budget), SIZES, budget)
    assert text.startswith("memory 860MiB, expected ")
    assert "20 of 20 batches in a file (600MiB)" in text
    assert "one layer at a time; 1 batch at once; 1 of 8 experts in memory" in text
    roomy = describe(decide(SIZES, 4000 * MIB), SIZES, 4000 * MIB)
    assert "hidden states in memory; next layer read ahead; 4 batches at once" in roomy


@pytest.mark.parametrize("text", ["8GiB", "500MB", "1.5 gib", "1e9"])
def test_sizes(text: str) -> None:
    assert parse_size(text, "memory") > MIB


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "8GiBs"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(BudgetError, match="--memory"):
        parse_size(text, "memory")


def test_sizes_are_shown_as_they_are_read() -> None:
    for size in (640 * MIB, 12 << 30, (12 << 30) + MIB):
        assert parse_size(show(size), "memory") == size


_BYTES = st.integers(0, 1 << 34)
_SIZES = st.builds(
    Sizes, base=_BYTES, resident=_BYTES, layer=_BYTES, rest=st.just(0), source=_BYTES,
    experts=st.integers(1, 300), batches=st.integers(0, 2000), hidden=_BYTES, work=_BYTES,
    logits=_BYTES, statistics=_BYTES, workers=st.integers(1, 16), chunks=st.booleans(),
    parked=st.integers(0, 1 << 20),
)  # fmt: skip


@given(_SIZES, st.integers(1, 1 << 38))
def test_a_decision_fits_or_the_least_is_more(sizes: Sizes, budget: int) -> None:
    try:
        found = decide(sizes, budget)
    except BudgetError:
        assert smallest_budget(sizes) > budget
        return
    assert peak(sizes, found) == found.peak <= budget
    assert 0 <= found.in_memory <= sizes.batches
    assert 1 <= found.workers <= sizes.workers
    assert found.chunk == sizes.experts or (sizes.chunks and found.chunk >= 1)


@given(_SIZES, st.integers(1, 1 << 38), st.integers(0, 1 << 36))
def test_more_memory_never_gives_up_more(sizes: Sizes, budget: int, more: int) -> None:
    def kept(decision: Decision) -> tuple[bool, bool, int, bool, int]:
        whole = decision.chunk == sizes.experts
        few = decision.chunk * 16 >= sizes.experts  # passes over the text
        speed = decision.workers * (3 if whole else 2) * few
        return decision.prefetch, few, speed, whole, decision.workers * 1000 + decision.chunk

    try:
        little = decide(sizes, budget)
    except BudgetError:
        return
    assert kept(decide(sizes, budget + more)) >= kept(little)
