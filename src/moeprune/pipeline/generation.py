"""The section ``generation`` of an evaluation: what a model says beside what its teacher says."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from moeprune.evaluation.answers import Answer, Decoding, Prompt, answer, end_tokens
from moeprune.evaluation.health import assess, findings
from moeprune.evaluation.perplexity import refuse_other_vocabulary
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import load_tokenizer
from moeprune.models.runtime import load
from moeprune.pipeline.inputs import Compute, Progress, Source, Text, silent
from moeprune.pipeline.prompts import Generate, describe, read_prompts


def generation(
    source: Source,
    teacher: Source | None,
    text: Text = Text(),
    wanted: Generate = Generate(),
    compute: Compute = Compute(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Generation health of a model and, on the same prompts, of its teacher.

    One model is in memory at a time, whole, with the cache of 16 answers: unlike perplexity this
    is not streamed by layers.

    Args:
        source: the model.
        teacher: what it was made from, if known.
        text: where prompts are cut from; its ``sequences`` and ``length`` do not matter.
        wanted: prompts and decoding.
        compute: where; ``workers`` does not matter.
        progress: as in the stages.

    Returns:
        JSON types; docs/generation.md describes them.

    Raises:
        MoepruneError: anything the user can mend.
    """
    names = {"model": source} if teacher is None else {"model": source, "teacher": teacher}
    trust = compute.trust_remote_code
    opened = {name: compute.open(Checkpoint.open(which, trust)) for name, which in names.items()}
    refuse_other_vocabulary(opened)
    checkpoint = opened["model"].checkpoint
    prompts = read_prompts(checkpoint, text, wanted)
    ways = [Decoding(t, wanted.new_tokens, wanted.seed) for t in wanted.temperatures]
    said: dict[str, list[list[Answer]]] = {}
    ends: dict[str, list[int]] = {}
    total, before = len(names) * len(ways) * len(prompts), 0
    for name, which in opened.items():
        model = load(which.checkpoint.path, which.dtype, compute.device, trust)
        ends[name] = list(end_tokens(model))
        said[name] = []
        for way in ways:

            def tell(done: int, _: int, before: int = before) -> None:
                progress("generating", before + done, total)

            said[name].append(answer(model, prompts, way, tell))
            before += len(prompts)
        del model
        gc.collect()
    return _section(prompts, wanted, ways, said, ends, load_tokenizer(checkpoint))


def _section(
    prompts: list[Prompt],
    wanted: Generate,
    ways: Sequence[Decoding],
    said: dict[str, list[list[Answer]]],
    ends: dict[str, list[int]],
    tokenizer: Any,
) -> dict[str, Any]:
    others: Sequence[list[Answer] | None] = said.get("teacher") or [None] * len(ways)
    decodings = [
        assess(prompts, mine, other, way, tokenizer.decode)
        for way, mine, other in zip(ways, said["model"], others, strict=True)
    ]
    told = findings(decodings)
    if "teacher" in ends and set(ends["model"]) != set(ends["teacher"]):
        told.insert(0, f"end tokens differ: {ends['model']} and, teacher, {ends['teacher']}")
    return {
        **describe(prompts),
        "new_tokens": wanted.new_tokens,
        "seed": wanted.seed,
        "end_tokens": ends,
        "decodings": decodings,
        "findings": told,
    }
