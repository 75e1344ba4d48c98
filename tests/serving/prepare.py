"""Writes pruned bf16 checkpoints, prompts and what transformers generates from them.

python tests/serving/prepare.py DIRECTORY

Runs in the environment of moeprune; ``serve.py`` then reads DIRECTORY in an environment with vLLM,
whose transformers is an older one. One folder per model: ``pruned`` (the
checkpoint) and ``pruned.json`` (see ``write``).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

import moeprune

sys.path.insert(0, str(Path(__file__).parent.parent))

from families import VOCABULARY, tiny_model, token_ids
from moeprune.models.checkpoint import demo_path
from moeprune.models.data import demo_text, read_documents

NEW_TOKENS = 48
PROMPTS = 12
CANDIDATES = 8
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# vLLM's CPU kernels want attention heads of 32 and more; its latent attention wants 512 + 64.
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": None,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 64},
    "mixtral": {"intermediate_size": 64},
    "qwen2_moe": {"moe_intermediate_size": 64, "use_sliding_window": False},
    "qwen3_moe": {"moe_intermediate_size": 64},
    "deepseek_v2": {
        "moe_intermediate_size": 64,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "num_key_value_heads": 4,
        # as the vendor's: vLLM 0.32 on the CPU rotates queries wrongly where there is no scaling
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "granitemoe": {"intermediate_size": 64},
}


def save_family(model_type: str, directory: Path) -> Path:
    """A tiny random bf16 checkpoint of the family."""
    model = tiny_model(model_type, **{**_sizes(model_type), **_FAMILIES[model_type]})
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data *= 0.5  # those weights are for a width of 32
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def _sizes(model_type: str) -> dict[str, Any]:
    """Those of ``_SIZES`` that the family's configuration has."""
    known = vars(tiny_model(model_type).config)
    return {name: size for name, size in _SIZES.items() if name in known}


def save_demo(directory: Path) -> Path:
    """The embedded model with a head of its own: vLLM's OLMoE does not read tied embeddings."""
    model = moeprune.load("demo")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(directory)
    for file in demo_path().glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def demo_prompts() -> list[list[int]]:
    """Beginnings of held-out documents, two of each of six domains."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    prompts = []
    for _, file in zip(range(PROMPTS // 2), demo_text("heldout").values(), strict=False):
        for _, text in zip(range(2), read_documents(file), strict=False):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            prompts.append([tokenizer.bos_token_id, *ids[: 12 + 4 * (len(prompts) % 6)]])
    return prompts


def random_prompts() -> list[list[int]]:
    """Prompts of different lengths."""
    return [token_ids(1, 8 + 3 * row, VOCABULARY, row)[0].tolist() for row in range(PROMPTS)]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Sequence[int], last: int) -> torch.Tensor:
    """Logits [last, V] at the last positions, from one forward without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0, -last:].float()


def continuation(model: PreTrainedModel, prompt: Sequence[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens behind ``prompt``, and the logarithmic probabilities that chose them [L, V]."""
    ids, scores = list(prompt), []
    for _ in range(NEW_TOKENS):
        scores.append(logits(model, ids, 1)[0].log_softmax(-1))
        ids.append(int(scores[-1].argmax()))
    return ids[len(prompt) :], torch.stack(scores)


def reference(
    pruned: Path, original: Path, prompts: Sequence[Sequence[int]], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """What transformers makes of a checkpoint.

    Per prompt: greedy ``tokens``; ``top``, the leading tokens of each step with their logarithmic
    probabilities; ``noise``, by how much those of the first two move when the same weights compute
    in float32; ``original``, the tokens that the unpruned model prefers behind the same prefixes.
    """
    model, other = (moeprune.load(path, dtype=dtype) for path in (pruned, original))
    exact = moeprune.load(pruned, dtype=torch.float32)
    found = []
    for prompt in prompts:
        tokens, scores_LV = continuation(model, prompt)
        ids = [*prompt, *tokens[:-1]]
        top = scores_LV.topk(CANDIDATES)
        exact_LV = logits(exact, ids, NEW_TOKENS).log_softmax(-1).gather(1, top.indices)
        found.append(
            {
                "prompt": list(prompt),
                "tokens": tokens,
                "top": [
                    [[int(i), float(p)] for i, p in zip(*step, strict=True)]
                    for step in zip(top.indices, top.values, strict=True)
                ],
                "noise": (exact_LV - top.values)[:, :2].abs().max(dim=1).values.tolist(),
                "original": logits(other, ids, NEW_TOKENS).argmax(-1).tolist(),
            }
        )
    return found


def write(
    folder: Path,
    name: str,
    original: Path,
    prompts: Sequence[Sequence[int]],
    kinds: Sequence[str] = ("float32",),
) -> None:
    """What is served as ``folder / name``: its facts and references beside it."""
    before, after = (moeprune.inspect(path) for path in (original, folder / name))
    facts = {
        "model_type": after["model_type"],
        "experts": [before["experts"], after["experts"]],
        "top_k": after["top_k"],
        **{kind: reference(folder / name, original, prompts, DTYPES[kind]) for kind in kinds},
    }
    (folder / f"{name}.json").write_text(json.dumps(facts))


def prepare(directory: Path) -> None:
    """Write all models below ``directory``."""
    for name in [*_FAMILIES, "demo"]:
        folder = directory / name
        folder.mkdir(parents=True)
        original = (
            save_demo(folder / "original")
            if name == "demo"
            else save_family(name, folder / "original")
        )
        plan = moeprune.plan(original, "moeits", moeprune.Budget(ratio=0.5))
        moeprune.apply(original, plan, folder / "pruned")
        prompts = demo_prompts() if name == "demo" else random_prompts()
        write(folder, "pruned", original, prompts, list(DTYPES))
        print(f"{name}: written", flush=True)
    folder = directory / "demo"
    shutil.copytree(demo_path(), folder / "tied")
    write(folder, "tied", folder / "original", demo_prompts())
    text = moeprune.Text(sequences=24, length=256)
    moeprune.prune(
        folder / "original", "mone", moeprune.Budget(ratio=0.5), folder / "novices", text
    )
    write(folder, "novices", folder / "original", demo_prompts())


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
