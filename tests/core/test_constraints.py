"""Pinned, forbidden and super experts, from what a user writes to what a plan may do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moeprune.core.constraints import Constraints, as_json, check_honoured, together
from moeprune.core.ops.super_experts import super_experts
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape
from moeprune.errors import MoepruneError

SHAPES = {layer: LayerShape(layer, 8, 2, 4, 6) for layer in (1, 2, 3, 5)}


def test_what_a_user_writes() -> None:
    wishes = Constraints(("1:3,5", "*:0", "1: 3, 7"), ("5:2",))
    pinned, forbidden = wishes.resolve(SHAPES)
    assert as_json(pinned) == {"1": [0, 3, 5, 7], "2": [0], "3": [0], "5": [0]}
    assert as_json(forbidden) == {"5": [2]}
    assert as_json(together(pinned, {2: frozenset({6}), 4: frozenset({1})})) == {
        "1": [0, 3, 5, 7],
        "2": [0, 6],
        "3": [0],
        "4": [1],
        "5": [0],
    }
    assert not Constraints() and Constraints(protect_super=True) and wishes
    assert Constraints().resolve(SHAPES) == ({}, {})


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "a:1", "3:x", "3:1;2", "-1:2", "3:1,"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(MoepruneError, match="bad --forbid"):
        Constraints(forbid=(text,)).resolve(SHAPES)


def test_layers_that_exist_are_named() -> None:
    with pytest.raises(MoepruneError, match="layer 4 is no MoE layer") as caught:
        Constraints(("4:0",)).resolve(SHAPES)
    assert caught.value.hint == "its MoE layers are 1, 2, 3, 5"


def test_a_method_that_does_not_heed_them_is_found() -> None:
    plans = {1: LayerPlan(1, 4, (0, 1), (2,))}
    check_honoured(plans, {1: frozenset({0})}, {1: frozenset({2, 3})}, "x")
    for lost in (2, 3):  # replaced and dropped
        with pytest.raises(MoepruneError, match=f"x does not know --pin.*expert {lost} of layer 1"):
            check_honoured(plans, {1: frozenset({lost})}, {}, "x")
    with pytest.raises(MoepruneError, match="x does not know --forbid: expert 1 of layer 1 stays"):
        check_honoured(plans, {}, {1: frozenset({1})}, "x")


def slow(largest: dict[int, list[float]]) -> dict[int, set[int]]:
    """The rule, by sorting: both bars, then the first three quarters of the layers."""
    every = sorted(a for values in largest.values() for a in values)
    place = 0.995 * (len(every) - 1)
    below = math.floor(place)
    above = min(below + 1, len(every) - 1)
    quantile = every[below] + (place - below) * (every[above] - every[below])
    layers = sorted(largest)[: math.ceil(0.75 * len(largest))]
    return {
        layer: {e for e, a in enumerate(largest[layer]) if a > quantile and a > every[-1] / 10}
        for layer in layers
    }


def test_super_experts_against_the_rule() -> None:
    random = np.random.default_rng(7)
    for layers, experts in ((4, 64), (8, 128), (1, 300), (3, 8)):
        largest = {i: (random.pareto(1.0, experts) + 1).tolist() for i in range(layers)}
        expected = {i: ids for i, ids in slow(largest).items() if ids}
        assert super_experts(largest) == expected
        assert layers * experts < 200 or expected


def test_super_experts_by_hand() -> None:
    quiet = [1.0] * 100
    loud = [1.0] * 99 + [50.0]
    assert super_experts({0: loud, 1: quiet, 2: quiet, 3: loud}) == {0: {99}}  # the last is late
    assert super_experts({7: loud, 9: quiet}) == {7: {99}}
    assert super_experts({0: quiet}) == {}  # nobody is above the quantile
    # a tenth of the largest is the higher bar here
    assert super_experts({0: [1.0] * 996 + [2.0, 3.0, 60.0, 500.0]}) == {0: {998, 999}}


def test_activations_that_are_not_finite_protect_nobody() -> None:
    assert super_experts({0: [math.nan, math.inf, 1.0, 1.0]}) == {}
    assert super_experts({0: [math.nan] * 3}) == {}
    assert super_experts({0: [math.nan, *([1.0] * 99), 90.0]}) == {0: {100}}
