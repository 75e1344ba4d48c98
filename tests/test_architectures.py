"""The table of architectures says what is measured, about all of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

import architectures
from families import moe_model_types

RESULT: dict[str, Any] = json.loads(architectures.RESULT.read_text())
OUTCOMES = ("exact", "same", "refused: ")


def test_every_architecture_and_no_blank() -> None:
    assert RESULT["transformers"] == transformers.__version__
    assert sorted(RESULT["architectures"]) == sorted(moe_model_types())
    for name, found in RESULT["architectures"].items():
        assert list(found) == list(architectures.COLUMNS), name
        for column, text in found.items():
            assert column == "discover" or text.startswith(OUTCOMES), (name, column, text)
        assert found["stream"] == "exact", name


def test_the_page_is_current() -> None:
    assert architectures.PAGE.read_text(encoding="utf-8") == architectures.page(RESULT)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss", "doge", "dbrx"])
def test_outcomes_are_measured(model_type: str) -> None:
    assert architectures.measure(model_type) == RESULT["architectures"][model_type]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", moe_model_types())
def test_all_outcomes_are_measured(model_type: str) -> None:
    assert architectures.measure(model_type) == RESULT["architectures"][model_type]
