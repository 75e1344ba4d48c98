"""Slimming and FLAP against loops, and what they promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.rows import SMALL, Rows, Weights, collected, random_rows, random_weights, view_of
from moeprune.core.budget import Budget
from moeprune.core.edits import Neurons
from moeprune.core.method import Context
from moeprune.core.plan import LayerPlan
from moeprune.errors import BudgetError
from moeprune.methods.flap import FLAP
from moeprune.methods.slim import Slim
from moeprune.models.checkpoint import Checkpoint
from moeprune.pipeline import stages

WEIGHTS = random_weights(SMALL)
ROWS = random_rows(SMALL, 60, weights=WEIGHTS, never=(4,))
E, N = SMALL.experts, SMALL.intermediate


def context(**budget: float) -> Context:
    return Context(Budget(**budget))  # type: ignore[arg-type]


def tokens_of(rows: Rows, expert: int) -> tuple[np.ndarray, np.ndarray]:
    """Hidden activations and gates of an expert's tokens, float64."""
    tokens, slots = torch.nonzero(rows.index_TK == expert, as_tuple=True)
    return rows.h_TEI[tokens, expert].double().numpy(), rows.gate_TK[tokens, slots].double().numpy()


def slow_score(kind: str, expert: int) -> list[float]:
    g, u, d = (WEIGHTS.matrix(expert, role).double().numpy() for role in ("gate", "up", "down"))
    h, gate = tokens_of(ROWS, expert)
    found = []
    for j in range(N):
        size = math.sqrt((g[j] ** 2).sum() * (u[j] ** 2).sum() * (d[:, j] ** 2).sum())
        energy = float((d[:, j] ** 2).sum())
        if kind == "magnitude" or not len(h):
            found.append(size if kind != "flap" else energy)
        elif kind == "activation":
            found.append(sum(float(x) ** 2 for x in h[:, j]) * energy)
        elif kind == "gated":
            found.append(
                sum((w * float(x)) ** 2 for w, x in zip(gate, h[:, j], strict=True)) * energy
            )
        else:
            found.append(float(np.var(h[:, j], ddof=1)) * energy)
    return found


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])


def neurons_of(layer: LayerPlan) -> list[list[int]]:
    assert layer.neurons is not None
    index = layer.neurons.index_N4
    return [index[index[:, 0] == e, 3].tolist() for e in range(E)]


@pytest.mark.parametrize("score", ["magnitude", "activation", "gated"])
def test_slim_keeps_what_a_loop_keeps(score: str) -> None:
    method = Slim(score=score, align=1)  # type: ignore[arg-type]
    layer = method.plan_layer(view_of(SMALL, collected(SMALL, ROWS), WEIGHTS), context(keep=5))
    assert neurons_of(layer) == [best(slow_score(score, e), 5) for e in range(E)]
    assert bool(layer.notes) == (score != "magnitude")


