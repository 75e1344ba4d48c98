"""Writes pruned bf16 checkpoints, prompts and what transformers generates from them.

python tests/serving/prepare.py DIRECTORY

Runs in the environment of moeprune; ``serve.py`` then reads DIRECTORY in an environment with vLLM,
whose transformers is an older one. One folder per model; in it checkpoints, and beside each what is
expected of it (``pruned`` and ``pruned.json``, see ``write``).
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, PreTrainedModel

import moeprune

sys.path.insert(0, str(Path(__file__).parent.parent))

from special import SPECIAL, write_special

from families import VOCABULARY, tiny_model, token_ids
from moeprune.core.plan import LayerPlan
from moeprune.models.checkpoint import Checkpoint, demo_path
from moeprune.models.data import demo_text, read_documents
from moeprune.models.editing import Writing
from support import plan_for

NEW_TOKENS = 24
PROMPTS = 12
MANY_PROMPTS = 32
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
_FAMILIES["deepseek_v3"] = {
    **_FAMILIES["deepseek_v2"],
    "head_dim": 64,
    "topk_method": "noaux_tc",  # vLLM asks for these keys of the vendor's; transformers does not
    "scoring_func": "sigmoid",
}
_FAMILIES |= {
    "glm4_moe": {"moe_intermediate_size": 64},
    "dots1": {"moe_intermediate_size": 64},
    "ernie4_5_moe": {"moe_intermediate_size": 64},
    "hunyuan_v1_moe": {"intermediate_size": 64},
}
BACKEND = ("granitemoe", "glm4_moe", "dots1", "ernie4_5_moe", "hunyuan_v1_moe")
"""Families that the plugin serves through vLLM's transformers backend."""


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


