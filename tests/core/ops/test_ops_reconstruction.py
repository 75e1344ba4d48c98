"""The error of subsets against loops over tokens and experts in float64."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from core.toy_block import Toy, slow_error
from moeprune.core.budget import Budget
from moeprune.core.method import Context
from moeprune.core.ops import reconstruction as module
from moeprune.core.ops.reconstruction import Norm, output_gram
from moeprune.core.replay import alone, followed_router, reconstruction, skip_threshold
from moeprune.core.shapes import LayerShape

SHAPE = LayerShape(layer=0, experts=6, top_k=2, hidden=8, intermediate=12)
CONTEXT = Context(Budget(keep=3))
EVERY = [ids for n in (2, 3, 5, 6) for ids in combinations(range(6), n)]


def mask(subsets: list[tuple[int, ...]]) -> torch.Tensor:
    kept_NE = torch.zeros(len(subsets), 6, dtype=torch.bool)
    for row, ids in enumerate(subsets):
        kept_NE[row, list(ids)] = True
    return kept_NE


@pytest.mark.parametrize("norm", ["frobenius", "token"])
def test_errors_equal_those_of_a_loop(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OUTPUTS", 50 * 6 * 8)  # tokens and subsets in several pieces
    monkeypatch.setattr(module, "_GATES", 7 * 120 * 6)
    toy = Toy(SHAPE)
    error = reconstruction(toy.view(), CONTEXT, norm)
    found = error.losses(mask(EVERY)).tolist()
    for kept, loss in zip(EVERY, found, strict=True):
        assert loss == pytest.approx(slow_error(toy, kept, norm), rel=1e-5, abs=1e-9)
    assert found[-1] == 0.0  # all experts are left


@pytest.mark.parametrize("gates", [1 << 21, 7 * 120 * 6])
def test_cores_do_not_matter_and_are_given_back(
    gates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All subsets in one part, which one core computes, and in several, which are shared."""
    monkeypatch.setattr(module, "_GATES", gates)
    error = reconstruction(Toy(SHAPE).view(), CONTEXT)
    parts: list[int] = []
    compute = module.Reconstruction._losses

    def watched(self: module.Reconstruction, *given: torch.Tensor) -> torch.Tensor:
        parts.append(torch.get_num_threads())
        return compute(self, *given)

    monkeypatch.setattr(module.Reconstruction, "_losses", watched)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(error.losses(mask(EVERY)).tolist())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    assert set(parts) == {1}
    assert (len(parts) > 2) == (gates < 1 << 20)


def test_another_target_is_compared_as_it_is() -> None:
    view = Toy(SHAPE).view()
    router, block = followed_router(view), view.need_block()
    x_SH = view.need().parts["sample"].x_SH  # type: ignore[attr-defined]
    target_SH = torch.randn(len(x_SH), 8, generator=torch.Generator().manual_seed(3))
    full_SE = router.gates(torch.ones(1, 6, dtype=torch.bool))[0]
    error = module.Reconstruction(
        router, output_gram(block.outputs, x_SH, full_SE, target_SH), "frobenius"
    )
    f_SEH = torch.stack([block.outputs(e, x_SH).double() for e in range(6)], dim=1)
    for kept in EVERY:
        gates_SE = router.gates(mask([kept]))[0]
        made_SH = (gates_SE[..., None] * f_SEH).sum(dim=1)
        expected = float((made_SH - target_SH).norm())
        assert float(error.losses(mask([kept]))[0]) == pytest.approx(expected, rel=1e-9)


def test_an_expert_without_tokens_changes_nothing_if_gates_are_divided() -> None:
    toy = Toy(SHAPE, never=(4,))
    view = toy.view()
    sample = view.need().parts["sample"]
    sample.gate_SK /= sample.gate_SK.sum(dim=1, keepdim=True)  # type: ignore[attr-defined]
    error = reconstruction(view, CONTEXT)
    assert error.router.rule.divided
    assert alone(error)[4] == 0.0
    assert min(alone(error)[:4]) > 0.0


def test_outputs_that_are_not_finite_are_told_and_count_as_zeros() -> None:
    view = Toy(SHAPE).view()
    view.weights.by_role["down"][2] = torch.nan  # type: ignore[attr-defined]
    told: list[str] = []
    error = reconstruction(view, Context(Budget(keep=3), warn=told.append))
    assert len(told) == 1 and "[2]" in told[0]
    assert torch.isfinite(error.losses(mask(EVERY))).all()


def test_the_threshold_of_skipping_is_the_median_ratio_of_the_two_best_that_stay() -> None:
    view = Toy(SHAPE).view()
    z_SE = view.need().parts["sample"].z_SR  # type: ignore[attr-defined]
    kept = (0, 2, 3, 5)
    best = z_SE[:, list(kept)].double().softmax(dim=1).sort(dim=1, descending=True).values
    ratios = sorted((best[:, 1] / best[:, 0]).tolist())
    middle = (ratios[59] + ratios[60]) / 2
    assert skip_threshold(followed_router(view), kept) == pytest.approx(middle)
