"""The streamed evaluation against whole models, computed here without the package."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeprune
from moeprune import Budget, Compute, Text, apply, calibrate, evaluate, plan
from moeprune.evaluation.perplexity import DomainScore, Evaluation, Sums
from moeprune.evaluation.schema import FORMAT, check
from moeprune.models.checkpoint import demo_path
from moeprune.models.data import demo_text

LENGTH = 48
FLOAT32 = Compute(dtype="float32", workers=1)


@pytest.fixture(scope="module")
def stats(shelf: Path, english: Path) -> Path:
    calibrate("demo", shelf / "stats", Text((str(english),), 8, 64), compute=FLOAT32)
    return shelf / "stats"


@pytest.fixture(scope="module")
def novices(shelf: Path, stats: Path) -> Path:
    """Half of the experts are constants."""
    apply("demo", plan("demo", "mone", Budget(ratio=0.5), stats, compute=FLOAT32), shelf / "mone")
    return shelf / "mone"


@pytest.fixture(scope="module")
def masked(shelf: Path, stats: Path) -> Path:
    """Half of the weights of every expert are zero."""
    options = {"propagate": "dense"}
    made = plan("demo", "moe-pruner", Budget(ratio=0.5), stats, options=options, compute=FLOAT32)
    apply("demo", made, shelf / "masked")
    return shelf / "masked"


@pytest.fixture(scope="module")
def text(english: Path, german: Path) -> Text:
    """Two domains of other lengths; all their windows."""
    return Text((f"en={english}", f"de={german}"), 0, LENGTH)


def windows(file: Path, length: int) -> Tensor:
    """All windows of a text: one document, started by the tokenizer's own start token."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    assert start is not None
    ids = [start, *tokenizer.encode(file.read_text(), add_special_tokens=False)]
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def whole_model(source: Path) -> Any:
    """All layers in memory at once; novices with the class that the checkpoint names."""
    if (source / "moeprune.json").is_file():
        return moeprune.load(source, dtype=torch.float32).eval()
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def logits(model: Any, ids_NL: Tensor) -> Tensor:
    """Logits that predict a token each, one window at a time, in double precision."""
    with torch.no_grad():
        found = [model(row[None], use_cache=False).logits[0, :-1] for row in ids_NL]
    return torch.stack(found).double()


def expected(student: Path, ids_NL: Tensor, teacher: Path | None = None) -> dict[str, float]:
    """The definitions, term by term."""
    logits_NLV = logits(whole_model(student), ids_NL)
    targets = ids_NL[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits_NLV.flatten(0, 1), targets)
    found = {"tokens": targets.numel(), "loss": float(loss), "perplexity": math.exp(loss)}
    if teacher is not None:
        other_NLV = logits(whole_model(teacher), ids_NL)
        p_NLV = torch.softmax(other_NLV, dim=-1)
        ratio_NLV = torch.log(p_NLV) - torch.log(torch.softmax(logits_NLV, dim=-1))
        found["kl"] = float((p_NLV * ratio_NLV).sum(dim=-1).mean())
        best_NL1 = other_NLV.argmax(-1, keepdim=True)
        in_five_NL = (logits_NLV.topk(5).indices == best_NL1).any(-1)
        found["agreement_top5"] = float(in_five_NL.double().mean())
        found["agreement"] = float((other_NLV.argmax(-1) == logits_NLV.argmax(-1)).double().mean())
    return found


