"""Verification of rebuilt experts, those that answer for others, and constants in outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from bases import edit_json, edit_tensors
from torch import Tensor

import moeprune
from edit_kinds import KINDS, plan_of
from families import save_tiny
from moeprune.models.store import write_plan
from moeprune.models.surgery import apply_plan

FAMILIES = ("mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3")
REBUILT = ("merge", "narrow", "ranks", "stored", "answer", "offsets", "answer-offsets-narrow")


@dataclass(frozen=True)
class Result:
    """A result with its plan and its original."""

    out: Path
    plan: Path
    original: Path


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Result]:
    """A clean result of one kind; tests must not write into it."""
    made: dict[tuple[str, str], Result] = {}

    def get(model_type: str, kind: str) -> Result:
        if (model_type, kind) not in made:
            base = tmp_path_factory.mktemp("rebuilt")
            original = save_tiny(model_type, base / "original")
            checkpoint, plan = plan_of(original, KINDS[kind])
            write_plan(plan, base / "plan.json")
            apply_plan(checkpoint, plan, base / "out")
            made[model_type, kind] = Result(base / "out", base / "plan.json", original)
        return made[model_type, kind]

    return get


Get = Callable[[str, str], Result]


@pytest.mark.parametrize("kind", REBUILT)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_clean_results_pass(model_type: str, kind: str, result: Get) -> None:
    """Alone, against the original, and against the original with the plan."""
    made = result(model_type, kind)
    known = {finding.rule for finding in moeprune.verify(made.original).findings}
    found = moeprune.verify(made.out, against=made.original, plan=made.plan)
    assert {finding.rule for finding in found.findings} <= known, found.findings
    assert found.comparison["logits"]["passed"]
    if kind != "answer":
        assert found.comparison["rebuilt_tensors_compared"]
    without = moeprune.verify(made.out, against=made.original)
    assert {finding.rule for finding in without.findings} <= known, without.findings
    plain = kind in ("answer", "offsets")
    assert ("against-logits" in without.skipped) == (not plain)


def largest_one(change: Callable[[Tensor], Tensor], ending: str) -> Callable[[Path], None]:
    """Changes the first tensor whose name ends so."""

    def edit(tensors: dict[str, Tensor]) -> None:
        key = min(key for key in tensors if key.endswith(ending))
        tensors[key] = change(tensors[key])

    return edit_tensors(edit)


def served(change: Callable[[list[int]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        def put(config: dict[str, dict[str, list[int]]]) -> None:
            change(config["experts_served_by"]["0"])

        edit_json(directory / "config.json", put)

    return edit


def everybody(table: list[int]) -> None:
    table[:] = [0] * len(table)


def gone(key: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        edit_json(directory / "config.json", lambda config: config.pop(key))

    return edit


CORRUPTIONS = {
    "answers: out of range": ("answer", served(lambda t: t.__setitem__(0, 99)), "answers"),
    "answers: too short": ("answer", served(lambda t: t.pop()), "answers"),
    "answers: not stored": ("answer", served(everybody), "answers"),
    "answers: table gone": ("answer", gone("experts_served_by"), "plan-counts"),
    "offsets: shape": (
        "offsets", largest_one(lambda t: t[:16].clone(), ".0.output_offset"), "offsets",
    ),
    "offsets: list gone": ("offsets", gone("expert_offsets"), "offsets"),
    "offsets: one missing": (
        "offsets",
        edit_tensors(lambda ts: ts.pop(min(k for k in ts if k.endswith(".1.output_offset")))),
        "offsets",
    ),
    "offsets: values": (
        "offsets", largest_one(lambda t: t + 1, ".0.output_offset"), "against-rebuilt",
    ),
    "narrow: a width": (
        "narrow", largest_one(lambda t: t[:, :-1].clone(), ".0.w2.weight"), "expert-shape",
    ),
    "merge: values": ("merge", largest_one(lambda t: t * 1.5, ".0.w2.weight"), "against-rebuilt"),
    "merge: router": ("merge", largest_one(lambda t: t * 1.5, ".gate.weight"), "against-rebuilt"),
    "merge: not rebuilt": (
        "merge", largest_one(lambda t: t + 0.1, "lm_head.weight"), "against-tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_is_found(name: str, result: Get, tmp_path: Path) -> None:
    kind, spoil, rule = CORRUPTIONS[name]
    made = result("mixtral", kind)
    shutil.copytree(made.out, tmp_path / "out")
    spoil(tmp_path / "out")
    found = moeprune.verify(tmp_path / "out", against=made.original, plan=made.plan)
    assert rule in {finding.rule for finding in found.findings}, found.findings
    assert not found.passed()


def test_the_result_says_what_it_is(result: Get) -> None:
    config = json.loads(
        (result("mixtral", "answer-offsets-narrow").out / "config.json").read_text()
    )
    assert config["architectures"] == ["AnsweringMixtralForCausalLM"]
    assert config["intermediate_size"] == 24
    assert set(config["experts_served_by"]) == {"0", "1", "2", "3"}
    assert config["expert_offsets"] == [0, 1, 2, 3]
