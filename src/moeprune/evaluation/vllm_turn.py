"""A process that serves one model with vLLM and takes turns when it is told to.

Run as a file, by an interpreter that has vLLM; moeprune need not be importable there. It reads one
JSON object a line from stdin: first the arguments of ``vllm.LLM``, then a turn each, ``ids`` and
``new_tokens``. It answers with a line each on the file descriptor that is its only argument:
stdout belongs to vLLM's own messages.
"""

import json
import os
import sys
import time


def main() -> None:
    """Serve until stdin ends."""
    from vllm import LLM, SamplingParams, __version__  # noqa: PLC0415  (only where it is installed)

    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as answers:
        engine = LLM(**json.loads(sys.stdin.readline()))

        def tell(value: object) -> None:
            answers.write(json.dumps(value) + "\n")
            answers.flush()

        def seconds(ids: list[list[int]], tokens: int) -> float:
            settings = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            prompts = [{"prompt_token_ids": row} for row in ids]
            start = time.perf_counter()
            engine.generate(prompts, settings, use_tqdm=False)
            return time.perf_counter() - start

        tell(__version__)
        for line in sys.stdin:
            turn = json.loads(line)
            first = seconds(turn["ids"], 1)
            whole = seconds(turn["ids"], turn["new_tokens"])
            tell({"prefill": first, "decode": max(whole - first, 1e-9)})


if __name__ == "__main__":
    main()
