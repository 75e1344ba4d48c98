"""Sums that do not depend on how the text was cut, and statistics on their way to disk and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.rows import SMALL, batches, collected, random_rows
from moeprune.core.accumulators import (
    ACCUMULATORS,
    LIGHT,
    SAMPLE_SIZE,
    BlockRows,
    Inputs,
    Outputs,
    Routing,
    TokenSample,
)
from moeprune.core.shapes import LayerShape
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import MoepruneError

TOKENS = 64
ROWS = random_rows(SMALL, TOKENS, never=[5])
cuts = st.lists(st.integers(1, TOKENS - 1), max_size=6)


def same(one: LayerStatistics, two: LayerStatistics, rel: float, only: str | None = None) -> None:
    """Counts and samples exactly, sums to ``rel`` of the largest entry of their tensor."""
    assert one.tokens == two.tokens
    first, second = one.to_tensors(), two.to_tensors()
    assert set(first) == set(second)
    for name, a in first.items():
        b = second[name]
        if only is not None and not name.startswith(only):
            continue
        if not a.is_floating_point() or name == "sample.x_SH":
            assert torch.equal(a, b), name
        else:
            # float32 totals (Gram matrices) can only agree to their own precision
            within = rel if a.dtype == torch.float64 else max(rel, 1e-5)
            assert (a - b).abs().max() <= within * max(1e-30, float(b.abs().max())), name


@settings(max_examples=25, deadline=None)
@given(cuts, cuts)
def test_any_two_splits_agree(one: list[int], two: list[int]) -> None:
    # a batch is summed in float32, so different splits may differ by its rounding
    same(collected(SMALL, ROWS, one), collected(SMALL, ROWS, two), 5e-6)


@settings(max_examples=25, deadline=None)
@given(cuts, st.randoms(use_true_random=False))
def test_merging_partial_sums_in_any_order_and_tree_is_feeding_one(
    ends: list[int], random: object
) -> None:
    parts = [collected(SMALL, batch) for batch in batches(ROWS, ends)]
    random.shuffle(parts)  # type: ignore[attr-defined]
    while len(parts) > 1:
        position = random.randrange(len(parts) - 1)  # type: ignore[attr-defined]
        parts[position].merge(parts.pop(position + 1))
    same(parts[0], collected(SMALL, ROWS, ends), 1e-9)


@pytest.mark.parametrize("name", sorted(ACCUMULATORS))
def test_every_accumulator_counts_every_token_once(name: str) -> None:
    whole = collected(SMALL, ROWS, needs=[name])
    twice = collected(SMALL, ROWS, needs=[name])
    twice.merge(LayerStatistics.empty(SMALL, [name]))
    same(twice, whole, 0.0)  # nothing added changes nothing
    half = collected(SMALL, ROWS.part(slice(0, 32)), needs=[name])
    with pytest.raises(AssertionError):
        same(half, whole, 1e-3, name)
    half.merge(collected(SMALL, ROWS.part(slice(32, None)), needs=[name]))
    same(half, whole, 5e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_moments_of_outputs_against_numpy(offset: float) -> None:
    rows = random_rows(SMALL, 500, seed=3)
    rows.f_TEH.add_(offset)
    outputs = collected(SMALL, rows, [3, 4, 100, 101, 350], ["outputs"]).part(Outputs)
    variance_EH = outputs.variance_EH().numpy()
    for e in range(SMALL.experts):
        tokens, slots = (ids.numpy() for ids in torch.nonzero(rows.index_TK == e, as_tuple=True))
        f_nH = rows.f_TEH.numpy().astype(np.float64)[tokens, e]
        g_n1 = rows.gate_TK.numpy().astype(np.float64)[tokens, slots][:, None]
        norm_n = np.linalg.norm(f_nH, axis=1)
        assert outputs.count_E[e] == len(tokens) > 20
        np.testing.assert_allclose(outputs.mean_EH[e], f_nH.mean(axis=0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(variance_EH[e], f_nH.var(axis=0, ddof=1), rtol=2e-5)
        np.testing.assert_allclose(
            outputs.gated_EH[e], (g_n1**2 * f_nH).sum(axis=0), rtol=1e-5, atol=1e-4
        )
        np.testing.assert_allclose(
            outputs.gate_f_EH[e], (g_n1 * f_nH).sum(axis=0), rtol=1e-5, atol=1e-4
        )
        for found, expected in (
            (outputs.max_E, np.abs(f_nH).max()),
            (outputs.gate_norm_sq_E, (g_n1[:, 0] * norm_n**2).sum()),
            (outputs.norm_E, norm_n.sum()),
            (outputs.norm_sq_E, (norm_n**2).sum()),
            (outputs.gate_norm_E, (g_n1[:, 0] * norm_n).sum()),
            (outputs.gate_sq_norm_sq_E, ((g_n1[:, 0] * norm_n) ** 2).sum()),
        ):
            assert float(found[e]) == pytest.approx(expected, rel=1e-6)


def test_variance_of_fewer_than_two_tokens_is_zero() -> None:
    lonely = random_rows(SMALL, 1)
    outputs = collected(SMALL, lonely, needs=["outputs"]).part(Outputs)
    assert sorted(outputs.count_E.tolist()) == [0, 0, 0, 0, 1, 1]
    assert torch.equal(outputs.variance_EH(), torch.zeros(6, 8, dtype=torch.float64))


def test_the_other_sums_against_loops() -> None:
    statistics = collected(SMALL, ROWS, [20])
    tensors = statistics.to_tensors()
    E, H, inner = SMALL.experts, SMALL.hidden, SMALL.intermediate
    expected = {
        "routing.count_E": torch.zeros(E),
        "routing.top1_E": torch.zeros(E),
        "routing.gate_E": torch.zeros(E),
        "routing.gate_sq_E": torch.zeros(E),
        "routing.together_EE": torch.zeros(E, E),
        "inputs.sq_EH": torch.zeros(E, H),
        "inputs.gated_sq_EH": torch.zeros(E, H),
        "hidden.sq_EI": torch.zeros(E, inner),
        "hidden.gated_sq_EI": torch.zeros(E, inner),
        "hidden.sum_EI": torch.zeros(E, inner),
        "input-gram.gram_EHH": torch.zeros(E, H, H),
        "hidden-gram.gram_EII": torch.zeros(E, inner, inner),
        "novice-gram.moments_EKK": torch.zeros(E, H + 1, H + 1),
        "novice-gram.cross_EHK": torch.zeros(E, H, H + 1),
        "router.sum_E": torch.zeros(E),
        "router.gram_EE": torch.zeros(E, E),
        "router.prob_E": torch.zeros(E),
    }
    expected = {name: blank.double() for name, blank in expected.items()}
    for t in range(TOKENS):
        x, z = ROWS.x_TH[t].double(), ROWS.logits_TR[t].double()
        expected["router.sum_E"] += z
        expected["router.gram_EE"] += torch.outer(z, z)
        expected["router.prob_E"] += z.exp() / z.exp().sum()
        chosen = ROWS.index_TK[t].tolist()
        expected["routing.top1_E"][chosen[int(ROWS.gate_TK[t].argmax())]] += 1
        for k, e in enumerate(chosen):
            g, h = ROWS.gate_TK[t, k].double(), ROWS.h_TEI[t, e].double()
            f, x1 = ROWS.f_TEH[t, e].double(), torch.cat((torch.ones(1).double(), x))
            for other in chosen:
                expected["routing.together_EE"][e, other] += 1
            for name, value in (
                ("routing.count_E", 1),
                ("routing.gate_E", g),
                ("routing.gate_sq_E", g * g),
                ("inputs.sq_EH", x * x),
                ("inputs.gated_sq_EH", (g * x) ** 2),
                ("hidden.sq_EI", h * h),
                ("hidden.gated_sq_EI", (g * h) ** 2),
                ("hidden.sum_EI", h),
                ("input-gram.gram_EHH", torch.outer(x, x)),
                ("novice-gram.moments_EKK", g * g * torch.outer(x1, x1)),
                ("novice-gram.cross_EHK", g * g * torch.outer(f, x1)),
                ("hidden-gram.gram_EII", torch.outer(h, h)),
            ):
                expected[name][e] += value
    elsewhere = ("outputs.", "sample.", "served.")
    assert set(expected) == {n for n in tensors if not n.startswith(elsewhere)}
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name].double(), value, rtol=1e-5, atol=1e-4, msg=name)


def test_slots_without_an_expert_count_for_nobody() -> None:
    index_TK = torch.tensor([[0, 6], [7, 2], [6, 7]])  # ids >= E: identity or skip classes
    gate_TK = torch.tensor([[0.25, 0.75], [0.5, 0.25], [0.5, 0.5]])
    statistics = LayerStatistics.empty(SMALL, ["routing"])
    keys = torch.arange(3)
    statistics.add_block(BlockRows(torch.zeros(3, 8), index_TK, gate_TK, None, keys))
    routing = statistics.part(Routing)
    assert statistics.tokens == 3
    assert routing.count_E.tolist() == [1, 0, 1, 0, 0, 0]
    assert routing.top1_E.tolist() == [0, 0, 0, 0, 0, 0]
    assert routing.gate_E.tolist() == [0.25, 0, 0.25, 0, 0, 0]
    assert routing.together_EE.sum() == 2


def test_the_largest_activation_is_of_either_sign_and_merges_as_a_maximum() -> None:
    rows = random_rows(SMALL, 40, seed=4)
    e = int(rows.index_TK[30, 0])
    rows.f_TEH[30, e, 2] = -1e6
    parts = [collected(SMALL, rows.part(slice(a, a + 20)), needs=["outputs"]) for a in (0, 20)]
    for one, two in (parts, parts[::-1]):
        total = LayerStatistics.empty(SMALL, ["outputs"])
        total.merge(one)
        total.merge(two)
        assert total.part(Outputs).max_E[e] == 1e6
    assert float(parts[0].part(Outputs).max_E[e]) < 1e5


def test_router_outputs_that_are_no_experts_share_the_probability() -> None:
    statistics = LayerStatistics.empty(SMALL, ["router"])
    rows = random_rows(SMALL, 3)
    wide_TR = torch.cat((rows.logits_TR, torch.full((3, 2), 9.0)), dim=1)
    statistics.add_block(BlockRows(rows.x_TH, rows.index_TK, rows.gate_TK, wide_TR, rows.key_T))
    prob_E = statistics.to_tensors()["router.prob_E"]
    torch.testing.assert_close(prob_E, wide_TR.double().softmax(dim=1).sum(dim=0)[:6])
    assert float(prob_E.sum()) < 0.2


def test_the_sample_is_the_tokens_with_the_smallest_keys() -> None:
    rows = random_rows(SMALL, SAMPLE_SIZE + 150, seed=9)
    smallest = rows.key_T.argsort()[:SAMPLE_SIZE]
    for ends in ([], [1, 2, 200], [SAMPLE_SIZE + 10]):
        sample = collected(SMALL, rows, ends, ["sample"]).part(TokenSample)
        assert torch.equal(sample.key_S, rows.key_T[smallest])
        assert torch.equal(sample.x_SH, rows.x_TH[smallest])


def test_router_output_is_asked_for_only_by_who_needs_it() -> None:
    assert LayerStatistics.empty(SMALL, LIGHT).needs_router
    assert not LayerStatistics.empty(SMALL, ["inputs", "routing"]).needs_router


def test_merge_refuses_other_shapes_and_other_sums() -> None:
    one = LayerStatistics.empty(SMALL, ["routing"])
    with pytest.raises(MoepruneError, match="cannot be merged") as caught:
        one.merge(LayerStatistics.empty(SMALL, ["routing", "inputs"]))
    assert "--collect" in caught.value.hint
    wider = LayerShape(0, 6, 2, 16, 12)
    with pytest.raises(MoepruneError, match="hidden=16"):
        one.merge(LayerStatistics.empty(wider, ["routing"]))


def test_unknown_and_missing_accumulators_are_named() -> None:
    with pytest.raises(MoepruneError, match="unknown accumulator 'outptus'") as caught:
        LayerStatistics.empty(SMALL, ["outptus"])
    assert "'outputs'" in caught.value.hint
    with pytest.raises(MoepruneError, match="do not hold 'inputs'") as caught:
        LayerStatistics.empty(SMALL, ["routing"]).part(Inputs)
    assert "--collect inputs,routing" in caught.value.hint


def test_tensors_round_trip() -> None:
    statistics = collected(SMALL, ROWS, [10, 30])
    tensors = statistics.to_tensors()
    back = LayerStatistics.from_tensors(SMALL, statistics.tokens, tensors)
    assert set(back.parts) == set(ACCUMULATORS)
    same(back, statistics, 0.0)
    back.merge(collected(SMALL, ROWS))  # what was read can be added to
    assert back.tokens == 2 * TOKENS


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("outputs.mean_EH", lambda t: t[:, :-1]),
        ("outputs.mean_EH", lambda t: t[:-1]),
        ("routing.count_E", lambda t: t[:-1]),
        ("routing.gate_E", lambda t: t.sum()),
        ("sample.x_SH", lambda t: t[:, :-1]),
        ("inputs.sq_EH", lambda t: None),
    ],
)
def test_from_tensors_refuses_other_sizes(name: str, change: object) -> None:
    tensors = collected(SMALL, ROWS).to_tensors()
    changed = change(tensors.pop(name))  # type: ignore[operator]
    if changed is not None:
        tensors[name] = changed
    with pytest.raises(MoepruneError, match=f"bad {name.partition('.')[0]} sums"):
        LayerStatistics.from_tensors(SMALL, TOKENS, tensors)


def test_from_tensors_refuses_unknown_sums() -> None:
    with pytest.raises(MoepruneError, match="unknown accumulator"):
        LayerStatistics.from_tensors(SMALL, 1, {"bogus.x": torch.zeros(1)})
