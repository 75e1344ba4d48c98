"""Nothing is reported on clean checkpoints, and the documentation lists every rule."""

from __future__ import annotations

from pathlib import Path

import pytest
from bases import Base

import moeprune
from moeprune.errors import MoepruneError
from moeprune.verification.run import RULES, rules_table

CLEAN = (
    "demo",
    "mixtral",  # experts one by one
    "granitemoe",  # fused
    "gpt_oss",  # fused, transposed, interleaved, with biases
    "deepseek_v3",  # groups and a correction bias
    "deepseek_v2",  # groups that are ranked by their best
    "ernie4_5_moe",  # a bias in a module of its own, tied embeddings
    "nemotron_h",  # experts without gate, layers of other kinds
    "minimax_m2",  # a bias beside the router
    "gemma4_text",  # entries for single layers that are not about experts
    "dots3_note_text",
    "longcat_flash",  # experts that return their input
    "dbrx",  # the counts stand in a part of the configuration
    "with-head",
    "fp8",
    "mxfp4",
    "mixtral/deleted",
    "granitemoe/deleted",
    "deepseek_v3/deleted",
    "gpt_oss/deleted",
    "olmoe/replaced",
    "granitemoe/replaced",
    "qwen2_moe/masked",
    "mixtral/masked-2-of-4",
    "mixtral/uneven",
    "granitemoe/uneven",
    "gemma4_text/uneven",  # counts under a key of their own
    "gpt_oss/padded",
    "deepseek_v3/padded",
    "fp8/deleted",
    "mxfp4/deleted",
    "with-head/deleted",
)


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_found(base: Base, name: str) -> None:
    result = moeprune.verify(base(name))
    assert [f for f in result.findings if f.severity != "note"] == []
    assert result.passed(strict=True)
    # a model without a tokenizer is told so, and that counts as nothing
    assert [f.rule for f in result.findings] == ([] if name == "demo" else ["tokenizer"])
    # what was not checked is said, and what needs no more than files was checked
    assert result.rules.keys() == {rule.id for rule in RULES}
    assert not result.skipped.keys() & {"config", "weights", "top-k", "finite", "dtype"}
    assert all(result.skipped.values())


def test_values_are_only_read_if_wanted(base: Base) -> None:
    result = moeprune.verify(base("mixtral"), values=False)
    assert {"finite", "zero-experts"} <= result.skipped.keys()
    assert result.passed(strict=True)


def test_rules_have_different_names_and_a_line_each() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES) == len({r.describes for r in RULES})
    assert all(rule.describes and "\n" not in rule.describes for rule in RULES)


def test_the_documentation_lists_every_rule() -> None:
    page = Path(__file__).parents[2] / "docs" / "verify.md"
    assert rules_table() in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"source": "nowhere"}, "no such directory"),
        ({"source": "demo", "plan": "plan.json"}, "compared with the original"),
        ({"source": "demo", "against": "demo", "plan": "none.json"}, "no plan"),
        ({"source": "demo", "against": "./nowhere"}, "does not exist"),
    ],
)
def test_what_cannot_be_verified_is_an_error(options: dict[str, str], problem: str) -> None:
    with pytest.raises(MoepruneError, match=problem) as caught:
        moeprune.verify(**options)  # type: ignore[arg-type]
    assert caught.value.hint


def test_an_empty_directory_has_findings(tmp_path: Path) -> None:
    result = moeprune.verify(tmp_path)
    assert {f.rule for f in result.of("error")} == {"config", "weights"}
