"""Recovery layer by layer: a model of four times as many layers needs the same memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moeprune.pipeline.inputs import Text
from recovering import prune, with_tokenizer


def build(path: Path, layers: int) -> Path:
    """A random OLMoE of 3 MB a layer."""
    config = OlmoeConfig(
        vocab_size=6144, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, num_experts=32, num_experts_per_tok=4,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    OlmoeForCausalLM(config).save_pretrained(path)
    return with_tokenizer(path)


CHILD = """
import sys
import torch
torch.set_num_threads(1)
from moeprune import recover, training
from moeprune.pipeline.inputs import Text
from moeprune.pipeline.measure import peak_memory, reset_peak_memory
student, teacher, text, out, short, short_teacher = sys.argv[1:]
chosen = training("expert-kd", None, {"layerwise": True, "steps": 1, "batch": 4})
page = Text((text,), 8, 32)
recover(short, short_teacher, out + "-first", chosen, page)  # imports, caches of libraries
reset_peak_memory()
recover(student, teacher, out, chosen, page)
print(peak_memory())
"""


def peak(student: Path, teacher: Path, text: Text, out: Path, short: tuple[Path, Path]) -> int:
    arguments = map(str, (student, teacher, text.sources[0], out, *short))
    found = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], env=dict(os.environ), check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return int(found.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux does")
def test_memory_does_not_grow_with_layers(text: Text, tmp_path: Path) -> None:
    made = {}
    for layers in (4, 16):
        big = build(tmp_path / f"teacher{layers}", layers)
        made[layers] = (prune(big, "masked", tmp_path / f"student{layers}"), big)
    peaks = {n: peak(*made[n], text, tmp_path / f"out{n}", made[4]) for n in made}
    weights = sum(file.stat().st_size for file in made[16][0].glob("*.safetensors"))
    assert peaks[16] < 1.05 * peaks[4], peaks
    assert peaks[16] - peaks[4] < weights / 2, peaks
