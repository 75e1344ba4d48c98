"""``evaluate --generate --efficiency --card`` from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from moeprune.models.card_text import BEGIN, END, NOT_MEASURED
from moeprune.pipeline.cards import write_measured
from running import Run

RESULT = {
    "format": "moeprune.evaluation/1",
    "model": "smaller",
    "teacher": "demo",
    "dtype": "float32",
    "data": {"tokens": 640, "length": 64, "hash": "abc"},
    "domains": {
        "english": {
            "tokens": 630,
            "perplexity": 40.0,
            "kl": 0.25,
            "agreement": 0.8,
            "against": {
                "kl": {"value": 0.25, "low": 0.2, "high": 0.3},
                "verdict": "worse by 0.25 | nats",
            },
        }
    },
    "groups": {"all": {"tokens": 630, "perplexity": 40.0, "kl": 0.25, "agreement": 0.8}},
    "findings": ["english is worse"],
}


@pytest.fixture
def pruned(smaller: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(smaller, tmp_path / "pruned"))


def test_measurements_are_written_between_the_marks(pruned: Path) -> None:
    card = pruned / "README.md"
    before = card.read_text()
    assert NOT_MEASURED in before
    card.write_text(before + "\n## My own words\r\n\nkept\n")
    write_measured(pruned, RESULT)
    once = card.read_bytes()
    assert write_measured(pruned, RESULT) == card and card.read_bytes() == once
    text = once.decode()
    assert NOT_MEASURED not in text and text.count(BEGIN) == text.count(END) == 1
    assert text.endswith("\n## My own words\n\nkept\n") or text.endswith("words\r\n\nkept\n")
    assert "0.2500 (0.2000 to 0.3000)" in text and "- english is worse" in text
    assert "worse by 0.25 / nats" in text, "a bar would end the cell"
    assert text.partition(BEGIN)[0] == before.partition(BEGIN)[0]
    ModelCard.load(card)
    assert [file.name for file in pruned.iterdir() if file.name.startswith(".")] == []


def test_everything_at_once(run: Run, pruned: Path, english: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The sea was"}\n{"prompt": "She said"}\n')
    options = ["--teacher", "demo", "--data", str(english), "--sequences", 2, "--length", 32]
    options += ["--generate", "--prompts", str(prompts), "--new-tokens", 4, "--temperature", 0]
    options += ["--efficiency", "--rounds", 2, "--card", "--dtype", "float32", "--json"]
    done = run("evaluate", pruned, *options)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["format"] == "moeprune.evaluation/1"
    assert found["generation"]["prompts"] == 2
    assert [d["name"] for d in found["generation"]["decodings"]] == ["greedy"]
    assert found["efficiency"]["turns"]["rounds"] == 2
    text = (pruned / "README.md").read_text()
    assert "### Generation" in text and "### Efficiency" in text
    assert "too small a sample: 2 prompts" in text


def test_tables_for_people(run: Run, english: Path) -> None:
    done = run(
        "evaluate", "demo", "--data", english, "--sequences", 1, "--length", 16,
        "--generate", "--prompts-per-domain", 1, "--new-tokens", 2, "--temperature", 0.5,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "temperature 0.5" in done.out and "distinct-1" in done.out


@pytest.mark.parametrize(
    ("options", "problem", "hint"),
    [
        (["--prompts-per-domain", "3"], "--prompts-per-domain is about", "add --generate"),
        (["--temperature", "0"], "--temperature is about", "add --generate"),
        (["--rounds", "3"], "--rounds is about speed", "add --efficiency"),
        (["--generate", "--prompts", "nowhere.jsonl"], "no such file of prompts", "write JSONL"),
        (["--generate", "--new-tokens", "0"], "new tokens must be at least 1", ""),
        (["--efficiency", "--rounds", "1"], "rounds must be at least 2", ""),
        (["--card"], "there is no card", "moeprune apply"),
    ],
)
def test_bad_options(
    run: Run, english: Path, options: list[str], problem: str, hint: str, tmp_path: Path
) -> None:
    size = ["--data", english, "--sequences", 1, "--length", 16]
    done = run("evaluate", "demo", *size, *options)
    assert done.code == 2 and problem in done.err and hint in done.err
    assert len(done.err.strip().splitlines()) <= 2 and done.out == ""


def test_a_card_without_marks(run: Run, pruned: Path) -> None:
    (pruned / "README.md").write_text("my own card")
    done = run("evaluate", pruned, "--card")
    assert done.code == 2 and "has no measured part" in done.err
    assert (pruned / "README.md").read_text() == "my own card"


def test_measured_cards_pass_verify(run: Run, pruned: Path) -> None:
    write_measured(pruned, RESULT)
    done = run("verify", pruned)
    assert done.code == 0 and "0 errors, 0 warnings" in done.out + done.err
