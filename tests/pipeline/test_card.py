"""The embedded model's card says what our own evaluation measures."""

from __future__ import annotations

import re

import pytest

from moeprune.models.checkpoint import demo_path
from moeprune.models.data import demo_text
from moeprune.pipeline.stages import Compute, Text, evaluate

WINDOWS = 128  # the card's protocol: the first 128 windows of 256 tokens of each domain, float32


def card_perplexities() -> dict[str, float]:
    card = (demo_path() / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (?:yes|no) \| [\d.]+ \| ([\d.]+) \|", card, flags=re.M)
    return {name: float(value) for name, value in rows}


@pytest.mark.parametrize("domain", ["english", "math"])
def test_evaluation_reproduces_the_card(domain: str) -> None:
    source = f"{domain}={demo_text('heldout')[domain]}"
    text = Text((source,), sequences=WINDOWS, length=256)
    result = evaluate("demo", text=text, compute=Compute(dtype="float32"))
    measured = result["domains"][domain]["perplexity"]
    assert round(measured, 1) == card_perplexities()[domain]
