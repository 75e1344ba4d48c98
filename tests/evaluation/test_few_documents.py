"""What is said, and left unsaid, where there are few documents or nothing differs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moeprune.evaluation.damage import Damage
from moeprune.evaluation.intervals import FEWEST
from moeprune.evaluation.paired import Paired, lost_more
from moeprune.evaluation.perplexity import DomainScore, Sums

TOKENS = 255.0


def pair(lost: np.ndarray, name: str, agree: float = 0.9) -> Paired:
    """One domain, a document a window, that lost so much per token."""
    count = len(lost)
    tokens, zero = np.full(count, TOKENS), np.zeros(count)
    student = Sums(tokens, (1.0 + lost) * tokens, np.abs(lost) * tokens, agree * tokens, tokens)
    teacher = Sums(tokens, tokens, zero, zero, zero)
    documents = np.arange(count)
    return Paired.of(
        name, DomainScore(student, True, 1.0, documents), DomainScore(teacher, False, 1.0)
    )


def test_no_finding_rests_on_a_handful_of_documents() -> None:
    rng = np.random.default_rng(0)
    others = {name: pair(rng.normal(0.1, 0.01, 10), name) for name in "abc"}
    for documents, said in ((FEWEST - 1, False), (FEWEST, True)):
        few = pair(rng.normal(0.9, 0.01, documents), "few")
        found = lost_more({**others, "few": few}, 0.02, "the others")
        assert any(sentence.startswith("few lost") for sentence in found) is said
        # nor does what is compared with so few
        assert bool(lost_more({"few": few, "a": others["a"]}, 0.02, "the others")) is said


def test_the_same_choices_are_no_proof_that_others_are() -> None:
    found = pair(np.random.default_rng(1).normal(0.0, 1e-4, 8), "x", agree=1.0).to_json(0.02, 0)
    assert found["agreement"]["high"] == 1.0
    assert found["agreement"]["low"] == pytest.approx(0.05 ** (1 / 8))
    assert found["loss"]["low"] < found["loss"]["high"]


def damage(count: int) -> Damage:
    """Rises of about 0.01, 0.04 and 0.2 nats per token."""
    rng = np.random.default_rng(2)
    tokens, zero = np.full(count, TOKENS), np.zeros(count)
    rises = [rng.gamma(4.0, rise / 4.0, count) for rise in (0.01, 0.04, 0.2)]
    branches = [Sums(tokens, rise * tokens, zero, zero, zero) for rise in rises]
    return Damage(Sums(tokens, zero, zero, zero, zero), branches, np.arange(count), "documents")


def test_recommended_ratio_ends_where_the_ends_of_the_rise_do() -> None:
    sample, ratios = damage(12), (0.25, 0.5, 0.75)
    found = sample.largest_ratio((0, 1, 2), ratios, 0.05)
    assert 0.25 < found.low < found.value < found.high < 0.75
    rises = [sample.loss(branch).interval() for branch in range(3)]
    below, above = (
        np.interp(found.low, ratios, [rise.high for rise in rises]),
        np.interp(found.high, ratios, [rise.low for rise in rises]),
    )
    assert below == pytest.approx(0.05) and above == pytest.approx(0.05)


def test_recommended_ratio_of_one_document_is_open() -> None:
    found = damage(1).largest_ratio((0, 1, 2), (0.25, 0.5, 0.75), 0.05)
    assert (found.low, found.high) == (0.0, 0.75) and math.isfinite(found.value)
