"""A regression that was planted is found and named; what is not there is not found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moeprune import Budget, Compute, Constraints, Text, apply, calibrate, evaluate, plan
from moeprune.core.accumulators import Routing
from moeprune.models.data import demo_text, read_documents
from moeprune.models.store import StatisticsStore
from running import page

ONE = Compute(dtype="float32", workers=1)
DOMAINS, DOCUMENTS, LENGTH = ("english", "german", "python"), 12, 48


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two windows of a dozen documents of three domains."""
    folder, sources = tmp_path_factory.mktemp("heldout"), []
    for name in DOMAINS:
        texts = [text[:260] for text in read_documents(demo_text("heldout")[name])][:DOCUMENTS]
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
        sources.append(f"{name}={file}")
    return tuple(sources)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model without the quarter of the experts that Python uses most above English."""
    folder = tmp_path_factory.mktemp("planted")
    shares: list[dict[int, Any]] = []
    for name in ("python", "english"):
        text = Text((str(page(folder, name, 3_000)),), 8, 64)
        store = calibrate("demo", folder / name, text, ("routing",), ONE)
        counts = {i: store.layer(i).part(Routing).count_E.double() for i in store.layers}
        shares.append({i: count_E / count_E.sum() for i, count_E in counts.items()})
    forbidden = []
    for layer, python_E in shares[0].items():
        excess_E = python_E - shares[1][layer]
        experts = excess_E.argsort(descending=True, stable=True)[: len(excess_E) // 4].tolist()
        forbidden.append(f"{layer}:{','.join(map(str, experts))}")
    made = plan(
        "demo", "random", Budget(ratio=0.25), compute=ONE, constraints=Constraints((), forbidden)
    )
    apply("demo", made, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def result(planted: Path, heldout: tuple[str, ...]) -> dict[str, Any]:
    return evaluate(planted, "demo", Text(heldout, 0, LENGTH), ONE)


def test_the_planted_domain_is_named_first(result: dict[str, Any]) -> None:
    first = result["findings"][0]
    says = r"python lost (\S+) nats per token more than the other domains \((\S+) to"
    match = re.match(says, first)
    assert match, first
    gap, low = map(float, match.groups())
    assert 0.0 < low < gap
    own = result["domains"]["python"]
    others = [result["domains"][name] for name in ("english", "german")]
    tokens = [one["tokens"] for one in others]
    losses = [one["against"]["loss"]["value"] * n for one, n in zip(others, tokens, strict=True)]
    assert gap == pytest.approx(
        own["against"]["loss"]["value"] - sum(losses) / sum(tokens), rel=1e-2
    )
    assert not any(sentence.startswith(("english", "german")) for sentence in result["findings"])


def test_its_interval_and_verdict(result: dict[str, Any]) -> None:
    against = result["domains"]["python"]["against"]
    loss = against["loss"]
    assert 0.0 < loss["low"] < loss["value"] < loss["high"]
    assert loss["items"] >= 10 and loss["method"] == "bootstrap-t over documents"
    assert against["verdict"].startswith("worse by ")
    assert against["smallest"] < loss["value"]
    assert against["kl"]["low"] > 0.0
    assert 0.0 <= against["agreement"]["low"] < against["agreement"]["high"] <= 1.0


def test_values_are_those_of_the_table(result: dict[str, Any]) -> None:
    """The centre of each interval is the number that stands beside it."""
    for part in (*result["domains"].values(), *result["groups"].values()):
        for key in ("kl", "agreement"):
            assert part["against"][key]["value"] == pytest.approx(part[key], rel=1e-9)
    kinds = result["groups"]
    assert kinds["languages"]["domains"] == ["english", "german"]
    assert kinds["code"]["domains"] == ["python"] and "maths" not in kinds
    assert kinds["all"]["tokens"] == sum(part["tokens"] for part in result["domains"].values())


def test_identical_models(planted: Path, heldout: tuple[str, ...]) -> None:
    same = evaluate(planted, planted, Text(heldout[2:], 0, LENGTH), ONE)
    against = same["domains"]["python"]["against"]
    assert against["verdict"].startswith("no difference: the same on all ")
    loss = against["loss"]
    assert loss["low"] <= 0.0 <= loss["high"] and "no spread" in loss["method"]
    items, agreement = loss["items"], against["agreement"]
    assert agreement["value"] == agreement["high"] == 1.0
    # so few documents cannot rule out that others differ
    assert agreement["low"] == pytest.approx(0.05 ** (1 / items))
    assert same["findings"] == []


def test_too_small_a_sample(planted: Path, heldout: tuple[str, ...]) -> None:
    few = evaluate(planted, "demo", Text(heldout[:1], 4, LENGTH), ONE)
    verdict = few["domains"]["english"]["against"]["verdict"]
    match = re.match(r"too small a sample: \d+ documents? .*; use --sequences (\d+)$", verdict)
    assert match, verdict
    assert int(match.group(1)) > 4


def test_seen_is_what_the_checkpoint_says(
    tmp_path: Path, heldout: tuple[str, ...], result: dict[str, Any]
) -> None:
    """A method without data has seen nothing that is known; another one names its text."""
    assert result["domains"]["python"]["seen"] is None and "seen" not in result["groups"]
    source = f"german={page(tmp_path, 'german', 1_500)}"
    calibrate("demo", tmp_path / "s", Text((source,), 4, 64), ("routing",), ONE)
    assert StatisticsStore.open(tmp_path / "s").manifest["data"]["domains"] == {"german": 4}
    apply("demo", plan("demo", "frequency", Budget(ratio=0.1), tmp_path / "s"), tmp_path / "out")
    found = evaluate(tmp_path / "out", "demo", Text(heldout[:2], 4, 16), ONE)
    assert {name: part["seen"] for name, part in found["domains"].items()} == {
        "english": False,
        "german": True,
    }
    assert found["groups"]["seen"]["domains"] == ["german"]
    assert found["groups"]["unseen"]["domains"] == ["english"]
