"""Answers of real models: the same as by hand, padded or not; a planted loop is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeprune
from moeprune import Compute, Text
from moeprune.errors import DataError, MoepruneError, UnsupportedModelError
from moeprune.evaluation.answers import Decoding, Prompt, answer
from moeprune.models.checkpoint import Checkpoint, demo_path
from moeprune.pipeline.generation import generation
from moeprune.pipeline.prompts import Generate, read_prompts
from recovering import prune

FLOAT32 = Compute(dtype="float32", workers=1)
PROMPTS = [Prompt("x", (5, 800, 33)), Prompt("x", (0, 71, 9, 2044, 15, 60, 7)), Prompt("x", (12,))]


@pytest.fixture(scope="module")
def novices(shelf: Path) -> Path:
    return prune(demo_path(), "novices", shelf / "novice-answers")


@pytest.fixture(scope="module")
def text(english: Path, german: Path) -> Text:
    return Text((f"en={english}", f"de={german}"))


def by_hand(model: Any, ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The likeliest token, again and again, without a cache."""
    known = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(count):
            best = model(known, use_cache=False).logits[0, -1].argmax()
            known = torch.cat([known, best.view(1, 1)], dim=1)
    return tuple(known[0, len(ids) :].tolist())


@pytest.mark.parametrize("kind", ["demo", "novices"])
def test_a_padded_batch_answers_like_each_prompt_alone(
    kind: str, request: pytest.FixtureRequest
) -> None:
    source = demo_path() if kind == "demo" else request.getfixturevalue(kind)
    model = moeprune.load(source, dtype=torch.float32)
    settings = model.generation_config
    found = answer(model, PROMPTS, Decoding(new_tokens=8))
    for prompt, one in zip(PROMPTS, found, strict=True):
        want = by_hand(model, prompt.ids, 8)
        ended = 0 in want  # the end token
        assert one.ended == ended
        assert one.ids == (want[: want.index(0)] if ended else want)
    assert model.generation_config is settings


def test_sampling_is_seeded_and_leaves_other_randomness_alone() -> None:
    model = moeprune.load("demo", dtype=torch.float32)
    state = torch.get_rng_state()
    first, again, other = (
        answer(model, PROMPTS, Decoding(1.0, 8, seed)) for seed in (3, 3, 4)
    )  # fmt: skip
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_beside_itself(text: Text) -> None:
    found = generation(
        "demo", "demo", text, Generate(per_domain=3, prompt_tokens=8, new_tokens=8), FLOAT32
    )
    assert [d["name"] for d in found["decodings"]] == ["greedy", "temperature 1"]
    for decoding in found["decodings"]:
        assert decoding["prompts"] == 6 and sorted(decoding["domains"]) == ["de", "en"]
        assert decoding["changed"]["share"] == 0.0
        assert all(cell["against"]["value"] == 0.0 for cell in decoding["measures"].values())
    assert all("answers are the teacher's" in told for told in found["findings"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_planted_loop_is_found(shelf: Path, text: Text) -> None:
    """Logits forty times as large: sampling becomes greedy, and greedy goes round in circles."""
    planted = shelf / "looping"
    shutil.copytree(demo_path(), planted)
    weights = load_file(planted / "model.safetensors")
    weights["model.norm.weight"] *= 40
    save_file(weights, planted / "model.safetensors", {"format": "pt"})
    wanted = Generate(per_domain=12, prompt_tokens=8, new_tokens=32, temperatures=(1.0,))
    found = generation(planted, "demo", text, wanted, FLOAT32)
    (decoding,) = found["decodings"]
    loop = decoding["measures"]["loop"]
    assert loop["model"]["value"] > loop["teacher"]["value"] + 0.2
    assert loop["against"]["low"] > 0.0 and loop["p_value"] < 0.02
    assert any("end in a loop" in told and "worse by" in told for told in found["findings"])
    assert decoding["examples"] and decoding["examples"][0]["looping_tokens"] >= 16


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "Once upon a time", "domain": "tales"}\n\n{"prompt": "def f(x):"}\n'
    )
    one, other = read_prompts(Checkpoint.open("demo"), Text(), Generate(prompts=file))
    assert (one.domain, other.domain) == ("tales", "prompts") and one.ids != other.ids
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    with pytest.raises(DataError, match="no chat template"):
        read_prompts(Checkpoint.open("demo"), Text(), Generate(prompts=chat))
    model = tmp_path / "model"
    shutil.copytree(demo_path(), model)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    (model / "chat_template.jinja").write_text(template)
    checkpoint = Checkpoint.open(model)
    (prompt,) = read_prompts(checkpoint, Text(), Generate(prompts=chat))
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "<user>hello<answer>"}\n')
    assert [prompt] == read_prompts(checkpoint, Text(), Generate(prompts=plain))


BAD = {
    "not JSON": ("{", "line 1: not JSON"),
    "nothing": ("\n\n", "holds no prompts"),
    "no prompt": ('{"text": "a"}', "line 1: neither a prompt nor messages"),
    "a list": ("[1]", "neither a prompt nor messages"),
    "no messages": ('{"messages": []}', "neither a prompt nor messages"),
    "empty": ('{"prompt": ""}', "the prompt is empty"),
}


@pytest.mark.parametrize("kind", sorted(BAD))
def test_bad_prompts(kind: str, tmp_path: Path) -> None:
    content, problem = BAD[kind]
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=problem):
        read_prompts(Checkpoint.open("demo"), Text(), Generate(prompts=file))


def test_bad_settings(text: Text, shelf: Path, novices: Path) -> None:
    with pytest.raises(DataError, match="new tokens must be at least 1"):
        Generate(new_tokens=0)
    with pytest.raises(DataError, match="between 0"):
        Generate(temperatures=(-1.0,))
    with pytest.raises(MoepruneError, match="more than the 512 positions"):
        generation("demo", None, text, Generate(new_tokens=1000), FLOAT32)
    broken = shelf / "not-finite"
    shutil.copytree(demo_path(), broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="not finite"):
        generation(broken, None, text, Generate(per_domain=1, new_tokens=2), FLOAT32)
