"""The section ``generation`` of an evaluation: what a model says beside what its teacher says."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from moeprune.errors import DataError
from moeprune.evaluation.answers import Answer, Decoding, Prompt, answer, end_tokens
from moeprune.evaluation.health import assess, findings
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import load_tokenizer
from moeprune.models.native import read_config, text_config
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
    checkpoint = Checkpoint.open(source, compute.trust_remote_code)
    names = {"model": source} if teacher is None else {"model": source, "teacher": teacher}
    _refuse_other_words(names, compute)
    prompts = read_prompts(checkpoint, text, wanted)
    ways = [Decoding(t, wanted.new_tokens, wanted.seed) for t in wanted.temperatures]
    said: dict[str, list[list[Answer]]] = {}
    ends: dict[str, list[int]] = {}
    total, before = len(names) * len(ways) * len(prompts), 0
    for name, which in names.items():
        model = _load(which, compute)
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


def _load(source: Source, compute: Compute) -> Any:
    dtype = compute.open(Checkpoint.open(source, compute.trust_remote_code)).dtype
    return load(source, dtype, compute.device, compute.trust_remote_code)


def _refuse_other_words(names: dict[str, Source], compute: Compute) -> None:
    sizes = {
        text_config(read_config(Checkpoint.open(which, compute.trust_remote_code))).vocab_size
        for which in names.values()
    }
    if len(sizes) > 1:
        raise DataError(f"teacher and student have different vocabularies: {sorted(sizes)}")
