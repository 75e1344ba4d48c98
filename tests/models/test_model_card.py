"""The card of every checkpoint: it parses, says what was done, and carries over what holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from families import save_tiny
from moeprune.core.plan import LayerPlan
from moeprune.models.card_metadata import hub_id, inherited, license_of
from moeprune.models.card_text import BEGIN, END, line
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.surgery import PROVENANCE, apply_plan
from recovering import KINDS, prune
from support import plan_for

CARD = """---
license: other
license_name: tongyi
license_link: LICENSE
language:
- en
- ja
tags: [chat]
base_model: somebody/else
---
# The original

It is good.
"""


@pytest.fixture
def original(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny checkpoint with a card and a licence."""
    path = tmp_path / "original"
    shutil.copytree(tiny("qwen3_moe"), path)
    (path / "README.md").write_text(CARD)
    (path / "LICENSE").write_text("do as you like")
    return path


def card(directory: Path) -> ModelCard:
    return ModelCard.load(directory / "README.md")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_a_card_says(kind: str, original: Path, tmp_path: Path) -> None:
    out = prune(original, kind, tmp_path / "out")
    found = card(out)
    said = found.data.to_dict()
    assert said["license"] == "other" and said["license_name"] == "tongyi"
    assert said["license_link"] == "LICENSE" and (out / "LICENSE").read_text() == "do as you like"
    assert said["language"] == ["en", "ja"] and said["library_name"] == "transformers"
    assert said["pipeline_tag"] == "text-generation" and {"moeprune", "pruned"} <= set(said["tags"])
    assert "chat" not in said["tags"], "tags of the original need not be true"
    assert "base_model" not in said and "base_model_relation" not in said
    own_code = kind in ("novices", "uneven")
    assert ("custom_code" in said["tags"]) == own_code
    assert ("trust_remote_code=True" in found.text) == own_code
    assert ("vLLM: no" in found.text) == own_code
    record = json.loads((out / PROVENANCE).read_text())
    for fact in (record["base_fingerprint"], record["plan_sha256"], "`original`", "`tongyi`"):
        assert fact in found.text
    for before, after in (record["experts"], record["parameters"], record["tensor_bytes"]):
        assert f"| {before:,} | {after:,} |".replace(",", " ") in found.text
    assert "[README.base.md](README.base.md)" in found.text
    assert (out / "README.base.md").read_text() == CARD
    assert found.text.count(BEGIN) == found.text.count(END) == 1 and "Not measured." in found.text
    assert ("stay in the files" in found.text) == (kind == "masked")
    assert record["licence"] == {"license": "tongyi", "file": "LICENSE"}
    assert record["command"] == "moeprune prune original --method test --out OUT"


def test_the_same_plan_gives_the_same_card(original: Path, tmp_path: Path) -> None:
    first, second = (prune(original, "novices", tmp_path / name) for name in ("a", "b"))
    for file in ("README.md", PROVENANCE):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_a_second_step_keeps_the_first_card(original: Path, tmp_path: Path) -> None:
    once = prune(original, "dropped", tmp_path / "once")
    twice = prune(once, "masked", tmp_path / "twice")
    found = card(twice)
    assert (twice / "README.base.md").read_text() == CARD
    assert not (twice / "README.base.2.md").exists()
    assert found.data.to_dict()["license_name"] == "tongyi"
    steps = json.loads((twice / PROVENANCE).read_text())["steps"]
    assert [step["base_name"] for step in steps] == ["original", "once"]
    assert "Step 1: from a model" in found.text and "Step 2: from a model" in found.text
    total, kept = steps[0]["experts"][0], steps[1]["experts"][1]
    assert f"| experts with weights | {total} | {kept} |" in found.text


def test_names_that_are_taken(original: Path, tmp_path: Path) -> None:
    (original / "README.base.md").write_text("somebody's")
    out = prune(original, "masked", tmp_path / "out")
    assert (out / "README.base.md").read_text() == "somebody's"
    assert (out / "README.base.2.md").read_text() == CARD


def test_models_of_the_hub_are_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "models--allenai--OLMoE-1B" / "snapshots" / "abc"
    path.parent.mkdir(parents=True)
    shutil.copytree(tiny("qwen3_moe"), path)
    assert hub_id(Checkpoint.open(path)) == "allenai/OLMoE-1B"
    out = prune(path, "masked", tmp_path / "out")
    assert card(out).data.base_model == "allenai/OLMoE-1B"
    again = prune(out, "masked", tmp_path / "again")
    assert card(again).data.base_model == "allenai/OLMoE-1B"
    assert hub_id(Checkpoint.open(out)) is None
    assert "license" not in card(out).data.to_dict()
    assert "do not say under which licence" in card(out).text


HOSTILE = {
    "not YAML": "---\na: [\n---\n",
    "a list": "---\n- a\n---\n",
    "numbers": "---\nlicense: 7\nlanguage: [1, 2]\n---\n",
    "long": f"---\nlicense: {'x' * 1000}\n---\n",
    "lines": '---\nlicense: "a\\nb"\n---\n',
    "a tag": "---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
    "bytes": "---\nlicense: mit\ud800\n---\n",
    "nothing": "",
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_cards_of_strangers(kind: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(HOSTILE[kind].encode("utf-8", "surrogatepass"))
    assert "license" not in inherited(tmp_path) or kind == "bytes"
    (tmp_path / "LICENCE.txt").write_text("x")
    if kind != "bytes":
        assert license_of(tmp_path) == {
            "license": "license-of-the-original",
            "file": "LICENCE.txt",
        }


def test_names_cannot_break_out_of_their_place(tmp_path: Path) -> None:
    directory = save_tiny("qwen3_moe", tmp_path / f"a`|b {BEGIN} c")
    out = prune(directory, "masked", tmp_path / "out")
    text = card(out).text
    assert text.count(BEGIN) == 1 and "a'/b" in text
    assert "<!--" not in line(BEGIN.replace("<!", "<!<!--"))  # nor by what is left of it


def test_a_plan_of_nothing_has_a_card(original: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(original)
    shapes = [site.shape for site in LayeredModel(checkpoint).sites.values()]
    same = [LayerPlan(s.layer, s.experts, tuple(range(s.experts))) for s in shapes]
    for name, layers in (("same", same), ("none", [])):
        apply_plan(checkpoint, plan_for(checkpoint, layers), tmp_path / name)
        assert "## How to open it" in card(tmp_path / name).text
