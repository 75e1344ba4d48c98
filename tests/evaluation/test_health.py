"""What is said of answers, from answers made by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scipy import stats

from moeprune.evaluation.answers import Answer, Decoding, Prompt
from moeprune.evaluation.health import NEVER_STOPS, assess, findings

FINE, LOOPS = tuple(range(30)), (1, 2, 3, *[7, 8] * 10)


def said(mine: list[Answer], teachers: list[Answer] | None) -> dict[str, Any]:
    prompts = [Prompt("ab"[n % 2], (n,)) for n in range(len(mine))]
    found = assess(prompts, mine, teachers, Decoding(), lambda ids: " ".join(map(str, ids)))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_a_planted_loop_is_counted_and_named() -> None:
    teachers = [Answer(FINE, True)] * 60
    mine = [Answer(LOOPS, False)] * 12 + [Answer(FINE, True)] * 48
    found = said(mine, teachers)
    loop = found["measures"]["loop"]
    assert loop["model"]["value"] == 0.2 and loop["teacher"]["value"] == 0.0
    assert loop["against"]["value"] == 0.2 and loop["against"]["low"] > 0.05
    assert loop["p_value"] == pytest.approx(stats.binomtest(12, 12).pvalue)
    assert loop["verdict"].startswith("worse by 20 points")
    assert found["never_ending"] == {
        "share": 0.2,
        "of": 60,
        "verdict": "12 of the 60 answers that the teacher ended had no end",
    }
    assert found["changed"] == {
        "share": 0.2,
        "after_tokens_median": 0.0,
        "after_tokens_least": 0,
    }
    assert [e["period"] for e in found["examples"]] == [2, 2, 2]
    assert found["examples"][0]["model"].endswith("7 8 7 8")
    assert found["domains"]["a"]["model"]["loop"] == 0.2
    told = findings([found])
    assert any("end in a loop 20.0% against 0.0%: worse by 20 points" in text for text in told)
    assert any("12 of the 60" in text for text in told)


def test_the_same_answers_differ_in_nothing() -> None:
    answers = [Answer(FINE[:n], n % 2 == 0) for n in range(1, 31)]
    found = said(answers, answers)
    for measure in found["measures"].values():
        against = measure["against"]
        assert against["value"] == 0.0 and against["low"] <= 0.0 <= against["high"]
        assert measure["p_value"] == 1.0 and measure["model"] == measure["teacher"]
    assert found["changed"]["share"] == 0.0 and found["never_ending"]["share"] == 0.0
    assert found["examples"] == []
    assert findings([found]) == ["greedy: all 30 answers are the teacher's"]


def test_a_small_sample_is_called_small() -> None:
    """One loop more in six answers says nothing, and neither does none."""
    mine = [Answer(LOOPS, True)] + [Answer(FINE, True)] * 5
    found = said(mine, [Answer(FINE, True)] * 6)
    assert found["measures"]["loop"]["verdict"].startswith(
        "too small a sample: only 1 of 6 prompts"
    )
    (told,) = findings([found])
    assert "too small a sample" in told and "--prompts-per-domain" in told


def test_where_nothing_ever_ends() -> None:
    found = said([Answer(FINE, False)] * 20, [Answer(FINE, False)] * 20)
    assert found["never_ending"] == {"share": None, "of": 0, "verdict": NEVER_STOPS}


def test_a_longer_answer_is_neither_better_nor_worse() -> None:
    mine = [Answer(tuple(range(20 + n % 3)), True) for n in range(40)]
    found = said(mine, [Answer(FINE[:8], True)] * 40)
    assert found["measures"]["length"]["verdict"].startswith("longer by")
    found = said([Answer(FINE[:8], True)] * 40, mine)
    assert found["measures"]["length"]["verdict"].startswith("shorter by")


def test_without_a_teacher_there_are_no_differences() -> None:
    found = said([Answer(LOOPS, True)] * 12, None)
    assert found["measures"]["loop"] == {"model": found["measures"]["loop"]["model"]}
    assert found["measures"]["loop"]["model"]["value"] == 1.0
    assert "changed" not in found and findings([found]) == []