def test_flap_keeps_what_a_loop_keeps_and_adds_the_mean() -> None:
    view = view_of(SMALL, collected(SMALL, ROWS, cuts=(7, 30)), WEIGHTS)
    layer = FLAP(align=1, bias="mean").plan_layer(view, context(keep=5))
    kept = neurons_of(layer)
    assert kept == [best(slow_score("flap", e), 5) for e in range(E)]
    assert layer.offsets_CH is not None
    for e in range(E):
        h, _ = tokens_of(ROWS, e)
        mean = h.mean(axis=0) if len(h) > 1 else np.zeros(N)
        mean[kept[e]] = 0
        expected = WEIGHTS.matrix(e, "down").double().numpy() @ mean
        np.testing.assert_allclose(layer.offsets_CH[e].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_global_flap_is_one_threshold() -> None:
    view = view_of(SMALL, collected(SMALL, ROWS), WEIGHTS)
    layer = FLAP("global", align=4).plan_model([view], context(ratio=0.5))[0]
    ranked = []
    for e in range(E):
        scores = slow_score("flap", e)
        z = (np.array(scores) - np.mean(scores)) / np.std(scores)
        ranked += [(z[j] if j != int(np.argmax(z)) else math.inf, e, j) for j in range(N)]
    gone = {(e, j) for _, e, j in sorted(ranked)[: E * N // 2]}
    kept = [[j for j in range(N) if (e, j) not in gone] for e in range(E)]
    assert neurons_of(layer) == kept
    assert layer.neurons is not None
    assert layer.neurons.width == math.ceil(max(map(len, kept)) / 4) * 4
    narrow = Neurons.matrix(layer.neurons, 0, "up", WEIGHTS)
    assert not narrow[len(kept[0]) :].any()


@pytest.mark.parametrize("method", [Slim(score="magnitude"), FLAP(), FLAP("global")])
def test_ratio_zero_is_the_identity(method: Slim | FLAP) -> None:
    view = view_of(SMALL, collected(SMALL, ROWS), WEIGHTS)
    layer = method.plan_model([view], context(ratio=0.0))[0]
    assert layer.keep == tuple(range(E))
    assert layer.neurons is None and layer.offsets_CH is None


@given(st.permutations(range(E)))
@settings(max_examples=10, deadline=None)
def test_permuting_experts_permutes_the_plan(order: list[int]) -> None:
    weights = Weights({role: w[list(order)] for role, w in WEIGHTS.by_role.items()})
    plain = Slim(score="magnitude", align=1).plan_layer(
        view_of(SMALL, None, WEIGHTS), context(keep=4)
    )
    moved = Slim(score="magnitude", align=1).plan_layer(
        view_of(SMALL, None, weights), context(keep=4)
    )
    assert neurons_of(moved) == [neurons_of(plain)[e] for e in order]


def test_widths_are_aligned_and_refused_clearly() -> None:
    view = view_of(SMALL, None, WEIGHTS)
    layer = Slim(score="magnitude", align=4).plan_layer(view, context(ratio=0.6))
    assert layer.neurons is not None and layer.neurons.width == 8  # 12 - 7 = 5, rounded up
    with pytest.raises(BudgetError, match="no multiple of 4"):
        Slim(score="magnitude", align=4).plan_layer(view, context(keep=6))
    with pytest.raises(BudgetError, match="12 neurons"):
        Slim(score="magnitude").plan_layer(view, context(keep=13))
    warned: list[str] = []
    asked = replace(context(ratio=0.3), warn=warned.append)
    assert Slim(score="magnitude", align=64).plan_layer(view, asked).neurons is None
    assert "removes none" in warned[0]


def test_survivors_are_what_a_mask_left() -> None:
    by_role = {role: w.clone() for role, w in WEIGHTS.by_role.items()}
    for e in range(E):
        by_role["up"][e, [1, 3, 5, 7, 9, 11]] = 0.0
    view = view_of(SMALL, None, Weights(by_role))
    layer = Slim(score="survivors", align=1).plan_layer(view, context(keep=6))
    assert neurons_of(layer) == [[0, 2, 4, 6, 8, 10]] * E


@pytest.mark.parametrize(
    "method",
    [Slim(align=8), Slim(score="magnitude", align=8), FLAP(align=8), FLAP("global", "mean", 8)],
    ids=["slim", "magnitude", "flap", "flap-global-mean"],
)
def test_a_whole_run(
    method: Slim | FLAP, tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    source = tiny("mixtral")
    made = stages.prune(source, method, Budget(ratio=0.5), tmp_path / "out", text)
    result = Checkpoint.open(tmp_path / "out")
    width = made.plan.layers[0].neurons.width  # type: ignore[union-attr]
    assert result.config["intermediate_size"] == width
    assert made.sizes.parameters[1] == result.numel
    zeros = sum(
        int((result.read(key) == 0).sum())
        for key in result.tensors
        if ".experts." in key and not key.endswith("output_offset")
    )
    assert made.sizes.nonzero[1] == result.numel - zeros
    stages.evaluate(tmp_path / "out", text=stages.Text(text.sources, 2, text.length))
