"""Generates with vLLM what ``run.py`` asks for, in the environment that has vLLM.

python tests/serving/serve.py JOBS.json

JOBS.json: a list of {"checkpoint", "result", "prompts": [[token id, ...], ...], "tokens": N,
"candidates": C, "dtype": name, "trust": whether the checkpoint's own Python files may run, "eager":
whether nothing is compiled (true unless given), "ranks": of tensor parallelism (1)}. The file
``result``: per prompt the greedy tokens and, for each step, the leading tokens with their
logarithmic probabilities; or the error. The models are loaded one after the other, because starting
vLLM takes longer than anything that tiny models do.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)


def expert_parameters(model: Any) -> int:
    """Numbers that the experts of the served model hold, vectors included."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    experts = (m for m in model.modules() if isinstance(m, RoutedExperts))
    return sum(  # DeepSeek-V3's router keeps its bias in here too
        p.numel() for m in experts for name, p in m.named_parameters() if "bias" not in name
    )


def peak_mebibytes() -> int:
    """The most memory that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def anonymous_mebibytes() -> int:
    """The memory of this process now that belongs to no file."""
    (line,) = (t for t in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in t)
    return int(line.split()[1]) >> 10


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """What one checkpoint answers."""
    import transformers
    import vllm

    model = vllm.LLM(
        model=job["checkpoint"],
        dtype=job["dtype"],
        enforce_eager=job.get("eager", True),
        tensor_parallel_size=job.get("ranks", 1),
        max_model_len=256,
        skip_tokenizer_init=True,
        trust_remote_code=job["trust"],
        enable_prefix_caching=False,
        seed=0,
    )
    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=job["tokens"],
        ignore_eos=True,
        logprobs=job["candidates"],
        detokenize=False,
    )
    outputs = model.generate(
        [vllm.TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]], sampling
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
    experts = sum(model.apply_model(expert_parameters))  # of all ranks
    versions = {"vllm": vllm.__version__, "transformers": transformers.__version__}
    return {
        "continuations": found,
        "versions": versions,
        "expert_parameters": experts,
        "mebibytes": anonymous_mebibytes(),
    }


def main(jobs: Path) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    for job in json.loads(jobs.read_text()):
        try:
            result = generate(job)
        except Exception as error:  # run.py says what it means
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        Path(job["result"]).write_text(json.dumps(result))
        print("done:", job["result"], f"{peak_mebibytes()} MiB", flush=True)
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