def demo_prompts(number: int = PROMPTS) -> list[list[int]]:
    """Beginnings of held-out documents of all domains in turn."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    domains = [read_documents(file) for file in demo_text("heldout").values()]
    texts = [text for row in zip(*domains, strict=False) for text in row][:number]
    prompts = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        prompts.append([tokenizer.bos_token_id, *ids[: 12 + 4 * (len(prompts) % 6)]])
    return prompts


def random_prompts() -> list[list[int]]:
    """Prompts of different lengths."""
    lengths = [8 + 11 * (row % 4) for row in range(PROMPTS)]
    return [token_ids(1, n, VOCABULARY, row)[0].tolist() for row, n in enumerate(lengths)]


@torch.no_grad()
def logits(model: PreTrainedModel, rows: Sequence[Sequence[int]], last: int) -> list[torch.Tensor]:
    """Logits [last, V] at the last positions of each row, from one forward without a cache.

    Rows are filled up at their ends, which a causal model does not see before.
    """
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    found = model(ids, use_cache=False).logits
    return [one[len(row) - last : len(row)].float() for one, row in zip(found, rows, strict=True)]


def continuations(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]]
) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy tokens behind each prompt, and the log-probabilities that chose them [L, V]."""
    found: dict[int, tuple[list[int], torch.Tensor]] = {}
    for length in sorted({len(prompt) for prompt in prompts}):  # no padding inside a batch
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[row] for row in rows])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        scores_NLV = torch.stack(made.logits, 1).float().log_softmax(-1)
        for row, tokens, scores_LV in zip(
            rows, made.sequences[:, length:].tolist(), scores_NLV, strict=True
        ):
            found[row] = tokens, scores_LV
    return [found[row] for row in range(len(prompts))]


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
    made = continuations(model, prompts)
    rows = [[*prompt, *tokens[:-1]] for prompt, (tokens, _) in zip(prompts, made, strict=True)]
    found = []
    for prompt, (tokens, scores_LV), exact_LV, other_LV in zip(
        prompts, made, logits(exact, rows, NEW_TOKENS), logits(other, rows, NEW_TOKENS), strict=True
    ):
        top = scores_LV.topk(CANDIDATES)
        moved = exact_LV.log_softmax(-1).gather(1, top.indices) - top.values
        found.append(
            {
                "prompt": list(prompt),
                "tokens": tokens,
                "top": [
                    [[int(i), float(p)] for i, p in zip(*step, strict=True)]
                    for step in zip(top.indices, top.values, strict=True)
                ],
                "noise": moved[:, :2].abs().max(dim=1).values.tolist(),
                "original": other_LV.argmax(-1).tolist(),
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
        "expert_parameters": [expert_parameters(path) for path in (original, folder / name)],
        "stored": stored(folder / name, before["experts"]),
        "top_k": after["top_k"],
        **{kind: reference(folder / name, original, prompts, DTYPES[kind]) for kind in kinds},
    }
    (folder / f"{name}.json").write_text(json.dumps(facts))


def stored(checkpoint: Path, before: int) -> str:
    """How many experts the layers of a checkpoint store, of how many."""
    file = checkpoint / "moeprune_plan.json"
    layers = json.loads(file.read_text())["layers"].values() if file.is_file() else ()
    kept = [len(layer["keep"]) for layer in layers] or [before]
    return "–".join(str(n) for n in sorted({min(kept), max(kept)})) + f" of {before}"


def expert_parameters(checkpoint: Path) -> int:
    """Numbers in the files that belong to routed experts, vectors included."""
    total = 0
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if re.search(r"\.(experts|block_sparse_moe\.(in|out)put_linear)\.", name):
                    total += math.prod(tensors.get_slice(name).get_shape())
    return total


def prepare(directory: Path) -> None:
    """Write all models below ``directory``."""
    for name in _FAMILIES:
        folder = directory / name
        folder.mkdir(parents=True)
        original = save_family(name, folder / "original")
        if name not in BACKEND[1:]:
            plan = moeprune.plan(original, "moeits", moeprune.Budget(ratio=0.5))
            moeprune.apply(original, plan, folder / "pruned")
            write(folder, "pruned", original, random_prompts(), list(DTYPES))
        for kind in SPECIAL if name not in BACKEND else ("novices", "uneven"):
            write_special(original, kind, folder / kind)
            write(folder, kind, original, random_prompts())
        print(f"{name}: written", flush=True)
    prepare_padded(directory / "deepseek_v3")
    prepare_demo(directory / "demo")
    prepare_large(directory / "large")


def prepare_padded(folder: Path) -> None:
    """The uneven plan of a family whose routers have a bias, filled up with experts of zeros."""
    original, plan = folder / "original", folder / "uneven" / "moeprune_plan.json"
    moeprune.apply(original, plan, folder / "padded", writing=Writing(pad=True))
    write(folder, "padded", original, random_prompts())


STOCK = {
    "masked": ("magnitude", moeprune.Budget(pattern=(2, 4))),
    "sparse": ("wanda", moeprune.Budget(ratio=0.5)),
    "merged": ("m-smoe", moeprune.Budget(ratio=0.5)),
    "narrow": ("flap", moeprune.Budget(ratio=0.5)),
    "shallow": ("angular", moeprune.Budget(ratio=0.25)),
}
"""What else comes out as a stock checkpoint, of the embedded model."""


def prepare_large(folder: Path) -> None:
    """Two layers with 3 GiB of experts, and half of them: for measuring memory.

    The weights are all alike, and nothing is expected of what they generate.
    """
    config = OlmoeConfig(num_hidden_layers=2, vocab_size=1024)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(-1)[:] = 0.01
    model.save_pretrained(folder / "original")
    checkpoint = Checkpoint.open(folder / "original")
    del model
    E, H = config.num_experts, config.hidden_size
    odd = tuple(range(1, E, 2))
    even = LayerPlan(0, E, tuple(range(0, E, 2)), replaced=odd, novices_NH=torch.ones(E // 2, H))
    plans = {
        "novices": [even, replace(even, layer=1)],
        "uneven": [LayerPlan(0, E, tuple(range(48))), LayerPlan(1, E, tuple(range(16)))],
    }
    for name, layers in plans.items():
        moeprune.apply(folder / "original", plan_for(checkpoint, layers), folder / name)
    for name in ("original", *plans):
        facts = {"bfloat16": [{"prompt": [1, 2, 3], "tokens": [0], "top": [[[0, 0.0]]]}]}
        facts["expert_parameters"] = [expert_parameters(folder / name)]
        (folder / f"{name}.json").write_text(json.dumps(facts))
    print("large: written", flush=True)


def prepare_demo(folder: Path) -> None:
    """The embedded model: as it is, pruned uniformly, with novices, and unevenly."""
    folder.mkdir(parents=True)
    original = save_demo(folder / "original")
    plan = moeprune.plan(original, "moeits", moeprune.Budget(ratio=0.5))
    moeprune.apply(original, plan, folder / "pruned")
    write(folder, "pruned", original, demo_prompts(), list(DTYPES))
    shutil.copytree(demo_path(), folder / "tied")
    write(folder, "tied", original, demo_prompts())
    text, half = moeprune.Text(sequences=24, length=256), moeprune.Budget(ratio=0.5)
    moeprune.prune("demo", "mone", half, folder / "novices", text)
    moeprune.prune("demo", "reap", half, folder / "uneven", text, options={"scope": "global"})
    for kind in ("novices", "uneven"):
        write(folder, kind, original, demo_prompts(MANY_PROMPTS), list(DTYPES))
    for kind, (method, budget) in STOCK.items():
        moeprune.prune(original, method, budget, folder / kind, text)
        write(folder, kind, original, demo_prompts())
    print("demo: written", flush=True)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
