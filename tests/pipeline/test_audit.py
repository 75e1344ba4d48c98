"""An audit of the embedded model against models that were really cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeprune
from moeprune import Budget, Compute, Text, apply, calibrate, plan
from moeprune.core.layer_plan import LayerPlan
from moeprune.errors import DataError
from moeprune.models.checkpoint import Checkpoint, demo_path
from moeprune.pipeline import audit_layers
from moeprune.pipeline.auditing import Trial, audit
from moeprune.pipeline.inputs import read_calibration

FLOAT32 = Compute(dtype="float32", workers=1)
LENGTH = 32


@pytest.fixture(autouse=True, scope="module")
def fewer_pairs() -> Iterator[None]:
    """Of experts whose weights are compared, and fewer resamples: each costs milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_layers, "RESAMPLES", 4)
        patch.setattr(audit_layers, "COMPARED", 4)
        yield


@pytest.fixture(scope="module")
def text(english: Path) -> Text:
    return Text((str(english),), 16, LENGTH)


@pytest.fixture(scope="module")
def stats(shelf: Path, text: Text) -> Path:
    calibrate("demo", shelf / "audit-stats", text, compute=FLOAT32)
    return shelf / "audit-stats"


@pytest.fixture(scope="module")
def given(text: Text, stats: Path) -> dict[str, Any]:
    """From statistics: nothing is observed."""
    trial = Trial(ratios=(0.5, 0.75), held=5, layers=2)
    return audit("demo", text, stats, trial, FLOAT32)


def logp(source: Path, ids_NL: Tensor) -> Tensor:
    model = moeprune.load(source, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids_NL, use_cache=False).logits[:, :-1].double().log_softmax(-1)


def test_measures_what_a_cut_does(
    given: dict[str, Any], text: Text, stats: Path, tmp_path: Path
) -> None:
    """The last layer alone, and all layers, written to disk and opened as a whole."""
    whole = plan("demo", "mone", Budget(ratio=0.75), stats, compute=FLOAT32)
    alone = replace(
        whole,
        layers={
            index: one if index == 5 else LayerPlan(index, 32, tuple(range(32)))
            for index, one in whole.layers.items()
        },
    )
    domain = read_calibration(Checkpoint.open("demo"), replace(text, sequences=5))[0]
    target = domain.ids_NL[:, 1:, None]
    teacher = logp(demo_path(), domain.ids_NL)
    said = (given["layers"]["5"]["damage"]["0.75"]["measured"], given["model_damage"]["0.75"])
    for name, made, cell in zip(("alone", "whole"), (alone, whole), said, strict=True):
        apply("demo", made, tmp_path / name)
        student = logp(tmp_path / name, domain.ids_NL)
        kl = float((teacher.exp() * (teacher - student)).sum(-1).mean())
        rise = float((teacher.gather(-1, target) - student.gather(-1, target)).mean())
        assert kl > 0.001
        assert cell["kl"]["value"] == pytest.approx(kl, rel=1e-3)
        assert cell["loss"]["value"] == pytest.approx(rise, abs=1e-4)
        assert cell["kl"]["low"] is None or 0.0 <= cell["kl"]["low"] < cell["kl"]["high"]


def test_given_statistics(given: dict[str, Any], stats: Path) -> None:
    assert given["format"] == "moeprune.audit/1" and given["statistics"] is not None
    assert any(text.startswith("the statistics were given") for text in given["warnings"])
    for layer, one in given["layers"].items():
        assert one["tokens"] == 16 * LENGTH and one["stability"] is None
        assert (one["damage"]["0.5"]["measured"] is not None) == (layer in ("0", "5"))
    assert given["predictor"]["cells"] == 4
    # 512 tokens are little, and it says so
    assert given["coverage"]["share"] > 0.8
    assert given["warnings"][0].endswith(
        ("would give 90% of experts 256", "is known to be enough: use other text")
    )
    assert any("too few for an interval" in text for text in given["warnings"])


def test_one_pass(text: Text) -> None:
    """Calibration and measurement in one walk: same numbers on any number of cores."""
    trial = Trial(ratios=(0.5,), held=4, layers=1)
    results = [
        audit("demo", replace(text, sequences=8), trial=trial, compute=replace(FLOAT32, workers=n))
        for n in (1, 2)
    ]
    for result in results:
        assert result.pop("seconds") > 0
    assert results[0] == results[1]
    found = results[0]
    data = found["data"]
    assert data["calibration"]["sequences"] + data["held"]["sequences"] == 12
    assert data["calibration"]["hash"] != data["held"]["hash"]
    for one in found["layers"].values():
        assert 0 < one["stability"]["0.5"]["mone"]["lowest"] <= 1
        assert one["stability"]["0.5"]["chance"] == pytest.approx(1 / 3)
        assert one["dead"] == [e for e, count in enumerate(one["counts"]) if count == 0]
    wanted = found["recommendation"]["ratio"]
    assert 0 <= wanted["low"] <= wanted["value"] <= wanted["high"] <= 0.5
    assert found["advice"]["advised"] == "experts" and not found["usage"]["balanced"]


def test_too_little_text(german: Path) -> None:
    with pytest.raises(DataError, match="at least two sequences"):
        audit("demo", Text((str(german),), 1, 512), trial=Trial(held=1), compute=FLOAT32)
