"""An audit of families with quirks: what cannot be replaced is deleted, what cannot go stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moeprune.errors import BudgetError, MoepruneError, UnsupportedModelError
from moeprune.pipeline.auditing import Trial, audit
from moeprune.pipeline.inputs import Compute, Text

Tiny = Callable[[str], Path]

ONE = Compute(dtype="float32", workers=1)
TRIAL = Trial(ratios=(0.25, 0.5), held=8)


@pytest.fixture
def little(text: Text) -> Text:
    return replace(text, sequences=12)


@pytest.mark.parametrize("kind", ["llama4_text", "gpt_oss", "nemotron_h"])
def test_families(kind: str, tiny: Tiny, little: Text) -> None:
    """Gates in inputs; biases; experts without a gate matrix, and layers without experts."""
    result = audit(tiny(kind), little, trial=TRIAL, compute=ONE)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["method"]["name"] == ("reap" if kind == "llama4_text" else "mone")
    assert list(map(int, result["layers"])) == result["model"]["moe_layers"]
    for one in result["layers"].values():
        assert sum(one["counts"]) <= one["top_k"] * one["tokens"]
        for ratio, cell in one["damage"].items():
            assert cell["removed"] == int(float(ratio) * one["experts"])
            assert cell["stream_error"] > 0 and cell["kl_predicted"] > 0
            assert cell["measured"]["kl"]["value"] > 0
    more, less = (result["model_damage"][ratio]["kl"]["value"] for ratio in ("0.5", "0.25"))
    assert more > less > 0
    assert result["advice"]["model"]["weights"]["value"] > 0


def test_refusals(tiny: Tiny, little: Text) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^doge is not supported: its experts are"):
        audit(tiny("doge"), little)
    with pytest.raises(UnsupportedModelError, match="llama4_text cannot be replaced by constants"):
        audit(tiny("llama4_text"), little, trial=Trial("mone"))
    with pytest.raises(MoepruneError, match="moeits does not"):
        audit(tiny("mixtral"), little, trial=Trial("moeits"))
    with pytest.raises(MoepruneError, match="mone-affine needs novice-gram"):
        audit(tiny("mixtral"), little, trial=Trial("mone-affine"))
    with pytest.raises(BudgetError, match="must ascend"):
        audit(tiny("mixtral"), little, trial=Trial(ratios=(0.5, 0.25)))


def test_what_a_router_cannot_do_is_not_tried(tiny: Tiny, little: Text) -> None:
    """Two experts a token: of eight, seven eighths cannot be deleted."""
    trial = Trial("reap", ratios=(0.5, 0.875), held=8, layers=1)
    result = audit(tiny("mixtral"), little, trial=trial, compute=ONE)
    first, *others = result["layers"].values()
    assert first["damage"]["0.5"]["measured"]["kl"]["value"] > 0
    for one in others:  # not among the layers that are cut one at a time
        assert one["damage"]["0.5"]["measured"] is None and one["damage"]["0.5"]["kl_predicted"] > 0
    assert all(
        "top-k is 2" in one["damage"]["0.875"]["refused"] for one in result["layers"].values()
    )
    assert list(result["model_damage"]) == ["0.5"]
    assert any(text.startswith("ratio 0.875 was not tried") for text in result["warnings"])
