"""Turns under vLLM, with a stand-in for its two classes: the protocol, and what can go wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from moeprune.errors import UnsupportedModelError
from moeprune.evaluation.vllm_speed import vllm_turns

ENGINE = """
import json, os, time

__version__ = "0.99"

class SamplingParams:
    def __init__(self, **options):
        assert options["ignore_eos"] and options["temperature"] == 0.0
        self.max_tokens = options["max_tokens"]

class LLM:
    def __init__(self, model, **options):
        print("noise on stdout", flush=True)
        if "refused" in model:
            raise ValueError("no class for such layers")
        assert options["enable_prefix_caching"] is False and options["max_model_len"] == 4 + 6
        self.model = model

    def generate(self, prompts, settings, use_tqdm):
        with open(os.environ["TURNS"], "a") as log:
            turn = [self.model, prompts[0]["prompt_token_ids"][0], settings.max_tokens]
            log.write(json.dumps(turn) + chr(10))
        if prompts[0]["prompt_token_ids"][0] == 99:
            os._exit(3)
        time.sleep(0.002 * settings.max_tokens)
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "vllm.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TURNS", str(tmp_path / "turns"))
    return tmp_path / "turns"


def prompts(*first: int) -> list[torch.Tensor]:
    return [torch.full((1, 4), number) for number in first]


def test_engines_take_turns(log: Path) -> None:
    models = {"model": Path("a"), "teacher": Path("b")}
    found, release = vllm_turns(models, prompts(1, 2), 6, 1, "float32", sys.executable)
    assert release == "0.99"
    turns = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
    assert turns == [(m, p, n) for p in (1, 1, 2) for m in "ab" for n in (1, 6)]
    assert [len(samples) for samples in found.values()] == [2, 2]
    assert all(s.decode > 0 and s.prefill > 0 for samples in found.values() for s in samples)


def test_a_refused_model_is_named_with_the_reason(log: Path) -> None:
    models = {"model": Path("refused")}
    with pytest.raises(UnsupportedModelError, match="ended with model: ValueError: no class"):
        vllm_turns(models, prompts(1), 6, 0, "float32", sys.executable)


def test_an_engine_that_dies(log: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="ended with model: noise on stdout"):
        vllm_turns({"model": Path("a")}, prompts(99), 6, 0, "float32", sys.executable)
