"""The JSON of an evaluation is what docs/evaluation.schema.json says; nothing else gets in."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from moeprune import MoepruneError, evaluate
from moeprune.evaluation.perplexity import DomainScore, Evaluation, Sums
from moeprune.evaluation.schema import FORMAT, SECTIONS, EvaluationJson, check, json_schema
from moeprune.evaluation.summary import summary

DOCS = Path(__file__).parents[2] / "docs"


def measured(seed: int) -> Evaluation:
    """Numbers of two domains, without a model."""
    rng = np.random.default_rng(seed)
    sums = [Sums(np.full(8, 9.0), *(rng.uniform(1.0, 9.0, 8) for _ in range(4))) for _ in range(2)]
    return Evaluation(
        {name: DomainScore(s, True) for name, s in zip(("en", "code"), sums, strict=True)}
    )


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": "a",
        "teacher": "b",
        "dtype": "float32",
        "data": {"hash": "0", "tokens": 160, "sequences": 16, "length": 10, "domains": {"en": 8}},
        "versions": {"moeprune": "0"},
        "seconds": 1.0,
        **summary(measured(0), measured(1), {"en"}, 8),
    }


def test_the_file_is_the_schema() -> None:
    """Regenerate it with python benchmarks/evaluation_schema.py; see its rule for versions."""
    written = json.loads((DOCS / "evaluation.schema.json").read_text(encoding="utf-8"))
    assert written == json_schema()


def test_every_key_is_explained() -> None:
    page = (DOCS / "evaluate.md").read_text(encoding="utf-8")
    parts = [EvaluationJson.model_json_schema(), *json_schema()["$defs"].values()]
    names = {name for part in parts for name in part["properties"]}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_a_result_is_of_the_schema(result: dict[str, Any]) -> None:
    checked = check(json.loads(json.dumps(result, allow_nan=False)))
    assert checked.groups["seen"].domains == ["en"] and checked.domains["code"].seen is False
    for section in SECTIONS:
        assert check({**result, section: {"anything": 1}})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("speed",), {}),
        (("domains", "en", "bleu"), 1.0),
        (("groups", "all", "against", "loss", "sd"), 1.0),
        (("format",), "moeprune.evaluation/2"),
        (("domains", "en", "tokens"), "many"),
        (("findings",), None),
    ],
)
def test_other_keys_and_versions_are_refused(
    result: dict[str, Any], path: tuple[str, ...], value: Any
) -> None:
    changed = copy.deepcopy(result)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValidationError):
        check(changed)


def test_a_section_that_is_not_known() -> None:
    with pytest.raises(MoepruneError, match="no section 'task'\ndid you mean 'tasks'"):
        evaluate("demo", sections={"task": lambda *_: {}})
    with pytest.raises(MoepruneError, match="--smallest must be above 0"):
        evaluate("demo", smallest=0.0)
