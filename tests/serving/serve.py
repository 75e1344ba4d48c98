"""Generates with vLLM what ``prepare.py`` asks for, in the environment that has vLLM.

python tests/serving/serve.py CHECKPOINT PROMPTS.json RESULT.json

PROMPTS.json: {"prompts": [[token id, ...], ...], "tokens": N, "candidates": C, "dtype": name,
"trust": whether the checkpoint's own Python files may run}. RESULT.json: per
prompt the greedy tokens and, for each step, the leading tokens with their logarithmic
probabilities. One model per process: vLLM holds its memory to the end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)


def main(checkpoint: str, asked: Path, result: Path) -> None:
    import transformers
    import vllm

    wanted = json.loads(asked.read_text())
    model = vllm.LLM(
        model=checkpoint,
        dtype=wanted["dtype"],
        enforce_eager=True,
        max_model_len=256,
        skip_tokenizer_init=True,
        trust_remote_code=wanted["trust"],
        enable_prefix_caching=False,
        seed=0,
    )
    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=wanted["tokens"],
        ignore_eos=True,
        logprobs=wanted["candidates"],
        detokenize=False,
    )
    outputs = model.generate(
        [vllm.TokensPrompt(prompt_token_ids=ids) for ids in wanted["prompts"]], sampling
    )
    found = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "top": [
                sorted(([int(i), p.logprob] for i, p in step.items()), key=lambda pair: -pair[1])
                for step in output.outputs[0].logprobs
            ],
        }
        for output in outputs
    ]
    versions = {"vllm": vllm.__version__, "transformers": transformers.__version__}
    result.write_text(json.dumps({"continuations": found, "versions": versions}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
