"""Two plans compared: by hand, and rank correlation against the textbook definition."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.plan_diff import plan_diff, spearman
from moeprune.errors import PlanError


def plan(layers: dict[int, LayerPlan], **fields: object) -> Plan:
    values = {
        "method": "a",
        "options": {"x": 1, "scope": "layer"},
        "budget": {"ratio": 0.5},
        "model": {"name": "m", "fingerprint": "f"},
        "statistics": {},
        "seed": 0,
    }
    return Plan(layers=layers, **{**values, **fields})  # type: ignore[arg-type]


ONE = plan(
    {
        0: LayerPlan(0, 4, (0, 1), scores={"s": (4.0, 3.0, 2.0, 1.0), "t": (1.0,) * 4}),
        2: LayerPlan(2, 4, (0, 1, 2, 3)),
    }
)
TWO = plan(
    {
        0: LayerPlan(0, 4, (1, 2), (3,), scores={"s": (1.0, 9.0, 8.0, 0.0), "u": (0.0,) * 4}),
        2: LayerPlan(2, 4, (3,)),
    },
    method="b",
    options={"x": 2, "y": 3, "scope": "layer"},
    statistics={"sha256": "z"},
)


def test_by_hand() -> None:
    found = plan_diff(ONE, TWO)
    assert found["methods"] == ["a", "b"]
    assert found["differs"] == {
        "method": ["a", "b"],
        "options": {"x": [1, 2], "y": [None, 3]},
        "statistics": [None, "z"],
    }
    assert found["layers"]["0"] == {
        "both": [1],
        "only_first": [0],
        "only_second": [2],
        "jaccard": pytest.approx(1 / 3),
        "spearman": {"s": pytest.approx(0.4)},  # ranks 3 2 1 0 and 1 3 2 0: 1 - 6 * 6 / 60
    }
    assert found["layers"]["2"]["jaccard"] == 0.25 and found["layers"]["2"]["spearman"] == {}
    assert found["all"] == {
        "both": 2,
        "only_first": 4,
        "only_second": 1,
        "jaccard": pytest.approx(2 / 7),
        "spearman": {"s": pytest.approx(0.4)},
    }


def test_a_plan_and_itself() -> None:
    found = plan_diff(ONE, ONE)
    assert found["differs"] == {} and found["all"]["jaccard"] == 1.0
    assert found["layers"]["0"]["spearman"] == {"s": 1.0, "t": None}
    moved = plan_diff(ONE, replace(ONE, model={"name": "n", "fingerprint": "g"}))
    assert moved["differs"] == {"model": ["m", "n"]}


def test_plans_of_other_shapes_are_refused() -> None:
    with pytest.raises(PlanError, match="only one of the plans speaks of layer 2"):
        plan_diff(ONE, replace(ONE, layers={0: ONE.layers[0]}))
    with pytest.raises(PlanError, match="layer 2 has 4 experts in one plan and 5 in the other"):
        plan_diff(ONE, replace(ONE, layers={**ONE.layers, 2: LayerPlan(2, 5, (1,))}))


values = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12
)  # fmt: skip


@given(values)
def test_spearman_is_pearson_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    ranked = []
    for column in zip(*pairs, strict=True):
        order = sorted(column)
        ranked.append(
            [np.mean([i for i, other in enumerate(order) if other == value]) for value in column]
        )
    found = spearman(*([float(v) for v in column] for column in zip(*pairs, strict=True)))
    if min(map(np.std, ranked)) == 0:
        assert found is None
    else:
        assert found is not None
        assert math.isclose(found, np.corrcoef(*ranked)[0, 1], abs_tol=1e-12)


def test_experts_without_a_score_do_not_count() -> None:
    assert spearman([1.0, None, 3.0, 2.0], [5.0, 1.0, 9.0, None]) == 1.0
    assert spearman([1.0, None], [1.0, 2.0]) is None