def test_equals_the_whole_model(text: Text, english: Path, german: Path) -> None:
    result = evaluate("demo", text=text, compute=FLOAT32)
    assert list(result["domains"]) == ["de", "en"]
    losses = []
    for name, file in (("de", german), ("en", english)):
        ids_NL = windows(file, LENGTH)
        want, score = expected(demo_path(), ids_NL), result["domains"][name]
        assert score["tokens"] == want["tokens"] == len(ids_NL) * (LENGTH - 1)
        assert score["loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert score["perplexity"] == pytest.approx(want["perplexity"], rel=1e-6)
        assert score["kl"] is None and score["agreement"] is None
        losses += [want["loss"]] * want["tokens"]
    # every token counts the same, whatever its domain
    total = result["groups"]["all"]
    assert total["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert total["perplexity"] == pytest.approx(math.exp(total["loss"]))


def test_bits_per_byte(english: Path) -> None:
    """All tokens of the text, predicted or not, share its bytes."""
    result = evaluate("demo", text=Text((str(english),), 0, LENGTH), compute=FLOAT32)
    score = result["domains"]["english"]
    tokens = len(windows(english, 1))
    bits = score["loss"] / math.log(2) * tokens / len(english.read_bytes())
    assert score["bits_per_byte"] == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("kind", ["novices", "masked"])
def test_student_equals_the_whole_models(
    kind: str, text: Text, english: Path, german: Path, request: pytest.FixtureRequest
) -> None:
    student = request.getfixturevalue(kind)
    result = evaluate(student, "demo", text, FLOAT32)
    for name, file in (("de", german), ("en", english)):
        want = expected(student, windows(file, LENGTH), demo_path())
        score = result["domains"][name]
        assert score["perplexity"] == pytest.approx(want["perplexity"], rel=1e-6)
        assert want["kl"] > 0.01, "too small to tell right from wrong"
        assert score["kl"] == pytest.approx(want["kl"], rel=1e-5)
        assert 0.05 < want["agreement"] < 0.999
        # a tie of two logits may fall either way
        for key in ("agreement", "agreement_top5"):
            assert score[key] == pytest.approx(want[key], abs=1.5 / want["tokens"])
        assert want["agreement"] < score["agreement_top5"] < 1.0


@pytest.mark.parametrize("kind", ["demo", "novices"])
def test_a_model_against_itself(kind: str, text: Text, request: pytest.FixtureRequest) -> None:
    model = kind if kind == "demo" else request.getfixturevalue(kind)
    result = evaluate(model, model, text, FLOAT32)
    assert abs(result["groups"]["all"]["kl"]) <= 1e-9
    assert result["groups"]["all"]["agreement"] == 1.0


def without_time(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "seconds"}


def test_workers_change_no_bit(text: Text, novices: Path, english: Path, german: Path) -> None:
    # several batches, so that two workers have something to share
    longer = Text((f"en={english}", f"de={german}"), 0, 16)
    results = [
        without_time(evaluate(novices, "demo", longer, Compute("cpu", "float32", workers)))
        for workers in (1, 2)
    ]
    assert results[0]["groups"]["all"]["kl"] > 0
    assert results[0] == results[1]


def test_number_of_windows(text: Text, english: Path, german: Path) -> None:
    """The first windows of every domain, all with 0, and no more than there are."""
    for asked in (3, 10_000, 0):
        few = Text(text.sources, asked, LENGTH)
        result = evaluate("demo", text=few, compute=FLOAT32)
        for name, file in (("de", german), ("en", english)):
            there = len(windows(file, LENGTH))
            count = min(asked, there) if asked else there
            assert result["domains"][name]["tokens"] == count * (LENGTH - 1)
            assert result["data"]["domains"][name] == count
    one = evaluate("demo", text=Text(text.sources, 1, LENGTH), compute=FLOAT32)
    want = expected(demo_path(), windows(english, LENGTH)[:1])
    assert one["domains"]["en"]["loss"] == pytest.approx(want["loss"], rel=1e-6)


def test_length_is_clipped_to_what_the_model_was_built_for(english: Path) -> None:
    result = evaluate("demo", text=Text((str(english),), 1, 100_000), compute=FLOAT32)
    assert result["data"]["length"] == 512
    assert result["domains"]["english"]["tokens"] == 511


def test_embedded_text(shelf: Path) -> None:
    result = evaluate("demo", text=Text((), 1, 8), compute=FLOAT32)
    assert list(result["domains"]) == sorted(demo_text("heldout"))
    assert all(score["tokens"] == 7 for score in result["domains"].values())
    # nothing to compare it with
    assert not any("against" in score for score in result["domains"].values())
    assert result["findings"] == []


def test_result_is_JSON(novices: Path, english: Path) -> None:
    result = evaluate(novices, "demo", Text((str(english),), 1, 32), FLOAT32)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["model"] == "mone" and result["teacher"] == "demo"
    assert check(result).format == FORMAT
    assert result["domains"]["english"]["seen"] is True


def score(tokens: float, nll: float, kl: float = 0.0, agree: float = 0.0) -> DomainScore:
    """Of one window."""
    sums = [np.array([value]) for value in (tokens, nll, kl, agree, agree)]
    return DomainScore(Sums(*sums), compared=True)


def test_totals_weigh_tokens_alike() -> None:
    evaluation = Evaluation({"a": score(3, 6.0, 1.5, 2), "b": score(1, 1.0, 0.5, 1)})
    measured = evaluation.total().to_json()
    assert measured["tokens"] == 4 and measured["windows"] == 2
    assert measured["loss"] == 7.0 / 4
    assert measured["perplexity"] == pytest.approx(math.exp(7.0 / 4))
    assert measured["kl"] == 2.0 / 4
    assert measured["agreement"] == 3 / 4


def test_what_is_not_finite_is_unknown() -> None:
    hopeless = score(2, 5000.0).to_json()
    assert hopeless["loss"] == 2500.0 and hopeless["perplexity"] is None
    broken = score(1, math.nan, math.nan).to_json()
    assert [broken[key] for key in ("loss", "perplexity", "kl", "agreement")] == [
        None,
        None,
        None,
        0.0,
    ]


def test_a_model_that_overflows(shelf: Path, english: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32)
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(shelf / "broken")
    AutoTokenizer.from_pretrained(demo_path()).save_pretrained(shelf / "broken")
    result = evaluate(shelf / "broken", "demo", Text((str(english),), 1, 16), FLOAT32)
    json.dumps(result, allow_nan=False)
    assert result["groups"]["all"]["perplexity"] is None and result["groups"]["all"]["kl"] is None
    english_score = result["domains"]["english"]
    assert english_score["tokens"] == 15
    against = english_score["against"]
    assert against["kl"]["low"] is None and against["verdict"].startswith("unknown")
